"""What a run writes down on its way, so that the same run, begun again, goes on where it was interrupted.

Whatever interrupts it: the user, a full disk, a crash, the end of power.
"""

from __future__ import annotations

import logging
import os
import pickle
import shutil
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from .errors import MediaError
from .life import Waypoint
from .video.files import check_folder
from .video.keep import Keep
from .video.media import Writer, saving

log = logging.getLogger(__name__)

# Seconds of work that may be lost, beside what an encoder holds back. A shorter run leaves nothing.
SAVE_EVERY = 10.0
SUFFIX = ".resume"


@contextmanager
def journal(destination: Path, fingerprint: str, device: torch.device) -> Iterator[Journal]:
    """The journal of a run, which is deleted when the block ends well; otherwise it stays, and it is said where.

    Args:
        fingerprint: of all that the result depends on. A run of another one has another journal.

    Raises:
        MediaError: another process is at it, or it cannot be written.
    """
    check_folder(destination)
    folder = destination.with_name(f".{destination.name}.{fingerprint}{SUFFIX}")
    with saving(destination):
        folder.mkdir(exist_ok=True)
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise MediaError(f"{destination.name} is being written by another process; wait for it, or stop it.") from error
    book = Journal(folder, device)
    if others := [each for each in _journals(destination) if each != folder]:
        log.info("An interrupted run for %s, of other settings or another source, is not gone on with; what it has "
                 "restored stays in %s until this one is complete.", destination.name, others[0])  # fmt: skip
    complete = False
    try:
        yield book
        complete = True
    finally:
        if not complete and time.monotonic() - book.begun >= SAVE_EVERY:
            with suppress(MediaError):
                book.save()
        lock.release()
        if complete:
            for each in _journals(destination):
                shutil.rmtree(each, ignore_errors=True)
        elif book.saved is None:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            log.warning("%d frames are kept in %s: the same run, begun again, goes on from there.",
                        book.saved.frames, folder)  # fmt: skip


def _journals(destination: Path) -> list[Path]:
    """Those of all runs that were to write a file."""
    return [each for each in destination.parent.iterdir()
            if each.name.startswith(f".{destination.name}.") and each.suffix == SUFFIX]  # fmt: skip


class Journal:
    """A folder that holds the beginning of a medium, and from where its restoration can go on."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._state = folder / "state.pt"
        self.keep, self.start = Keep(folder), None
        if self._state.exists():
            self._load(device)
        self.saved: Keep | None = self.keep if self.start else None
        self._waypoints: deque[Waypoint] = deque()
        self._writer: Writer | None = None
        self.begun = self._written = time.monotonic()

    def _load(self, device: torch.device) -> None:
        """What an earlier run has left: `keep`, and the place behind it, `start`."""
        folder = self.keep.folder
        try:
            state = torch.load(self._state, map_location=device, weights_only=True)
            keep, start = Keep(folder, **state["keep"]), Waypoint(**state["waypoint"])
        except (OSError, RuntimeError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as error:
            log.warning("What an interrupted run has left in %s cannot be read (%s); beginning anew.", folder, error)
            return
        if not keep.is_whole():
            log.warning("What an interrupted run has left in %s is damaged; beginning anew.", folder)
            return
        self.keep, self.start = keep, start

    def passed(self, waypoint: Waypoint, writer: Writer) -> None:
        """The frame before this place has been written."""
        if writer.kept is None:
            return
        self._writer = writer
        self._waypoints.append(waypoint)
        while self._waypoints[0].frames < writer.kept.frames:
            self._waypoints.popleft()
        if time.monotonic() - self._written >= SAVE_EVERY:
            self.save()
            self._written = time.monotonic()

    def save(self) -> None:
        """Write down how far the writer has come.

        Raises:
            MediaError: the disk is full.
        """
        kept = self._writer and self._writer.kept
        if not kept or kept == self.saved or not self._waypoints or self._waypoints[0].frames != kept.frames:
            return
        self._writer.flush()
        if kept.bytes and kept.packets.stat().st_size < kept.bytes:  # the disk was full when the writer let go of it
            return
        state = {"keep": {key: value for key, value in asdict(kept).items() if key != "folder"},
                 "waypoint": asdict(self._waypoints[0])}  # fmt: skip
        new = self._state.with_suffix(".new")
        with saving(self._writer.dst):
            torch.save(state, new)
            os.replace(new, self._state)
        self.saved = kept
