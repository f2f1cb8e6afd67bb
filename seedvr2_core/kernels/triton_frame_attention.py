"""The kernel of `frame_attention`. Importing this file imports Triton."""
# L positions of a frame   C channels, padded to a power of two in a block
# a tile: QUERIES positions of one frame, KEYS at a time

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .frame_attention import Tile


@triton.jit
def frame_kernel(
    q,  # n L C, as all others
    k,
    v,
    out,
    L,
    scale,  # 1/sqrt(c), for a softmax to the base 2
    C: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    frame = tl.program_id(1).to(tl.int64) * L * C
    row = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    c = tl.arange(0, BLOCK_C)
    wide = (c < C)[None, :]
    mine = frame + row.to(tl.int64)[:, None] * C + c[None, :]
    asked = tl.load(q + mine, mask=(row < L)[:, None] & wide, other=0.0)
    top = tl.full((QUERIES,), -float("inf"), tl.float32)
    weight = tl.full((QUERIES,), 0.0, tl.float32)
    total = tl.full((QUERIES, BLOCK_C), 0.0, tl.float32)
    step = tl.arange(0, KEYS)
    for at in range(0, L, KEYS):
        real = at + step < L
        where = frame + (at + step).to(tl.int64)[:, None] * C + c[None, :]
        key = tl.load(k + where, mask=real[:, None] & wide, other=0.0)
        scores = tl.where(real[None, :], tl.dot(asked, key.T) * scale, -float("inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        share = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(top - higher)
        weight = weight * shrink + tl.sum(share, 1)
        value = tl.load(v + where, mask=real[:, None] & wide, other=0.0)
        total = tl.dot(share.to(value.dtype), value, total * shrink[:, None])
        top = higher
    result = (total / weight[:, None]).to(out.dtype.element_ty)
    tl.store(out + mine, result, mask=(row < L)[:, None] & wide)


def run(q: Tensor, k: Tensor, v: Tensor, tile: Tile) -> Tensor:
    """See `frame_attention.attend`."""
    frames, positions, channels = q.shape
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out = torch.empty_like(q)
    with torch.cuda.device_of(q):
        frame_kernel[(triton.cdiv(positions, tile.queries), frames)](
            q, k, v, out, positions, math.log2(math.e) / math.sqrt(channels), C=channels, QUERIES=tile.queries,
            KEYS=tile.keys, BLOCK_C=max(16, triton.next_power_of_2(channels)), num_warps=tile.warps,
            num_stages=tile.stages,
        )  # fmt: skip
    return out
