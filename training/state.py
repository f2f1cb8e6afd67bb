"""Saving a run so that a crash loses nothing, and taking it up again as if it had never stopped."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from seedvr2_core.errors import CheckpointError

FILE = "checkpoint.pt"


def save(directory: Path, state: dict) -> None:
    """Write the state beside the last one and swap them: there is a whole checkpoint at every moment."""
    partial = directory / f".{FILE}.partial"
    try:
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(directory / FILE)
    finally:
        partial.unlink(missing_ok=True)


def load(directory: Path) -> dict | None:
    """The last state saved in a run directory, or None if there is none yet."""
    path = directory / FILE
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None


def load_averaged(directory: Path) -> dict[str, torch.Tensor]:
    """The averaged weights of a run directory.

    Raises:
        CheckpointError: no run was saved there.
    """
    saved = load(directory)
    if saved is None:
        raise CheckpointError(f"{directory} holds no {FILE}; run the stage that writes it first.")
    return saved["ema"]["module"]
