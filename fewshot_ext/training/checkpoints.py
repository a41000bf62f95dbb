"""Checkpoints that are written whole or not at all."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from fewshot_ext._files import replace_file


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the file and renames: a full disk or a killed process leaves the checkpoint before it.

    Lightning's own writer stages in the system's temporary folder, which is often another disk: the last step is then
    a copy, and can be cut short.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        path = Path(path)

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)

        try:
            replace_file(path, write)
        except (OSError, RuntimeError) as error:
            # torch's zip writer turns what the file raised into a RuntimeError of its own, and Ctrl-C too.
            if isinstance(error.__context__, KeyboardInterrupt):
                raise error.__context__ from None
            cause = error.__context__ if isinstance(error.__context__, OSError) else error
            kept = "; the checkpoint before it is whole" if path.exists() else ""
            raise OSError(f"cannot write the checkpoint {path}: {cause}{kept}") from error
