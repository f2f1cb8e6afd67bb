"""Images and folders of numbered images, in 8 and 16 bits."""

# H, W height and width   c channels: red, green, blue and perhaps alpha

from __future__ import annotations

import io
import os
import re
import shutil
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Literal

import av
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import MediaError
from .keep import Keep
from .media import Frame, MediaInfo, Moment, Orientation, Reader, Writer, integers, saving
from .planes import Coding, rgb_from_frame

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
TRANSPARENT = (".png", ".webp", ".tif", ".tiff")

# How Pillow saves: without loss, or in JPEG as near to it as is sensible.
SAVING = {
    ".jpg": {"quality": 95, "subsampling": 0},
    ".jpeg": {"quality": 95, "subsampling": 0},
    ".webp": {"lossless": True, "exact": True},
    ".tif": {"compression": "tiff_deflate"},
    ".tiff": {"compression": "tiff_deflate"},
}
# Pillow cuts 16-bit colour down to 8, FFmpeg does not: demuxer to read with; encoder, byte order and options to write.
DEEP_DEMUXERS = {"PNG": "png_pipe", "TIFF": "tiff_pipe"}
DEEP_ENCODERS = {
    ".png": ("png", "be", {"pred": "mixed"}),
    ".tif": ("tiff", "le", {"compression_algo": "deflate"}),
    ".tiff": ("tiff", "le", {"compression_algo": "deflate"}),
}

EXIF_ORIENTATION = 0x0112
TIFF_BITS_PER_SAMPLE = 258
PNG_BIT_DEPTH = 24  # offset of the byte in the file
ORIENTATIONS = {  # Exif 2.3, tag 0x0112
    2: Orientation(flip_x=True),
    3: Orientation(flip_x=True, flip_y=True),
    4: Orientation(flip_y=True),
    5: Orientation(transposed=True),
    6: Orientation(transposed=True, flip_x=True),
    7: Orientation(transposed=True, flip_x=True, flip_y=True),
    8: Orientation(transposed=True, flip_y=True),
}


def probe_image(path: Path, fps: Fraction) -> MediaInfo:
    """Describe an image by its header.

    Raises:
        MediaError: not an image, several pages, or more than 16 bits per colour.
    """
    with _opened(path) as image:
        pages = getattr(image, "n_frames", 1)
        if pages > 1 and image.format != "MPO":  # a photo with extra views of itself
            raise MediaError(f"{path.name} holds {pages} pictures; save them as a video or as a folder of images.")
        depth = _depth(image, path)
        if depth > 16 or image.mode == "F":
            raise MediaError(f"{path.name} has {depth} bits per colour; save it with 8 or 16.")
        upright = ORIENTATIONS.get(image.getexif().get(EXIF_ORIENTATION), Orientation())
        width, height = upright.size(*image.size)
        return MediaInfo(
            path=path,
            kind="image",
            width=width,
            height=height,
            frames=1,
            fps=fps,
            duration=1 / fps,
            bit_depth=depth,
            has_alpha=image.has_transparency_data,
            codec=image.format.lower(),
            pixel_format=image.mode,
            rotation=upright.degrees,
        )


def probe_folder(path: Path, fps: Fraction) -> MediaInfo:
    """Describe the images in a folder as one clip, by their headers.

    Raises:
        MediaError: no images, or not all of one size.
    """
    infos = [probe_image(each, fps) for each in images_in(path)]
    if not infos:
        raise MediaError(f"The folder {path.name} holds no images ({', '.join(SUFFIXES)}).")
    first = infos[0]
    for info in infos:
        if (info.width, info.height) != (first.width, first.height):
            raise MediaError(
                f"All images of a folder must have one size, but {info.path.name} is {info.width}x{info.height} "
                f"and {first.path.name} is {first.width}x{first.height}."
            )
    return replace(
        first,
        path=path,
        kind="folder",
        frames=len(infos),
        duration=len(infos) / fps,
        bit_depth=max(info.bit_depth for info in infos),
        has_alpha=any(info.has_alpha for info in infos),
    )


def images_in(folder: Path) -> list[Path]:
    """The visible images of a folder, 2 before 10."""
    found = [each for each in folder.iterdir() if each.suffix.lower() in SUFFIXES and not each.name.startswith(".")]
    return sorted(found, key=lambda each: [int(part) if part.isdigit() else part for part in _parts(each.name)])


def why_no_clip(folder: Path) -> str | None:
    """Why the images of a folder are separate pictures, in words that follow "because"; None if they are a clip.

    A clip has one size, and names that differ in nothing but a number, of which most are there.
    """
    images = images_in(folder)
    if len(images) == 1:
        return "there is only one"
    if (numbers := _numbers(images)) is None:
        return "their names are not one numbered sequence"
    if (numbers[-1] - numbers[0] + 1) > 2 * len(numbers):
        return f"most numbers between {numbers[0]} and {numbers[-1]} are missing"
    if len(set(map(_size, images)) - {None}) > 1:
        return "they differ in size"
    return None


