"""Attention inside many packed sequences: one call, several implementations."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import SettingError
from . import flash, reference, sdpa, varlen
from .backend import AttentionCall, Backend, Sequences

__all__ = ["ATTENTION_NAMES", "BACKENDS", "AttentionCall", "Backend", "Sequences", "resolve", "varlen_attention"]

# Fastest first; "auto" takes the first that can run.
BACKENDS = (flash.FLASH_3, flash.FLASH_2, varlen.BACKEND, sdpa.BACKEND, reference.BACKEND)
ATTENTION_NAMES = ("auto", *(backend.name for backend in BACKENDS))


def varlen_attention(call: AttentionCall, name: str = "auto") -> Tensor:
    """Softmax attention inside each packed sequence: l heads d.

    Args:
        call: queries, keys, values and where the sequences lie.
        name: one of ATTENTION_NAMES.

    Raises:
        SettingError: the backend asked for by name is unknown or cannot run this call.
    """
    return choose(call, name).run(call)


def choose(call: AttentionCall, name: str) -> Backend:
    """The backend that will run this call; see `varlen_attention`."""
    if name == "auto":
        return next(backend for backend in BACKENDS if backend.why_not(call) is None)
    for backend in BACKENDS:
        if backend.name == name:
            if reason := backend.why_not(call):
                raise SettingError(f"Attention {name!r} cannot run here: it {reason}. Use 'auto' or another backend.")
            return backend
    raise SettingError(f"There is no attention {name!r}; choose one of {', '.join(ATTENTION_NAMES)}.")


def resolve(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """The name of the backend that calls of this kind will run on, so that it can be refused, and told, before work.

    Raises:
        SettingError: as `varlen_attention`.
    """
    one = torch.empty(1, 1, head_dim, device=device, dtype=dtype)
    return choose(AttentionCall(one, one, one, Sequences((1,), device)), name).name
