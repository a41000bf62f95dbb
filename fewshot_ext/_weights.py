"""Files of weights and settings, read without running code in them."""

import pickle
from typing import Any, BinaryIO

import torch


def load_weights(file: BinaryIO) -> Any:
    """What ``torch.save`` wrote, on the CPU.

    Raises:
        ValueError: the file holds something else, or is damaged; the message says which, in words of our own: torch's
            advise to run whatever code is in the file.
    """
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError("it is no file of weights, or holds more than weights and settings") from error
    # What torch raises depends on where the file is cut or what lies there instead.
    except (RuntimeError, ValueError, EOFError, OSError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"it cannot be read as a file of weights ({type(error).__name__})") from error
