"""Norm and modulation of tokens in one pass, and the gated residual that leaves a sub-layer.

The reference functions define the answers: fp32 inside, one rounding at the end.

    n tokens of one sample, whose modulation they share   c channels
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """rms(x) * scale + shift, where rms has no weights.

    Args:
        x: n c, contiguous.
        scale, shift: 1 c.
    """
    from .triton_modulate import norm_modulate as run

    return run(x, scale, shift, eps)


def gate_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + y * gate.

    Args:
        x, y: n c, contiguous.
        gate: 1 c.
    """
    from .triton_modulate import gate_residual as run

    return run(x, y, gate)


def reference_norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    return (F.rms_norm(x.float(), x.shape[-1:], eps=eps) * scale.float() + shift.float()).to(x.dtype)


def reference_gate_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return (x.float() + y.float() * gate.float()).to(x.dtype)
