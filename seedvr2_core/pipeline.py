"""Clips in, restored clips out; whole, or stage by stage.

    T H W frames as shown   c channels, 3 or 4 with alpha   b c t h w latents
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager

import torch
from torch import Tensor

from .errors import MediaError
from .life import Frames, Life, OnProgress, Waypoint
from .loading import Models
from .memory.plan import MemoryPlan, Stage
from .planning import log_plan, plan_clip, told_of_memory
from .settings import DEFAULTS, Settings
from .video.geometry import LATENT_FRAMES, LATENT_PIXELS, to_frames
from .video.shots import shots


def restore(
    frames: Tensor, models: Models, settings: Settings = DEFAULTS, on_progress: OnProgress | None = None
) -> Tensor:
    """Restore a clip that fits in memory.

    Args:
        frames: T H W c in 0..1. One frame is a picture.
        on_progress: see `OnProgress`.

    Returns:
        T H' W' c in 0..1, fp32 on the CPU; H' and W' are what `settings.target` makes of H and W.

    Raises:
        MediaError: there is no frame, or not 3 or 4 channels.
    """
    if frames.dim() != 4 or frames.shape[-1] not in (3, 4) or 0 in frames.shape:
        raise MediaError(f"Expected frames T H W c with 3 or 4 channels, got the shape {tuple(frames.shape)}.")
    size = settings.target.size(*frames.shape[1:3])
    return torch.cat(list(stream(frames, models, settings, size, len(frames), on_progress)))


def stream(
    frames: Frames,
    models: Models,
    settings: Settings,
    size: tuple[int, int],
    total: int | None = None,
    on_progress: OnProgress | None = None,
    plan: MemoryPlan | None = None,
) -> Iterator[Tensor]:
    """Restore frames as they come; memory does not grow with their number.

    Args:
        frames: each H W c, floats in 0..1 or codes in uint8 or uint16, which take less memory while they wait.
        size: height and width of the result.
        total: how many frames there will be, if known; only progress depends on it.
        plan: as made before, by `plan_clip`; None: it is made now.

    Yields:
        T H' W' c in 0..1, fp32 on the CPU, in order, in pieces of any length; as many frames in all as came in.

    Raises:
        MediaError: there is no frame.
        SettingError: a setting is impossible here, or takes more memory than there is.
    """
    plan = plan or plan_clip(models, settings, size, total)
    log_plan(plan, models, settings, "Frames")
    with told_of_memory(models, size):
        for frame, _ in restored(frames, models, settings, size, total, on_progress, plan):
            yield frame.cpu()


@torch.inference_mode()
def restored(
    frames: Frames,
    models: Models,
    settings: Settings,
    size: tuple[int, int],
    total: int | None,
    on_progress: OnProgress | None,
    plan: MemoryPlan,
    start: Waypoint | None = None,
) -> Iterator[tuple[Tensor, Waypoint]]:
    """Frames 1 H W c in 0..1, on the device, of what `plan` was made for, each with the place behind it.

    Args:
        start: a place from which to go on: the frames before it are read, but do not come out.
    """
    report = on_progress or (lambda stage, done, total: None)
    done = 0
    with closing(Life(models, settings, size, total, report, plan)) as life:
        for shot in [iter(frames)] if settings.one_shot else shots(frames):
            if start and done < start.shot:
                for _ in shot:
                    done += 1
                    life.pass_by(done)
                continue
            life.begin(done, start if start and start.shot == done else None)
            for frame in life.finish(life.decode(life.restore(life.encode(life.pieces(shot))))):
                yield frame, life.waypoint
            done += life.left
    if not done:
        raise MediaError("There is no frame to restore.")


@torch.inference_mode()
def encode(
    frames: Tensor,
    models: Models,
    settings: Settings,
    on_progress: OnProgress | None = None,
    plan: MemoryPlan | None = None,
) -> Tensor:
    """The first stage alone: the degraded latent c t h w, fp32 on the device, of frames T H W c in 0..1.

    It is scaled as the transformer sees it; T frames become ceil((T - 1) / 4) + 1 latents. For `plan` see `stream`.
    """
    size = settings.target.size(*frames.shape[1:3])
    with _alone("encode", models, settings, size, len(frames), on_progress, plan) as life:
        return torch.cat([latent for latent, _ in life.encode(life.pieces(frames))], dim=1)


@torch.inference_mode()
def restore_latent(
    condition: Tensor,
    models: Models,
    settings: Settings,
    on_progress: OnProgress | None = None,
    plan: MemoryPlan | None = None,
) -> Tensor:
    """The second stage alone: a clean latent c t h w, fp32 on the device, of a degraded one on the device.

    For `plan` see `stream`.
    """
    size, frames = pixel_size(condition)
    with _alone("restore", models, settings, size, frames, on_progress, plan) as life:
        latents = condition.float().split(1, dim=1)
        each = ((latent, index == len(latents) - 1) for index, latent in enumerate(latents))
        return torch.cat([latent for latent, _ in life.restore(each)], dim=1)


@torch.inference_mode()
def decode(
    latent: Tensor,
    models: Models,
    settings: Settings,
    on_progress: OnProgress | None = None,
    plan: MemoryPlan | None = None,
) -> Iterator[Tensor]:
    """The third stage alone: pieces of frames T H W 3 in 0..1 on the device, of a clean latent c t h w on the device.

    As many frames as a clip of so many latents can have, with the padding of their size. For `plan` see `stream`.
    """
    size, frames = pixel_size(latent)
    with _alone("decode", models, settings, size, frames, on_progress, plan) as life:
        for clip in life.decode(iter([(latent.float(), True)])):
            yield to_frames(clip.transpose(0, 1).float()).permute(0, 2, 3, 1)


def pixel_size(latent: Tensor) -> tuple[tuple[int, int], int]:
    """Height and width in pixels, and frames, of a latent c t h w."""
    _, t, h, w = latent.shape
    return (h * LATENT_PIXELS, w * LATENT_PIXELS), (t - 1) * LATENT_FRAMES + 1


@contextmanager
def _alone(
    stage: Stage,
    models: Models,
    settings: Settings,
    size: tuple[int, int],
    frames: int,
    on_progress: OnProgress | None,
    plan: MemoryPlan | None,
) -> Iterator[Life]:
    """A life of which only one stage is lived."""
    plan = plan or plan_clip(models, settings, size, frames)
    log_plan(plan, models, settings, "Frames", [stage])
    report = on_progress or (lambda stage, done, total: None)
    with told_of_memory(models, size), closing(Life(models, settings, size, frames, report, plan, stage)) as life:
        yield life
