"""The kernels of `group_norm`. Importing this file imports Triton."""
# P positions of one frame   C channels, padded to a power of two inside a block

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .group_norm import Frames, Moments, frames_of

# Elements that one program holds at a time: 32 a thread, four loads of 16 bytes in flight before the first is used.
BLOCK = 4096
WARPS = 4
# Programs that share the frames of one call while they add up. More than any GPU runs at once, and a constant, so that
# sums do not depend on the GPU.
PROGRAMS = 2048


@triton.jit
def _frame(FRAMES, clip_stride, frame_stride):
    """Where this program's frame starts. In 64 bits: a long clip has more than 2^31 elements."""
    frame = tl.program_id(1)
    return (frame // FRAMES).to(tl.int64) * clip_stride + (frame % FRAMES).to(tl.int64) * frame_stride


@triton.jit
def statistics_kernel(
    x,
    bias,  # C, or None
    residual,  # or None
    out,  # or None
    partials,  # 2 n splits C: each program's share, added up afterwards in an order that never changes
    FRAMES,
    P,
    x_clip,
    x_frame,
    residual_clip,
    residual_frame,
    out_clip,
    out_frame,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    split = tl.program_id(0)
    splits = tl.num_programs(0)
    c = tl.arange(0, BLOCK_C)
    x += _frame(FRAMES, x_clip, x_frame)
    if residual is not None:
        residual += _frame(FRAMES, residual_clip, residual_frame)
    if out is not None:
        out += _frame(FRAMES, out_clip, out_frame)
    sums = tl.full((BLOCK_P, BLOCK_C), 0.0, tl.float32)
    squares = tl.full((BLOCK_P, BLOCK_C), 0.0, tl.float32)
    for start in range(split * BLOCK_P, P, splits * BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        inside = (p < P)[:, None] & (c < C)[None, :]
        where = p.to(tl.int64)[:, None] * C + c[None, :]
        value = tl.load(x + where, mask=inside, other=0.0).to(tl.float32)
        if bias is not None:
            value += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
        if residual is not None:
            value += tl.load(residual + where, mask=inside, other=0.0).to(tl.float32)
        if out is not None:
            stored = value.to(out.dtype.element_ty)
            tl.store(out + where, stored, mask=inside)
            value = stored.to(tl.float32)
        # A bias also reaches positions beyond the frame.
        value = tl.where(inside, value, 0.0)
        sums += value
        squares += value * value
    here = ((tl.program_id(1) * splits + split) * C).to(tl.int64) + c
    half = (tl.num_programs(1) * splits * C).to(tl.int64)
    tl.store(partials + here, tl.sum(sums, 0), mask=c < C)
    tl.store(partials + half + here, tl.sum(squares, 0), mask=c < C)


@triton.jit
def apply_kernel(
    x,
    sums,  # n groups
    squares,
    weight,  # C
    bias,  # C
    out,
    FRAMES,
    P,
    share,  # 1 / values in a group of a frame
    eps,
    x_clip,
    x_frame,
    out_clip,
    out_frame,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    frame = tl.program_id(1)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.arange(0, BLOCK_C)
    real = c < C
    inside = (p < P)[:, None] & real[None, :]
    where = p.to(tl.int64)[:, None] * C + c[None, :]
    value = tl.load(x + _frame(FRAMES, x_clip, x_frame) + where, mask=inside, other=0.0).to(tl.float32)
    group = frame * GROUPS + c // (C // GROUPS)
    mean = tl.load(sums + group, mask=real, other=0.0) * share
    # Rounding can leave a constant group a hair below zero.
    variance = tl.maximum(tl.load(squares + group, mask=real, other=0.0) * share - mean * mean, 0.0)
    scale = tl.load(weight + c, mask=real, other=0.0).to(tl.float32) * tl.rsqrt(variance + eps)
    shift = tl.load(bias + c, mask=real, other=0.0).to(tl.float32) - mean * scale
    value = value * scale[None, :] + shift[None, :]
    value = value / (1.0 + tl.exp(-value))
    tl.store(out + _frame(FRAMES, out_clip, out_frame) + where, value.to(out.dtype.element_ty), mask=inside)


def _block(channels: int) -> dict[str, int]:
    width = triton.next_power_of_2(channels)
    return {"C": channels, "BLOCK_C": width, "BLOCK_P": max(1, BLOCK // width)}


def statistics(
    x: Tensor, groups: int, bias: Tensor | None = None, residual: Tensor | None = None, out: Tensor | None = None
) -> Moments:
    """See `group_norm.group_statistics` and `group_norm.add_residual`."""
    at = frames_of(x)
    other_at = [frames_of(x if y is None else y) for y in (residual, out)]
    block = _block(at.channels)
    splits = min(triton.cdiv(at.pixels, block["BLOCK_P"]), triton.cdiv(PROGRAMS, at.count))
    partials = torch.empty(2, at.count, splits, at.channels, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        statistics_kernel[(splits, at.count)](
            x, bias, residual, out, partials, at.frames, at.pixels, *_strides(at, *other_at), **block, num_warps=WARPS
        )
    return Moments(*partials.sum(2).unflatten(-1, (groups, -1)).sum(-1).unbind(0))


def apply(x: Tensor, moments: Moments, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """See `group_norm.apply_norm_silu`."""
    at, out = frames_of(x), torch.empty_like(x)
    groups = moments.sums.shape[1]
    block = _block(at.channels)
    with torch.cuda.device_of(x):
        apply_kernel[(triton.cdiv(at.pixels, block["BLOCK_P"]), at.count)](
            x,
            moments.sums,
            moments.squares,
            weight,
            bias,
            out,
            at.frames,
            at.pixels,
            groups / (at.channels * at.pixels),
            eps,
            *_strides(at, frames_of(out)),
            GROUPS=groups,
            **block,
            num_warps=WARPS,
        )
    return out


def _strides(*places: Frames) -> list[int]:
    return [stride for at in places for stride in (at.clip_stride, at.frame_stride)]
