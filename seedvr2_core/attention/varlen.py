"""torch's own variable-length attention (torch 2.10 and later, CUDA)."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from .backend import AttentionCall, Backend, needs_half_on_cuda

THERE = find_spec("torch.nn.attention.varlen") is not None


def why_not(call: AttentionCall) -> str | None:
    if not THERE:
        return "needs torch 2.10 or later"
    if torch.version.hip or not torch.backends.cuda.is_flash_attention_available():
        return "needs a torch that was built with flash attention for NVIDIA, as for Linux"
    return needs_half_on_cuda(call)


def run(call: AttentionCall) -> Tensor:
    # Late: with it comes torch's whole compiler, which takes as long to import as all the rest.
    from torch.nn.attention.varlen import varlen_attn

    cu_seqlens, longest = call.sequences.cu_seqlens, max(call.sequences.lengths)
    return varlen_attn(call.q, call.k, call.v, cu_seqlens, cu_seqlens, longest, longest)


BACKEND = Backend(
    name="varlen", why_not=why_not, run=run, differentiable=True, tolerance={"atol": 4e-3, "rtol": 4e-3}
)
