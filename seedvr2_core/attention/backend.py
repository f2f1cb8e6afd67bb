"""What an attention implementation promises, and the call it receives.

    l packed tokens of all sequences   heads, d attention heads and their width
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from ..device import AMPERE

# What the fused kernels are written for.
HEAD_STEP, MAX_HEAD_DIM = 8, 256


@dataclass(frozen=True)
class Sequences:
    """Where the sequences of a packed tensor begin and end: known on the host, and made once per clip."""

    lengths: tuple[int, ...]
    device: torch.device

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Start of every sequence, and the end of the last."""
        return (0, *accumulate(self.lengths))

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """The offsets as int32 on the device, as variable-length kernels want them."""
        return torch.tensor(self.offsets, dtype=torch.int32, device=self.device)


@dataclass(frozen=True)
class AttentionCall:
    """Softmax attention inside each of many packed sequences, scale 1/sqrt(d), no mask."""

    q: Tensor  # l heads d
    k: Tensor
    v: Tensor
    sequences: Sequences


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One implementation.

    `why_not` says in words why a call cannot run here, or None. `tolerance` is how far from the fp32 reference its
    result may be, as keyword arguments of torch.testing.assert_close.
    """

    name: str
    why_not: Callable[[AttentionCall], str | None]
    run: Callable[[AttentionCall], Tensor]
    differentiable: bool
    tolerance: Mapping[str, float]


def needs_half_on_cuda(call: AttentionCall) -> str | None:
    """The condition that the fused kernels share."""
    if call.q.device.type != "cuda":
        return f"needs a CUDA device, got {call.q.device.type}"
    if call.q.dtype not in (torch.float16, torch.bfloat16):
        return f"needs fp16 or bf16, got {str(call.q.dtype).removeprefix('torch.')}"
    if (d := call.q.shape[-1]) % HEAD_STEP or d > MAX_HEAD_DIM:
        return f"needs heads of up to {MAX_HEAD_DIM} channels, in multiples of {HEAD_STEP}, got {d}"
    if (capability := torch.cuda.get_device_capability(call.q.device)) < AMPERE:
        return "needs compute capability {}.{} or later, got {}.{}".format(*AMPERE, *capability)
    return None
