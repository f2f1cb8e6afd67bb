"""What a run writes down on its way, so that the same run, begun again, goes on where it was interrupted.

Whatever interrupts it: the user, a full disk, a crash, the end of power.
"""

from __future__ import annotations

import io
import logging
import os
import pickle
import shutil
import time
import zlib
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from .checkpoints.plain import UNREADABLE
from .errors import MediaError
from .life import Waypoint
from .video.chunks import OVERLAP
from .video.files import check_folder
from .video.keep import Keep
from .video.media import Writer, saving
from .video.stills import images_in

log = logging.getLogger(__name__)

# Seconds of work that may be lost, beside what an encoder holds back. A shorter run leaves nothing.
SAVE_EVERY = 10.0
# Of the hidden folder beside a destination, `.NAME.resume`, that has a folder for every run that was to write it.
SUFFIX = ".resume"
STATE = "state"
# In front of the state: its CRC-32, big endian.
CHECKSUM = 4


@contextmanager
def claimed(destination: Path) -> Iterator[Path]:
    """Keep other processes from writing a destination; the folder for what they would need to go on.

    Raises:
        MediaError: another process is at it, or there can be no such folder.
    """
    check_folder(destination)
    folder = destination.with_name(f".{destination.name}{SUFFIX}")
    with saving(destination):
        folder.mkdir(exist_ok=True)
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise MediaError(f"{destination.name} is being written by another process; wait for it, or stop it. If there "
                         f"is none, delete {lock.lock_file}.") from error  # fmt: skip
    except (OSError, NotImplementedError) as error:  # on some network folders
        log.debug("%s cannot be locked: %s", folder, error)
    try:
        yield folder
    finally:
        lock.release()
        if not any(each.is_dir() for each in folder.iterdir()):
            shutil.rmtree(folder, ignore_errors=True)


def holds_work(folder: Path) -> bool:
    """Whether there is something to go on from in such a folder."""
    return next(folder.glob(f"*/{STATE}"), None) is not None


@contextmanager
def journal(destination: Path, fingerprint: str, device: torch.device) -> Iterator[Journal]:
    """The journal of a run, which is deleted when the block ends well; otherwise it stays, and it is said where.

    Args:
        fingerprint: of all that the result depends on. A run of another one has another journal.

    Raises:
        MediaError: another process is at it, or it cannot be written.
    """
    with claimed(destination) as folder:
        own = folder / fingerprint
        if holds_work(folder) and not (own / STATE).exists():
            log.info("A run for %s with other settings or from another source was interrupted. It is not gone on with; "
                     "what it has restored stays in %s until this one is complete.",
                     destination.name, folder)  # fmt: skip
        with saving(destination):
            own.mkdir(exist_ok=True)
        book = Journal(own, device)
        complete = False
        try:
            yield book
            complete = True
        finally:
            if not complete and time.monotonic() - book.begun >= SAVE_EVERY:
                with suppress(MediaError):
                    book.save()
            if complete:
                for each in folder.iterdir():
                    if each.is_dir():
                        shutil.rmtree(each, ignore_errors=True)
            elif book.saved is None:
                shutil.rmtree(own, ignore_errors=True)
            else:
                log.warning("%d frames are kept in %s: the same run, begun again, goes on from there.",
                            book.saved.frames, folder)  # fmt: skip


class Journal:
    """A folder that holds the beginning of a medium, and from where its restoration can go on."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._state = folder / STATE
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
            data = self._state.read_bytes()
            if zlib.crc32(data[CHECKSUM:]) != int.from_bytes(data[:CHECKSUM], "big"):
                raise ValueError("it is damaged")
            state = torch.load(io.BytesIO(data[CHECKSUM:]), map_location=device, weights_only=True)
            keep, start = Keep(folder, **state["keep"]), Waypoint(**state["waypoint"])
            if not _is_possible(keep, start):
                raise ValueError("it makes no sense")
            # Packets of a video, or else images.
            files = [keep.packets] if keep.packets.exists() else images_in(keep.images)[: keep.frames]
            if not keep.is_whole(files):
                raise ValueError("what it tells of is not there, or damaged")
        except (*UNREADABLE, pickle.UnpicklingError) as error:
            log.warning("What an interrupted run has left in %s cannot be gone on with (%s); beginning anew.",
                        folder, (str(error).splitlines() or [type(error).__name__])[0])  # fmt: skip
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
        numbers = {"frames": kept.frames, "bytes": kept.bytes, "checksum": kept.checksum}
        buffer = io.BytesIO()
        torch.save({"keep": numbers, "waypoint": vars(self._waypoints[0])}, buffer)
        data, new = buffer.getvalue(), self._state.with_suffix(".new")
        with saving(self._writer.dst):
            self._writer.flush()
            with new.open("wb") as file:
                file.write(zlib.crc32(data).to_bytes(CHECKSUM, "big") + data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, self._state)
        self.saved = kept


def _is_possible(keep: Keep, start: Waypoint) -> bool:
    """Whether these are numbers that a run may have written down."""
    numbers = (keep.frames, keep.bytes, keep.checksum, start.frames, start.shot, start.length)
    return (
        all(type(number) is int for number in numbers)
        and 0 <= start.shot < start.frames == keep.frames
        and keep.bytes > 0
        and start.length > OVERLAP
        and isinstance(start.color, dict)
    )
