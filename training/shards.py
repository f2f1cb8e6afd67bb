"""Precomputed latents on disk, and the batches they make.

A data set is a folder of plain tar shards, named and laid out as WebDataset does, with an index beside them:

    images-000007.tar            KEY.hq.safetensors, KEY.lq0.safetensors, ..., KEY.txt.safetensors, KEY.json
    images-000007.json           its manifest, written last: a shard without one is not finished
    index/offset.npy ...         a column of every property of a sample, memory-mapped
    index/about.json             buckets, shards, scale, and the settings all of it was made with
    index/text.safetensors       the text of every sample that has none of its own, where there is one

Samples are read by offset, in any order, so the order is free to be a pure function of the step (see `buckets`). They
may as well lie in an object store, s3://bucket/latents: whatever fsspec can read, which may want a library of its own,
s3fs for this one. A folder may hold no latents, and word of what to make them from: see `pixels`.

`python -m training.shards export-parquet DIR OUT.parquet` writes a table of all samples, for analysis.
"""
# n samples   c t h w latent channels, frames, height, width   l c text tokens and channels

from __future__ import annotations

import argparse
import io
import json
import logging
import math
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from safetensors import SafetensorError
from safetensors.torch import load, load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from seedvr2_core.errors import CheckpointError, SettingError
from seedvr2_core.video.geometry import Grid

from .buckets import BatchPlan, Deal, Members, members_of
from .config import run_main
from .data import UNREADABLE_SHARE
from .randomness import rng

log = logging.getLogger(__name__)

INDEX, ABOUT, SHARED_TEXT = "index", "about.json", "text.safetensors"
# What says how to make latents, where there are none.
PIXELS = "pixels.json"
# Tensors of every file inside a shard have this name.
TENSOR = "latent"
# Samples of each kind that are kept out of training, the first ones.
HELD_OUT = 16
# Columns of the index, one .npy file each; those of the degraded latents have a second axis, the variant.
COLUMNS = {"shard": np.int32, "bucket": np.int32, "kind": np.int32, "hq": np.int64, "lq": np.int64, "txt": np.int64,
           "about": np.int64}  # fmt: skip


class Place(NamedTuple):
    """Where the bytes of one file inside a shard lie."""

    offset: int
    size: int


@dataclass(frozen=True)
class Pair:
    """One sample: latents c t h w in the autoencoder's own scale."""

    hq: Tensor
    lq: list[Tensor]  # a latent for every degraded version
    about: Mapping[str, Any]  # ready for JSON
    text: Tensor | None = None  # embedding l c of its own caption


