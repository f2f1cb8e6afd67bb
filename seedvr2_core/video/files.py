"""The door to media on disk: what a file is, its frames in, frames out to a file.

A video, an image and a folder of images look the same from here:

    info = probe(src)
    with open_reader(info) as frames, open_writer(dst, info, width=1280, height=720) as out:
        for frame in frames:
            out.write(restore(frame.floats()[None]), [frame.time])
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

from ..errors import MediaError
from .encoders import Codec
from .keep import Keep
from .media import Frame, MediaInfo, Moment, Reader, Writer
from .stills import SUFFIXES as IMAGE_SUFFIXES
from .stills import FolderWriter, ImageWriter, StillReader, probe_folder, probe_image
from .video_reader import VideoReader, probe_video
from .video_writer import MUXERS, VideoWriter

__all__ = ["Codec", "Frame", "MediaInfo", "Moment", "Reader", "Writer", "open_reader", "open_writer", "probe",
           "video_suffix"]  # fmt: skip

# A list, because FFmpeg finds a video in nearly everything: it renders text files as a terminal would.
VIDEO_SUFFIXES = (*MUXERS, ".avi", ".mpg", ".mpeg", ".m2v", ".vob", ".ts", ".mts", ".m2ts", ".wmv", ".asf", ".flv",
                  ".f4v", ".3gp", ".3g2", ".ogv", ".mxf", ".dv", ".y4m", ".gif")  # fmt: skip
# Frames per second of what has no rate of its own.
DEFAULT_FPS = Fraction(24)


def probe(path: str | Path, *, fps: Fraction | int = DEFAULT_FPS) -> MediaInfo:
    """Describe a video, an image or a folder of images.

    Args:
        fps: the rate of a folder of images, which says nothing about it itself.

    Raises:
        MediaError: it does not exist, is of an unknown kind, is damaged, or shows nothing.
    """
    path = Path(path)
    if path.is_dir():
        return probe_folder(path, Fraction(fps))
    if not path.exists():
        raise MediaError(f"{path} does not exist.")
    suffix = path.suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return probe_image(path, Fraction(fps))
    if suffix in VIDEO_SUFFIXES:
        return probe_video(path)
    raise MediaError(f"{path.name} ends in none of {', '.join(VIDEO_SUFFIXES + IMAGE_SUFFIXES)}.")


def video_suffix(source: MediaInfo) -> str:
    """Suffix of a video that can hold what is made of a source: its own if such videos can be written."""
    suffix = source.path.suffix.lower()
    if suffix in MUXERS:
        return suffix
    # Pictures bring no sound or subtitles that need the container that takes everything, but hardly any TV plays.
    return ".mp4" if source.kind != "video" and not source.has_alpha else ".mkv"


def open_reader(info: MediaInfo) -> Reader:
    """Iterate over the frames of what `probe` described, one in memory at a time.

    Raises:
        MediaError: while iterating, when the file turns out to be damaged; it says how many frames were good.
    """
    return VideoReader(info) if info.kind == "video" else StillReader(info)


def check_folder(dst: Path) -> None:
    """Raises MediaError where there is no folder for a file."""
    if not dst.absolute().parent.is_dir():
        raise MediaError(f"The folder {dst.parent} for {dst.name} does not exist; make it first.")


def open_writer(
    dst: str | Path,
    source: MediaInfo,
    *,
    width: int,
    height: int,
    alpha: bool | None = None,
    codec: Codec = "auto",
    keep: Keep | None = None,
) -> Writer:
    """Write frames to a video, an image or, if `dst` has no suffix, a folder of images.

    Args:
        source: where the frames come from. A video written from a video takes over its clock, sound, subtitles and
            colour tags; images take over depth, names and colour profile.
        width, height: pixels of the frames to come; odd ones are kept.
        alpha: whether they are RGBA; as in the source if None.
        codec: of a video; "auto" follows the suffix, the depth and the transparency.
        keep: where what is written survives this process, and what an earlier one has left there, of the same source
            and for the same `dst`, with which this one goes on. A picture and transparent VP9 do not survive.

    Raises:
        MediaError: before anything is written, when `dst` cannot hold what is to come, its sound included.
    """
    dst = Path(dst)
    alpha = source.has_alpha if alpha is None else alpha
    check_folder(dst)
    if dst.exists() and source.path.exists() and dst.samefile(source.path):
        raise MediaError(f"{dst.name} is the file being read; name another to write to.")
    suffix = dst.suffix.lower()
    if suffix in MUXERS and not dst.is_dir():
        return VideoWriter(dst, source, width=width, height=height, alpha=alpha, codec=codec, keep=keep)
    if codec != "auto":
        raise MediaError(f"{dst.name} is not a video, so it cannot be {codec}; leave the codec out or name a video.")
    if suffix in IMAGE_SUFFIXES and not dst.is_dir():
        if source.frames != 1:
            raise MediaError(f"{dst.name} holds one picture; name a video or a folder for the frames of a clip.")
        return ImageWriter(dst, source, width=width, height=height, alpha=alpha)
    if not suffix or dst.is_dir():
        return FolderWriter(dst, source, width=width, height=height, alpha=alpha, keep=keep)
    raise MediaError(f"{dst.name} ends in none of {', '.join(MUXERS)}, {', '.join(IMAGE_SUFFIXES)}.")
