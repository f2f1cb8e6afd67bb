"""The kernels of `modulate`: one program a token. Importing this file imports Triton."""
# C channels, padded to a power of two inside a block

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WARPS = 4


@triton.jit
def _row(row, c, C: tl.constexpr):
    return tl.load(row + c, mask=c < C, other=0.0).to(tl.float32)


@triton.jit
def norm_modulate_kernel(x, scale, shift, out, eps, C: tl.constexpr, BLOCK: tl.constexpr):
    c = tl.arange(0, BLOCK)
    start = tl.program_id(0).to(tl.int64) * C
    value = tl.load(x + start + c, mask=c < C, other=0.0).to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value, 0) / C + eps)
    value = value * _row(scale, c, C) + _row(shift, c, C)
    tl.store(out + start + c, value.to(out.dtype.element_ty), mask=c < C)


@triton.jit
def gate_residual_kernel(x, y, gate, out, C: tl.constexpr, BLOCK: tl.constexpr):
    c = tl.arange(0, BLOCK)
    start = tl.program_id(0).to(tl.int64) * C
    value = tl.load(y + start + c, mask=c < C, other=0.0).to(tl.float32) * _row(gate, c, C)
    value += tl.load(x + start + c, mask=c < C, other=0.0).to(tl.float32)
    tl.store(out + start + c, value.to(out.dtype.element_ty), mask=c < C)


def norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """See `modulate.norm_modulate`."""
    out, (tokens, channels) = torch.empty_like(x), x.shape
    with torch.cuda.device_of(x):
        norm_modulate_kernel[(tokens,)](
            x,
            scale.contiguous(),
            shift.contiguous(),
            out,
            eps,
            C=channels,
            BLOCK=triton.next_power_of_2(channels),
            num_warps=WARPS,
        )
    return out


def gate_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """See `modulate.gate_residual`."""
    out, (tokens, channels) = torch.empty_like(x), x.shape
    with torch.cuda.device_of(x):
        gate_residual_kernel[(tokens,)](
            x, y, gate.contiguous(), out, C=channels, BLOCK=triton.next_power_of_2(channels), num_warps=WARPS
        )
    return out