def write_shard(directory: Path, name: str, pairs: Iterable[tuple[str, Pair]], settings: Mapping[str, Any]) -> None:
    """Write one shard, its tar first and its manifest last, each whole or not at all.

    Args:
        directory: of the data set; made if missing.
        name: KIND-NUMBER, "images-000007".
        pairs: key and sample, in order. All have as many degraded versions.
        settings: what they were made with; shards of one data set agree on it.

    Raises:
        CheckpointError: the disk is full, or cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    rows, total, squares, count = [], 0.0, 0.0, 0
    part = directory / f".{name}.{os.getpid()}.part"
    try:
        with tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as tar:
            for key, pair in pairs:
                files = {f"{key}.hq.safetensors": to_bytes({TENSOR: pair.hq})}
                files |= {f"{key}.lq{i}.safetensors": to_bytes({TENSOR: lq}) for i, lq in enumerate(pair.lq)}
                if pair.text is not None:
                    files[f"{key}.txt.safetensors"] = to_bytes({TENSOR: pair.text})
                files[f"{key}.json"] = json.dumps(pair.about).encode()
                places = [_add(tar, file, content) for file, content in files.items()]
                rows.append({"key": key, "shape": list(pair.hq.shape[1:]), "variants": len(pair.lq),
                             "text": 0 if pair.text is None else pair.text.shape[1], "places": places})  # fmt: skip
                values = pair.hq.double()
                total, squares, count = total + values.sum().item(), squares + values.square().sum().item(), (
                    count + values.numel()
                )
        part.replace(directory / f"{name}.tar")
        manifest = {"settings": settings, "rows": rows, "sum": total, "squares": squares, "count": count}
        _write_json(directory / f"{name}.json", manifest)
    except OSError as error:
        raise CheckpointError(f"The shard {name} cannot be written to {directory} ({error.strerror}); make room and "
                              "run the command again, finished shards are kept.") from error
    finally:
        part.unlink(missing_ok=True)


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> Place:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    # A header takes one block; the bytes follow it. Times and owners stay zero, so that equal samples are equal files.
    place = Place(tar.offset + tarfile.BLOCKSIZE, len(content))
    tar.addfile(info, io.BytesIO(content))
    return place


def _write_json(path: Path, value: Any) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(json.dumps(value))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def is_finished(directory: Path, name: str, settings: Mapping[str, Any]) -> bool:
    """Whether a shard is there already, made with these settings.

    Raises:
        SettingError: it was made with other settings.
    """
    manifest = directory / f"{name}.json"
    if not manifest.exists() or not (directory / f"{name}.tar").exists():
        return False
    made_with = json.loads(manifest.read_text())["settings"]
    wanted = json.loads(json.dumps(settings))
    # A setting that there was not yet when the shard was made was none.
    changed = [name for name in {**wanted, **made_with} if made_with.get(name) != wanted.get(name)]
    if changed:
        raise SettingError(f"{directory} was made with another {changed[0]} ({made_with.get(changed[0])}, now "
                           f"{wanted.get(changed[0])}); use another folder, or remove that one.")
    return True


def build_index(
    directory: Path, names: Iterable[str], text: Tensor | None = None, scale: float | None = None
) -> None:
    """Gather the manifests of all shards into columns, under their final name whole or not at all.

    Args:
        directory: of the data set.
        names: of its shards, in the order of the samples.
        text: embedding l c of samples that have none of their own.
        scale: of the autoencoder, by which transformers see its latents multiplied; None: it has none yet, and gets the
            one that makes the variance of these latents 1.

    Raises:
        CheckpointError: a shard is missing, or shards do not belong together.
    """
    names = list(names)
    manifests = {name: _manifest(directory, name) for name in names}
    kinds = list(dict.fromkeys(name.rsplit("-", 1)[0] for name in names))
    rows = [(shard, kinds.index(name.rsplit("-", 1)[0]), row)
            for shard, name in enumerate(names) for row in manifests[name]["rows"]]  # fmt: skip
    if len({row["variants"] for _, _, row in rows}) != 1:
        raise CheckpointError(f"{directory} holds samples with different numbers of degraded versions, or none at all; "
                              "precompute them with one setting.")
    shared = [] if text is None else [text.shape[1]]
    widths = sorted({*shared, *(row["text"] for _, _, row in rows if row["text"])})
    if len(widths) > 1:
        raise CheckpointError(f"{directory} holds texts {' and '.join(map(str, widths))} wide, and a model takes one "
                              "width; remove the shards, and precompute them with texts of one encoder.")
    buckets = sorted({tuple(row["shape"]) for _, _, row in rows})
    columns: dict[str, list] = {name: [] for name in COLUMNS}
    for shard, kind, row in rows:
        hq, *rest = row["places"]
        lq, rest = rest[: row["variants"]], rest[row["variants"] :]
        own_text = rest[0] if row["text"] else Place(0, 0)
        bucket = buckets.index(tuple(row["shape"]))
        values = (shard, bucket, kind, hq, lq, own_text, rest[-1])
        for name, value in zip(COLUMNS, values, strict=True):
            columns[name].append(value)
    count = sum(manifest["count"] for manifest in manifests.values())
    mean = sum(manifest["sum"] for manifest in manifests.values()) / count
    variance = sum(manifest["squares"] for manifest in manifests.values()) / count - mean**2
    about = {"shards": names, "kinds": kinds, "buckets": buckets, "samples": len(rows),
             "scale": scale or 1 / math.sqrt(variance), "settings": manifests[names[0]]["settings"],
             "text_width": widths[0] if widths else None}  # fmt: skip
    part = directory / f".{INDEX}.{os.getpid()}.part"
    # A killed process with this number may have left one.
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        for name, dtype in COLUMNS.items():
            np.save(part / f"{name}.npy", np.asarray(columns[name], dtype=dtype))
        if text is not None:
            (part / SHARED_TEXT).write_bytes(to_bytes({TENSOR: text}))
        _write_json(part / ABOUT, about)
        shutil.rmtree(directory / INDEX, ignore_errors=True)
        part.replace(directory / INDEX)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _manifest(directory: Path, name: str) -> dict[str, Any]:
    try:
        return json.loads((directory / f"{name}.json").read_text())
    except OSError as error:
        raise CheckpointError(f"The shard {name} is not finished in {directory}; run `python -m training.precompute` "
                              "for it first.") from error


@dataclass(frozen=True)
class LatentBatch:
    """One batch: latents b c t h w as a transformer sees them, and what goes with them."""

    hq: Tensor
    lq: Tensor
    texts: list[Tensor | None]  # embedding l c of each sample, where it has one
    ids: np.ndarray  # of the samples, in the index of the data set
    bucket: Grid

    def cut(self, t: int) -> LatentBatch:
        """The same clips, t latent frames long."""
        return replace(self, hq=self.hq[:, :, :t], lq=self.lq[:, :, :t], bucket=self.bucket._replace(t=t))


class ShardReader:
    """The samples of a data set by their number. One that cannot be read is replaced by the next of its bucket, always
    by the same, and counted."""

    def __init__(self, directory: Path | str):
        """`directory` may be an address, such as s3://bucket/latents."""
        try:
            self._system, self._root = url_to_fs(str(directory))
        except (ImportError, ValueError) as error:
            raise CheckpointError(f"{directory} cannot be opened ({error}). Install with pip what is missing, or copy "
                                  "the latents to a folder.") from error
        index = Path(self._root) / INDEX
        try:
            if not isinstance(self._system, LocalFileSystem):
                # Columns are mapped into memory, from a copy that stays as long as this does.
                self._copy = tempfile.TemporaryDirectory()
                index = Path(self._copy.name) / INDEX
                self._system.get(f"{self._root}/{INDEX}", str(index), recursive=True)
            about = json.loads((index / ABOUT).read_text())
            self.columns = {name: np.load(index / f"{name}.npy", mmap_mode="r") for name in COLUMNS}
            self.shared_text = load_file(index / SHARED_TEXT)[TENSOR] if (index / SHARED_TEXT).exists() else None
        except FileNotFoundError as error:
            raise CheckpointError(f"{directory} holds no finished latents; run `python -m training.precompute` first."
                                  ) from error
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"{index} is damaged ({error}); remove it and run `python -m training.precompute` "
                                  "again, finished shards are kept.") from error
        self.directory = directory
        self.shards: list[str] = about["shards"]
        self.buckets = [Grid(*shape) for shape in about["buckets"]]
        self.kinds: list[str] = about["kinds"]
        self.scale: float = about["scale"]
        self.settings: Mapping[str, Any] = about["settings"]
        self.text_width: int | None = about.get("text_width")
        self.variants = self.columns["lq"].shape[1]
        self.unreadable: dict[int, str] = {}  # and why
        self._files: dict[int, BinaryIO] = {}

    def __len__(self) -> int:
        return len(self.columns["shard"])

    def read(self, number: int, variant: int = 0) -> tuple[Tensor, Tensor, Tensor | None, int]:
        """Clean and degraded latent c t h w, the text of the sample or else of all, and the number it really is.

        Raises:
            CheckpointError: so many samples are unreadable that it is no accident.
        """
        for candidate in self._with_substitutes(number):
            if candidate in self.unreadable:
                continue
            try:
                hq = self._latent(candidate, self.columns["hq"][candidate])
                lq = self._latent(candidate, self.columns["lq"][candidate, variant])
                place = self.columns["txt"][candidate]
                text = self._tensor(candidate, place) if place[1] else self.shared_text
                return hq, lq, text, candidate
            except (OSError, SafetensorError, KeyError) as error:
                self._count(candidate, error)
        raise CheckpointError(f"No sample of {self.directory} that has the shape of sample {number} can be read.")

    def about(self, number: int) -> dict[str, Any]:
        """What the sample was made from, and every parameter of its degradations."""
        return json.loads(self._bytes(number, self.columns["about"][number]))

    def row(self, number: int) -> dict[str, Any]:
        """What there is to know of a sample without its latents; offset and size are those of the clean one."""
        column = {name: values[number].tolist() for name, values in self.columns.items()}
        offset, size = column["hq"]
        return {"number": number, "shard": self.shards[column["shard"]], "kind": self.kinds[column["kind"]],
                **self.buckets[column["bucket"]]._asdict(), "offset": offset, "size": size,
                "text_size": column["txt"][1], "about": json.dumps(self.about(number))}  # fmt: skip

    def _with_substitutes(self, number: int) -> Iterable[int]:
        yield number
        same = np.flatnonzero(self.columns["bucket"] == self.columns["bucket"][number])
        after = int(np.searchsorted(same, number, side="right"))
        yield from (int(same[(after + i) % len(same)]) for i in range(len(same) - 1))

    def _count(self, number: int, error: Exception) -> None:
        shard = self.shards[self.columns["shard"][number]]
        self.unreadable[number] = f"sample {number} in {shard}.tar: {error}"
        log.warning("Unreadable and replaced by the next of its shape: %s", self.unreadable[number])
        if len(self.unreadable) > max(1, UNREADABLE_SHARE * len(self)):
            raise CheckpointError(
                f"{len(self.unreadable)} of {len(self)} samples of {self.directory} cannot be read, the last was "
                f"{self.unreadable[number]}. Remove the shard's .tar and .json and precompute it again."
            ) from error

    def _latent(self, number: int, place: np.ndarray) -> Tensor:
        latent, bucket = self._tensor(number, place), self.buckets[self.columns["bucket"][number]]
        if latent.shape[1:] != bucket:
            raise OSError(f"a tensor of {list(latent.shape)} lies at {place[0]}, expected a latent of {list(bucket)}")
        return latent

    def _tensor(self, number: int, place: np.ndarray) -> Tensor:
        return load(self._bytes(number, place))[TENSOR]

    def _bytes(self, number: int, place: np.ndarray) -> bytes:
        shard = int(self.columns["shard"][number])
        if shard not in self._files:
            # Without what stores read ahead: the next sample is anywhere.
            self._files[shard] = self._system.open(f"{self._root}/{self.shards[shard]}.tar", cache_type="none")
        offset, size = map(int, place)
        self._files[shard].seek(offset)
        content = self._files[shard].read(size)
        if len(content) != size:
            raise OSError(f"{len(content)} of {size} bytes at {offset}, the file is cut short")
        return content


