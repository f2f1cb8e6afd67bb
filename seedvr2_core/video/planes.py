"""Decoded frames <-> RGB: what the numbers in a video's planes mean.

The arithmetic is ours, because swscale's is not exact enough: its 16-bit RGB input comes out almost half an 8-bit step
too bright, its 16-bit RGB output as much too dark, and it takes untagged HD for BT.601. It still reorders unusual
layouts into planes, which is lossless.
"""

# H, W height and width   c channels   planes may be smaller than H, W: subsampled chroma

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import av
import numpy as np
import torch
from torch import Tensor

from ..errors import MediaError

# Code points of ITU-T H.273, which av hands out as numbers. 2 is "unspecified" and left out: it names nothing.
MATRICES = {0: "rgb", 1: "bt709", 4: "fcc", 5: "bt470bg", 6: "smpte170m", 7: "smpte240m", 8: "ycgco", 9: "bt2020nc",
            10: "bt2020c"}  # fmt: skip
PRIMARIES = {1: "bt709", 4: "bt470m", 5: "bt470bg", 6: "smpte170m", 7: "smpte240m", 8: "film", 9: "bt2020",
             10: "smpte428", 11: "smpte431", 12: "smpte432", 22: "ebu3213"}  # fmt: skip
TRANSFERS = {1: "bt709", 4: "bt470m", 5: "bt470bg", 6: "smpte170m", 7: "smpte240m", 8: "linear", 9: "log100",
             10: "log316", 11: "iec61966-2-4", 12: "bt1361e", 13: "iec61966-2-1", 14: "bt2020-10", 15: "bt2020-12",
             16: "smpte2084", 17: "smpte428", 18: "arib-std-b67"}  # fmt: skip
RANGES = {1: "limited", 2: "full"}

# Share of red and of blue in luma (ITU-R BT.709, BT.601, BT.2020; FCC 73.682; SMPTE 240M).
LUMA = {"bt709": (0.2126, 0.0722), "smpte170m": (0.299, 0.114), "bt470bg": (0.299, 0.114), "fcc": (0.3, 0.11),
        "smpte240m": (0.212, 0.087), "bt2020nc": (0.2627, 0.0593), "bt2020c": (0.2627, 0.0593)}  # fmt: skip


@dataclass(frozen=True)
class Coding:
    """How colours became numbers."""

    matrix: str  # "rgb" or a key of LUMA
    range: Literal["limited", "full"]


def coding_of(pixel_format: str, color_range: str | None, matrix: str | None, height: int) -> Coding:
    """The coding a file declares, or the one players assume where it declares none."""
    layout = av.VideoFormat(pixel_format)
    if "f16" in pixel_format or "f32" in pixel_format:
        raise MediaError(f"Its pixels are floating point ({pixel_format}); convert it to 16-bit whole numbers first.")
    if layout.is_rgb or layout.has_palette or len(layout.components) < 3:  # grey is RGB with one value for all
        return Coding("rgb", color_range or "full")
    if matrix not in LUMA:
        if matrix == "ycgco":
            raise MediaError("Its colours are coded as YCgCo, which is not supported; convert it to BT.709 first.")
        matrix = "bt709" if height >= 720 else "smpte170m"
    return Coding(matrix, color_range or ("full" if pixel_format.startswith("yuvj") else "limited"))


def depth_of(pixel_format: str) -> int:
    """Bits per colour value."""
    layout = av.VideoFormat(pixel_format)
    return 8 if layout.has_palette else max(part.bits for part in layout.components)


def has_alpha(pixel_format: str) -> bool:
    """Whether pixels of this format carry transparency."""
    return any(part.is_alpha for part in av.VideoFormat(pixel_format).components)


