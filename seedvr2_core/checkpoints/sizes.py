"""From the shapes of a model's tensors to its config."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import get_args

from ..errors import CheckpointError
from ..models.dit import DiTConfig
from ..models.rope import RopeKind, frequencies
from ..models.vae import SEEDVR2_VAE, VAEConfig
from ..models.windows import WindowConfig
from ..video.geometry import PATCH, Grid
from .format import Header, TensorInfo

# Its rows are the width of the transformer, its columns one patch of the input.
DIT_KEY = "vid_in.proj.weight"
# Constants stored as tensors, often in too low a precision; the model computes its own.
FREQUENCIES = ".attn.rope.rope.freqs"
# The metadata of a safetensors file under which `save` keeps what shapes cannot show.
CONFIG_KEY = "seedvr2_config"


def dit_config(header: Header, stored: Mapping[str, str]) -> DiTConfig:
    """Sizes of a transformer from its shapes; what they cannot show comes from the metadata or is as published."""
    shapes = _Shapes(header, stored)
    depth = shapes.count("blocks.#.")
    separate = shapes.count("blocks.#.attn.proj_qkv.vid.")
    stream = "vid" if separate else "all"
    head_dim = shapes.size(f"blocks.0.attn.norm_q.{stream}.weight", 0, 1)
    mlp = "swiglu" if f"blocks.0.mlp.{stream}.proj_in_gate.weight" in stored else "gelu"
    stated = _Stated.of(header)
    windows = stated.inner("windows")
    splits, train_area, size = windows.counts("splits", 3), windows.counts("train_area", 2), windows.counts("size", 3)
    known = WindowConfig()
    heads, odd = divmod(shapes.size(f"blocks.0.attn.proj_qkv.{stream}.weight", 0, 2), 3 * head_dim)
    if odd or not heads:
        raise CheckpointError(
            f"{header.file} has attention that is no whole number of heads of {head_dim} channels; it is damaged or of "
            "another model."
        )
    return DiTConfig(
        dim=shapes.size(DIT_KEY, 0, 2),
        depth=depth,
        heads=heads,
        head_dim=head_dim,
        text_dim=shapes.size("txt_in.weight", 1, 2),
        in_channels=shapes.size(DIT_KEY, 1, 2) // PATCH**2,
        out_channels=shapes.size("vid_out.proj.weight", 0, 2) // PATCH**2,
        separate_layers=separate,
        mlp=mlp,
        mlp_hidden=shapes.size(f"blocks.0.mlp.{stream}.proj_in.weight", 0, 2),
        rope=_rope(shapes, head_dim, mlp),
        out_norm="vid_out_norm.weight" in stored,
        # As in the published model of this kind.
        modulate_last_text=stated.truth("modulate_last_text", default=mlp == "gelu"),
        windows=WindowConfig(
            splits=Grid(*splits) if splits else known.splits,
            train_area=train_area or known.train_area,
            max_t=windows.count("max_t", known.max_t),
            size=Grid(*size) if size else None,
        ),
    )


def _rope(shapes: _Shapes, head_dim: int, mlp: str) -> RopeKind:
    name = f"blocks.0{FREQUENCIES}"
    if name in shapes.stored:
        lengths = {len(frequencies(kind, head_dim)): kind for kind in get_args(RopeKind)}
        length = shapes.size(name, 0, 1)
        if length not in lengths:
            raise CheckpointError(
                f"{shapes.header.file} has {length} rotary frequencies for heads of {head_dim} channels, expected "
                f"{' or '.join(map(str, lengths))}; it is of another model."
            )
        return lengths[length]
    return "video_text" if mlp == "swiglu" else "video"


def vae_config(header: Header, stored: Mapping[str, str]) -> VAEConfig:
    """Sizes of an autoencoder from its shapes; what they cannot show comes from the metadata or is as published."""
    shapes, stated = _Shapes(header, stored), _Stated.of(header)
    # At least one, so that a file without any is refused for the tensors it lacks.
    stages = range(max(1, shapes.count("encoder.down_blocks.#.")))
    widths = tuple(shapes.size(f"encoder.down_blocks.{i}.resnets.0.conv1.weight", 0, 5) for i in stages)
    groups = stated.count("groups", SEEDVR2_VAE.groups)
    if any(width % groups for width in widths):
        raise CheckpointError(
            f"{header.file} has a VAE of widths {', '.join(map(str, widths))}, expected multiples of its {groups} "
            "normalisation groups; it is damaged or of another model."
        )
    return VAEConfig(
        widths=widths,
        blocks=shapes.count("encoder.down_blocks.0.resnets.#."),
        latent_channels=shapes.size("decoder.conv_in.weight", 1, 5),
        groups=groups,
        scale=stated.positive("scale", SEEDVR2_VAE.scale),
    )


class _Shapes:
    """Shapes by plain name, checked as they are asked for."""

    def __init__(self, header: Header, stored: Mapping[str, str]):
        self.header, self.stored = header, stored

    def __getitem__(self, name: str) -> TensorInfo:
        if name not in self.stored:
            raise CheckpointError(
                f"{self.header.file} lacks the tensor {name}; it is incomplete, or one piece of a split checkpoint."
            )
        return self.header.tensors[self.stored[name]]

    def size(self, name: str, axis: int, ndim: int) -> int:
        shape = self[name].shape
        if len(shape) != ndim or min(shape) < 1:
            raise CheckpointError(
                f"{self.header.file} has {name} of shape {list(shape)}, expected {ndim} dimensions; it is damaged "
                "or of another model."
            )
        return shape[axis]

    def count(self, pattern: str) -> int:
        """How many different numbers stand for `#` in names that match; they must run from 0 without a gap."""
        regex = re.compile(re.escape(pattern).replace(r"\#", r"(\d{1,6})"))
        found = {int(match[1]) for name in self.stored if (match := regex.match(name))}
        if found != set(range(len(found))):
            missing = min(set(range(len(found))) - found)
            raise CheckpointError(
                f"{self.header.file} lacks the tensors {pattern.replace('#', str(missing))}*; it is incomplete, or one "
                "piece of a split checkpoint."
            )
        return len(found)


class _Stated:
    """Settings written into the metadata by `save`, each checked as it is asked for."""

    def __init__(self, file: str, values: object):
        self.file = file
        if not isinstance(values, dict):
            raise CheckpointError(f"{file} has a {CONFIG_KEY} that is no JSON object; it is damaged.")
        self.values = values

    @classmethod
    def of(cls, header: Header) -> _Stated:
        try:
            return cls(header.file, json.loads(header.metadata.get(CONFIG_KEY, "{}")))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{header.file} has a {CONFIG_KEY} that is not JSON; it is damaged.") from error

    def inner(self, name: str) -> _Stated:
        return _Stated(self.file, self.values.get(name, {}))

    def counts(self, name: str, length: int) -> tuple[int, ...] | None:
        values = self.values.get(name)
        if values is None:
            return None
        if not isinstance(values, list) or len(values) != length or not all(map(_is_count, values)):
            raise self._wrong(name, f"{length} whole numbers above 0")
        return tuple(values)

    def count(self, name: str, default: int) -> int:
        value = self.values.get(name, default)
        if not _is_count(value):
            raise self._wrong(name, "a whole number above 0")
        return value

    def positive(self, name: str, default: float) -> float:
        value = self.values.get(name, default)
        if type(value) not in (int, float) or not 0 < value < 1e6:
            raise self._wrong(name, "a number above 0")
        return float(value)

    def truth(self, name: str, default: bool) -> bool:
        value = self.values.get(name, default)
        if type(value) is not bool:
            raise self._wrong(name, "true or false")
        return value

    def _wrong(self, name: str, expected: str) -> CheckpointError:
        stated = json.dumps(self.values[name])[:40]
        return CheckpointError(f"{self.file} states {name} = {stated} in {CONFIG_KEY}, but it must be {expected}.")


def _is_count(value: object) -> bool:
    # JSON's true is an int to Python. The bound keeps a damaged file from asking for absurd sizes.
    return type(value) is int and 0 < value < 1 << 20