def export_parquet(directory: Path | str, target: Path) -> None:
    """Write a table with a row for every sample: where it lies, its latent size, and as JSON what it was made from.

    Raises:
        SettingError: pyarrow is not installed.
        CheckpointError: there are no latents.
    """
    try:
        import pyarrow
        from pyarrow.parquet import ParquetWriter
    except ImportError as error:
        raise SettingError(f"A Parquet file needs the library pyarrow ({error}); pip install pyarrow") from error
    reader = ShardReader(directory)
    texts = ("shard", "kind", "about")
    numbers = ("number", "t", "h", "w", "offset", "size", "text_size")
    schema = pyarrow.schema([*((name, pyarrow.string()) for name in texts),
                             *((name, pyarrow.int64()) for name in numbers)])  # fmt: skip
    with ParquetWriter(target, schema) as writer:
        # A group of rows for every shard.
        for shard in range(len(reader.shards)):
            rows = [reader.row(int(number)) for number in np.flatnonzero(reader.columns["shard"] == shard)]
            writer.write_table(pyarrow.Table.from_pylist(rows, schema))


class Store(Protocol):
    """Where `Latents` finds pairs, by their number."""

    scale: float  # of the autoencoder, by which latents are multiplied
    variants: int  # degraded versions of each sample
    buckets: Sequence[Grid]  # the latent sizes that there are
    bucket_of: np.ndarray  # of each sample, the number of its latent size
    kind_of: np.ndarray  # of each sample, a number for what it was made as
    text_width: int | None  # channels of texts; None: no sample has one
    autoencoder: str | None  # what made the latents, as for `weights.open_vae`; None: nobody knows
    unreadable: Mapping[int | str, str]  # samples that had to be replaced so far, and why

    def read(self, number: int, variant: int) -> tuple[Tensor, Tensor, Tensor | None, int]:
        """Clean and degraded latent c t h w, not scaled, the text l c, and the number that the sample really has."""


