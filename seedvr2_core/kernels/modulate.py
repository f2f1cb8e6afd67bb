"""Norm and modulation of tokens in one pass, and the gated residual that leaves a sub-layer.

The reference functions define the answers: fp32 inside, one rounding at the end.

    n tokens of all samples   c channels   s samples, or 1 row that all tokens share
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def norm_modulate(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, sample: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """rms(x) * scale + shift, where rms has no weights.

    Args:
        x: n c, contiguous.
        scale, shift: s c.
        sample: n, the row that belongs to every token, int32; None where there is one row.
        out: n c, contiguous; may be x itself.
    """
    from .triton_modulate import norm_modulate as run

    return run(x, scale, shift, eps, sample, torch.empty_like(x) if out is None else out)


def gate_residual(
    x: Tensor, y: Tensor, gate: Tensor, sample: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """x + y * gate.

    Args:
        x, y: n c, contiguous.
        gate: s c.
        sample: n, the row that belongs to every token, int32; None where there is one row.
        out: n c, contiguous; may be x or y itself.
    """
    from .triton_modulate import gate_residual as run

    return run(x, y, gate, sample, torch.empty_like(x) if out is None else out)


def reference_norm_modulate(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, sample: Tensor | None = None
) -> Tensor:
    normed = F.rms_norm(x.float(), x.shape[-1:], eps=eps)
    return (normed * _rows(scale, sample) + _rows(shift, sample)).to(x.dtype)


def reference_gate_residual(x: Tensor, y: Tensor, gate: Tensor, sample: Tensor | None = None) -> Tensor:
    return (x.float() + y.float() * _rows(gate, sample)).to(x.dtype)


def _rows(rows: Tensor, sample: Tensor | None) -> Tensor:
    return rows.float() if sample is None else rows.float()[sample]
