"""Video files: described, and decoded frame by frame."""

# H, W height and width   c channels: red, green, blue and perhaps alpha

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from itertools import islice, pairwise
from operator import mul
from pathlib import Path

import av
import numpy as np

from ..errors import MediaError
from .media import Frame, MediaInfo, Moment, Orientation, Reader
from .planes import MATRICES, PRIMARIES, RANGES, TRANSFERS, coding_of, depth_of, has_alpha, rgb_from_frame

logger = logging.getLogger(__name__)

# FFmpeg's own VP8 and VP9 decoders skip the alpha layer, which WebM announces in a tag.
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
# Containers whose clock starts anywhere, often hours in.
BROADCAST = {"mpegts", "mpeg"}
# Containers that announce their length and end without complaint when they are cut short.
SILENTLY_SHORT = {"matroska,webm"}
# Seconds of which such a file may be short; and frames, so as to leave rounding aside, of which it may be silently.
MAY_LACK, LITTLE = 1, Fraction(3, 2)
# Packets that `probe_video` reads; enough for the first frame to come out and for a rate to show.
LOOKED_AT = 60
# How it shows, while reading, that a file is damaged.
DAMAGE = (av.FFmpegError, MediaError)
# Frames by which decoding order may run ahead of showing (ITU-T H.264, max_num_reorder_frames).
REORDERED = 16


def probe_video(path: Path) -> MediaInfo:
    """Describe a video by its header and first frame.

    Raises:
        MediaError: it has no video stream or no readable frame.
    """
    with opened(path) as container:
        stream = _video_stream(container, path)
        first, stamps = _look_inside(container, stream, path)
        codec = stream.codec_context
        upright = _orientation(first)
        width, height = upright.size(first.width, first.height)
        fps = Fraction(stream.average_rate or stream.guessed_rate or stream.base_rate or 25)
        duration = _duration(container, stream)
        aspect = Fraction(stream.sample_aspect_ratio or 1)
        return MediaInfo(
            path=path,
            kind="video",
            width=width,
            height=height,
            frames=stream.frames or (round(duration * fps) if duration else None),
            fps=fps,
            duration=duration,
            bit_depth=depth_of(first.format.name),
            # The GIF decoder delivers alpha for every file, transparent or not.
            has_alpha=has_alpha(first.format.name) and codec.name != "gif",
            codec=codec_name(codec),
            pixel_format=first.format.name,
            rotation=upright.degrees,
            interlaced=bool(first.interlaced_frame),
            pixel_aspect=1 / aspect if upright.transposed else aspect,
            variable_frame_rate=_varies(stamps),
            color_range=RANGES.get(int(first.color_range)),
            color_matrix=MATRICES.get(int(first.colorspace)),
            color_primaries=PRIMARIES.get(int(codec.color_primaries)),
            color_transfer=TRANSFERS.get(int(codec.color_trc)),
            audio=tuple(describe(each) for each in container.streams.audio),
            subtitles=tuple(describe(each) for each in container.streams.subtitles),
            time_base=stream.time_base,
            start=_clock_start(container),
        )


class VideoReader(Reader):
    """The shown frames of a video, upright, in RGB by the file's own colour tags, at the file's own times."""

    def _frames(self) -> Iterator[Frame]:
        info, count, shown = self.info, 0, Fraction(0)
        coding = coding_of(info.pixel_format, info.color_range, info.color_matrix, info.height)
        try:
            for frame, time in _timed(info):
                upright = _orientation(frame)
                if upright.size(frame.width, frame.height) != (info.width, info.height):
                    raise MediaError("the picture changes size")
                pixels = rgb_from_frame(frame, coding, alpha=info.has_alpha)
                count, shown = count + 1, time.start + time.duration
                yield Frame(upright.apply(pixels), time)
        except DAMAGE as error:
            raise MediaError(
                f"{info.path.name} is damaged: {count} frames ({float(shown):.2f} s) can be read, then "
                f"{getattr(error, 'strerror', error)}; repair the file or cut it there."
            ) from error
        if not count:
            raise MediaError(f"{info.path.name} shows not a single frame; it may be cut short.")