def rgb_from_frame(frame: av.VideoFrame, coding: Coding, *, alpha: bool) -> Tensor:
    """Decode the planes of a frame: (H, W, c), uint8 up to 8 bits, else uint16 filling 0..65535.

    Args:
        alpha: return RGBA; the frame must carry it. Otherwise RGB, whatever the frame carries.
    """
    frame = _planar(frame)
    bits, size = depth_of(frame.format.name), (frame.height, frame.width)
    parts = _planes(frame)
    opacity = [parts.pop() / (2**bits - 1)] if has_alpha(frame.format.name) else []
    values = [_dequantise(part, bits, coding, chroma=i > 0) for i, part in enumerate(parts)]
    if len(values) == 1:
        values *= 3
    elif coding.matrix != "rgb":
        kr, kb = LUMA[coding.matrix]
        kg, y, cb, cr = 1 - kr - kb, values[0], *(_enlarge(value, size) for value in values[1:])
        values = [
            y.add(cr, alpha=2 * (1 - kr)),
            y.add(cb, alpha=-2 * (1 - kb) * kb / kg).add_(cr, alpha=-2 * (1 - kr) * kr / kg),
            y.add(cb, alpha=2 * (1 - kb)),
        ]
    values = [*values, *opacity] if alpha else values
    top, dtype = (255, torch.uint8) if bits <= 8 else (65535, torch.uint16)
    pixels = torch.empty(*size, len(values), dtype=dtype)
    for i, value in enumerate(values):
        pixels[..., i] = value.mul(top).round_().clamp_(0, top)
    return pixels


def planes_from_rgb(pixels: Tensor, pixel_format: str, coding: Coding) -> list[Tensor]:
    """Encode (H, W, c) RGB or RGBA, floating point 0..1, for a planar pixel format, rounded.

    Returns a plane of whole numbers per component of the format, uint8 up to 8 bits, else uint16.
    """
    height, width, _ = pixels.shape
    layout, bits = av.VideoFormat(pixel_format, width, height), depth_of(pixel_format)
    red, green, blue, *alpha = pixels.float().clamp(0, 1).unbind(-1)
    if coding.matrix == "rgb":
        values = [red, green, blue]
    else:
        kr, kb = LUMA[coding.matrix]
        chroma = (layout.chroma_height(), layout.chroma_width())
        y = (kr * red).add_(green, alpha=1 - kr - kb).add_(blue, alpha=kb)
        values = [y, *(_reduce(color - y, chroma) / (2 * (1 - k)) for color, k in ((blue, kb), (red, kr)))]
    parts = [_quantise(value, bits, coding, chroma=i > 0) for i, value in enumerate(values)]
    if has_alpha(pixel_format):
        parts.append((alpha[0] * (2**bits - 1)).round())
    return [part.to(torch.uint8 if bits <= 8 else torch.uint16) for part in parts]


