"""The kernels of `windows`. Importing this file imports Triton.

Keys are normalised and rotated once, by a pass of their own: a window of 3240 tokens is read by 26 programs a head, and
each would do it again. Queries are read once, so for them it is the first step of the attention.
"""
# D channels of a head, padded to a power of two in a block; PAIRS of them are rotated
# a tile: QUERIES rows of one window and head, KEYS at a time

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .windows import StreamCall, Tile, WindowCall

# Tokens of one program of the pass over keys. It goes through all heads, whose angles are the same.
TOKENS = 32


@triton.jit
def _turn(x, weight, cos, sin, eps, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """RMS norm and rotation of ROWS BLOCK_D in fp32; cosine and sine are ROWS BLOCK_D/2."""
    x *= tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
    x *= weight
    # Adjacent channels are the pairs.
    even, odd = tl.split(tl.reshape(x, (ROWS, BLOCK_D // 2, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, odd * cos + even * sin), (ROWS, BLOCK_D))


@triton.jit
def _angles(cos, sin, token, real, PAIRS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of the tables, as ROWS BLOCK_D/2. Pairs beyond the rotated ones keep still."""
    pair = tl.arange(0, BLOCK_D // 2)
    where = token.to(tl.int64)[:, None] * PAIRS + pair[None, :]
    mask = real[:, None] & (pair < PAIRS)[None, :]
    return tl.load(cos + where, mask=mask, other=1.0), tl.load(sin + where, mask=mask, other=0.0)


@triton.jit
def key_kernel(
    k,
    weight,
    cos,  # of the first token of this stream
    sin,
    out,  # tokens heads D
    COUNT,
    HEADS,
    token_stride,
    head_stride,
    eps,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    real = token < COUNT
    mask = real[:, None] & (d < D)[None, :]
    scale = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    turn, lift = _angles(cos, sin, token, real, PAIRS, BLOCK_D)
    source = k + token.to(tl.int64)[:, None] * token_stride + d[None, :]
    target = out + token.to(tl.int64)[:, None] * (HEADS * D) + d[None, :]
    for head in range(HEADS):
        x = tl.load(source + head * head_stride, mask=mask, other=0.0).to(tl.float32)
        x = _turn(x, scale, turn, lift, eps, D, ROWS, BLOCK_D)
        tl.store(target + head * D, x.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _step(q, k, v, real, scale, top, weight, total):
    """One tile of keys and values: the running maximum, sum of weights and weighted values of an online softmax."""
    scores = tl.where(real[None, :], tl.dot(q, k.T) * scale, -float("inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    share = tl.exp2(scores - higher[:, None])
    shrink = tl.exp2(top - higher)
    weight = weight * shrink + tl.sum(share, 1)
    return higher, weight, tl.dot(share.to(v.dtype), v, total * shrink[:, None])


@triton.jit
def window_kernel(
    vid_q,
    vid_v,
    vid_k,  # turned, n heads D
    vid_norm,
    vid_out,  # n heads D
    txt_q,  # None if text does not ask
    txt_v,
    txt_k,  # turned, l heads D
    txt_norm,
    txt_out,  # r heads D
    cos,  # video, then text
    sin,
    order,
    starts,
    text_starts,
    text_lengths,
    text_rows,
    VIDEO,  # n
    HEADS,
    vid_q_token,
    vid_q_head,
    vid_v_token,
    vid_v_head,
    txt_q_token,
    txt_q_head,
    txt_v_token,
    txt_v_head,
    scale,  # 1/sqrt(d), for a softmax to the base 2
    eps,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    head = tl.program_id(1)
    window = tl.program_id(2)
    start = tl.load(starts + window)
    length = tl.load(starts + window + 1) - start
    text = tl.load(text_starts + window)
    text_length = tl.load(text_lengths + window)
    first = tl.program_id(0) * QUERIES
    rows = length
    if txt_q is not None:
        rows += text_length
    # The grid is cut for the longest window.
    if first >= rows:
        return

    row = first + tl.arange(0, QUERIES)
    d = tl.arange(0, BLOCK_D)
    wide = (d < D)[None, :]
    of_video = row < length
    token = tl.load(order + start + row, mask=of_video, other=0).to(tl.int64)[:, None]
    q = tl.load(vid_q + head * vid_q_head + token * vid_q_token + d[None, :], mask=of_video[:, None] & wide, other=0.0)
    q = q.to(tl.float32)
    factor = tl.load(vid_norm + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    place = token
    if txt_q is not None:
        # A tile may hold the last video tokens of a window and its text.
        of_text = (row >= length) & (row < rows)
        txt_token = (text + row - length).to(tl.int64)[:, None]
        txt_at = txt_q + head * txt_q_head + txt_token * txt_q_token + d[None, :]
        q += tl.load(txt_at, mask=of_text[:, None] & wide, other=0.0).to(tl.float32)
        txt_factor = tl.load(txt_norm + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
        factor = tl.where(of_text[:, None], txt_factor, factor)
        place = tl.where(of_text[:, None], VIDEO + txt_token, token)
    pair = tl.arange(0, BLOCK_D // 2)[None, :]
    rotated = (row < rows)[:, None] & (pair < PAIRS)
    turn = tl.load(cos + place * PAIRS + pair, mask=rotated, other=1.0)
    lift = tl.load(sin + place * PAIRS + pair, mask=rotated, other=0.0)
    q = _turn(q, factor, turn, lift, eps, D, QUERIES, BLOCK_D).to(vid_k.dtype.element_ty)

    top = tl.full((QUERIES,), -float("inf"), tl.float32)
    weight = tl.full((QUERIES,), 0.0, tl.float32)
    total = tl.full((QUERIES, BLOCK_D), 0.0, tl.float32)
    step = tl.arange(0, KEYS)
    for at in range(0, length, KEYS):
        real = at + step < length
        mask = real[:, None] & wide
        key = tl.load(order + start + at + step, mask=real, other=0).to(tl.int64)[:, None]
        k = tl.load(vid_k + head * D + key * (HEADS * D) + d[None, :], mask=mask, other=0.0)
        v = tl.load(vid_v + head * vid_v_head + key * vid_v_token + d[None, :], mask=mask, other=0.0)
        top, weight, total = _step(q, k, v, real, scale, top, weight, total)
    for at in range(0, text_length, KEYS):
        real = at + step < text_length
        mask = real[:, None] & wide
        key = (text + at + step).to(tl.int64)[:, None]
        k = tl.load(txt_k + head * D + key * (HEADS * D) + d[None, :], mask=mask, other=0.0)
        v = tl.load(txt_v + head * txt_v_head + key * txt_v_token + d[None, :], mask=mask, other=0.0)
        top, weight, total = _step(q, k, v, real, scale, top, weight, total)

    out = (total / weight[:, None]).to(vid_out.dtype.element_ty)
    tl.store(vid_out + head * D + token * (HEADS * D) + d[None, :], out, mask=of_video[:, None] & wide)
    if txt_q is not None:
        kept = (tl.load(text_rows + window) + row - length).to(tl.int64)[:, None]
        tl.store(txt_out + head * D + kept * (HEADS * D) + d[None, :], out, mask=of_text[:, None] & wide)


def run(call: WindowCall, tile: Tile) -> tuple[Tensor, Tensor | None]:
    """See `windows.attend`."""
    vid, txt, windows = call.vid, call.txt, call.windows
    n, heads, d = vid.q.shape
    vid_out = torch.empty(n, heads, d, dtype=vid.v.dtype, device=vid.v.device)
    txt_out = None if txt.q is None else vid_out.new_empty(windows.rows, heads, d)
    grid = (triton.cdiv(windows.longest, tile.queries), heads, len(windows.text_starts))
    with torch.cuda.device_of(vid.q):
        window_kernel[grid](
            vid.q, vid.v, turned_keys(vid, call, 0), vid.norm_q, vid_out,
            txt.q, txt.v, turned_keys(txt, call, n), txt.norm_q, txt_out,
            call.cos, call.sin, windows.order, windows.starts, windows.text_starts, windows.text_lengths,
            windows.text_rows, n, heads, *_strides(vid.q), *_strides(vid.v), *_strides(txt.q), *_strides(txt.v),
            math.log2(math.e) / math.sqrt(d), call.eps, D=d, PAIRS=call.cos.shape[1], QUERIES=tile.queries,
            KEYS=tile.keys, BLOCK_D=block_width(d), num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return vid_out, txt_out


def turned_keys(stream: StreamCall, call: WindowCall, first: int) -> Tensor:
    """Normalised and rotated keys, tokens heads d, of a stream whose first token is number `first` of all."""
    tokens, heads, d = stream.k.shape
    out = torch.empty(tokens, heads, d, dtype=stream.k.dtype, device=stream.k.device)
    with torch.cuda.device_of(stream.k):
        key_kernel[(triton.cdiv(tokens, TOKENS),)](
            stream.k, stream.norm_k, call.cos[first:], call.sin[first:], out, tokens, heads, *_strides(stream.k),
            call.eps, D=d, PAIRS=call.cos.shape[1], ROWS=TOKENS, BLOCK_D=block_width(d),
        )  # fmt: skip
    return out


def block_width(d: int) -> int:
    """Channels of a head inside a block; tensor cores want at least 16."""
    return max(16, triton.next_power_of_2(d))


def _strides(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else (x.stride(0), x.stride(1))
