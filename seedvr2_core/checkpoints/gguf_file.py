"""GGUF files, whose matrices are stored in blocks of a few bits a number; read by the package `gguf`.

They are small on disk and in a download. Read, they are floats like all others: a smaller model on the device is what
`packing` is for.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .format import Format, Header, TensorInfo, first_bytes
from .plain import UNREADABLE, damaged

if TYPE_CHECKING:
    from gguf import GGUFReader

INSTALLED = find_spec("gguf") is not None
# Metadata under which the shape is kept of a tensor that was reshaped to be quantised.
SHAPE_KEY = "comfy.gguf.orig_shape."
# torch's words for the types that are no blocks.
PLAIN = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def is_gguf(path: Path) -> bool:
    return first_bytes(path).startswith(b"GGUF")


def _open(path: Path) -> GGUFReader:
    from gguf import GGUFReader

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numbers of a damaged header that overflow; the outcome is what counts
            return GGUFReader(path)
    except UNREADABLE as error:
        raise damaged(path, error) from error


def gguf_header(path: Path) -> Header:
    """List a GGUF file, which names the fastest axis first."""
    if not INSTALLED:
        return Header(file=path.name, tensors={})
    file = _open(path)
    tensors = {}
    for tensor in file.tensors:
        field = file.fields.get(f"{SHAPE_KEY}{tensor.name}")
        shape = [part[0] for part in (field.parts[i] for i in field.data)] if field else reversed(tensor.shape)
        kind = tensor.tensor_type.name
        tensors[tensor.name] = TensorInfo(shape=tuple(map(int, shape)), dtype=PLAIN.get(kind, kind.lower()))
    return Header(file=path.name, tensors=tensors)


def read_gguf(path: Path, names: Iterable[str], device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Tensors in fp32, whatever they are stored in."""
    from gguf import dequantize

    file, shapes = _open(path), gguf_header(path).tensors
    stored = {tensor.name: tensor for tensor in file.tensors}
    for name in names:
        try:
            values = torch.from_numpy(dequantize(stored[name].data, stored[name].tensor_type))
            yield name, values.reshape(shapes[name].shape).to(device)
        except (NotImplementedError, *UNREADABLE) as error:
            raise damaged(path, error) from error


GGUF = Format(
    name="gguf",
    recognise=is_gguf,
    header=gguf_header,
    read=read_gguf,
    why_not="" if INSTALLED else "is a GGUF file, for which the package gguf is needed (pip install gguf)",
)
