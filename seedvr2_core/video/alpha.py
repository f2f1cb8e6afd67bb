"""Enlarge a transparency mask along the edges of the restored picture. The model itself knows RGB only."""

# T frames   h w input, H W output height and width

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import resize, to_frames

# A mask is binary, a cut-out, if all but this share of its values lie within 0.1 of 0 or 1.
BINARY_SHARE = 0.95
# Radius of the guided filter in output pixels, and the guide variance below which it only smooths.
BINARY_RADIUS, SOFT_RADIUS = 2, 3
EPSILON = 0.002
# Steepness of the curve that hardens a cut-out, in full where the picture has an edge of strength 0.25.
STEEPNESS, FULL_EDGE = 12, 0.25
# ITU-R BT.601 luma, in the 15-bit fractions of common 8-bit conversions.
LUMA = (9798 / 2**15, 19235 / 2**15, 3735 / 2**15)


def upscale_alpha(alpha: Tensor, rgb: Tensor) -> Tensor:
    """Enlarge a mask to the size of the restored frames it belongs to.

    Bicubic, then a guided filter so that its edges fall on edges of the picture. A mask that is nearly all 0 and 1
    (judged over the frames given) is sharpened back: hard away from edges, a steep ramp on them.

    Args:
        alpha: mask at input size, T 1 h w, 0..1.
        rgb: restored frames, T 3 H W, -1..1.

    Returns T 1 H W, 0..1, fp32.

    Source: the community node's edge-guided alpha.
    """
    if bool((alpha == 1).all()):
        # The curve that hardens cut-outs ends a little below 1.
        return alpha.new_ones(len(rgb), 1, *rgb.shape[-2:], dtype=torch.float32)
    rgb = to_frames(rgb)
    enlarged = resize(alpha.float(), *rgb.shape[-2:])
    guide = rgb.mean(dim=1, keepdim=True)
    binary = ((alpha < 0.1) | (alpha > 0.9)).float().mean() > BINARY_SHARE
    guided = guided_filter(guide, enlarged, BINARY_RADIUS if binary else SOFT_RADIUS).clamp(0, 1)
    return _sharpened(guided, _edges(rgb)) if binary else guided


def guided_filter(guide: Tensor, source: Tensor, radius: int, epsilon: float = EPSILON) -> Tensor:
    """The source T 1 H W as a locally linear function of the guide T 1 H W, in boxes of 2 * radius + 1 pixels.

    Source: He, Sun, Tang, "Guided Image Filtering", ECCV 2010.
    """
    guide_mean, source_mean = _mean(guide, radius), _mean(source, radius)
    covariance = _mean(guide * source, radius) - guide_mean * source_mean
    variance = _mean(guide * guide, radius) - guide_mean * guide_mean
    slope = covariance / (variance + epsilon)
    return _mean(slope, radius) * guide + _mean(source_mean - slope * guide_mean, radius)


def _mean(x: Tensor, radius: int) -> Tensor:
    # The node counts what lies outside as zeros, which makes an opaque mask transparent along the border.
    return F.avg_pool2d(x, 2 * radius + 1, stride=1, padding=radius, count_include_pad=False)


def _sharpened(alpha: Tensor, edges: Tensor) -> Tensor:
    near_edge = F.max_pool2d(edges, 3, stride=1, padding=1)
    steep = torch.sigmoid(STEEPNESS * (alpha - 0.5))
    result = torch.lerp(alpha, steep, (edges / FULL_EDGE).clamp(0, 1))
    result = torch.where(near_edge < 0.05, _hard(alpha), result)
    # Half-transparent without an edge to explain it, or nowhere near one: decide.
    undecided = (result > 0.3) & (result < 0.7) & (edges <= 0.15)
    return torch.where(undecided | (near_edge < 0.03), _hard(result), result)


def _hard(alpha: Tensor) -> Tensor:
    return (alpha > 0.5).float()


def _edges(rgb: Tensor) -> Tensor:
    """Sobel gradient T 1 H W of frames T 3 H W, 0..1, as a share of the strongest in its frame."""
    # Truncated to 8 bits before and after, because the thresholds above were chosen on such edges.
    codes = (rgb * 255).floor()
    luma = (codes * codes.new_tensor(LUMA).view(3, 1, 1)).sum(dim=1, keepdim=True).add(0.5).floor()
    # The border mirrors about its pixels, which a picture one pixel wide cannot.
    mode = "reflect" if min(luma.shape[-2:]) > 1 else "replicate"
    x = F.pad(luma, (1, 1, 1, 1), mode=mode)
    across = x[..., :-2, :] + 2 * x[..., 1:-1, :] + x[..., 2:, :]
    down = x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]
    gradient = torch.hypot(across[..., 2:] - across[..., :-2], down[..., 2:, :] - down[..., :-2, :])
    strongest = gradient.amax(dim=(-2, -1), keepdim=True).clamp_min(1e-10)
    return (gradient / strongest * 255).floor() / 255
