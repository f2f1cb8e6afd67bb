"""What is decided before a clip is computed: how much of it at once, in the memory that there is."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from .attention import resolve
from .device import free_bytes, is_out_of_memory
from .errors import SettingError
from .loading import Models
from .memory.plan import STAGES, MemoryPlan, Stage, describe, make_plan
from .memory.stages import Work, resident_bytes
from .settings import Settings
from .video.geometry import LATENT_FRAMES

if TYPE_CHECKING:
    from .video.media import MediaInfo

log = logging.getLogger(__name__)


def plan_clip(
    models: Models,
    settings: Settings,
    size: tuple[int, int],
    frames: int | None,
    source: int = 0,
    device: torch.device | None = None,
    budget: int | None = None,
) -> MemoryPlan:
    """How to compute a clip in the memory that there is.

    Args:
        size: height and width of the result.
        source: bytes of a frame as it is read.
        device: where it will be computed, if the models are not there yet.
        budget: bytes that may be used there, weights included; None: what is free.

    Raises:
        SettingError: it does not fit, by whatever way.
    """
    device = device or models.device
    work = Work(
        vae=models.vae,
        dit=models.dit,
        device=device.type,
        height=size[0],
        width=size[1],
        frames=frames,
        chunk=None if settings.chunk is None else (settings.chunk - 1) // LATENT_FRAMES + 1,
        source=source if device.type == "cpu" else 0,
    )
    if budget is None:
        budget = free_bytes(device) + resident_bytes([models.dit, models.vae], device)
    return make_plan(work, budget if settings.memory_limit is None else min(budget, settings.memory_limit))


def bytes_of_others(models: Models) -> int:
    """What lies on a GPU besides these models before a clip is begun, of whoever else is in this process."""
    if models.device.type != "cuda":
        return 0
    return torch.cuda.memory_allocated(models.device) - resident_bytes([models.dit, models.vae], models.device)


def available_bytes(models: Models, plan: MemoryPlan, others: int) -> int:
    """What a clip could have now, what it uses included; `others` is what it does not use but was there before."""
    if models.device.type == "cuda":
        return free_bytes(models.device) + torch.cuda.memory_allocated(models.device) - others
    return free_bytes(models.device) + plan.weights


def bytes_of_frame(info: MediaInfo) -> int:
    """What a frame takes as it is read."""
    return info.height * info.width * (4 if info.has_alpha else 3) * (1 if info.bit_depth <= 8 else 2)


def attention_name(models: Models, settings: Settings) -> str:
    """The attention that will run; one that cannot is refused before any work."""
    return resolve(settings.attention, models.device, models.dtype, models.dit.config.head_dim)


def log_plan(
    plan: MemoryPlan, models: Models, settings: Settings, source: str, stages: Sequence[Stage] = STAGES
) -> None:
    """One line with everything that was decided for this clip, of which these stages will run."""
    work = plan.work
    log.info(
        "%s: %s -> %d x %d, %s on %s in %s, %s%s",
        source,
        "? frames" if work.frames is None else "1 frame" if work.frames == 1 else f"{work.frames} frames",
        work.width,
        work.height,
        models.label,
        models.device,
        str(models.dtype).removeprefix("torch."),
        f"attention {attention_name(models, settings)}, " if models.dit else "",
        describe(plan, stages),
    )


@contextmanager
def told_of_memory(models: Models, size: tuple[int, int]) -> Iterator[None]:
    """Where memory runs out for good, this is one sentence."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        # Who is told may keep the traceback, which would keep what the steps were working on.
        traceback.clear_frames(error.__traceback__)
        raise SettingError(
            f"Restoring at {size[1]} x {size[0]} takes more memory than {models.device} has free; choose a smaller "
            "size or a shorter chunk, or close other programs."
        ) from error
