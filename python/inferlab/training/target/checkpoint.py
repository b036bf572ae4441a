"""Checkpoints that survive a crash or a full disk: written aside, then renamed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Replaces the checkpoint at `path`, or leaves it as it was.

    Raises:
        OSError: the file could not be written, e.g. because the disk is full; the earlier
            checkpoint is intact.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, RuntimeError):  # torch's zip writer hides the OSError
            raise OSError(f"{path}: checkpoint not written: {error}") from error
        raise


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads what `save_checkpoint` wrote; tensors and plain values only, no code.

    Raises:
        ValueError: the file is missing or is not a checkpoint.
    """
    require_checkpoint(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"--resume: {path} is not a readable checkpoint: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"--resume: {path} holds a {type(state).__name__}, not a checkpoint")
    return state


def require_checkpoint(path: Path) -> None:
    """Raises ValueError when there is no checkpoint at `path`."""
    if not path.is_file():
        raise ValueError(
            f"--resume: no checkpoint at {path}; check --output, or start anew without --resume"
        )
