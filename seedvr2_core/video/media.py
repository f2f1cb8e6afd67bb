"""What a video, an image and a folder of images have in common: how they are described, read and written."""

# T frames   H, W height and width   c channels: red, green, blue and perhaps alpha

from __future__ import annotations

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Literal

import av
import torch
from torch import Tensor

from ..errors import MediaError
from .geometry import to_floats
from .keep import Keep


@dataclass(frozen=True, kw_only=True)
class MediaInfo:
    """What is known about a medium before all of it is read."""

    path: Path
    kind: Literal["video", "image", "folder"]
    width: int  # as shown, that is after rotation
    height: int
    frames: int | None  # exact for images and folders; for a video what its container says or implies
    fps: Fraction  # on average; the given rate for images
    duration: Fraction | None  # seconds
    bit_depth: int
    has_alpha: bool
    codec: str
    pixel_format: str
    rotation: int = 0  # degrees clockwise from stored to shown
    interlaced: bool = False
    pixel_aspect: Fraction = Fraction(1)  # width to height of one pixel, as shown
    variable_frame_rate: bool | None = None  # as far as its beginning tells
    color_range: Literal["limited", "full"] | None = None  # None where the file does not say
    color_matrix: str | None = None
    color_primaries: str | None = None
    color_transfer: str | None = None
    audio: tuple[str, ...] = ()
    subtitles: tuple[str, ...] = ()
    time_base: Fraction | None = None  # seconds; the clock a video's timestamps tick by
    start: Fraction = Fraction(0)  # seconds on the file's clock that Moment.start calls 0


@dataclass(frozen=True)
class Moment:
    """When a frame appears and for how long, in seconds."""

    start: Fraction
    duration: Fraction


@dataclass(frozen=True)
class Frame:
    """One picture: (H, W, c) RGB or RGBA, uint8 0..255 or uint16 0..65535, and its place in time."""

    pixels: Tensor
    time: Moment

    def floats(self) -> Tensor:
        """The pixels as float32 (H, W, c), 0..1."""
        return to_floats(self.pixels)


