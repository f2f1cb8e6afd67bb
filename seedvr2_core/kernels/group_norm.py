"""GroupNorm of single frames in two passes, each fused with what lies next to it.

First the statistics, as sums that bands of a frame, GPUs or a convolution's epilogue may contribute to; then their
application together with SiLU, written straight into the buffer that the next convolution reads. The reference
functions define the answers: sums in fp32, biased variance over the channels and positions of a group, one rounding at
the end. The functions called `torch_*` are the library's way: its own GroupNorm knows no channels-last memory on a GPU.

Activations are channels-last and may be views: every frame is dense, frames and clips lie where their strides say.

    b clips   c channels   t h w frames, height, width   n = b t frames of all clips   groups of channels
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Moments(NamedTuple):
    """What GroupNorm needs to know of every group of every frame, in fp32. Moments of parts of a frame add up."""

    sums: Tensor  # n groups
    squares: Tensor  # n groups, sums of squares


class Frames(NamedTuple):
    """Where the frames of a channels-last activation lie, in elements."""

    clips: int
    frames: int  # of one clip
    channels: int
    height: int
    width: int
    clip_stride: int
    frame_stride: int

    @property
    def count(self) -> int:
        return self.clips * self.frames

    @property
    def pixels(self) -> int:
        return self.height * self.width


def frames_of(x: Tensor) -> Frames:
    """The frames of b c t h w, or of n c h w.

    Raises:
        ValueError: a frame is not dense and channels-last.
    """
    if x.ndim == 4:
        x = x.unsqueeze(2)
    b, c, t, h, w = x.shape
    strides = (x.stride(1), x.stride(4), x.stride(3))
    # The stride of an axis of length 1 may be anything.
    if any(size > 1 and got != dense for size, got, dense in zip((c, w, h), strides, (1, c, w * c), strict=True)):
        raise ValueError(f"frames must be dense and channels-last, got shape {(*x.shape,)} with strides {x.stride()}")
    return Frames(b, t, c, h, w, x.stride(0), x.stride(2))


def group_statistics(x: Tensor, groups: int) -> Moments:
    """Moments of b c t h w or n c h w, channels-last frames."""
    from .triton_group_norm import statistics

    return statistics(x, groups)


def add_residual(
    x: Tensor, residual: Tensor | None, groups: int, bias: Tensor | None = None, out: Tensor | None = None
) -> tuple[Tensor, Moments]:
    """x + bias + residual, and the moments of what is stored, in one pass.

    Args:
        x, residual: b c t h w or n c h w, channels-last frames.
        bias: c, of the convolution that made x, where it has not been added.
        out: where to write, of the same shape; x or residual itself will do.
    """
    from .triton_group_norm import statistics

    out = torch.empty_like(x) if out is None else out
    return out, statistics(x, groups, bias=bias, residual=residual, out=out)


def apply_norm_silu(x: Tensor, moments: Moments, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """silu(norm(x)).

    Args:
        x: b c t h w or n c h w, channels-last frames.
        moments: of x.
        weight, bias: c, of the norm.
    """
    from .triton_group_norm import apply

    return apply(x, moments, weight, bias, eps)


# The library's way.


def torch_statistics(x: Tensor, groups: int) -> Moments:
    """Moments of n c h w. Reads x twice, and converts to fp32 as it reads."""
    values = x.unflatten(1, (groups, -1))
    sums = values.sum((2, 3, 4), dtype=torch.float32)
    return Moments(sums, torch.linalg.vector_norm(values, dim=(2, 3, 4), dtype=torch.float32).square())


def torch_apply_norm_silu(x: Tensor, moments: Moments, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """silu(norm(x)) of n c h w, in the memory format of x."""
    groups = moments.sums.shape[1]
    count = x[0].numel() // groups
    mean = moments.sums / count
    inverse = (moments.squares / count - mean.square()).clamp_min(0).add(eps).rsqrt()
    scale = (weight.float().view(groups, -1) * inverse[:, :, None]).flatten(1)
    shift = bias.float() - mean.repeat_interleave(len(bias) // groups, dim=1) * scale
    # fp32 inside and one rounding, because the sum of products is formed in the widest type and then converted.
    out = torch.addcmul(shift[:, :, None, None], x, scale[:, :, None, None], out=torch.empty_like(x))
    return F.silu(out, inplace=True)


# The references.


def reference_statistics(x: Tensor, groups: int) -> Moments:
    planes = _planes(x).unflatten(1, (groups, -1)).flatten(2)
    return Moments(planes.sum(-1), planes.square().sum(-1))


def reference_add_residual(
    x: Tensor, residual: Tensor | None, groups: int, bias: Tensor | None = None
) -> tuple[Tensor, Moments]:
    total = _with(x.float(), bias)
    out = (total if residual is None else total + residual.float()).to(x.dtype)
    return out, reference_statistics(out, groups)


def reference_apply_norm_silu(x: Tensor, moments: Moments, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    grouped = _planes(x).unflatten(1, (moments.sums.shape[1], -1))
    count = grouped[0, 0].numel()
    mean = (moments.sums / count)[:, :, None, None, None]
    variance = (moments.squares / count)[:, :, None, None, None] - mean.square()
    grouped = (grouped - mean) * torch.rsqrt(variance.clamp_min(0) + eps)
    y = F.silu(_with(grouped.flatten(1, 2) * weight.float()[:, None, None], bias)).to(x.dtype)
    return y if x.ndim == 4 else y.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


def _planes(x: Tensor) -> Tensor:
    """fp32 n c h w."""
    return (x if x.ndim == 4 else x.transpose(1, 2).flatten(0, 1)).float()


def _with(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias.float().view(-1, *[1] * (x.ndim - 2))
