"""Spatial tiles around encode and decode, blended at their seams.

    b clips   c channels   T H W pixel frames, height, width   t h w the same in latent space
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import SettingError
from ..video.geometry import LATENT_PIXELS
from .vae import CausalState, VAEConfig, VideoVAE
from .vae_fast import FastVAE
from .windows import Span


class Tile(NamedTuple):
    """Rows and columns of the latent."""

    rows: Span
    columns: Span


@dataclass(frozen=True)
class TiledVAE:
    """Stands in for an autoencoder, see `VideoVAE` for the methods, and never takes more than one tile at once.

    A tile is not exact: its norms and its attention see one tile instead of the frame, and at its border the
    convolutions see zeros. Neighbours therefore differ in tone, which a linear ramp from one to the other spreads but
    does not remove. `FastVAE` computes frames in bands that take little memory and are exact; tiles are for those who
    know and want them. Length is no reason either: slices in time are exact. What fits into one tile is exact as well.

    Clips have a height and a width that are multiples of 8. Moments are blended, not samples. A causal state is as
    large as that of whole frames and a little more, for what overlaps; states of other autoencoders and other tiles do
    not fit.
    """

    vae: VideoVAE | FastVAE
    tile: int = 1024  # side, in pixels, a multiple of 8
    overlap: int = 128  # of neighbours, in pixels, a multiple of 8 below `tile`

    def __post_init__(self) -> None:
        """Raises SettingError if `tile` or `overlap` is not such a number."""
        if self.tile % LATENT_PIXELS or self.overlap % LATENT_PIXELS or not 0 <= self.overlap < self.tile:
            raise SettingError(
                f"Tiles of {self.tile} pixels that overlap by {self.overlap} are not possible; choose multiples of "
                f"{LATENT_PIXELS}, the overlap smaller than the tile."
            )

    @property
    def config(self) -> VAEConfig:
        return self.vae.config

    @property
    def dtype(self) -> torch.dtype:
        return self.vae.dtype

    def watched(self, on_step: Callable[[], None]) -> AbstractContextManager[None]:
        return self.vae.watched(on_step)

    def encode(self, clip: Tensor) -> Tensor:
        return self._blend(lambda part, _: self.vae.encode(part), clip, LATENT_PIXELS, 1)

    def decode(self, latent: Tensor) -> Tensor:
        return self._blend(lambda part, _: self.vae.decode(part), latent, 1, LATENT_PIXELS)

    def encode_slice(self, clip: Tensor, state: CausalState, last: bool = False) -> tuple[Tensor, CausalState]:
        slices = _Slices(self.vae.encode_slice, state.begin(), last)
        return self._blend(slices, clip, LATENT_PIXELS, 1), slices.state

    def decode_slice(self, latent: Tensor, state: CausalState, last: bool = False) -> tuple[Tensor, CausalState]:
        slices = _Slices(self.vae.decode_slice, state.begin(), last)
        return self._blend(slices, latent, 1, LATENT_PIXELS), slices.state

    def _blend(self, run: Callable[[Tensor, Tile], Tensor], x: Tensor, before: int, after: int) -> Tensor:
        """Run tile by tile; one latent position is `before` rows and columns of x and `after` of the result."""
        height, width = (side // before for side in x.shape[-2:])
        tile, overlap = self.tile // LATENT_PIXELS, self.overlap // LATENT_PIXELS
        rows, columns = cut(height, tile, overlap), cut(width, tile, overlap)
        if len(rows) == len(columns) == 1:
            return run(x, Tile(rows[0], columns[0]))
        row_weights, column_weights = ramps(rows, overlap, after), ramps(columns, overlap, after)
        out = None
        for (i, row), (j, column) in product(enumerate(rows), enumerate(columns)):
            part = run(x[..., _scaled(row, before), _scaled(column, before)], Tile(row, column))
            if out is None:
                dtype = part.dtype
                # Weights rounded to bf16 would no longer sum to 1.
                precise = torch.promote_types(dtype, torch.float32)
                out = part.new_zeros(*part.shape[:-2], height * after, width * after, dtype=precise)
            weight = (row_weights[i][:, None] * column_weights[j]).to(part.device, precise)
            out[..., _scaled(row, after), _scaled(column, after)] += part * weight
        return out.to(dtype)


class _Slices:
    """Runs tiles of a slice. The states of all live in one, each layer's past under the tile and the layer: so it may
    be anywhere that a causal state may be, and only one tile's is at work."""

    def __init__(self, step: Callable[..., tuple[Tensor, CausalState]], state: CausalState, last: bool):
        self.step, self.begun, self.last = step, state, last

    def __call__(self, part: Tensor, tile: Tile) -> Tensor:
        layers = [layer for where, layer in self.begun if where == tile]
        past = CausalState({layer: self.begun[tile, layer] for layer in layers})
        out, kept = self.step(part, past, last=self.last)
        for layer in list(kept):
            self.begun[tile, layer] = kept.pop(layer)
        return out

    @property
    def state(self) -> CausalState:
        return CausalState() if self.last else self.begun


def cut(side: int, tile: int, overlap: int) -> list[Span]:
    """Tiles along one axis of the latent."""
    # A rest that the tile before already covers is left out.
    starts = [start for start in range(0, side, tile - overlap) if start == 0 or side - start > overlap]
    return [Span(start, min(start + tile, side)) for start in starts]


def ramps(spans: list[Span], overlap: int, scale: int) -> list[Tensor]:
    """Weights, in fp64, of what comes out of each tile along one axis; everywhere they sum to 1.

    Linear from a neighbour to the next, in the middle of a pixel, so that no weight is 0. Where more than two tiles
    meet, an overlap being longer than half a tile, they are scaled to that sum.
    """
    rise = (torch.arange(overlap * scale, dtype=torch.float64) + 0.5) / (overlap * scale)
    weights, total = [], torch.zeros(spans[-1].stop * scale, dtype=torch.float64)
    for span in spans:
        weight = torch.ones((span.stop - span.start) * scale, dtype=torch.float64)
        if span is not spans[0]:
            weight[: len(rise)] = rise
        if span is not spans[-1]:
            end = weight[len(weight) - len(rise) :]
            torch.minimum(end, rise.flip(0), out=end)
        weights.append(weight)
        total[_scaled(span, scale)] += weight
    return [weight / total[_scaled(span, scale)] for span, weight in zip(spans, weights, strict=True)]


def _scaled(span: Span, scale: int) -> slice:
    return slice(span.start * scale, span.stop * scale)