def frame_from_planes(planes: Sequence[Tensor], pixel_format: str, coding: Coding) -> av.VideoFrame:
    """The frame that has these planes, see `planes_from_rgb`."""
    height, width = planes[0].shape
    frame = av.VideoFrame(width, height, pixel_format)
    dtype = np.dtype("u1" if depth_of(pixel_format) <= 8 else "<u2")
    for component, values in zip(frame.format.components, planes, strict=True):
        plane = frame.planes[component.plane]
        rows = np.zeros((plane.height, plane.line_size // dtype.itemsize), dtype)
        rows[:, : plane.width] = values.cpu().numpy()
        plane.update(rows)
    frame.colorspace = number_of(MATRICES, coding.matrix)
    frame.color_range = number_of(RANGES, coding.range)
    return frame


def _planar(frame: av.VideoFrame) -> av.VideoFrame:
    """The frame itself or, where its layout is unusual, a copy with the same numbers in a plane per component."""
    layout = frame.format
    planar = len({component.plane for component in layout.components}) == len(layout.components)
    # The rows of a negative line size (bottom-up) are out of reach of the buffer, so such a frame is copied as well.
    awkward = layout.has_palette or layout.is_big_endian or layout.is_bit_stream
    if planar and not awkward and all(plane.line_size > 0 for plane in frame.planes):
        return frame
    colors, alpha = len(layout.components), "a" if has_alpha(layout.name) else ""
    if layout.is_rgb or layout.has_palette or colors == 2:
        plain = f"gbr{alpha}p"
    else:
        plain = "gray" if colors == 1 else f"yuv{alpha}444p"
    return frame.reformat(format=plain if depth_of(layout.name) <= 8 else f"{plain}16le")


def _planes(frame: av.VideoFrame) -> list[Tensor]:
    """Planes in the order Y Cb Cr, R G B or grey, alpha last; whole numbers of the frame's own depth, as float."""
    dtype = np.dtype("u1" if depth_of(frame.format.name) <= 8 else "<u2")
    planes = []
    for component in frame.format.components:
        plane = frame.planes[component.plane]
        rows = np.frombuffer(plane, dtype).reshape(plane.height, -1)[:, : plane.width]
        planes.append(torch.from_numpy(rows.astype(np.float32)))
    return planes


def _dequantise(values: Tensor, bits: int, coding: Coding, chroma: bool) -> Tensor:
    """Whole numbers to 0..1, or -0.5..0.5 for chroma. Source: ITU-R BT.709 and H.273, both ranges."""
    scale, chroma = 2.0 ** (bits - 8), chroma and coding.matrix != "rgb"
    if coding.range == "limited":
        return (values - 128 * scale) / (224 * scale) if chroma else (values - 16 * scale) / (219 * scale)
    return (values - (128 * scale if chroma else 0)) / (2**bits - 1)


def _quantise(values: Tensor, bits: int, coding: Coding, chroma: bool) -> Tensor:
    """The inverse of `_dequantise`, rounded and kept inside the format."""
    scale, chroma = 2.0 ** (bits - 8), chroma and coding.matrix != "rgb"
    if coding.range == "limited":
        values = values * (224 * scale) + 128 * scale if chroma else values * (219 * scale) + 16 * scale
    else:
        values = values * (2**bits - 1) + (128 * scale if chroma else 0)
    return values.round().clamp(0, 2**bits - 1)


def _enlarge(chroma: Tensor, size: tuple[int, int]) -> Tensor:
    """Interpolate chroma to full size, doubling as often as needed.

    Chroma sits on the left pixel of a pair and between two rows, as MPEG-2, H.264, HEVC and VP9 have it unless told
    otherwise; av does not pass on what a file says about it.
    """
    height, width = size
    while chroma.shape[1] < width:
        after = torch.cat([chroma[:, 1:], chroma[:, -1:]], dim=1)
        chroma = torch.stack([chroma, (chroma + after) / 2], dim=2).flatten(1)[:, :width]
    while chroma.shape[0] < height:
        before, after = torch.cat([chroma[:1], chroma[:-1]]), torch.cat([chroma[1:], chroma[-1:]])
        above, below = 0.75 * chroma + 0.25 * before, 0.75 * chroma + 0.25 * after
        chroma = torch.stack([above, below], dim=1).flatten(0, 1)[:height]
    return chroma


def _reduce(chroma: Tensor, size: tuple[int, int]) -> Tensor:
    """Halve chroma where the format wants it, to the places `_enlarge` starts from."""
    height, width = size
    if chroma.shape[1] > width:
        padded = torch.cat([chroma[:, :1], chroma, chroma[:, -1:]], dim=1)  # so that every second pixel has neighbours
        chroma = (padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:])[:, ::2] / 4
    if chroma.shape[0] > height:
        padded = torch.cat([chroma, chroma[-1:]])[: 2 * height]
        chroma = (padded[::2] + padded[1::2]) / 2
    return chroma


def number_of(names: dict[int, str], name: str) -> int:
    """The H.273 code point that one of the tables above gives this name."""
    return next(number for number, known in names.items() if known == name)
