"""The contract of a checkpoint format: tell from a file whether it is ours, list its tensors, read them.

A format is one file with a `FORMAT` and one line in `FORMATS`. It knows how tensors are stored, never what they are
for: that is read from their names and shapes in `detect.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

# Types that hold a weight to 8 bits of precision or more, and such as hold none but what others make of them.
NUMBERS = ("float64", "float32", "float16", "bfloat16")
CODES = ("int64", "int32", "int16", "int8", "uint8", "bool", "float8_e8m0fnu")


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """What a file says about one tensor before its data is read."""

    shape: tuple[int, ...]
    dtype: str  # torch's word for it, "float16", or the file's own where torch has none

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a file says it holds. A file that is one bare tensor lists it under the empty name."""

    file: str  # its name, for messages
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str] = field(default_factory=dict)


def nothing(path: Path, names: Iterable[str], device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """The `read` of a format with a `why_not`."""
    yield from ()


@dataclass(frozen=True, kw_only=True)
class Format:
    """One way of storing tensors.

    Args:
        name: one word for lists.
        recognise: whether this existing, non-empty file is of this format; decided by content, never by extension.
        header: lists the tensors without reading their data. Raises CheckpointError if the file is damaged.
        read: yields the named tensors one by one, on a device, in the type they are stored in. On the CPU they may be
            views of the file. Raises CheckpointError if the file is damaged.
        why_not: why such a file cannot be loaded, as the end of a sentence that starts with its name; empty if it can.
    """

    name: str
    recognise: Callable[[Path], bool]
    header: Callable[[Path], Header]
    read: Callable[[Path, Iterable[str], torch.device], Iterator[tuple[str, Tensor]]] = nothing
    why_not: str = ""


def first_bytes(path: Path, count: int = 16) -> bytes:
    """The start of a file, where formats keep their mark."""
    with path.open("rb") as file:
        return file.read(count)
