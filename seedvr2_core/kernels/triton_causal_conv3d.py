"""The kernels of `causal_conv3d`. Importing this file imports Triton.

A program computes the product [positions of a box of one frame] x [weights of some output channels] and sums over taps
and input channels. Both kernels number programs and finish alike; they differ in how operands arrive.
"""
# T frames out   H W height, width   C_IN C_OUT channels   TAPS in time; 3 x 3 in space
# a tile: ROWS x COLUMNS positions, CHANNELS out; DEPTH input channels at a time

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .causal_conv3d import Tile
from .group_norm import Moments, frames_of


@triton.jit
def _place(T, H, W, C_OUT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr):
    """Clip, frame in it, first row, column and output channel of this program.

    Channels change fastest, then columns: programs that run together read the same input and neighbouring rows, which
    the L2 cache then holds.
    """
    program = tl.program_id(0)
    across: tl.constexpr = (C_OUT + CHANNELS - 1) // CHANNELS
    wide = (W + COLUMNS - 1) // COLUMNS
    high = (H + ROWS - 1) // ROWS
    n0 = program % across * CHANNELS
    program = program // across
    x0 = program % wide * COLUMNS
    program = program // wide
    y0 = program % high * ROWS
    program = program // high
    return program // T, program % T, y0, x0, n0


