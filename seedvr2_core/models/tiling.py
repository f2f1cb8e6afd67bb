"""Spatial tiles around encode and decode, blended at their seams.

    b clips   c channels   T H W pixel frames, height, width   t h w the same in latent space
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from ..errors import SettingError
from ..video.geometry import LATENT_PIXELS
from .vae import VideoVAE
from .windows import Span


def encode_tiled(vae: VideoVAE, clip: Tensor, tile: int = 1024, overlap: int = 128) -> Tensor:
    """Moments b 32 t h w of a clip b 3 T H W in -1..1, never encoding more than tile x tile pixels at once.

    A tile is not exact: its norms and its attention see one tile instead of the frame, and at its border the
    convolutions see zeros. Neighbours therefore differ in tone, which the blending spreads but does not remove. It is
    the last resort for a frame that does not fit into memory; length is no reason, `vae.encode` is sliced in time and
    exact. A clip that fits into one tile is encoded exactly.

    Args:
        clip: H and W multiples of 8.
        tile: side of a tile, in pixels, a multiple of 8.
        overlap: of neighbours, in pixels, a multiple of 8 below `tile`.

    Raises:
        SettingError: `tile` or `overlap` is not such a number.

    Source: the community node's tiled VAE; moments are blended, not samples.
    """
    return _blended(vae.encode, clip, LATENT_PIXELS, 1, *_in_latents(tile, overlap))


def decode_tiled(vae: VideoVAE, latent: Tensor, tile: int = 1024, overlap: int = 128) -> Tensor:
    """Clip b 3 T H W, about -1..1, of latents b 16 t h w, never decoding more than tile x tile pixels at once.

    See `encode_tiled` for what `tile` and `overlap` (in pixels here too) may be and what tiling costs.
    """
    return _blended(vae.decode, latent, 1, LATENT_PIXELS, *_in_latents(tile, overlap))


def _in_latents(tile: int, overlap: int) -> tuple[int, int]:
    if tile % LATENT_PIXELS or overlap % LATENT_PIXELS or not 0 <= overlap < tile:
        raise SettingError(
            f"Tiles of {tile} pixels that overlap by {overlap} are not possible; choose multiples of {LATENT_PIXELS}, "
            "the overlap smaller than the tile."
        )
    return tile // LATENT_PIXELS, overlap // LATENT_PIXELS


def _blended(
    network: Callable[[Tensor], Tensor], x: Tensor, before: int, after: int, tile: int, overlap: int
) -> Tensor:
    """Run a network tile by tile; one latent position is `before` rows and columns of x and `after` of its output."""
    rows, columns = (_axis(side // before, tile, overlap, after) for side in x.shape[-2:])
    out = None
    for (row, row_weight), (column, column_weight) in product(rows, columns):
        part = network(x[..., _scaled(row, before), _scaled(column, before)])
        if out is None:
            out = part.new_zeros(*part.shape[:-2], rows[-1][0].stop * after, columns[-1][0].stop * after)
        out[..., _scaled(row, after), _scaled(column, after)] += part * (row_weight[:, None] * column_weight).to(part)
    return out


def _scaled(span: Span, scale: int) -> slice:
    return slice(span.start * scale, span.stop * scale)


def _axis(side: int, tile: int, overlap: int, scale: int) -> list[tuple[Span, Tensor]]:
    """Tiles along one axis of the latent, and the weights of what comes out of each; together they sum to 1."""
    # A rest that the tile before already covers is left out.
    starts = [start for start in range(0, side, tile - overlap) if start == 0 or side - start > overlap]
    spans = [Span(start, min(start + tile, side)) for start in starts]
    ramp = 0.5 - 0.5 * torch.cos(math.pi * torch.linspace(0, 1, overlap * scale))
    weights, total = [], torch.zeros(side * scale)
    for span in spans:
        weight = torch.ones((span.stop - span.start) * scale)
        if span.start > 0:
            weight[: len(ramp)] *= ramp
        if span.stop < side:
            weight[len(weight) - len(ramp) :] *= 1 - ramp
        weights.append(weight)
        total[_scaled(span, scale)] += weight
    return [(span, weight / total[_scaled(span, scale)]) for span, weight in zip(spans, weights, strict=True)]
