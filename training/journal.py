"""What a run writes about itself: metrics, validation results and alerts, one JSON object a line.

A disk that is full never stops a run: what cannot be written is kept, as far as a file's buffer reaches, and tried
again with the next line.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TextIO, TypeVar

from filelock import FileLock, Timeout

from seedvr2_core.errors import SettingError

from .parallel import Processes, attempt

log = logging.getLogger(__name__)

METRICS, VALIDATION, ALERTS, HEARTBEATS = "metrics.jsonl", "validation.jsonl", "alerts.jsonl", "heartbeats"
LOCK = "lock"
# Seconds for which a server of files may keep the lock of a machine that is no more.
LEASE = 120.0

P, T = ParamSpec("P"), TypeVar("T")


@contextmanager
def claimed(directory: Path, processes: Processes) -> Iterator[None]:
    """Keep a run directory, which is made where there is none, from being written by another call.

    Raises:
        SettingError: in all processes; another call is at it. One that was killed is not.
    """
    directory.mkdir(parents=True, exist_ok=True)
    lock, taken = FileLock(directory / LOCK), False
    if processes.first:
        try:
            lock.acquire(timeout=LEASE if attempt() else 0)
        except Timeout:
            taken = True
        except (OSError, NotImplementedError) as error:  # on some network folders
            log.debug("%s cannot be locked: %s", directory, error)
    try:
        if processes.agree(taken):
            raise SettingError(f"{directory} is being written by another run; wait for it, stop it, or choose another "
                               f"--out. If there is none, delete {lock.lock_file}.")  # fmt: skip
        yield
    finally:
        lock.release()


class Journal:
    """The log files of a run directory, opened for appending; a context.

    Args:
        directory: of the run; None writes nothing, as all processes but the first do.
        step: of the checkpoint that the run goes on from. What was written at later steps, by a process that was
            killed before its next checkpoint, is dropped: it will be written again.
        tensorboard: also write TensorBoard events. A sink that fails is dropped with a warning; it never stops a run.
    """

    def __init__(self, directory: Path | None, step: int, tensorboard: bool = False):
        self.directory, self.step = directory, step
        self.files: dict[str, TextIO] = {}
        self.failures: dict[str, int] = {}  # lines of a file that could not be written when they were due
        self.events = self._open_events() if tensorboard and directory else None

    def __enter__(self) -> Journal:
        self._open(self.step)
        return self

    def rewind(self, step: int) -> None:
        """Drop what was written from a step on; the run goes back there. Alerts are kept."""
        self._close()
        self._open(step)

    def _open(self, step: int) -> None:
        if self.directory is None:
            return
        # A row of metrics belongs to the step that begins at its number, a validation to the one that ended there.
        trim(self.directory / METRICS, step)
        trim(self.directory / VALIDATION, step + 1)
        for name in (METRICS, VALIDATION, ALERTS):
            self.files[name] = open(self.directory / name, "a", buffering=1, encoding="utf-8")  # noqa: SIM115

    def _close(self) -> None:
        for name, file in self.files.items():
            try:
                file.close()
            except OSError as error:
                log.warning("%s lacks its last lines: %s", name, error)
        self.files.clear()

    def __exit__(self, *exception: object) -> None:
        self._close()
        for name, count in self.failures.items():
            log.warning("%d lines of %s could not be written when they were due.", count, name)
        if self.events is not None:
            self.events.close()

    def metrics(self, row: Mapping[str, Any]) -> None:
        self._write(METRICS, row)
        self._show("train", row)

    def validation(self, row: Mapping[str, Any]) -> None:
        log.info("%s", dict(row))
        self._write(VALIDATION, row)
        self._show("validation", row)

    def alert(self, step: int, message: str, scalars: Mapping[str, Any] | None = None) -> None:
        if self.directory is not None:
            log.warning("Step %d: %s", step, message)
        self._write(ALERTS, {"step": step, "message": message, "scalars": dict(scalars or {})})

    def _write(self, name: str, row: Mapping[str, Any]) -> None:
        if name not in self.files:
            return
        try:
            self.files[name].write(json.dumps(row) + "\n")
        except OSError as error:
            if name not in self.failures:
                log.warning("%s cannot be written at the moment: %s", name, error)
            self.failures[name] = self.failures.get(name, 0) + 1

    def _open_events(self) -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            log.warning("TensorBoard is not written: %s. Install tensorboard, or set run.tensorboard=false.", error)
            return None
        return SummaryWriter(str(self.directory))

    def _show(self, group: str, row: Mapping[str, Any]) -> None:
        if self.events is None:
            return
        try:
            for name, value in row.items():
                if name != "step" and isinstance(value, int | float):
                    self.events.add_scalar(f"{group}/{name}", value, row["step"])
        except (OSError, RuntimeError, ValueError) as error:
            log.warning("TensorBoard is written no longer: %s", error)
            self.events = None


def beat(directory: Path, rank: int, step: int) -> None:
    """Leave a sign of life of one process among many: where all wait for one that hangs, its file is the oldest."""
    try:
        (directory / HEARTBEATS).mkdir(exist_ok=True)
        (directory / HEARTBEATS / f"{rank:05d}.json").write_text(
            json.dumps({"step": step, "host": socket.gethostname(), "pid": os.getpid()}), "utf-8"
        )
    except OSError as error:
        log.debug("Process %d leaves no heartbeat: %s", rank, error)


def timed(call: Callable[P, T], *args: P.args, **options: P.kwargs) -> tuple[T, float]:
    """What a call returns, and the seconds that it took."""
    start = time.perf_counter()
    result = call(*args, **options)
    return result, time.perf_counter() - start


def trim(path: Path, step: int) -> None:
    """Drop the rows of a log from `step` on, and a last line that was cut off."""
    if not path.exists():
        return
    kept = [row for row in read(path) if row["step"] < step]
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in kept), "utf-8")
    partial.replace(path)


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a log file; a last line that was cut off by a kill is left out."""
    rows = []
    for line in path.read_text("utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            log.debug("%s holds an unfinished line", path)
    return rows
