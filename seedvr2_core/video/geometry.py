"""The sizes a clip may have: target size, resizing, padding and cropping, latent and token grids, value ranges."""

# T C H W   frames, channels, height, width in pixels   t h w the same in latent or token space

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import SettingError

# Pixels (frames) covered by one step of the latent. Its first frame covers one pixel frame, so a clip has 4n+1.
LATENT_FRAMES = 4
LATENT_PIXELS = 8
# Latent rows and columns in one token of the transformer, which does not group frames.
PATCH = 2
# Height and width of a clip are multiples of this: 16.
CLIP_MULTIPLE = LATENT_PIXELS * PATCH
# No codec or image format worth writing goes further; a larger size is a typing error.
MAX_SIDE = 65536


class Grid(NamedTuple):
    """Counts along time, height and width, in latent positions or in tokens."""

    t: int
    h: int
    w: int


@dataclass(frozen=True)
class Target:
    """How large the output shall be. Build one with a constructor below, then ask `size`.

    All but `exact` keep the aspect ratio up to rounding. A value out of range raises SettingError.
    """

    kind: Literal["same", "scale", "short_side", "long_side", "megapixels", "exact"]
    values: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for value in self.values:
            if not (math.isfinite(value) and value > 0):
                raise SettingError(f"The output size cannot be {self}: {value:g} has to be a number above zero.")

    def __str__(self) -> str:
        # Width first, as people say it.
        values = reversed(self.values) if self.kind == "exact" else self.values
        return f"{self.kind.replace('_', ' ')} {' x '.join(f'{value:g}' for value in values)}".strip()

    @classmethod
    def same(cls) -> Target:
        """The size of the input: restore without enlarging."""
        return cls("same")

    @classmethod
    def scale(cls, factor: float) -> Target:
        """Both sides times `factor`; below 1 shrinks."""
        return cls("scale", (factor,))

    @classmethod
    def short_side(cls, pixels: int) -> Target:
        """The shorter side becomes `pixels`."""
        return cls("short_side", (pixels,))

    @classmethod
    def long_side(cls, pixels: int) -> Target:
        """The longer side becomes `pixels`."""
        return cls("long_side", (pixels,))

    @classmethod
    def megapixels(cls, millions: float) -> Target:
        """About `millions` of pixels a frame."""
        return cls("megapixels", (millions,))

    @classmethod
    def exact(cls, height: int, width: int) -> Target:
        """This height and width, whatever becomes of the aspect ratio."""
        return cls("exact", (height, width))

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Output (height, width) in pixels for frames of this size, at least 1 x 1.

        Raises SettingError above 65536 pixels a side.
        """
        rows, columns = (max(1, side) for side in self._size(height, width))
        if max(rows, columns) > MAX_SIDE:
            raise SettingError(f"The output would be {columns} x {rows} pixels, beyond the limit of {MAX_SIDE} a side; "
                               f"ask for less than {self}.")
        return rows, columns

    def _size(self, height: int, width: int) -> tuple[int, int]:
        short, long = min(height, width), max(height, width)
        match self.kind, self.values:
            case "same", ():
                return height, width
            case "exact", (rows, columns):
                return int(rows), int(columns)
            case "scale", (factor,):
                return _scaled(height, width, factor)
            case "megapixels", (millions,):
                return _scaled(height, width, math.sqrt(millions * 1e6 / (height * width)))
            case "long_side", (pixels,):
                side = int(pixels), int(pixels * short / long)
                return side if height >= width else side[::-1]
            case "short_side", (pixels,):
                side = int(pixels), int(pixels * long / short)
                return side if height <= width else side[::-1]
        raise SettingError(f"There is no output size {self.kind!r} with {len(self.values)} values; "
                           "build it with a constructor of Target.")


def _scaled(height: int, width: int, factor: float) -> tuple[int, int]:
    # round() is half to even, as in the published code.
    return round(height * factor), round(width * factor)


def resize(frames: Tensor, height: int, width: int) -> Tensor:
    """Resample frames (T C H W, 0..1) to height x width, clamped to 0..1, in the dtype given.

    Antialiased bicubic with a = -0.5 and pixel centres, up or down. Frames of that size already come back as they are.
    """
    if frames.shape[-2:] == (height, width):
        return frames
    # fp32: the antialiased filter has many small taps, and half precision is missing on some devices.
    resized = F.interpolate(frames.float(), (height, width), mode="bicubic", align_corners=False, antialias=True)
    return resized.clamp_(0, 1).to(frames.dtype)


def padded_size(height: int, width: int, multiple: int = CLIP_MULTIPLE) -> tuple[int, int]:
    """Height and width after `pad_to_multiple`."""
    return -(-height // multiple) * multiple, -(-width // multiple) * multiple


def pad_to_multiple(clip: Tensor, multiple: int = CLIP_MULTIPLE) -> Tensor:
    """Extend ... H W at the bottom and right to the next multiple, mirroring the picture about its last row and column.

    A picture smaller than its padding is mirrored back and forth. Undone by `crop`.
    """
    sizes = clip.shape[-2:]
    for axis, size, total in zip((-2, -1), sizes, padded_size(*sizes, multiple), strict=True):
        if total > size:
            clip = clip.index_select(axis, torch.tensor(_reflection(size, total), device=clip.device))
    return clip


def _reflection(size: int, total: int) -> list[int]:
    period = max(1, 2 * (size - 1))
    return [min(i % period, period - i % period) if size > 1 else 0 for i in range(total)]


def crop(clip: Tensor, height: int, width: int) -> Tensor:
    """The top left height x width of ... H W, a view: what `pad_to_multiple` added goes away."""
    return clip[..., :height, :width]


def padded_length(frames: int, step: int = LATENT_FRAMES) -> int:
    """The smallest step * n + 1 that holds this many frames: 1, 5, 9, 13, ..."""
    return -(-(frames - 1) // step) * step + 1


def mirror_indices(frames: int, total: int) -> list[int]:
    """Frame numbers that lengthen a clip to `total` by playing it backwards from its end: 0 1 2 3 4, 3 2 1.

    A clip too short for that is played back to frame 1 and then holds its last frame, as the community node does.
    """
    extra = total - frames
    if extra < frames:
        tail = [frames - 2 - i for i in range(extra)]
    else:
        tail = [*range(frames - 1, 0, -1), *[frames - 1] * (extra - frames + 1)]
    return [*range(frames), *tail]


def mirror_indices_before(frames: int, extra: int) -> list[int]:
    """Frame numbers of a clip with `extra` mirrored frames in front: 3 2 1, 0 1 2 3 4. See `mirror_indices`."""
    if extra < frames:
        head = [*range(extra, 0, -1)]
    else:
        head = [*[frames - 1] * (extra - frames + 1), *range(frames - 1, 0, -1)]
    return [*head, *range(frames)]


def latent_grid(frames: int, height: int, width: int) -> Grid:
    """Latent size of a padded clip: 4n+1 frames, height and width multiples of 16, all in pixels."""
    return Grid((frames - 1) // LATENT_FRAMES + 1, height // LATENT_PIXELS, width // LATENT_PIXELS)


def to_floats(pixels: Tensor) -> Tensor:
    """Codes in uint8 or uint16, or floats in 0..1, to floats of 32 bits or more in 0..1. Any layout; it is kept."""
    if pixels.is_floating_point():
        return pixels.to(torch.promote_types(pixels.dtype, torch.float32))
    return pixels.float() / torch.iinfo(pixels.dtype).max


def to_clip(frames: Tensor) -> Tensor:
    """0..1, what a user sees, to -1..1, what the model sees. Any layout; it is kept."""
    return frames * 2 - 1


def to_frames(clip: Tensor) -> Tensor:
    """-1..1 to 0..1 in fp32, clamped. Any layout; it is kept."""
    # fp32: the sum below costs half-precision values near zero the bits that tell two 8-bit codes apart.
    return clip.float().clamp(-1, 1) * 0.5 + 0.5


def to_uint8(frames: Tensor) -> Tensor:
    """0..1 to codes 0..255, rounded half to even. Truncation, seen elsewhere, darkens by half a code."""
    return (frames.float().clamp(0, 1) * 255).round().to(torch.uint8)
