"""Attention inside many packed sequences: one call, several implementations."""

from __future__ import annotations

import logging

from torch import Tensor

from ..errors import SettingError
from . import flash, reference, sdpa, varlen
from .backend import AttentionCall, Backend, Sequences

__all__ = ["ATTENTION_NAMES", "BACKENDS", "AttentionCall", "Backend", "Sequences", "varlen_attention"]

log = logging.getLogger(__name__)

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
        backend = next(backend for backend in BACKENDS if backend.why_not(call) is None)
        log.debug("attention: %s", backend.name)
        return backend
    for backend in BACKENDS:
        if backend.name == name:
            if reason := backend.why_not(call):
                raise SettingError(f"Attention {name!r} cannot run here: it {reason}. Use 'auto' or another backend.")
            return backend
    raise SettingError(f"There is no attention {name!r}; choose one of {', '.join(ATTENTION_NAMES)}.")
