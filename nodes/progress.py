"""The progress of a restoration, as a node shows it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..seedvr2_core.progress import SHARES, Overall
from . import host


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
