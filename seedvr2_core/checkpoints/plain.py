"""Tensors stored as they are: safetensors, and PyTorch files that hold tensors and nothing that could run."""

from __future__ import annotations

import pickle
import re
import struct
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError
from .format import Format, Header, TensorInfo, first_bytes

# safetensors' names for what torch can hold.
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
ZIP = b"PK\x03\x04"
# What a damaged or hostile file makes torch's reader raise: it interprets the file's own bytes as instructions.
UNREADABLE = (RuntimeError, OSError, EOFError, ValueError, TypeError, LookupError, AttributeError, AssertionError,
              ArithmeticError, MemoryError, struct.error)  # fmt: skip


def damaged(path: Path, error: Exception) -> CheckpointError:
    reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    return CheckpointError(f"{path.name} is damaged or incomplete ({reason}); download or copy it again.")


# --- safetensors


def is_safetensors(path: Path) -> bool:
    # Eight bytes of length, then JSON.
    return first_bytes(path)[8:9] == b"{"


@contextmanager
def _safe_open(path: Path, device: str = "cpu") -> Iterator[safe_open]:
    try:
        with safe_open(path, framework="pt", device=device) as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise damaged(path, error) from error


def safetensors_header(path: Path) -> Header:
    """List a safetensors file; its reader checks that the data matches the header in size."""
    with _safe_open(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict, has no __iter__
        return Header(
            file=path.name,
            tensors={
                name: TensorInfo(shape=tuple(s.get_shape()), dtype=DTYPES.get(s.get_dtype(), s.get_dtype().lower()))
                for name, s in slices.items()
            },
            metadata=file.metadata() or {},
        )


def read_safetensors(path: Path, names: Iterable[str], device: torch.device) -> Iterator[tuple[str, Tensor]]:
    with _safe_open(path, str(device)) as file:
        for name in names:
            yield name, file.get_tensor(name)


# --- PyTorch's own files


def is_pickle(path: Path) -> bool:
    head = first_bytes(path)
    # Older files are bare pickles: a protocol mark and its number.
    return head.startswith(ZIP) or (head[:1] == b"\x80" and head[1:2] <= b"\x05")


def _unpickle(path: Path) -> object:
    # Mapped, not read: only the pages of tensors that are used get loaded. Old files cannot be mapped, and torch takes
    # a path that ends in .safetensors for that format, whatever it holds.
    mapped = first_bytes(path).startswith(ZIP) and path.suffix.lower() != ".safetensors"
    try:
        with warnings.catch_warnings(), path.open("rb") as file:
            warnings.simplefilter("ignore")  # remarks on pickle protocols; the outcome is what counts
            return torch.load(path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"asks for {wanted[1]}, which could run code" if wanted else "is damaged or holds more than tensors"
        raise CheckpointError(
            f"{path.name} was refused, since it {reason}; use a .safetensors file, or one that holds tensors only."
        ) from error
    except UNREADABLE as error:
        raise damaged(path, error) from error


def tensors_of(stored: object) -> dict[str, Tensor]:
    """Tensors of nested dicts, under their keys joined by dots. Whatever is no ordinary tensor is left out."""
    found: dict[str, Tensor] = {}
    # A stack and not recursion, and each dict once: a hostile file nests a million deep, or contains itself.
    waiting, seen = [("", stored)], set()
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, Tensor):
            if value.layout is torch.strided and not value.is_quantized and value.device.type == "cpu":
                found[name] = value.detach()
        elif isinstance(value, dict) and id(value) not in seen:
            seen.add(id(value))
            waiting += [(f"{name}.{key}" if name else str(key), inner) for key, inner in reversed(value.items())]
    return found


def pickle_header(path: Path) -> Header:
    tensors = tensors_of(_unpickle(path))
    return Header(
        file=path.name,
        tensors={
            name: TensorInfo(shape=tuple(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."))
            for name, tensor in tensors.items()
        },
    )


def read_pickle(path: Path, names: Iterable[str], device: torch.device) -> Iterator[tuple[str, Tensor]]:
    tensors = tensors_of(_unpickle(path))
    for name in names:
        yield name, tensors[name].to(device)


SAFETENSORS = Format(name="safetensors", recognise=is_safetensors, header=safetensors_header, read=read_safetensors)
PICKLE = Format(name="pickle", recognise=is_pickle, header=pickle_header, read=read_pickle)
