"""From checkpoint files to models that are ready to compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from .checkpoints import Prompts, inspect, load_dit, load_prompts, load_vae
from .device import free_bytes
from .errors import SettingError
from .kernels import Choices, choices_for
from .models.dit import DiT
from .models.linear import E4M3, pack
from .models.linear import resolve as resolve_packing
from .models.tiling import TiledVAE
from .models.vae import VideoVAE
from .models.vae_fast import FastOptions, FastVAE

# Multiplications between two questions whether to go on: on two cores 0.15 s in bf16, 0.3 s in fp32.
CPU_TURN = 1 << 35


@dataclass(frozen=True, kw_only=True)
class Models:
    """What a restoration runs on. A single stage needs no more than its own model."""

    dit: DiT | None
    vae: VideoVAE | FastVAE | TiledVAE | None
    prompts: Prompts | None  # of the transformer
    label: str  # for people
    # Where it computes, as tensors name it: "cuda:0", not "cuda". Blocks of the transformer may wait elsewhere.
    device: torch.device
    choices: Choices | None = None  # who says where our own kernels run; None: nowhere
    files: tuple[Path, ...] = ()  # where they come from
    make_room: Callable[[], None] = lambda: None  # asks others for memory of the device, when it has run out

    @property
    def dtype(self) -> torch.dtype:
        return (self.vae if self.dit is None else self.dit.txt_in.weight).dtype


def load_models(
    dit: Path,
    vae: Path,
    device: torch.device,
    dtype: torch.dtype,
    packing: str = "auto",
    kernels: bool = False,
    memory_limit: int | None = None,
) -> Models:
    """Load a transformer with its prompts, and an autoencoder.

    Args:
        packing: of the transformer's linear layers, one of PACKING_NAMES; "fp8" is faster on new GPUs and less exact.
        kernels: try our own GPU kernels and use those that agree with the library and are faster. Not the default
            until they have been proven on a GPU.
        memory_limit: bytes of a GPU that may be used, as in `Settings`; None: what is free.

    Raises:
        CheckpointError: a file is missing, damaged or something else.
    """
    # The large file comes last, so that a mistake in the others shows at once.
    resolve_packing(packing, device, dtype)  # refused before anything is loaded
    choices = choices_for(device) if kernels else None
    options = replace(fast_options(device), choices=choices)
    prompts, autoencoder = load_prompts(dit), FastVAE(load_vae(vae, dtype, device), options)
    content = inspect(dit)
    taken = content.parameters * (E4M3 if packing == "fp8" else dtype).itemsize
    fits = device.type != "cuda" or taken <= room(device, memory_limit)
    if packing != "auto" and not fits:
        raise SettingError(
            f"Packing {packing!r} needs the whole transformer on {device}, where it does not fit; use 'auto'."
        )
    if device.type == "cpu" or (packing == "auto" and fits):
        transformer = pack(load_dit(dit, dtype, device), packing)
    else:
        # One part after another, so that no more than one lies on the device before it is packed. Blocks for which
        # there is no room wait on the host until the plan of a clip says which of them may stay on the device.
        transformer = load_dit(dit, dtype)
        for part in [*around_blocks(transformer), *(transformer.blocks if fits else [])]:
            pack(part.to(device), packing)
    return Models(
        dit=transformer,
        vae=autoencoder,
        prompts=prompts,
        label=content.label,
        device=torch.empty(0, device=device).device,
        choices=choices,
        files=(dit, vae),
    )


def room(device: torch.device, memory_limit: int | None) -> int:
    """Bytes of a GPU that may be used beside what is there already."""
    free = free_bytes(device)
    return free if memory_limit is None else min(free, memory_limit - torch.cuda.memory_allocated(device))


def around_blocks(dit: DiT) -> list[nn.Module]:
    """The parts of a transformer that never take turns on the device, whatever its blocks do."""
    return [part for name, part in dit.named_children() if name != "blocks"]


def fast_options(device: torch.device) -> FastOptions:
    """How the autoencoder computes on this device."""
    # Shared products are measured to be faster on CPUs only; on GPUs that is still to be seen.
    if device.type == "cpu":
        return FastOptions(turn=CPU_TURN, device="cpu")
    return FastOptions(winograd_from=None, device=device.type)