def missing_numbers(folder: Path) -> list[int]:
    """Numbers that the names of a clip leave out between the first and the last."""
    numbers = _numbers(images_in(folder)) or [0]
    return sorted({*range(numbers[0], numbers[-1])} - {*numbers})


def _numbers(images: Sequence[Path]) -> list[int] | None:
    """What counts up in names that are otherwise the same."""
    names = [_parts(image.stem) for image in images]
    if not names or len(set(map(len, names))) > 1:
        return None
    # Text and digits take turns.
    varying = [index for index, parts in enumerate(zip(*names, strict=True)) if len(set(parts)) > 1]
    if len(varying) != 1 or varying[0] % 2 == 0:
        return None
    numbers = [int(name[varying[0]]) for name in names]
    return numbers if all(before < after for before, after in pairwise(numbers)) else None


def _size(image: Path) -> tuple[int, int] | None:
    try:
        # Not more than that: to tell which way up it is, a PNG would have to be decoded.
        with _opened(image) as opened:
            return opened.size
    except MediaError:  # told when it is read
        return None


class StillReader(Reader):
    """The picture of an image, or those of a folder in natural order, at a constant rate."""

    def _frames(self) -> Iterator[Frame]:
        info = self.info
        for i, path in enumerate([info.path] if info.kind == "image" else images_in(info.path)):
            pixels = read_image(path)
            if pixels.shape[:2] != (info.height, info.width):
                raise MediaError(f"{path.name} has changed its size since it was first looked at.")
            if info.bit_depth > 8 and pixels.dtype == torch.uint8:
                pixels = (pixels.to(torch.int32) * 257).to(torch.uint16)
            if info.has_alpha and pixels.shape[2] == 3:
                opaque = torch.full_like(pixels[..., :1], torch.iinfo(pixels.dtype).max)
                pixels = torch.cat([pixels, opaque], dim=2)
            yield Frame(pixels, Moment(i / info.fps, 1 / info.fps))


class ImageWriter(Writer):
    """One frame as an image, in 16 bits where the source has more than 8 and the format allows."""

    def __init__(self, dst: Path, source: MediaInfo, *, width: int, height: int, alpha: bool) -> None:
        super().__init__(dst, width=width, height=height, channels=4 if alpha else 3)
        _check_alpha(dst, alpha)
        self.source = source
        with saving(dst):  # what cannot be is told before any work
            self.partial.touch()

    def _pack(self, frame: Tensor) -> list[Tensor]:
        return [integers(frame, _written_depth(self.dst, self.source.bit_depth))]

    def _write(self, planes: Sequence[Tensor], time: Moment) -> None:
        if self.frames:
            raise MediaError(f"{self.dst.name} holds one picture; name a video or a folder for more.")
        write_image(self.partial, planes[0], self.source.bit_depth, _color_profile(self.source.path))

    def _finish(self) -> None:
        pass


class FolderWriter(Writer):
    """Frames as numbered images in a new folder; those of a folder keep their names and formats."""

    def __init__(
        self,
        dst: Path,
        source: MediaInfo,
        *,
        width: int,
        height: int,
        alpha: bool,
        keep: Keep | None = None,
    ) -> None:
        super().__init__(dst, width=width, height=height, channels=4 if alpha else 3)
        if keep:
            self.kept, self.frames, self.partial = keep, keep.frames, keep.images
        self._in_cache: list[Path] = []  # written, though maybe not yet on disk
        self.source = source
        if source.audio:
            self.notices.append(f"A folder of images holds no sound: that of {source.path.name} is left out.")
        self.originals = images_in(source.path) if source.kind == "folder" else []
        for original in self.originals:
            _check_alpha(original, alpha)
        if dst.exists() and not dst.is_dir():
            raise MediaError(f"{dst.name} is a file without a suffix, so its kind is unknown; name a video, an image "
                             "or a new folder.")  # fmt: skip
        if dst.exists() and any(dst.iterdir()):
            raise MediaError(f"The folder {dst.name} is not empty; name a new one, so that nothing in it is lost.")
        with saving(dst):
            if self.partial.exists() and not self.frames:
                shutil.rmtree(self.partial)  # left by a run that was killed
            self.partial.mkdir(exist_ok=True)

    def _pack(self, frame: Tensor) -> list[Tensor]:
        # For those of its images that can have as many bits; the others make theirs of them.
        return [integers(frame, 16 if self.source.bit_depth > 8 else 8)]

    def _write(self, planes: Sequence[Tensor], time: Moment) -> None:
        original = self.originals[self.frames] if self.frames < len(self.originals) else None
        name = original.name if original else f"{self.frames + 1:06d}.png"
        path, profile = self.partial / name, _color_profile(original)
        data = write_image(path, planes[0], self.source.bit_depth, profile)
        if self.kept:
            size, checksum = self.kept.bytes + len(data), zlib.crc32(data, self.kept.checksum)
            self.kept = replace(self.kept, frames=self.frames + 1, bytes=size, checksum=checksum)
            self._in_cache.append(path)

    def flush(self) -> None:
        while self._in_cache:
            with self._in_cache.pop().open("rb+") as file:
                os.fsync(file.fileno())

    def _finish(self) -> None:
        pass


