"""What samples a run sees when: phases, each a share of its steps, with lengths and sizes that grow.

A latent's first t frames are the latent of the clip's first 4t-3 frames, since the autoencoder is causal; so longer
samples stand in for shorter ones.

Source: growth over SeedVR's training, arXiv 2501.01320, and within SeedVR2's last stage, arXiv 2506.05301; the lengths,
sizes and shares in recipes are ours.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from seedvr2_core.errors import SettingError
from seedvr2_core.video.geometry import LATENT_FRAMES, LATENT_PIXELS, Grid

from .config import setting

log = logging.getLogger(__name__)

# How far the area of a sample may be from that of a phase: shapes of many aspects are rounded to 16 pixels.
AREA_TOLERANCE = 1.25


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of the run, and what its samples are."""

    share: float = setting(about="of the steps, in proportion to the other phases'", least=0)
    frames: tuple[int, ...] = setting((), "lengths 4n+1, to which longer clips are cut; none: as they are", least=1)
    size: int | None = setting(None, "side of a square of the samples' area, in pixels; none: of any", least=16)

    def lengths(self, sample: Grid) -> tuple[int, ...]:
        """Latent frames t that a sample of this latent size may be cut to in this phase; () where it has no part."""
        if self.size is not None:
            ratio = sample.h * sample.w * LATENT_PIXELS**2 / self.size**2
            if not 1 / AREA_TOLERANCE < ratio < AREA_TOLERANCE:
                return ()
        if not self.frames:
            return (sample.t,)
        wanted = sorted(set(map(_in_latents, self.frames)))
        # Pictures are better pictures than the first frames of clips.
        return tuple(t for t in wanted if t <= sample.t and (t == 1) == (sample.t == 1))


SomePhase = TypeVar("SomePhase", bound=Phase)


def phase_at(step: int, steps: int, phases: Sequence[SomePhase]) -> SomePhase:
    """The phase that a step falls into, of a run of `steps`."""
    total, done = sum(phase.share for phase in phases), 0.0
    for phase in phases:
        done += phase.share
        if step < steps * done / total:
            return phase
    return phases[-1]


def check_phases(phases: Sequence[Phase], samples: Sequence[Grid]) -> None:
    """Before a run: whether there is something to learn from in every phase. Lengths that no sample has are logged.

    Args:
        samples: latent sizes that there are.

    Raises:
        SettingError: a phase has no samples.
    """
    for number, phase in enumerate(phases):
        found = {t for sample in samples for t in phase.lengths(sample)}
        if not found:
            area = "" if phase.size is None else f" of about {phase.size} x {phase.size} pixels"
            there = ", ".join(sorted({_in_pixels(sample) for sample in samples}))
            raise SettingError(f"curriculum.{number} asks for {_listed(phase.frames)} frames{area}, and the latents "
                               f"are {there}; precompute others, or change curriculum.")
        missing = [frames for frames in phase.frames if _in_latents(frames) not in found]
        if missing:
            log.warning("curriculum.%d goes without samples of %s frames: the latents have none so long.", number,
                        _listed(missing))  # fmt: skip


def _in_latents(frames: int) -> int:
    return (frames - 1) // LATENT_FRAMES + 1


def _listed(frames: Sequence[int]) -> str:
    return " and ".join(map(str, frames)) or "any number of"


def _in_pixels(sample: Grid) -> str:
    return f"{LATENT_FRAMES * (sample.t - 1) + 1} x {sample.h * LATENT_PIXELS} x {sample.w * LATENT_PIXELS}"