class Latents:
    """Pairs as training takes them, times the scale of their autoencoder: every one once an epoch, one shape a batch.

    What is in a batch is a function of (seed, step) alone. Some samples of each kind are held out, and in no batch.

    Args:
        source: a folder of shards, or the address of one; a folder of plain safetensors files, one a kind, each
            {"hq": n c t h w, "lq": the same}; what `training.precompute mode=pixels` leaves; or what else has pairs.
        seed: of the run.
        device: where an autoencoder works whose latents are made when they are asked for. Batches are in host memory.

    Raises:
        CheckpointError: the folder holds no latents.
    """

    def __init__(self, source: Path | str | Store, seed: int, device: torch.device | str = "auto"):
        self.seed = seed
        self.store = _open(source, str(device)) if isinstance(source, Path | str) else source
        self.scale = self.store.scale
        kinds, shapes = np.asarray(self.store.kind_of), self.store.bucket_of
        self._kinds = [np.flatnonzero(kinds == kind) for kind in np.unique(kinds)]
        self._members = [members_of(self.store.buckets, shapes, kind[HELD_OUT:]) for kind in self._kinds]
        self._plans: dict[str, tuple[Deal, BatchPlan]] = {}

    @property
    def members(self) -> list[Members]:
        """Of every kind of sample, the ids of each latent size that there are to learn from.

        Raises:
            CheckpointError: all samples are held out.
        """
        if not any(self._members):
            counts = " and ".join(str(len(kind)) for kind in self._kinds)
            raise CheckpointError(
                f"There are {counts} pairs of latents, by kind, and the first {HELD_OUT} of each kind are held out for "
                "validation, so none is left to learn from; precompute more (crops.0.count=100)."
            )
        return self._members

    @property
    def shapes(self) -> list[Grid]:
        """Latent sizes of what there is to learn from; raises as `members`."""
        return sorted({bucket for kind in self.members for bucket in kind})

    def batch(self, step: int, deal: Deal, micro: int = 0) -> LatentBatch:
        """A micro-batch of the batch of a step, by the plan of `plan` with the same deal.

        Every batch is dealt to the micro-batches in equal parts, whoever computes them. Numbers beyond those of the
        step are for further turns of a module, which come in an order of their own.
        """
        turn, micro = divmod(micro, deal.micros)
        found = self.plan(replace(deal, order=f"{deal.order}/{turn}") if turn else deal)(step)
        slots = found.slots(micro, deal.micros)
        return self._gather(found.ids[slots.start : slots.stop], step, slots.start).cut(found.shape.t)

    def plan(self, deal: Deal) -> BatchPlan:
        """The plan of all batches.

        Raises:
            CheckpointError: all samples are held out.
            SettingError: no sample has a part in it.
        """
        known = self._plans.get(deal.order)
        if known is None or known[0] != deal:
            known = self._plans[deal.order] = deal, BatchPlan(self.members, deal, self.seed)
        return known[1]

    def held_out(self) -> list[tuple[Tensor, Tensor]]:
        """Clean and degraded latents that no batch holds, of every kind and shape."""
        return [(batch.hq, batch.lq) for batch in self.held_out_captioned()]

    def held_out_captioned(self) -> list[LatentBatch]:
        """The same with the texts of the samples."""
        batches = []
        for kind in self._kinds:
            ids = kind[:HELD_OUT]
            for bucket in np.unique(self.store.bucket_of[ids]):
                batches.append(self._gather(ids[self.store.bucket_of[ids] == bucket], 0))
        return batches

    @property
    def autoencoder(self) -> str | None:
        """What made the latents, as for `weights.open_vae`; None where plain files do not say."""
        return self.store.autoencoder

    @property
    def text_width(self) -> int | None:
        """Channels of the samples' texts; None where none has one."""
        return self.store.text_width

    @property
    def unreadable(self) -> Mapping[int | str, str]:
        """Samples that had to be replaced so far, and why."""
        return self.store.unreadable

    def _gather(self, ids: np.ndarray, step: int, first_slot: int = 0) -> LatentBatch:
        draws = (rng(self.seed, "variant", step, first_slot + slot) for slot in range(len(ids)))
        variants = [int(draw.integers(self.store.variants)) if self.store.variants > 1 else 0 for draw in draws]
        hq, lq, texts, really = zip(*map(self.store.read, map(int, ids), variants), strict=True)
        bucket = self.store.buckets[self.store.bucket_of[ids[0]]]
        stacked = [torch.stack(part).float() * self.scale for part in (hq, lq)]
        return LatentBatch(*stacked, list(texts), np.asarray(really), bucket)


