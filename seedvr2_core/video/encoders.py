"""Which encoder and pixel format a video file gets."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import av
from av.codec import codecs_available

from ..errors import MediaError

Codec = Literal["auto", "h264", "h265", "av1", "vp9", "prores", "ffv1"]


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """An encoder of FFmpeg and the planar pixel formats it takes, by bit depth."""

    library: str
    suffixes: tuple[str, ...]
    plain: dict[int, str]
    odd: dict[int, str] = field(default_factory=dict)  # where width or height is odd; empty: the same as plain
    alpha: dict[int, str] = field(default_factory=dict)  # empty: cannot be transparent
    options: dict[str, str] = field(default_factory=dict)
    tag: str | None = None  # FourCC in .mp4 and .mov, where FFmpeg's own choice does not play everywhere


# Of the libraries that encode: what they wrote goes together only with what the same ones write.
VERSIONS = {"av": av.__version__, **av.library_versions}

# The qualities (crf) leave no damage visible beside the restored detail. H.264 and HEVC cannot crop 4:2:0 to an odd
# size, so odd sizes are kept by storing chroma in full (4:4:4) instead of dropping a row or column.
ENCODERS: dict[str, Encoder] = {
    "h264": Encoder(
        library="libx264",
        suffixes=(".mp4", ".m4v", ".mov", ".mkv"),
        plain={8: "yuv420p", 10: "yuv420p10le"},
        odd={8: "yuv444p", 10: "yuv444p10le"},
        # Half as far ahead as usual, for 0.1 to 0.4 dB: what an encoder holds back takes memory, and is lost when a run
        # is interrupted.
        options={"crf": "16", "preset": "medium", "rc-lookahead": "20"},
    ),
    "h265": Encoder(
        library="libx265",
        suffixes=(".mp4", ".m4v", ".mov", ".mkv"),
        plain={8: "yuv420p", 10: "yuv420p10le"},
        odd={8: "yuv444p", 10: "yuv444p10le"},
        options={"crf": "16", "preset": "medium", "x265-params": "log-level=error"},
        tag="hvc1",  # Apple's players refuse hev1
    ),
    "av1": Encoder(
        library="libsvtav1",
        suffixes=(".webm", ".mkv", ".mp4"),
        plain={8: "yuv420p", 10: "yuv420p10le"},
        options={"crf": "18", "preset": "6"},
    ),
    "vp9": Encoder(
        library="libvpx-vp9",
        suffixes=(".webm", ".mkv", ".mp4"),
        plain={8: "yuv420p"},
        alpha={8: "yuva420p"},
        # Alternate reference frames would leave the alpha layer, a stream of its own, out of step.
        options={"crf": "12", "deadline": "good", "cpu-used": "3", "row-mt": "1", "auto-alt-ref": "0"},
    ),
    "prores": Encoder(
        library="prores_ks",
        suffixes=(".mov", ".mkv"),
        plain={10: "yuv422p10le"},
        odd={10: "yuv444p10le"},
        alpha={10: "yuva444p10le"},
    ),
    "ffv1": Encoder(
        library="ffv1",
        suffixes=(".mkv",),
        plain={10: "gbrp10le", 16: "gbrp16le"},
        alpha={10: "gbrap10le", 16: "gbrap16le"},
        options={"level": "3", "g": "1"},
    ),
}

# What "auto" means: up to 8 bits, more bits (10-bit H.264 hardly plays anywhere), transparent.
AUTO: dict[str, tuple[str, str, str | None]] = {
    ".mp4": ("h264", "h265", None),
    ".m4v": ("h264", "h265", None),
    ".mov": ("h264", "h265", "prores"),
    ".mkv": ("h264", "h265", "ffv1"),
    ".webm": ("vp9", "av1", "vp9"),
}


def choose(dst: Path, codec: Codec, *, width: int, height: int, bit_depth: int, alpha: bool) -> tuple[Encoder, str]:
    """The encoder for a file and the pixel format to feed it.

    Raises:
        MediaError: the container cannot hold the codec, the codec no transparency, or this build of av lacks it.
    """
    suffix = dst.suffix.lower()
    if codec == "auto":
        shallow, deep, transparent = AUTO[suffix]
        name = transparent if alpha else deep if bit_depth > 8 else shallow
        if name is None:
            raise MediaError(f"{dst.name} cannot hold transparency; choose .mov, .mkv or .webm instead.")
    else:
        name = codec
    encoder = ENCODERS[name]
    if suffix not in encoder.suffixes:
        raise MediaError(f"{dst.name} cannot hold {name} video; name a {' or '.join(encoder.suffixes)} file instead.")
    if alpha and not encoder.alpha:
        able = ", ".join(key for key, value in ENCODERS.items() if value.alpha)
        raise MediaError(f"{dst.name} is to be {name}, which cannot hold transparency; choose one of {able}.")
    if encoder.library not in codecs_available:
        raise MediaError(f"{dst.name} needs the encoder {encoder.library}, which this installation of av lacks; "
                         "install av from PyPI or choose another codec.")  # fmt: skip
    odd = width % 2 or height % 2
    formats = encoder.alpha if alpha else (encoder.odd if odd else None) or encoder.plain
    depth = min((depth for depth in formats if depth >= bit_depth), default=max(formats))
    return encoder, formats[depth]
