"""Checkpoints of a run: saved while it goes on, whole at every moment, and taken up by any number of processes.

A checkpoint is a folder of `torch.distributed.checkpoint` shards. It is complete once `meta.json` lies in it, which is
written last; what has none is the rest of a crash and never read. Names inside: `NAME/...` the weights of module NAME,
`NAME.optim/...` the state of its optimiser, `ema/...` the averaged weights, `rng/...` the generators of every process.

    runs/NAME/checkpoints/step_000500/   runs/NAME/ema/step_005000.safetensors
"""

from __future__ import annotations

import json
import os
import random
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from seedvr2_core.errors import CheckpointError

from .parallel import Processes

META, LATEST = "meta.json", "latest"
FOLDER, AVERAGED = "checkpoints", "ema"
# What a full disk, a lost mount or a failing process looks like from here.
FAILURES = (OSError, RuntimeError, CheckpointException)


class Checkpoints:
    """The checkpoints of one run directory.

    Args:
        directory: of the run.
        processes: that save and load together.
        keep: complete checkpoints left after a save.
        asynchronous: write in the background, after copying everything to the CPU's memory. One at a time.
    """

    def __init__(self, directory: Path, processes: Processes | None = None, keep: int = 2, asynchronous: bool = False):
        self.directory, self.keep, self.asynchronous = directory / FOLDER, keep, asynchronous
        self.processes = processes or Processes()
        self.pending: tuple[Path, dict[str, Any], Future] | None = None
        self.last: Path | None = None  # of the complete ones that this run saved or began with

    def save(self, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any] | None = None) -> None:
        """Begin a checkpoint; `settle` completes it. The tensors may change as soon as this returns.

        Raises:
            CheckpointError: it could not be begun, or the one before could not be completed. All complete ones are
                still there.
        """
        self.settle(wait=True)
        path = self.directory / f"step_{step:06d}"
        meta = {"step": step, "world": self.processes.world, "torch": torch.__version__, **(meta or {})}
        future: Future = Future()
        try:
            self._by_the_first(lambda: self._prepare(path))
            options = {"checkpoint_id": path, "process_group": self.processes.saving}
            if self.asynchronous:
                # Nothing is copied ahead of the writing, which finds all in host memory, in a thread of no device.
                writer = dcp.FileSystemWriter(path, per_thread_copy_ahead=0)
                future = quietly(dcp.async_save, dict(tensors), storage_writer=writer, **options)
            else:
                future.set_result(quietly(dcp.save, dict(tensors), **options))
        except FAILURES as error:
            future.set_exception(error)
        self.pending = (path, meta, future)
        if not self.asynchronous:
            self.settle(wait=True)

    def settle(self, wait: bool) -> None:
        """Complete the checkpoint in flight: all at once if it has been written, or after waiting for it.

        Raises:
            CheckpointError: it could not be written. What there is of it is removed, the complete ones stay.
        """
        if self.pending is None or not (wait or self._written(self.pending[2])):
            return
        (path, meta, future), self.pending = self.pending, None
        try:
            self._together(future.result)
            self._by_the_first(lambda: self._complete(path, meta))
            self.last = path
        except FAILURES as error:
            if self.processes.first:
                remove(path)
            raise CheckpointError(
                f"{path} could not be saved ({_reason(error)}). The checkpoints before it are whole; "
                "make room, the next one will be tried as usual."
            ) from error

    def _by_the_first(self, act: Callable[[], None]) -> None:
        """Do something in the first process, as `_together`."""
        self._together(act if self.processes.first else lambda: None)

    def _together(self, act: Callable[[], object]) -> None:
        """Do something in all processes; where it fails in one of them, all raise, and none waits for another."""
        failure = None
        try:
            act()
        except FAILURES as error:
            failure = error
        reasons = self.processes.gather(None if failure is None else _reason(failure))
        if failure is not None:
            raise failure
        if reason := next(filter(None, reasons), None):
            raise OSError(reason)

    def _prepare(self, path: Path) -> None:
        # Left by a crash.
        remove(path)
        path.mkdir(parents=True)

    def _written(self, future: Future) -> bool:
        # All processes complete it at the same step, so that they do the same afterwards.
        return min(self.processes.mean([float(future.done())])) == 1.0

    def _complete(self, path: Path, meta: Mapping[str, Any]) -> None:
        write_whole(path / META, json.dumps(meta, indent=1))
        link = self.directory / f".{LATEST}.{os.getpid()}"
        # In a container the process that was killed here had this number too.
        link.unlink(missing_ok=True)
        # For people alone; few may make one on Windows.
        with suppress(OSError):
            link.symlink_to(path.name)
            link.replace(self.directory / LATEST)
        for old in complete(self.directory)[: -self.keep]:
            remove(old)

    def amend(self, path: Path, meta: Mapping[str, Any]) -> None:
        """Change what a complete checkpoint says besides its tensors."""
        if self.processes.first:
            write_whole(path / META, json.dumps({**read_meta(path), **meta}, indent=1))
        self.processes.agree(None)

    def newest(self) -> Path | None:
        """The last complete checkpoint, the same for all processes."""
        found = complete(self.directory)
        return self.processes.agree(found[-1] if found else None)

    def load(self, path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Read a checkpoint into tensors, however they are sharded now. Generators of other processes are left out.

        Returns:
            what was saved as meta.

        Raises:
            CheckpointError: it is not complete, or holds other names or shapes.
        """
        saved, wanted = stored(path), dict(tensors)
        names = {name for name in saved if not name.startswith("rng/")}
        if names != wanted.keys():
            odd = sorted(names ^ wanted.keys())
            raise CheckpointError(
                f"{path} is of another model or optimiser: {odd[0]!r} and {len(odd) - 1} more names "
                "are only in one of them. Resume with the config that the run was begun with."
            )
        for name, tensor in wanted.items():
            if tuple(saved[name]) != tuple(tensor.shape):
                raise CheckpointError(
                    f"{path} is of another model: {name!r} is {tuple(saved[name])} there and "
                    f"{tuple(tensor.shape)} here."
                )
        quietly(dcp.load, wanted, checkpoint_id=path, process_group=self.processes.saving)
        self.last = path
        return read_meta(path)


def remove(path: Path) -> None:
    """Remove a checkpoint. From the first moment on it is not complete any more, whenever this is interrupted."""
    (path / META).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    found = (path.parent for path in folder.glob(f"step_*/{META}") if not path.parent.is_symlink())
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def newest_meta(directory: Path) -> dict[str, Any]:
    """What the newest complete checkpoint of a run directory says besides its tensors; {} where there is none."""
    found = complete(directory / FOLDER)
    return read_meta(found[-1]) if found else {}


def read_meta(path: Path) -> dict[str, Any]:
    """What a checkpoint says besides its tensors.

    Raises:
        CheckpointError: it is not complete.
    """
    if not (path / META).exists():
        raise CheckpointError(f"{path} is no complete checkpoint: it has no {META}. Choose another, or leave --resume.")
    return json.loads((path / META).read_text("utf-8"))


def stored(path: Path) -> dict[str, torch.Size]:
    """Names and shapes of the tensors in a checkpoint.

    Raises:
        CheckpointError: it is not complete.
    """
    read_meta(path)
    entries = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    return {name: entry.size for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


def load_averaged(directory: Path, name: str = "ema") -> dict[str, Tensor]:
    """The averaged weights of a run: of its last checkpoint, or of a .safetensors file of averaged weights.

    Args:
        directory: of the run, or the file.
        name: another prefix, to read a module's own weights instead.

    Raises:
        CheckpointError: no run was saved there.
    """
    if directory.is_file():
        return load_kept(directory)
    found = complete(directory / FOLDER)
    if not found:
        kept = sorted((directory / AVERAGED).glob("step_*.safetensors"))
        if kept:
            return load_kept(kept[-1])
        raise CheckpointError(f"{directory} holds no complete checkpoint; run the stage that writes it first.")
    names = {key: size for key, size in stored(found[-1]).items() if key.startswith(f"{name}/")}
    tensors = {key: torch.empty(size) for key, size in names.items()}
    quietly(dcp.load, tensors, checkpoint_id=found[-1], no_dist=True)
    return {key.removeprefix(f"{name}/"): tensor for key, tensor in tensors.items()}


def load_kept(path: Path) -> dict[str, Tensor]:
    """What `save_averaged` wrote.

    Raises:
        CheckpointError: the file is missing or truncated.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); copy it again, or take another step.") from error


