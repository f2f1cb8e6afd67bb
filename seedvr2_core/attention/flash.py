"""flash-attn 2 and 3, where they are installed."""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import AttentionCall, Backend, needs_half_on_cuda

try:
    from flash_attn import flash_attn_varlen_func as flash_2
except ImportError:
    flash_2 = None
try:
    from flash_attn_interface import flash_attn_varlen_func as flash_3
except ImportError:
    flash_3 = None


def why_not_2(call: AttentionCall) -> str | None:
    if flash_2 is None:
        return "needs the package flash-attn"
    return needs_half_on_cuda(call)


def why_not_3(call: AttentionCall) -> str | None:
    if flash_3 is None:
        return "needs the package flash-attn-3 (flash_attn_interface)"
    if (reason := needs_half_on_cuda(call)) is None and torch.cuda.get_device_capability(call.q.device) != (9, 0):
        return "needs a Hopper GPU (compute capability 9.0)"
    return reason


def run_2(call: AttentionCall) -> Tensor:
    cu_seqlens, longest = call.sequences.cu_seqlens, max(call.sequences.lengths)
    # torch's own switch does not reach it.
    same = torch.are_deterministic_algorithms_enabled()
    return flash_2(call.q, call.k, call.v, cu_seqlens, cu_seqlens, longest, longest, deterministic=same)


def run_3(call: AttentionCall) -> Tensor:
    cu_seqlens, longest = call.sequences.cu_seqlens, max(call.sequences.lengths)
    same = torch.are_deterministic_algorithms_enabled()
    out = flash_3(call.q, call.k, call.v, cu_seqlens, cu_seqlens, longest, longest, deterministic=same)
    # Early versions also return the log-sum-exp.
    return out[0] if isinstance(out, tuple) else out


_TOLERANCE = {"atol": 4e-3, "rtol": 4e-3}
FLASH_2 = Backend(name="flash_2", why_not=why_not_2, run=run_2, differentiable=True, tolerance=_TOLERANCE)
FLASH_3 = Backend(name="flash_3", why_not=why_not_3, run=run_3, differentiable=True, tolerance=_TOLERANCE)
