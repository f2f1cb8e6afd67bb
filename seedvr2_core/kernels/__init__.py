"""Kernels of our own, each beside the plain torch that defines its answer. None computes gradients.

Triton is optional: it is imported when a kernel is first run, and `why_not` says whether one could be. Files named
`triton_*` hold the kernels and are imported by nobody else.
"""

from .choice import LIBRARY, Choices, Machine, Question, choices_for, default_path, rounded, why_not
from .group_norm import Moments

__all__ = [
    "LIBRARY", "Choices", "Machine", "Moments", "Question", "choices_for", "default_path", "rounded", "why_not",
]  # fmt: skip
