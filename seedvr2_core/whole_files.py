"""Whole files: from a medium on disk to the restored one, of any length, at constant memory.

Files are read and written by threads of their own; frames go to the device, and from it to a file, as whole numbers.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from .errors import MediaError
from .journal import claimed, journal
from .life import PIECE, OnProgress, Waypoint
from .loading import Models
from .memory.plan import MemoryPlan
from .models.linear import is_rounded
from .pipeline import restored
from .planning import bytes_of_frame, log_plan, plan_clip, told_of_memory
from .settings import DEFAULTS, Settings
from .video.encoders import VERSIONS
from .video.files import Frame, MediaInfo, Moment, open_reader, open_writer, probe
from .video.geometry import LATENT_FRAMES
from .video.stills import images_in
from .video.threads import read_ahead, write_behind
from .video.transfers import download

log = logging.getLogger(__name__)

# Frames read before they are needed, and finished ones that wait to be written; both as whole numbers.
READ_AHEAD = WRITE_BEHIND = 2 * PIECE


@dataclass(frozen=True, kw_only=True)
class Report:
    """What became of a file."""

    source: Path
    destination: Path
    model: str
    frames: int
    width: int
    height: int
    seconds: float
    chunk: int  # frames
    resumed: int  # frames that an interrupted run had restored before


def restore_file(
    source: str | Path,
    destination: str | Path,
    models: Models,
    settings: Settings = DEFAULTS,
    on_progress: OnProgress | None = None,
    fps: Fraction | int = 24,
    on_frame: Callable[[Tensor], None] | None = None,
    plan: MemoryPlan | None = None,
) -> Report:
    """Restore a video, an image or a folder of numbered images, whatever its length, into another.

    Sound, subtitles, timestamps and colour tags of a video are kept. The destination appears when it is complete;
    until then, and after an error or a cancellation, it is as it was before. A run that was interrupted goes on where
    it was when it is begun again: the result is the same. Where a source turns out to be damaged, what can be read of
    it is restored, and kept beside the destination under a name that says so.

    Args:
        fps: frame rate of a folder of images, which are frames of a clip here, whatever their names.
        on_frame: called with every finished frame H W c in 0..1, on the device.
        plan: as made before, by `plan_clip`; None: it is made now.

    Raises:
        MediaError: the source cannot be read to its end or the destination not written.
        SettingError: a setting is impossible for this source.
    """
    start = time.perf_counter()
    info = probe(source, fps=fps)
    size = height, width = settings.target.size(info.height, info.width)
    plan = plan or plan_clip(models, settings, size, info.frames, bytes_of_frame(info))
    log_plan(plan, models, settings, f"{info.path.name}, {info.width} x {info.height}")
    if info.interlaced:
        log.warning("%s is marked as interlaced: if what moves has combs, they will be restored too; deinterlace it "
                    "first, with ffmpeg -i IN -vf bwdif OUT.", info.path.name)  # fmt: skip

    def write(frame: tuple[Callable, Moment, Waypoint]) -> None:
        arrived, moment, waypoint = frame
        writer.write_packed(arrived(), moment)
        if book:
            book.passed(waypoint, writer)

    # A picture is too little to be gone on with.
    mark = fingerprint(info, models, settings)
    kept = nullcontext() if info.kind == "image" else journal(Path(destination), mark, models.device)
    with (
        kept as book,
        open_reader(info) as reader,
        open_writer(destination, info, width=width, height=height, keep=book and book.keep) as writer,
        closing(read_ahead(reader, READ_AHEAD)) as ahead,
        write_behind(write, WRITE_BEHIND) as put,
        told_of_memory(models, size),
        # At once, also when `on_frame` raises: whoever is told may keep the traceback, and with it the models at work.
        closing(
            restored(
                legible := _Legible(ahead, resumed := writer.frames), models, settings, size, info.frames, on_progress,
                plan, book and book.start,
            )
        ) as frames,
    ):
        for notice in writer.notices:
            log.warning(notice)
        if resumed:
            log.info("%s: going on after %d frames that an interrupted run has restored", writer.dst, resumed)
        for (frame,), waypoint in frames:
            if on_frame:
                on_frame(frame)
            put((download(writer.pack(frame)), legible.moments.popleft(), waypoint))
        if legible.damage:
            writer.land_beside()
    if damage := legible.damage:
        of = f" of {info.frames}" if info.frames and info.frames > writer.frames else ""
        raise MediaError(f"{str(damage).removesuffix('.')}; {writer.frames}{of} frames were restored and are in "
                         f"{writer.landing}.") from damage  # fmt: skip
    return Report(
        source=Path(source),
        destination=Path(destination),
        model=models.label,
        frames=writer.frames,
        width=width,
        height=height,
        seconds=round(time.perf_counter() - start, 3),
        chunk=LATENT_FRAMES * (plan.chunk - 1) + 1,
        resumed=resumed,
    )


class _Legible:
    """The frames of a source up to where it turns out to be damaged, unless that is at the first."""

    def __init__(self, reader: Iterable[Frame], known: int):
        """`known`: frames from the beginning that are needed but not on their way any more."""
        self.reader, self.known = reader, known
        self.moments: deque[Moment] = deque()  # of the frames that are on their way
        self.damage: MediaError | None = None

    def __iter__(self) -> Iterator[Tensor]:
        number = 0
        try:
            for number, frame in enumerate(self.reader, start=1):
                if number > self.known:
                    self.moments.append(frame.time)
                yield frame.pixels
        except MediaError as error:
            if not number:
                raise
            self.damage = error


def fingerprint(info: MediaInfo, models: Models, settings: Settings) -> str:
    """Eight digits that change with all a result depends on, but not with where and in how much memory it is made."""
    sources = images_in(info.path) if info.kind == "folder" else [info.path]
    identity = {
        "source": [_stamp(path) for path in sources],
        "fps": info.fps,
        "models": [models.label, models.dtype, *map(_stamp, models.files)],
        "settings": asdict(replace(settings, memory_limit=None, attention=Settings.attention)),
        "rounded": models.dit is not None and is_rounded(models.dit),
        "versions": [torch.__version__, VERSIONS, *map(_stamp, sorted(Path(__file__).parent.rglob("*.py")))],
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:8]


def _stamp(path: Path) -> tuple[str, int, int]:
    """Changes when a file does."""
    status = path.stat()
    return path.name, status.st_size, status.st_mtime_ns


def check_file(
    source: str | Path, destination: str | Path, settings: Settings = DEFAULTS, fps: Fraction | int = 24
) -> None:
    """Refuse what `restore_file` would refuse and what needs no models to be found out. Leaves nothing behind.

    Raises:
        MediaError: the source cannot be opened, or the destination not hold what is to come, or another process is
            writing it.
        SettingError: the output would have an impossible size.
    """
    info = probe(source, fps=fps)
    height, width = settings.target.size(info.height, info.width)
    with nullcontext() if info.kind == "image" else claimed(Path(destination)):
        open_writer(destination, info, width=width, height=height).discard()