def _open(where: Path | str, device: str) -> Store:
    if "://" in str(where):
        return _Shards(ShardReader(where))
    directory = Path(where)
    if plain := sorted(directory.glob("*.safetensors")):
        return InMemory(list(map(load_file, plain)))
    if (directory / PIXELS).exists() and not (directory / INDEX).exists():
        from .pixels import Pixels  # it builds on this file

        return Pixels(directory, device)
    return _Shards(ShardReader(directory))


class _Shards:
    """A `ShardReader` as a `Store`."""

    def __init__(self, reader: ShardReader):
        self.read = reader.read
        self.scale, self.variants, self.buckets = reader.scale, reader.variants, reader.buckets
        self.text_width, self.autoencoder = reader.text_width, reader.settings.get("vae")
        self.bucket_of, self.kind_of = np.asarray(reader.columns["bucket"]), reader.columns["kind"]
        self.unreadable = reader.unreadable


class InMemory:
    """A `Store` of tensors."""

    def __init__(self, kinds: Sequence[Mapping[str, Tensor]], scale: float | None = None):
        """
        Args:
            kinds: {"hq": n c t h w, "lq": the same} of every kind of sample.
            scale: of their autoencoder; None: what makes their variance 1.
        """
        self.kinds = kinds
        counts = [len(kind["hq"]) for kind in kinds]
        self.variants, self.unreadable, self.text_width, self.autoencoder = 1, {}, None, None
        self.buckets = sorted({Grid(*kind["hq"].shape[2:]) for kind in kinds})
        self.kind_of = np.repeat(np.arange(len(counts)), counts)
        of_kind = np.array([self.buckets.index(Grid(*kind["hq"].shape[2:])) for kind in kinds])
        self.bucket_of = of_kind[self.kind_of]
        self.starts = np.concatenate([[0], np.cumsum(counts)])
        self.scale = scale or 1 / torch.cat([kind["hq"].flatten() for kind in kinds]).std().item()

    def read(self, number: int, variant: int = 0) -> tuple[Tensor, Tensor, None, int]:
        kind = self.kinds[self.kind_of[number]]
        place = number - self.starts[self.kind_of[number]]
        return kind["hq"][place], kind["lq"][place], None, number


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.shards")
    commands = parser.add_subparsers(required=True)
    export = commands.add_parser("export-parquet", help="write a table of all samples")
    export.add_argument("latents", help="folder or address")
    export.add_argument("out", type=Path, help="file to write")
    args = parser.parse_args(argv)
    export_parquet(args.latents, args.out)


if __name__ == "__main__":
    run_main(main)