def gathered(tensors: Mapping[str, Tensor], processes: Processes) -> dict[str, Tensor]:
    """Whole tensors in the first process, in host memory; {} in the others, which have to call this too.

    One after another, for all of them together may be more than a device has room for.
    """
    whole = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if processes.first:
            whole[name] = full.detach().cpu().contiguous()
        del full
    return whole


def save_averaged(directory: Path, step: int, averages: Mapping[str, Tensor], processes: Processes) -> None:
    """Keep averaged weights for good, as one .safetensors file.

    Raises:
        CheckpointError: it could not be written.
    """
    whole = gathered(averages, processes)
    if not processes.first:
        return
    path = directory / AVERAGED / f"step_{step:06d}.safetensors"
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(whole, partial)
        partial.replace(path)
    except FAILURES as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(f"{path} could not be saved ({_reason(error)}).") from error


# What a run consists of, as tensors by name.


def optimizer_tensors(name: str, module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state by the names of the parameters; what has not been updated yet has none."""
    return {
        f"{name}.optim/{parameter_name}/{key}{part}": tensor
        for parameter_name, parameter in module.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
        for part, tensor in parts(value).items()
    }


def parts(value: Tensor) -> dict[str, Tensor]:
    """A tensor under no name; one of torchao's 8 bits as what it consists of: ".codes", ".scale" and ".qmap"."""
    if isinstance(value, DTensor) or not hasattr(value, "__tensor_flatten__"):
        return {"": value}
    names, _ = value.__tensor_flatten__()
    return {f".{name}": getattr(value, name) for name in names}


def prepare_optimizer(
    name: str, module: nn.Module, optimizer: torch.optim.Optimizer, names: Mapping[str, torch.Size]
) -> None:
    """Give an unused optimiser the state that a checkpoint with these names can be read into: by a step of the weights
    that have one there. What it does to them is undone by reading the checkpoint."""
    updated = {key.rpartition("/")[0] for key in names}
    for parameter_name, parameter in module.named_parameters():
        if f"{name}.optim/{parameter_name}" in updated:
            parameter.grad = torch.zeros_like(parameter.detach())
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def generators(rank: int) -> dict[str, Tensor]:
    """The state of every global generator of this process. Nothing in training draws from them without setting them
    first: belt and braces."""
    _, keys, position, *_ = np.random.get_state()
    states = {
        "python": torch.tensor(random.getstate()[1], dtype=torch.int64),
        "numpy": torch.tensor([*keys.tolist(), position], dtype=torch.int64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {f"rng/{rank}/{name}": state for name, state in states.items()}


def restore_generators(path: Path, rank: int) -> None:
    """Set the global generators of this process as they were, if it had a place in the run that was saved."""
    states = {name: state for name, state in generators(rank).items() if name in stored(path)}
    if not states:
        return
    quietly(dcp.load, states, checkpoint_id=path, no_dist=True)
    states = {name.rpartition("/")[2]: state for name, state in states.items()}
    random.setstate((3, tuple(states["python"].tolist()), None))
    *keys, position = states["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position))
    torch.set_rng_state(states["torch"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def write_whole(path: Path, text: str) -> None:
    """Write a file beside its place and swap it in, so that it is whole at every moment."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def quietly(call: Any, *args: Any, **kwargs: Any) -> Any:
    """Without the warning that a process on its own is on its own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        return call(*args, **kwargs)


def _reason(error: BaseException) -> str:
    """The last line of what went wrong, which names it."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