def _timed(info: MediaInfo) -> Iterator[tuple[av.VideoFrame, Moment]]:
    """Decoded frames and when they are shown.

    One frame is held back until the next tells how long it stays. Packets do not: .mp4 notes durations in decoding
    order, which at a variable rate are those of other frames. Only the last frame has nothing else to go by.
    """
    waiting, start, stay = None, Fraction(0), Fraction(0)
    tick = info.time_base or 1 / info.fps
    damage = None
    try:
        for frame, own_start, duration in _decoded(info):
            after = start + stay if own_start is None else own_start
            if waiting is not None:
                after = max(after, start + tick)  # damaged clocks stand still or run backwards
                yield waiting, Moment(start, after - start)
            waiting, start, stay = frame, after, duration
    except DAMAGE as error:
        damage = error
    if waiting is not None:
        yield waiting, Moment(start, stay)
    if damage:
        raise damage


def _decoded(info: MediaInfo) -> Iterator[tuple[av.VideoFrame, Fraction | None, Fraction]]:
    """Frames with the start, if any, and the duration that the container gives them, in seconds."""
    with opened(info.path) as container:
        stream = _video_stream(container, info.path)
        stream.thread_type = "AUTO"
        decoder = _decoder(stream)
        ticks: dict[int, int] = {}  # durations; older versions of av keep them on packets only

        def timed(frame: av.VideoFrame) -> tuple[av.VideoFrame, Fraction | None, Fraction]:
            start = None if frame.pts is None else frame.pts * stream.time_base - info.start
            return frame, start, ticks.pop(frame.pts, 0) * stream.time_base or 1 / info.fps

        try:
            for packet in _packets(container, stream, info):
                if packet.stream.index != stream.index:  # its own stream_index is 0 on the packet that ends a stream
                    continue
                if packet.is_corrupt:
                    raise MediaError("a frame is cut short")
                if packet.pts is not None:
                    ticks[packet.pts] = packet.duration or 0
                yield from map(timed, decoder.decode(packet))
        except DAMAGE:
            with suppress(av.FFmpegError):  # there may be nothing more
                yield from map(timed, decoder.decode(None))  # good frames that wait for those to be shown before them
            raise


@contextmanager
def opened(path: Path) -> Iterator[av.container.InputContainer]:
    """Open a media file for demuxing; a MediaError says when it is none."""
    try:
        # Absolute, so that a colon in the name is no protocol.
        container = av.open(str(path.absolute()), metadata_errors="replace")
    except (av.FFmpegError, OSError) as error:
        raise MediaError(
            f"{path.name} cannot be opened as a video ({error.strerror}); it is damaged, cut short or not a video."
        ) from error
    with container:
        yield container


def describe(stream: av.stream.Stream) -> str:
    """Name a sound or subtitle stream in a few words."""
    codec = stream.codec_context
    words = [codec_name(codec)]
    if stream.type == "audio":
        words += [f"{codec.sample_rate} Hz", codec.layout.name]
    language = stream.metadata.get("language", "und")
    return " ".join(words if language == "und" else [*words, language])


def codec_name(context: av.CodecContext | None) -> str:
    """What a stream is coded in, say "mp3"; older versions of av only know their decoder, say "mp3float"."""
    return getattr(context.codec, "canonical_name", context.codec.name) if context else "unknown"


def _video_stream(container: av.container.InputContainer, path: Path) -> av.VideoStream:
    for stream in container.streams.video:
        disposition = getattr(stream, "disposition", None)  # since av 14.1
        if disposition is None or "attached_pic" not in (disposition.name or ""):  # cover art
            return stream
    raise MediaError(f"{path.name} holds no video" + (", only sound." if container.streams.audio else "."))


