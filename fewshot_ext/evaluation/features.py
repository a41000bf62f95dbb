"""Features kept on disk, so that another head or another number of episodes need not run the backbone again."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fewshot_ext._files import replace_file
from fewshot_ext.data.archive_file import ArraySpec, read_arrays

# Vectors or maps.
_ARRAYS = {"features": ArraySpec("f", (2, 3, 4)), "key": ArraySpec("U", (0,))}


class FeatureCache:
    """A folder of ``.npz`` files, each with one tensor and the whole key that it belongs to. Nothing is unpickled.

    Args:
        folder: made when the first tensor is kept; None keeps nothing and finds nothing.

    Example:
        >>> cache = FeatureCache("features")
        >>> key = {"split": "novel", "checkpoint": "5feceb66", "data": "6b86b273"}
        >>> cache.save(key, torch.ones(2, 3))
        >>> cache.load(key)
        tensor([[1., 1., 1.],
                [1., 1., 1.]])
        >>> cache.load({**key, "data": "d4735e3a"}) is None
        True
    """

    def __init__(self, folder: str | Path | None) -> None:
        self.folder = None if folder is None else Path(folder)

    def load(self, key: Mapping[str, str]) -> Tensor | None:
        """The float32 or float16 tensor kept under ``key``; None where there is none, or where its file is damaged."""
        if self.folder is None:
            return None
        try:
            arrays = read_arrays(self._path(key), _ARRAYS.get)
            same = str(arrays["key"]) == json.dumps(key, sort_keys=True)
        except (OSError, ValueError, KeyError):
            return None
        features = arrays.get("features")
        if not same or features is None or features.dtype not in (np.float32, np.float16):
            return None
        return torch.from_numpy(features)

    def save(self, key: Mapping[str, str], features: Tensor) -> None:
        """Keeps a float32 or float16 tensor under ``key``, in place of an older one.

        Raises:
            OSError: the folder cannot be written to.
        """
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        arrays = {"features": features.cpu().numpy(), "key": np.array(json.dumps(key, sort_keys=True))}
        replace_file(self._path(key), lambda path: np.savez(path, **arrays))

    def _path(self, key: Mapping[str, str]) -> Path:
        # The start of each value is enough for a file name: the whole key is inside and is compared on loading.
        return self.folder / ("_".join(value[:12] for value in key.values()) + ".npz")
