"""The progress of a restoration or a download, as a node shows it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from threading import Event
from typing import TypeVar

from torch import Tensor

from ..seedvr2_core.errors import Cancelled
from ..seedvr2_core.progress import SHARES, Overall
from . import host
from .host import io

# on_progress(stage, done, total), in bytes.
Fetching = Callable[[str, int, int], None]
# Seconds between two looks at what happens in another thread.
LOOK_EVERY = 0.5

T = TypeVar("T")


def counted(frames: int) -> str:
    """A number of frames as people say it."""
    return "1 frame" if frames == 1 else f"{frames} frames"


class Shown:
    """Shows the progress of one clip on a node.

    Args:
        start, length: which part of all that the node does this clip is, 0..1.
        stages: those that it goes through.
    """

    def __init__(
        self, progress: host.Progress, start: float = 0.0, length: float = 1.0, stages: Sequence[str] = tuple(SHARES)
    ):
        self.progress, self.start, self.length = progress, start, length
        self.overall, self.share = Overall(stages), start

    def __call__(self, stage: str, done: float, total: int | None) -> None:
        share = self.overall(stage, done, total)
        if share is not None:
            self.share = self.start + self.length * share
        self.progress(self.share, f"{stage}: {int(done)} of {total or '?'} frames")

    def preview(self, frame: Tensor) -> None:
        self.progress.preview(frame, self.share)


def of_download(node: type[io.ComfyNode]) -> Fetching:
    """Shows a download on a node."""
    progress = host.Progress(node.hidden.unique_id)

    def show(stage: str, done: int, total: int) -> None:
        text = f"{stage}: {done / 1e6:.0f} of {total / 1e6:.0f} MB" if total else f"{stage}: connecting"
        progress(done / max(1, total), text)

    return show


def in_background(step: Callable[[Fetching], T], on_progress: Fetching) -> T:
    """Take a step in a thread of its own, and say here how far it is even while it is silent, as on a slow line.

    Args:
        step: calls what it is given as `on_progress`.
        on_progress: called in this thread; may raise to cancel, then the step ends where it next has progress.
    """
    at, stopped = ("download", 0, 0), Event()

    def note(*progress: object) -> None:
        nonlocal at
        if stopped.is_set():
            raise Cancelled("Stopped; what has arrived is kept, and the next run goes on from there.")
        at = progress

    # Its end is waited for: two downloads of one file must not write side by side.
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(step, note)
        try:
            while wait([running], LOOK_EVERY).not_done:
                on_progress(*at)
            return running.result()
        finally:
            stopped.set()
