"""Losses as pure functions, one equation each.

b clips   c channels   T H W pixel frames, height, width
r, f logits b of the discriminator for real and for restored samples, paired: sample i of both has one condition; or,
     from a discriminator of pixels, b t h w, a logit a patch
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

# Side of the windows whose spectra are compared, in pixels.
WINDOW = 32


def relativistic_d(r: Tensor, f: Tensor) -> Tensor:
    """mean softplus(-(r - f)); ln 2 where real and restored look alike.

    Source: RpGAN, Jolicoeur-Martineau, arXiv 1807.00734; as SeedVR2, arXiv 2506.05301, and R3GAN, arXiv 2501.05441.
    """
    return F.softplus(f - r).mean()


def relativistic_g(r: Tensor, f: Tensor) -> Tensor:
    """mean softplus(-(f - r)): the discriminator's loss with the roles exchanged. Source: as `relativistic_d`."""
    return relativistic_d(f, r)


def non_saturating_d(r: Tensor, f: Tensor) -> Tensor:
    """mean softplus(-r) + softplus(f). Source: Goodfellow et al., arXiv 1406.2661; as APT, arXiv 2501.08316."""
    return F.softplus(-r).mean() + F.softplus(f).mean()


def non_saturating_g(r: Tensor, f: Tensor) -> Tensor:
    """mean softplus(-f); what is real does not matter. Source: as `non_saturating_d`."""
    return F.softplus(-f).mean()


def hinge_d(r: Tensor, f: Tensor) -> Tensor:
    """mean max(0, 1 - r) + max(0, 1 + f); 2 where all logits are 0. Source: Geometric GAN, arXiv 1705.02894."""
    return F.relu(1 - r).mean() + F.relu(1 + f).mean()


def hinge_g(r: Tensor, f: Tensor) -> Tensor:
    """-mean f; what is real does not matter. Source: as `hinge_d`."""
    return -f.mean()


def approximate_penalty(logits: Tensor, perturbed: Tensor) -> Tensor:
    """mean (D(x) - D(x + sigma e))^2, e unit Gaussian: sigma^2 times the squared gradient of D at x, to first order.

    On real samples it stands for R1, on restored ones for R2. Both terms pass gradients: with the perturbed one
    detached the value is the same, but its gradient is no longer that of the penalty, and training is lost.

    Source: APT, arXiv 2501.08316, for R1; SeedVR2, arXiv 2506.05301, eq. 3, for R2.
    """
    return (logits - perturbed).square().mean()


def feature_distances(restored: Sequence[Tensor], real: Sequence[Tensor]) -> Tensor:
    """mean |D_i(restored) - D_i(real)| of the features of every tap i: as many as there are taps.

    Their mean is the loss of feature matching. The paper gives no normalisation; a mean keeps its weight at every size.

    Source: SeedVR2, arXiv 2506.05301, eq. 4.
    """
    return torch.stack([(a.float() - b.float()).abs().mean() for a, b in zip(restored, real, strict=True)])


def gradient_ratio(a: Tensor, b: Tensor, output: Tensor) -> Tensor:
    """|da/dx| / |db/dx|, at most 1e4: what makes a loss b pull at an output x as hard as a loss a does.

    Both graphs are kept; no gradient goes through the ratio.

    Source: VQGAN, arXiv 2012.09841, eq. 7, which takes both gradients at the weight of the last layer. At what that
    layer returns they are to be had however its weight is sharded or cast; so does EnCodec, arXiv 2210.13438,
    section 3.4.
    """
    of_a, of_b = (torch.autograd.grad(loss, output, retain_graph=True)[0].norm() for loss in (a, b))
    # The gradient of a mean over a million entries is small; a floor that is not smaller still would be the ratio.
    return (of_a / of_b.clamp_min(1e-12)).clamp(max=1e4)


def high_frequency_ratio(restored: Tensor, real: Tensor) -> Tensor:
    """Energy of what a 3 x 3 mean takes away, of restored over real clips b c T H W; 1 is right, less blurred."""
    restored, real = (rearrange(x, "b c t h w -> (b c t) 1 h w") for x in (restored, real))
    fine, wanted = (
        (x - F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)).square().mean() for x in (restored, real)
    )
    return fine / wanted.clamp_min(1e-12)


def l1(a: Tensor, b: Tensor) -> Tensor:
    """mean |a - b|, over all entries."""
    return (a - b).abs().mean()


def relative_l1(restored: Tensor, real: Tensor, degraded: Tensor) -> Tensor:
    """mean over samples of |restored - real| / (|degraded - real| + 0.03): 1 for what leaves its input as it is.

    An error counts by its share of the one that was there, as in a gain of decibels: an easy sample asks for as much
    as a hard one, where with `l1` the adversarial loss outweighs it and makes up texture.

    Args:
        restored, real, degraded: b ..., all in one scale; 0.03 is for latents, whose deviation is 1.
    """
    error, before = ((sample - real).abs().flatten(1).mean(1) for sample in (restored, degraded))
    return (error / (before + 0.03)).mean()


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