@dataclass(frozen=True, kw_only=True)
class Orientation:
    """How stored pixels become upright ones: transposed first, then mirrored left-right and top-bottom."""

    transposed: bool = False
    flip_x: bool = False
    flip_y: bool = False

    @property
    def degrees(self) -> int:
        """Rotation clockwise, mirroring left aside."""
        return (90 if self.flip_x else 270) if self.transposed else (180 if self.flip_y else 0)

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height as shown."""
        return (height, width) if self.transposed else (width, height)

    def apply(self, pixels: Tensor) -> Tensor:
        """Turn (H, W, c) pixels upright."""
        axes = [axis for axis, flipped in ((0, self.flip_y), (1, self.flip_x)) if flipped]
        pixels = pixels.transpose(0, 1) if self.transposed else pixels
        # torch mirrors no uint16; it is the same bits.
        bits = pixels.view(torch.int16) if pixels.dtype == torch.uint16 else pixels
        return (bits.flip(axes) if axes else bits).contiguous().view(pixels.dtype)


class Reader(ABC):
    """The frames of a medium in order, decoded one at a time. Every iteration starts over."""

    def __init__(self, info: MediaInfo) -> None:
        self.info = info
        self._open: list[Iterator[Frame]] = []

    def __iter__(self) -> Iterator[Frame]:
        frames = self._frames()
        self._open.append(frames)
        return frames

    @abstractmethod
    def _frames(self) -> Iterator[Frame]:
        """Generate the frames; files are closed when the generator is."""

    def close(self) -> None:
        """End every iteration and release its file."""
        while self._open:
            self._open.pop().close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Writer(ABC):
    """Takes frames and leaves a complete medium at `dst`, or nothing.

    Everything goes to a hidden neighbour, `.NAME.partial.EXT`, which takes the name of `dst` when the `with` block
    ends well. Any exception, an interrupt too, deletes it and leaves an older `dst` as it was.
    """

    notices: list[str]  # what `dst` will lack of its source, a sentence each, for people
    kept: Keep | None = None  # what another run could go on from, were this one killed now; None: nothing ever

    def __init__(self, dst: Path, *, width: int, height: int, channels: int) -> None:
        self.dst = dst
        self.partial = dst.with_name(f".{dst.stem}.partial{dst.suffix}")
        self.landing = dst  # where it goes when it is complete
        self.notices = []
        self.shape = (height, width, channels)
        self.frames = 0  # written so far

    def write(self, frames: Tensor, times: Sequence[Moment]) -> None:
        """Append frames.

        Args:
            frames: (T, H, W, c), floating point, 0..1 (values outside are cut off), or codes in uint8 or uint16.
            times: one moment per frame, later ones later; only videos keep them.

        Raises:
            MediaError: the disk is full, or a frame does not fit what was announced.
        """
        if len(times) != len(frames):
            raise MediaError(f"{self.dst.name} takes a time for each frame, but got {len(times)} for {len(frames)}.")
        for frame, time in zip(frames, times, strict=True):
            self.write_packed(self.pack(frame), time)

    def pack(self, frame: Tensor) -> list[Tensor]:
        """The whole numbers that go into the file, in the layout the encoder takes: the first half of `write`.

        They lie where the frame does and take at most half of its bytes in fp32, an eighth for 8-bit 4:2:0. Changes
        nothing in the writer, so that another thread may be writing.

        Args:
            frame: (H, W, c), otherwise as in `write`.

        Raises:
            MediaError: the frame does not fit what was announced.
        """
        if tuple(frame.shape) != self.shape:
            raise MediaError(
                f"{self.dst.name} takes frames of (height, width, channels) {self.shape}, but got {tuple(frame.shape)}."
            )
        return self._pack(frame)

    def write_packed(self, planes: Sequence[Tensor], time: Moment) -> None:
        """Append a frame that `pack` has prepared: the second half of `write`."""
        with saving(self.dst):
            self._write(planes, time)
        self.frames += 1

    def land_beside(self) -> Path:
        """Have what was written so far, because there will be no more, completed beside `dst`, which stays as it is.

        Returns:
            The free name that it will get: NAME.partial.EXT, or one with a number.
        """
        names = (self.dst.with_name(f"{self.dst.stem}.partial{n if n > 1 else ''}{self.dst.suffix}") for n in count(1))
        self.landing = next(name for name in names if not name.exists())
        return self.landing

    def flush(self) -> None:  # noqa: B027 (nothing to do for writers that keep nothing)
        """Have on disk what is `kept`."""

    @abstractmethod
    def _pack(self, frame: Tensor) -> list[Tensor]:
        """Turn one (H, W, c) frame into whole numbers."""

    @abstractmethod
    def _write(self, planes: Sequence[Tensor], time: Moment) -> None:
        """Encode what `_pack` made of one frame."""

    @abstractmethod
    def _finish(self) -> None:
        """Flush and close, so that `partial` is complete."""

    def _release(self) -> None:  # noqa: B027 (nothing to do for writers that keep nothing open)
        """Let go of open files without completing anything."""

    def discard(self) -> None:
        """Delete what was written so far."""
        self._release()
        if self.partial.is_dir() and not self.kept:
            shutil.rmtree(self.partial)
        if not self.partial.is_dir():
            self.partial.unlink(missing_ok=True)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        complete = False
        try:
            if kind is None:
                if not self.frames:
                    raise MediaError(f"{self.dst.name} was not written: there was no frame to put in it.")
                with saving(self.dst):
                    self._finish()
                    if self.partial.is_dir() and self.landing.is_dir():
                        self.landing.rmdir()  # empty: folders with something in them are refused at opening
                    os.replace(self.partial, self.landing)
                complete = True
        finally:
            if not complete:
                self.discard()


@contextmanager
def saving(dst: Path) -> Iterator[None]:
    """Where a file cannot be written, this is one sentence."""
    try:
        yield
    except (OSError, av.FFmpegError) as error:
        why = f"{dst.name} could not be written ({error.strerror}); what was there before is untouched."
        raise MediaError(why) from error


def integers(values: Tensor, depth: Literal[8, 16]) -> Tensor:
    """0..1, or codes, to whole numbers, rounded: uint8 0..255 or uint16 0..65535. Truncating would darken them."""
    top, dtype = (255, torch.uint8) if depth == 8 else (65535, torch.uint16)
    if values.dtype == dtype:
        return values
    return to_floats(values).float().clamp(0, 1).mul(top).round().to(dtype)