def read_image(path: Path) -> Tensor:
    """Decode an image, upright: (H, W, c), uint8, or uint16 0..65535 where the file has more than 8 bits."""
    with _opened(path) as image:
        upright = ORIENTATIONS.get(image.getexif().get(EXIF_ORIENTATION), Orientation())
        transparent = image.has_transparency_data
        if _depth(image, path) > 8:
            with av.open(str(path.absolute()), format=DEEP_DEMUXERS[image.format]) as container:
                frame = next(container.decode(video=0))
            return upright.apply(rgb_from_frame(frame, Coding("rgb", "full"), alpha=transparent))
        pixels = ImageOps.exif_transpose(image).convert("RGBA" if transparent else "RGB")
        return torch.from_numpy(np.array(pixels))


def write_image(path: Path, frame: Tensor, bit_depth: int, color_profile: bytes | None = None) -> bytes:
    """Encode one (H, W, c) frame, 0..1 or codes, rounded; in 16 bits if `bit_depth` is over 8 and the format can.

    Returns what is in the file now.
    """
    depth = _written_depth(path, bit_depth)
    encode = _encode_deep if depth > 8 else _encode
    data = encode(integers(frame, depth), path.suffix.lower(), color_profile)
    path.write_bytes(data)  # encoded first: Pillow's own writing hides why it fails
    return data


def _encode(pixels: Tensor, suffix: str, color_profile: bytes | None) -> bytes:
    image, buffer = Image.fromarray(pixels.cpu().numpy()), io.BytesIO()
    options = {**SAVING.get(suffix, {}), "format": Image.registered_extensions()[suffix], "icc_profile": color_profile}
    try:
        image.save(buffer, **options)
    except (ValueError, OSError) as error:  # larger than the format can be
        raise MediaError(f"A {suffix} image cannot be {image.width}x{image.height} ({error}).") from error
    return buffer.getvalue()


def _encode_deep(pixels: Tensor, suffix: str, color_profile: bytes | None) -> bytes:
    height, width, channels = pixels.shape
    name, order, options = DEEP_ENCODERS[suffix]
    encoder = av.CodecContext.create(name, "w")
    encoder.width, encoder.height, encoder.time_base = width, height, Fraction(1, 25)
    encoder.pix_fmt = ("rgb48" if channels == 3 else "rgba64") + order
    encoder.options = dict(options)
    frame = av.VideoFrame(width, height, encoder.pix_fmt)
    rows = np.zeros((height, frame.planes[0].line_size // 2), ">u2" if order == "be" else "<u2")
    rows[:, : width * channels] = pixels.cpu().numpy().reshape(height, -1)
    frame.planes[0].update(rows)
    data = b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode(None)])
    return _with_png_profile(data, color_profile) if color_profile and name == "png" else data


def _with_png_profile(png: bytes, profile: bytes) -> bytes:
    """Insert an iCCP chunk after the header, which takes the first 33 bytes. Source: PNG specification, 11.3.2.3."""
    body = b"iCCP" + b"ICC profile\0\0" + zlib.compress(profile)
    return png[:33] + struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body)) + png[33:]


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except (OSError, SyntaxError, ValueError, StopIteration, Image.DecompressionBombError, av.FFmpegError) as error:
        reason = getattr(error, "strerror", None) or str(error).replace(str(path), path.name)
        raise MediaError(f"{path.name} is not a readable image ({reason}).") from error


def _depth(image: Image.Image, path: Path) -> int:
    """Bits per colour in the file, which Pillow does not tell."""
    if image.format == "PNG":
        with path.open("rb") as file:
            file.seek(PNG_BIT_DEPTH)
            return max(8, file.read(1)[0])
    if image.format == "TIFF":
        return max(8, *image.tag_v2.get(TIFF_BITS_PER_SAMPLE, (8,)))
    return 8


def _written_depth(path: Path, bit_depth: int) -> Literal[8, 16]:
    return 16 if bit_depth > 8 and path.suffix.lower() in DEEP_ENCODERS else 8


def _color_profile(path: Path | None) -> bytes | None:
    """The ICC profile of an RGB image; others do not fit the RGB that is written."""
    if path is None or path.suffix.lower() not in SUFFIXES:
        return None
    with _opened(path) as image:
        return image.info.get("icc_profile") if image.mode in ("RGB", "RGBA", "P") else None


def _check_alpha(path: Path, alpha: bool) -> None:
    if alpha and path.suffix.lower() not in TRANSPARENT:
        raise MediaError(f"{path.name} cannot hold transparency; name a .png, .webp or .tiff file instead.")


def _parts(name: str) -> list[str]:
    return re.split(r"(\d+)", name.lower())