def _look_inside(
    container: av.container.InputContainer, stream: av.VideoStream, path: Path
) -> tuple[av.VideoFrame, list[int]]:
    """The first frame, and the timestamps of the first packets in order of showing."""
    decoder, first, stamps = _decoder(stream), None, set()
    try:
        for packet in islice(container.demux(stream), LOOKED_AT):
            if packet.pts is not None:
                stamps.add(packet.pts)
            if first is None:
                first = next(iter(decoder.decode(packet)), None)
    except av.FFmpegError as error:
        if first is None:
            raise MediaError(f"Not even the first frame of {path.name} can be read ({error.strerror}).") from error
    if first is None:
        raise MediaError(f"{path.name} shows not a single frame; it may be cut short.")
    # The last ones may still wait for frames between them.
    return first, sorted(stamps)[: LOOKED_AT - REORDERED]


def _decoder(stream: av.VideoStream) -> av.VideoStream | av.CodecContext:
    name = ALPHA_DECODERS.get(codec_name(stream.codec_context))
    if name in av.codecs_available and stream.metadata.get("alpha_mode") == "1":
        return av.CodecContext.create(name, "r")
    return stream


def _packets(
    container: av.container.InputContainer, stream: av.VideoStream, info: MediaInfo
) -> Iterator[av.Packet]:
    """Packets of all streams, so that an early end shows even where sound outlasts the picture."""
    end = shown = Fraction(0)
    for packet in container.demux():
        if packet.pts is not None:
            after = (packet.pts + (packet.duration or 0)) * packet.time_base
            end, shown = max(end, after), max(shown, after) if packet.stream.index == stream.index else shown
        yield packet
    if container.format.name in SILENTLY_SHORT and container.duration:
        announced = Fraction(container.duration, av.time_base)
        if announced - end > MAY_LACK:
            raise MediaError(f"the file ends, though it announces {float(announced):.2f} s")
        # A tag that outlasts the file is left from before it was cut.
        tag = _tagged_duration(stream)
        whole, found = (tag, shown) if tag and tag <= announced else (announced, end)
        if (whole - found) * info.fps > LITTLE:
            logger.warning("%s announces %.2f s, but only %.2f s were found; its end may be missing.",
                           info.path.name, whole, found)  # fmt: skip


def _orientation(frame: av.VideoFrame) -> Orientation:
    for extra in frame.side_data:
        if extra.type.name == "DISPLAYMATRIX":
            # x' = a x + c y, y' = b x + d y, fixed point; angles in between are as good as never meant.
            a, b, _, c, d = np.frombuffer(bytes(extra), np.int32)[:5].tolist()
            if abs(b) + abs(c) > abs(a) + abs(d):
                return Orientation(transposed=True, flip_x=c < 0, flip_y=b < 0)
            return Orientation(flip_x=a < 0, flip_y=d < 0)
    return Orientation()


def _duration(container: av.container.InputContainer, stream: av.VideoStream) -> Fraction | None:
    if stream.duration and container.format.name not in BROADCAST:  # which do not know
        return stream.duration * stream.time_base
    return Fraction(container.duration, av.time_base) if container.duration else None


def _tagged_duration(stream: av.VideoStream) -> Fraction | None:
    """Seconds that Matroska notes for a single stream."""
    found = re.match(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
    return sum(map(mul, map(Fraction, found.groups()), (3600, 60, 1)), Fraction(0)) if found else None


def _varies(stamps: list[int]) -> bool | None:
    """Whether frames stay for unequal times, rounding to ticks left aside."""
    # A packet one tick after another shows nothing: VP9 hides frames that way.
    steps = [after - before for before, after in pairwise(stamps) if after - before > 1]
    if not steps:
        return None if len(stamps) < 2 else False
    return max(steps) - min(steps) > max(2, min(steps) / 20)


def _clock_start(container: av.container.InputContainer) -> Fraction:
    if container.format.name not in BROADCAST:
        return Fraction(0)
    starts = [each.start_time * each.time_base for each in container.streams if each.start_time is not None]
    return min(starts, default=Fraction(0))
