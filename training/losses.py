"""Losses as pure functions, one equation each.

b clips   c channels   T H W pixel frames, height, width
"""

from __future__ import annotations

import math
from functools import cache

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

# Side of the windows whose spectra are compared, in pixels.
WINDOW = 32


def kl(mean: Tensor, std: Tensor) -> Tensor:
    """KL divergence from N(mean, std^2) to N(0, 1), averaged over all entries."""
    return 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).mean()


def spectral(a: Tensor, b: Tensor) -> Tensor:
    """Weight-free stand-in for a perceptual loss between clips b 3 T H W in -1..1; H and W at least 32.

    L1 between log-magnitudes of 32 x 32 DCT blocks of the luma, which asks for the right amount of texture without
    asking for its phase, plus L1 between gradients at three scales.
    """
    a, b = (rearrange(x, "b c t h w -> (b t) c h w") for x in (a, b))
    loss = (log_spectrum(a) - log_spectrum(b)).abs().mean()
    for scale in range(3):
        if scale:
            a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
        loss = loss + (a.diff(dim=-1) - b.diff(dim=-1)).abs().mean() + (a.diff(dim=-2) - b.diff(dim=-2)).abs().mean()
    return loss


def log_spectrum(frames: Tensor) -> Tensor:
    """Log-magnitude of the DCT of every 32 x 32 block of the luma of frames n 3 H W."""
    luma = frames.mean(dim=1)
    h, w = (size // WINDOW for size in luma.shape[-2:])
    blocks = rearrange(luma[:, : h * WINDOW, : w * WINDOW], "n (h p) (w q) -> n h w p q", p=WINDOW, q=WINDOW)
    dct = dct_matrix(WINDOW).to(frames)
    # Below 0.05 a coefficient is quantisation noise; its logarithm would dominate.
    return torch.log(0.05 + (dct @ blocks @ dct.T).abs())


@cache
def dct_matrix(size: int) -> Tensor:
    """Orthonormal DCT-II, size x size."""
    k = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * (k[None] + 0.5) * k[:, None]) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix.float()
