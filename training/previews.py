"""Pictures of a run: held-out samples before and after, and what moves in them.

T H W frames, height, width
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from seedvr2_core.video.geometry import to_uint8

from .losses import high_frequency_ratio

# Frames of a clip in its strip: the first, the last, and some between.
FRAMES = 4


@dataclass(frozen=True)
class Preview:
    """One held-out sample, frames T 3 H W in 0..1, all of one shape."""

    name: str  # fit for a file
    given: Tensor
    restored: Tensor
    wanted: Tensor

    @property
    def detail(self) -> float:
        """How many times the energy of fine detail that is wanted was restored."""
        clips = [x.detach().float().cpu().transpose(0, 1)[None] for x in (self.restored, self.wanted)]
        return high_frequency_ratio(*clips).item()


def write_previews(folder: Path, averaged: Sequence[Preview], raw: Sequence[Preview]) -> None:
    """Write NAME.png for every sample: a column each for given, restored by the averaged weights, restored by the raw
    weights, and wanted; a row for each of up to four frames. A clip also gets NAME_time.png, its middle row of pixels
    over time in the same columns."""
    folder.mkdir(parents=True, exist_ok=True)
    for best, plain in zip(averaged, raw, strict=True):
        columns = [x.detach().float().cpu() for x in (best.given, best.restored, plain.restored, best.wanted)]
        _write(folder / f"{best.name}.png", strip(columns))
        if len(best.wanted) > 1:
            _write(folder / f"{best.name}_time.png", temporal_profile(columns))


def strip(columns: Sequence[Tensor]) -> Tensor:
    """Frames T 3 H W each -> one picture 3 (rows H) (columns W)."""
    length = len(columns[0])
    chosen = torch.linspace(0, length - 1, min(FRAMES, length)).round().long()
    return rearrange([column[chosen] for column in columns], "n t c h w -> c (t h) (n w)")


def temporal_profile(columns: Sequence[Tensor]) -> Tensor:
    """Frames T 3 H W each -> one picture 3 T (columns W): the middle row of every frame, from the first one down."""
    middle = columns[0].shape[2] // 2
    return rearrange([column[:, :, middle] for column in columns], "n t c w -> c t (n w)")


def colour(latent: Tensor, basis: Tensor) -> Tensor:
    """A latent 16 t h w as frames t 3 h w in 0..1, without a decoder.

    Args:
        latent: of unit variance.
        basis: 3 16, see `colour_basis`.
    """
    return (0.5 + torch.einsum("kc,cthw->tkhw", basis, latent.float().cpu()) / 6).clamp(0, 1)


def colour_basis(latents: Tensor) -> Tensor:
    """The three directions 3 16 in which latents b 16 t h w vary most, scaled to unit variance."""
    rows = rearrange(latents.float().cpu(), "b c t h w -> (b t h w) c")
    values, vectors = torch.linalg.eigh((rows - rows.mean(0)).T @ (rows - rows.mean(0)) / len(rows))
    return (vectors[:, -3:] / values[-3:].clamp_min(1e-6).sqrt()).T.flip(0)


def _write(path: Path, picture: Tensor) -> None:
    Image.fromarray(to_uint8(picture.clamp(0, 1)).permute(1, 2, 0).contiguous().numpy()).save(path)
