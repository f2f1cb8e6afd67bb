"""The kernels of `modulate`: one program a token. Importing this file imports Triton."""
# C channels, padded to a power of two inside a block

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WARPS = 4


@triton.jit
def _row(rows, sample, c, C: tl.constexpr):
    """This token's row of s C, in fp32."""
    if sample is not None:
        rows += tl.load(sample + tl.program_id(0)).to(tl.int64) * C
    return tl.load(rows + c, mask=c < C, other=0.0).to(tl.float32)


@triton.jit
def norm_modulate_kernel(x, scale, shift, sample, out, eps, C: tl.constexpr, BLOCK: tl.constexpr):
    c = tl.arange(0, BLOCK)
    start = tl.program_id(0).to(tl.int64) * C
    value = tl.load(x + start + c, mask=c < C, other=0.0).to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value, 0) / C + eps)
    value = value * _row(scale, sample, c, C) + _row(shift, sample, c, C)
    tl.store(out + start + c, value.to(out.dtype.element_ty), mask=c < C)


@triton.jit
def gate_residual_kernel(x, y, gate, sample, out, C: tl.constexpr, BLOCK: tl.constexpr):
    c = tl.arange(0, BLOCK)
    start = tl.program_id(0).to(tl.int64) * C
    value = tl.load(y + start + c, mask=c < C, other=0.0).to(tl.float32) * _row(gate, sample, c, C)
    value += tl.load(x + start + c, mask=c < C, other=0.0).to(tl.float32)
    tl.store(out + start + c, value.to(out.dtype.element_ty), mask=c < C)


def norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float, sample: Tensor | None, out: Tensor) -> Tensor:
    """See `modulate.norm_modulate`."""
    tokens, channels = x.shape
    with torch.cuda.device_of(x):
        norm_modulate_kernel[(tokens,)](
            x,
            scale.contiguous(),
            shift.contiguous(),
            sample,
            out,
            eps,
            C=channels,
            BLOCK=triton.next_power_of_2(channels),
            num_warps=WARPS,
        )
    return out


def gate_residual(x: Tensor, y: Tensor, gate: Tensor, sample: Tensor | None, out: Tensor) -> Tensor:
    """See `modulate.gate_residual`."""
    tokens, channels = x.shape
    with torch.cuda.device_of(x):
        gate_residual_kernel[(tokens,)](
            x, y, gate.contiguous(), sample, out, C=channels, BLOCK=triton.next_power_of_2(channels), num_warps=WARPS
        )
    return out
