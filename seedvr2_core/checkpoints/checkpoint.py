"""One file on disk, opened: its format, its tensors, and what they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..models.dit import SEEDVR2_7B, DiTConfig
from ..models.vae import VAEConfig
from . import gguf_file, plain, unsupported
from .detect import Content, Kind, Part, detect
from .format import NUMBERS, Format, Header, first_bytes
from .published import MODELS
from .sizes import FREQUENCIES

# The first that recognises a file reads it, so what is a special case of another comes before it.
FORMATS: tuple[Format, ...] = (gguf_file.GGUF, unsupported.QUANTISED, plain.SAFETENSORS, plain.PICKLE)
# What people save under a weights file's name when a download goes wrong.
MISTAKEN = {b"version https://": "a Git LFS pointer", b"<": "a web page"}


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """What a file holds, read from its header alone."""

    path: Path
    format: str  # name of one of FORMATS
    size: int  # bytes
    kind: Kind
    label: str  # for people: "SeedVR2 3B", "a LoRA"
    parts: tuple[Part, ...]  # the models inside, the transformer first
    dtype: str  # of most of the weights
    tensors: int
    parameters: int  # of the models inside, or of everything
    prompts: tuple[str, ...]  # which prompt embeddings are inside: "positive", "negative"
    why_not: str  # why it cannot be loaded, as one sentence; empty if it can

    @property
    def coarse(self) -> bool:
        """Whether most of the weights are rounded more than 16 bits round."""
        return self.dtype not in NUMBERS

    @property
    def config(self) -> DiTConfig | VAEConfig | None:
        """Of the first model inside."""
        return self.parts[0].config if self.parts else None

    @property
    def prefix(self) -> str:
        """In front of the tensor names of the first model inside."""
        return self.parts[0].prefix if self.parts else ""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A weights file whose header has been read and understood."""

    path: Path
    format: Format
    header: Header
    content: Content

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Read the header of a file.

        Raises:
            CheckpointError: no such file, no weights file, or a damaged, unsafe or incomplete one.
        """
        format = _format_of(path)
        header = format.header(path)
        return cls(path=path, format=format, header=header, content=detect(header))

    def read(self, names: Iterable[str], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Read tensors by their names in the file, in the type they are stored in."""
        return dict(self.format.read(self.path, names, torch.device(device)))

    @property
    def why_not(self) -> str:
        if not self.format.why_not:
            return ""
        # The 3B if the file does not tell which model it is.
        dit = self.content.part("dit")
        model = "vae" if self.content.kind == "vae" else "7b" if dit and dit.config == SEEDVR2_7B else "3b"
        return (
            f"{self.path.name} {self.format.why_not}; use the fp16 file of the same model instead, such as "
            f"{MODELS[model].file} (seedvr2 download {model})."
        )

    @property
    def info(self) -> CheckpointInfo:
        tensors, parts = self.header.tensors, self.content.parts
        weights = [at for part in parts for name, at in part.stored.items() if not name.endswith(FREQUENCIES)]
        elements: Counter[str] = Counter()
        for name in weights or tensors:
            elements[tensors[name].dtype] += tensors[name].elements
        return CheckpointInfo(
            path=self.path,
            format=self.format.name,
            size=self.path.stat().st_size,
            kind=self.content.kind,
            label=self.content.label,
            parts=parts,
            dtype=max(elements, key=elements.__getitem__, default="unknown"),
            tensors=len(tensors),
            parameters=sum(elements.values()),
            prompts=tuple(self.content.prompts),
            why_not=self.why_not,
        )


def inspect(path: Path) -> CheckpointInfo:
    """Say what a file holds without reading its weights.

    Raises:
        CheckpointError: no such file, no weights file, or a damaged, unsafe or incomplete one.
    """
    return Checkpoint.open(Path(path)).info


def _format_of(path: Path) -> Format:
    expected = "expected a .safetensors, .pth or .gguf file"
    try:
        head = first_bytes(path)
        for format in FORMATS:
            if head and format.recognise(path):
                return format
    except FileNotFoundError as error:
        raise CheckpointError(f"There is no file {path}, {expected}.") from error
    except IsADirectoryError as error:
        raise CheckpointError(f"{path} is a folder, {expected}.") from error
    except OSError as error:
        # Windows refuses to open a folder with the error of a missing permission.
        what = "is a folder" if path.is_dir() else f"cannot be opened ({error.strerror})"
        raise CheckpointError(f"{path} {what}, {expected}.") from error
    if not head:
        raise CheckpointError(f"{path.name} is empty; download or copy it again.")
    for mark, what in MISTAKEN.items():
        if head.startswith(mark):
            raise CheckpointError(f"{path.name} is {what}, {expected}.")
    raise CheckpointError(f"{path.name} is not a weights file (it starts with {head!r}), {expected}.")
