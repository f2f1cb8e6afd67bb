"""Build a module from a checkpoint, strictly: every tensor is there, of the right shape, and none is left over."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from ..errors import CheckpointError
from ..models.dit import DiT
from ..models.vae import VideoVAE
from .checkpoint import Checkpoint
from .detect import Part
from .format import CODES
from .sizes import FREQUENCIES

log = logging.getLogger(__name__)

# How many tensors an error names; the rest is counted.
NAMED = 3

Module = TypeVar("Module", bound=nn.Module)


def load_dit(path: Path, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu") -> DiT:
    """Load a transformer, in evaluation mode.

    Each tensor is converted on its own, so there is never a second copy of the model. On the CPU, tensors stored in
    `dtype` already stay mapped to the file, which then must not be changed in place. Rotary frequencies are computed,
    never loaded.

    Raises:
        CheckpointError: the file holds no transformer, cannot be read, or lacks or exceeds the expected tensors.
    """
    checkpoint = Checkpoint.open(Path(path))
    part = _part(checkpoint, "dit", "a SeedVR2 DiT")
    model = _load(checkpoint, part, DiT, dtype, device)
    model.reset_frequencies()
    return model


def load_vae(path: Path, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu") -> VideoVAE:
    """Load an autoencoder, in evaluation mode. Memory as for `load_dit`.

    Raises:
        CheckpointError: the file holds no SeedVR2 VAE, cannot be read, or lacks or exceeds the expected tensors.
    """
    checkpoint = Checkpoint.open(Path(path))
    return _load(checkpoint, _part(checkpoint, "vae", "the SeedVR2 VAE"), VideoVAE, dtype, device)


def _part(checkpoint: Checkpoint, kind: str, expected: str) -> Part:
    if part := checkpoint.content.part(kind):
        if checkpoint.why_not:
            raise CheckpointError(checkpoint.why_not)
        return part
    if not checkpoint.content.parts and checkpoint.why_not:
        raise CheckpointError(checkpoint.why_not)
    verb = "looks like" if checkpoint.content.kind == "other" else "holds"
    raise CheckpointError(f"{checkpoint.path.name} {verb} {checkpoint.content.label}, expected {expected}.")


# Ordinary tensors, whatever the caller's mode: those of inference mode cannot be used after a move in another mode.
@torch.inference_mode(False)
def _load(
    checkpoint: Checkpoint,
    part: Part,
    build: Callable[..., Module],
    dtype: torch.dtype,
    device: torch.device | str,
) -> Module:
    with torch.device("meta"):
        module = build(part.config)
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items() if not _computed(name)}
    _check(checkpoint, part, shapes)
    if checkpoint.info.coarse:
        log.info("%s holds weights in %s: larger files of the same model restore better", checkpoint.path.name,
                 checkpoint.info.dtype)  # fmt: skip

    names = {part.stored[name]: name for name in shapes}
    # Real memory for what is computed, since the module has none yet; its owner fills it in.
    weights = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        for name, tensor in module.state_dict().items()
        if _computed(name)
    }
    for stored, tensor in checkpoint.format.read(checkpoint.path, names, torch.device(device)):
        name = names[stored]
        weights[name] = tensor.to(dtype).reshape(shapes[name]).contiguous()
    module.load_state_dict(weights, assign=True)
    return module.eval()


def _computed(name: str) -> bool:
    return name.endswith(FREQUENCIES)


def _check(checkpoint: Checkpoint, part: Part, shapes: dict[str, tuple[int, ...]]) -> None:
    found = {name: checkpoint.header.tensors[at] for name, at in part.stored.items() if not _computed(name)}
    problems = {
        "lacks": [name for name in shapes if name not in found],
        "has the unexpected": [name for name in found if name not in shapes],
        "has, in shapes that do not fit,": [
            f"{name} {list(found[name].shape)} instead of {list(shape)}"
            for name, shape in shapes.items()
            if name in found and not _fits(found[name].shape, shape)
        ],
        "stores as integers": [name for name in shapes if name in found and found[name].dtype in CODES],
    }
    for verb, names in problems.items():
        if names:
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            raise CheckpointError(
                f"{checkpoint.path.name} looks like {part.label} but {verb} {', '.join(names[:NAMED])}{more}; "
                "it is incomplete, or of another version."
            )


def _fits(found: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    # Very old files keep attention matrices as 1 x 1 convolutions.
    return found[: len(expected)] == expected and all(n == 1 for n in found[len(expected) :])