@triton.jit
def _finish(
    total,  # positions of the tile x CHANNELS, fp32
    out,
    bias,
    residual,
    partials,
    clip,
    t,
    y0,
    x0,
    n0,
    T,
    H,
    W,
    out_clip,
    out_frame,
    residual_clip,
    residual_frame,
    C_OUT: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Add what is to be added, store, and leave the sums of this tile's groups."""
    p = tl.arange(0, ROWS * COLUMNS)
    row = p // COLUMNS
    column = p % COLUMNS
    n = n0 + tl.arange(0, CHANNELS)
    inside = ((y0 + row < H) & (x0 + column < W))[:, None] & (n < C_OUT)[None, :]
    # Only the start of a tile needs 64 bits.
    start = (y0.to(tl.int64) * W + x0) * C_OUT
    where = (row * W + column)[:, None] * C_OUT + n[None, :]
    if bias is not None:
        total += tl.load(bias + n, mask=n < C_OUT, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        residual += clip.to(tl.int64) * residual_clip + t.to(tl.int64) * residual_frame + start
        total += tl.load(residual + where, mask=inside, other=0.0).to(tl.float32)
    stored = total.to(out.dtype.element_ty)
    out += clip.to(tl.int64) * out_clip + t.to(tl.int64) * out_frame + start
    tl.store(out + where, stored, mask=inside)
    if partials is not None:
        # 2 n tiles GROUPS: added up afterwards in an order that never changes, unlike atomic additions.
        width: tl.constexpr = C_OUT // GROUPS
        held: tl.constexpr = CHANNELS // width
        wide = (W + COLUMNS - 1) // COLUMNS
        tiles = (H + ROWS - 1) // ROWS * wide
        tile = y0 // ROWS * wide + x0 // COLUMNS
        group = n0 // width + tl.arange(0, held)
        kept = tl.where(inside, stored.to(tl.float32), 0.0)
        sums = tl.sum(tl.reshape(tl.sum(kept, 0), (held, width)), 1)
        squares = tl.sum(tl.reshape(tl.sum(kept * kept, 0), (held, width)), 1)
        here = ((clip * T + t).to(tl.int64) * tiles + tile) * GROUPS + group
        # Of all axes of the grid only the first is used, and channels vary fastest in it.
        across: tl.constexpr = (C_OUT + CHANNELS - 1) // CHANNELS
        half = (tl.num_programs(0) // across).to(tl.int64) * GROUPS
        tl.store(partials + here, sums, mask=group < GROUPS)
        tl.store(partials + half + here, squares, mask=group < GROUPS)


@triton.jit
def descriptor_kernel(
    x,  # descriptor of b t h w C_IN, box 1 1 ROWS COLUMNS DEPTH
    weight,  # descriptor of C_OUT (TAPS 3 3 C_IN), box CHANNELS DEPTH
    out,
    bias,
    residual,
    partials,
    T,
    H,
    W,
    out_clip,
    out_frame,
    residual_clip,
    residual_frame,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    TAPS: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    clip, t, y0, x0, n0 = _place(T, H, W, C_OUT, ROWS, COLUMNS, CHANNELS)
    total = tl.full((CHANNELS, ROWS * COLUMNS), 0.0, tl.float32)
    parts: tl.constexpr = C_IN // DEPTH
    for step in range(TAPS * 9 * parts):
        tap = step // parts
        c = step % parts * DEPTH
        # Boxes that reach over an edge are filled up with zeros: the padding.
        box = x.load([clip, t + tap // 9, y0 + tap // 3 % 3 - 1, x0 + tap % 3 - 1, c])
        # Weights come first because Triton lets only the second operand of a product be reshaped where it lies, in
        # shared memory; as the first one the box would pass through registers.
        total = tl.dot(weight.load([n0, step * DEPTH]), tl.reshape(box, (ROWS * COLUMNS, DEPTH)).T, total)
    _finish(
        total.T, out, bias, residual, partials, clip, t, y0, x0, n0, T, H, W, out_clip, out_frame, residual_clip,
        residual_frame, C_OUT, GROUPS, ROWS, COLUMNS, CHANNELS,
    )  # fmt: skip


@triton.jit
def pointer_kernel(
    x,
    weight,  # C_OUT (TAPS 3 3 C_IN)
    out,
    bias,
    residual,
    partials,
    T,
    H,
    W,
    x_clip,
    x_frame,
    out_clip,
    out_frame,
    residual_clip,
    residual_frame,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    TAPS: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    clip, t, y0, x0, n0 = _place(T, H, W, C_OUT, ROWS, COLUMNS, CHANNELS)
    p = tl.arange(0, ROWS * COLUMNS)
    row = p // COLUMNS
    column = p % COLUMNS
    n = n0 + tl.arange(0, CHANNELS)
    d = tl.arange(0, DEPTH)
    # Only the start of a tile needs 64 bits.
    x += clip.to(tl.int64) * x_clip + t.to(tl.int64) * x_frame + (y0.to(tl.int64) * W + x0) * C_IN
    weight += n[:, None] * (TAPS * 9 * C_IN)
    total = tl.full((ROWS * COLUMNS, CHANNELS), 0.0, tl.float32)
    parts: tl.constexpr = (C_IN + DEPTH - 1) // DEPTH
    for step in range(TAPS * 9 * parts):
        tap = step // parts
        c = step % parts * DEPTH + d
        down = row + tap // 3 % 3 - 1
        right = column + tap % 3 - 1
        inside = (y0 + down >= 0) & (y0 + down < H) & (x0 + right >= 0) & (x0 + right < W)
        frame = x + (tap // 9).to(tl.int64) * x_frame
        box = tl.load(
            frame + (down * W + right)[:, None] * C_IN + c[None, :],
            mask=inside[:, None] & (c < C_IN)[None, :],
            other=0.0,
        )
        factors = tl.load(weight + tap * C_IN + c[None, :], mask=(n < C_OUT)[:, None] & (c < C_IN)[None, :], other=0.0)
        total = tl.dot(box, factors.T, total)
    _finish(
        total, out, bias, residual, partials, clip, t, y0, x0, n0, T, H, W, out_clip, out_frame, residual_clip,
        residual_frame, C_OUT, GROUPS, ROWS, COLUMNS, CHANNELS,
    )  # fmt: skip


def run(x: Tensor, weight: Tensor, tile: Tile, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """See `causal_conv3d.causal_conv3d`."""
    out = _output(x, weight)
    _launch(x, weight, tile, bias, residual, out, None, 1)
    return out


def run_with_statistics(
    x: Tensor, weight: Tensor, tile: Tile, groups: int, bias: Tensor | None, residual: Tensor | None
) -> tuple[Tensor, Moments]:
    """See `causal_conv3d.causal_conv3d_with_statistics`."""
    out = _output(x, weight)
    at = frames_of(out)
    boxes = triton.cdiv(at.height, tile.rows) * triton.cdiv(at.width, tile.columns)
    partials = torch.empty(2, at.count, boxes, groups, dtype=torch.float32, device=x.device)
    _launch(x, weight, tile, bias, residual, out, partials, groups)
    return out, Moments(*partials.sum(2).unbind(0))


def _output(x: Tensor, weight: Tensor) -> Tensor:
    b, _, extended, h, w = x.shape
    shape = (b, weight.shape[0], extended - weight.shape[2] + 1, h, w)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)


def _launch(
    x: Tensor,
    weight: Tensor,
    tile: Tile,
    bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    partials: Tensor | None,
    groups: int,
) -> None:
    c_out, c_in, taps, *_ = weight.shape
    source, at = frames_of(x), frames_of(out)
    beside = at if residual is None else frames_of(residual)
    weight = weight.contiguous(memory_format=torch.channels_last_3d).permute(0, 2, 3, 4, 1).reshape(c_out, -1)
    if tile.loads == "descriptors":
        kernel, places = descriptor_kernel, ()
        x = x.permute(0, 2, 3, 4, 1)
        inputs = (
            TensorDescriptor.from_tensor(x, [1, 1, tile.rows, tile.columns, tile.depth]),
            TensorDescriptor.from_tensor(weight, [tile.channels, tile.depth]),
        )
    else:
        kernel, places = pointer_kernel, (source.clip_stride, source.frame_stride)
        inputs = (x, weight)
    boxes = triton.cdiv(at.height, tile.rows) * triton.cdiv(at.width, tile.columns)
    with torch.cuda.device_of(out):
        kernel[(at.count * boxes * triton.cdiv(c_out, tile.channels),)](
            *inputs, out, bias, residual, partials, at.frames, at.height, at.width, *places, at.clip_stride,
            at.frame_stride, beside.clip_stride, beside.frame_stride, C_IN=c_in, C_OUT=c_out, TAPS=taps, GROUPS=groups,
            ROWS=tile.rows, COLUMNS=tile.columns, CHANNELS=tile.channels, DEPTH=tile.depth, num_warps=tile.warps,
            num_stages=tile.stages,
        )  # fmt: skip
