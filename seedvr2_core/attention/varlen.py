"""torch's own variable-length attention (torch 2.10 and later, CUDA)."""

from __future__ import annotations

from torch import Tensor

from .backend import AttentionCall, Backend, needs_half_on_cuda

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None


def why_not(call: AttentionCall) -> str | None:
    if varlen_attn is None:
        return "needs torch 2.10 or later"
    return needs_half_on_cuda(call)


def run(call: AttentionCall) -> Tensor:
    cu_seqlens, longest = call.sequences.cu_seqlens, max(call.sequences.lengths)
    return varlen_attn(call.q, call.k, call.v, cu_seqlens, cu_seqlens, longest, longest)


BACKEND = Backend(
    name="varlen", why_not=why_not, run=run, differentiable=True, tolerance={"atol": 4e-3, "rtol": 4e-3}
)
