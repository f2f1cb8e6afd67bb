"""Video files: encoded at the exact times of their frames, beside the untouched sound of their source."""

# H, W height and width   c channels: red, green, blue and perhaps alpha

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from fractions import Fraction
from pathlib import Path

import av
from torch import Tensor

from ..errors import MediaError
from .encoders import Codec, Encoder, choose
from .geometry import to_floats
from .keep import Keep, PacketLog, packets_of
from .media import MediaInfo, Moment, Writer
from .planes import (
    MATRICES,
    PRIMARIES,
    RANGES,
    TRANSFERS,
    Coding,
    depth_of,
    frame_from_planes,
    number_of,
    planes_from_rgb,
)
from .video_reader import codec_name, describe, opened

logger = logging.getLogger(__name__)

MUXERS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska", ".webm": "webm"}
# FFmpeg would write these, by how the codecs begin, but hardly any player finds the sound again.
UNPLAYABLE = {"mp4": ("vorbis", "pcm_"), "mov": ("vorbis", "opus")}
# Facts about the old file that would be wrong in the new one.
STALE_TAGS = {"major_brand", "minor_version", "compatible_brands", "encoder", "duration"}
KEPT_STREAM_TAGS = {"language", "title", "handler_name"}


class VideoWriter(Writer):
    """Encodes frames at their own times; sound, subtitles, chapters and tags are copied from a source video.

    The picture is coded as BT.709, limited range, and says so; BT.2020 and full range of the source are kept. Colours
    are not converted between primaries or transfer curves, so those tags are the source's.
    """

    def __init__(
        self,
        dst: Path,
        source: MediaInfo,
        *,
        width: int,
        height: int,
        alpha: bool,
        codec: Codec = "auto",
        keep: Keep | None = None,
    ) -> None:
        super().__init__(dst, width=width, height=height, channels=4 if alpha else 3)
        encoder, self.pixel_format = choose(
            dst, codec, width=width, height=height, bit_depth=source.bit_depth, alpha=alpha
        )
        if depth_of(self.pixel_format) < min(source.bit_depth, 10):
            self.notices.append(f"{dst.name} holds 8 bits per colour; its source has {source.bit_depth}.")
        self.coding = _coding(source, self.pixel_format)
        # The source's own clock, so that every timestamp of a variable rate stays exact.
        self.time_base = source.time_base or 1 / source.fps
        self._durations: dict[int, int] = {}
        self._last = self._decoded = -math.inf  # times of the last frame and of the last packet, in ticks
        self._end = Fraction(0)  # of the last frame, in seconds
        self._log: PacketLog | None = None
        self._stack = ExitStack()
        with ExitStack() as undo:
            undo.callback(self.discard)
            try:
                self._open(encoder, source)
                # Its alpha is a second picture beside every packet, which av can read but not make.
                if keep and not (alpha and encoder.library == "libvpx-vp9"):
                    self._go_on(keep)
            except (OSError, ValueError, av.FFmpegError) as error:
                reason = getattr(error, "strerror", None) or error
                raise MediaError(f"{dst.name} cannot be started at {width}x{height} ({reason}).") from error
            undo.pop_all()

    def _open(self, encoder: Encoder, source: MediaInfo) -> None:
        # Through a Python file, because FFmpeg closes its own without reporting a disk that filled up at the end.
        self._file = self._stack.enter_context(self.partial.open("wb"))
        muxer = MUXERS[self.dst.suffix.lower()]
        options = {"movie_timescale": str(_movie_timescale(self.time_base))} if muxer in ("mp4", "mov") else {}
        self._container = av.open(self._file, "w", format=muxer, container_options=options)
        self._stack.callback(self._container.close)
        self._video = self._add_video(encoder, source)
        self._copy = self._stack.enter_context(StreamCopy(source, self._container, self.dst))
        self.notices += self._copy.notices
        with _fair_threads():
            self._container.start_encoding()

    def _go_on(self, keep: Keep) -> None:
        for packet in packets_of(keep, self.time_base):
            self._last = max(self._last, packet.pts)
            self._end = max(self._end, (packet.pts + packet.duration) * self.time_base)
            self._carry(packet)
        self.kept, self.frames = keep, keep.frames
        self._log = PacketLog(keep)
        self._stack.callback(self._log.close)

    def _add_video(self, encoder: Encoder, source: MediaInfo) -> av.VideoStream:
        stream = self._container.add_stream(encoder.library, rate=source.fps, options=dict(encoder.options))
        context = stream.codec_context
        # Without frames out of order where they do harm: .mp4 notes durations in decoding order, so that uneven ones
        # would go to the wrong frames, and libx265 makes up decoding times when a clip has but two frames.
        if source.variable_frame_rate or (source.frames or 0) < 4:
            context.max_b_frames = 0
        context.height, context.width, _ = self.shape
        context.pix_fmt = self.pixel_format
        context.time_base = stream.time_base = self.time_base
        context.sample_aspect_ratio = source.pixel_aspect
        wide = self.coding.matrix == "bt2020nc"
        self._tags = {
            "color_primaries": number_of(PRIMARIES, source.color_primaries or ("bt2020" if wide else "bt709")),
            "color_trc": number_of(TRANSFERS, source.color_transfer or "bt709"),
        }
        context.colorspace = number_of(MATRICES, self.coding.matrix)
        context.color_range = number_of(RANGES, self.coding.range)
        for name, number in self._tags.items():
            setattr(context, name, number)
        if encoder.tag and self._container.format.name in ("mp4", "mov"):
            context.codec_tag = encoder.tag
        context.thread_type = "AUTO"
        return stream

    def _pack(self, frame: Tensor) -> list[Tensor]:
        return planes_from_rgb(to_floats(frame), self.pixel_format, self.coding)

    def _write(self, planes: Sequence[Tensor], time: Moment) -> None:
        picture = frame_from_planes(planes, self.pixel_format, self.coding)
        for name, number in self._tags.items():
            if hasattr(picture, name):  # ProRes writes what its frames say; av 14 cannot tell them
                setattr(picture, name, number)
        picture.pts, picture.time_base = round(time.start / self.time_base), self.time_base
        if picture.pts <= self._last:
            raise MediaError(f"{self.dst.name} got a frame for {float(time.start):.3f} s after a later one.")
        self._last = picture.pts
        self._durations[picture.pts] = max(1, round(time.duration / self.time_base))
        if self._log:
            self._log.expect(picture.pts)
        self._end = time.start + time.duration
        self._mux(self._video.encode(picture))

    def _mux(self, packets: list[av.Packet]) -> None:
        for packet in packets:
            # Only here do all containers learn how long the last frame stays.
            packet.duration = self._durations.pop(packet.pts)
            # Where an encoder takes over from that of an earlier run, it knows nothing of the last times of the other.
            packet.dts = max(packet.dts, self._decoded + 1)
            if self._log:
                self._log.append(packet)
                self.kept = self._log.kept
            self._carry(packet)

    def _carry(self, packet: av.Packet) -> None:
        self._decoded = packet.dts
        self._copy.until(packet.dts * packet.time_base)
        packet.stream = self._video
        self._container.mux(packet)

    def flush(self) -> None:
        if self._log:
            self._log.flush()

    def _finish(self) -> None:
        self._mux(self._video.encode(None))
        # A clip that was cut short keeps the sound that belongs to it.
        self._copy.until(math.inf if self.landing == self.dst else self._end)
        self._container.close()
        self._stack.close()

    def _release(self) -> None:
        # What fails here concerns a file about to be deleted.
        with suppress(OSError, ValueError, av.FFmpegError):
            self._stack.close()


@contextmanager
def _fair_threads() -> Iterator[None]:
    """Let this thread, and those that are started meanwhile, share the CPU with all others as this thread did before.

    Where it may, as root in a container does, SVT-AV1 makes real-time threads of its own and of the one that opens it.
    All else would stand still while they compute, with it the threads that a real-time one waits for.
    """
    tasks = Path("/proc/self/task")
    if not (tasks.is_dir() and hasattr(os, "sched_getscheduler")):
        yield
        return
    policy, param, others = os.sched_getscheduler(0), os.sched_getparam(0), {task.name for task in tasks.iterdir()}
    others.discard(str(threading.get_native_id()))
    try:
        yield
    finally:
        for task in tasks.iterdir():
            if task.name not in others:
                with suppress(ProcessLookupError):  # it has ended
                    if os.sched_getscheduler(int(task.name)) != policy:
                        os.sched_setscheduler(int(task.name), policy, param)


class StreamCopy:
    """Carries packets of sound and subtitles from a source video to an output, byte for byte.

    Raises:
        MediaError: at once, if the output cannot hold a sound stream; it is never lost silently.
    """

    def __init__(self, source: MediaInfo, target: av.container.OutputContainer, dst: Path) -> None:
        self._target = target
        self._start = source.start
        self._stack = ExitStack()
        self._streams: dict[int, av.stream.Stream] = {}
        self._waiting: av.Packet | None = None
        self._packets = iter(())
        self.notices: list[str] = []
        if source.kind != "video":
            return
        container = self._stack.enter_context(opened(source.path))
        for stream in container.streams:
            if stream.type in ("audio", "subtitle"):
                self._add(stream, source.path, dst)
            elif stream.type != "video":
                self.notices.append(f"{source.path.name}: stream {stream.index} ({stream.type}) is not copied.")
        target.metadata.update({k: v for k, v in container.metadata.items() if k.lower() not in STALE_TAGS})
        if hasattr(target, "set_chapters"):  # since av 15
            target.set_chapters(container.chapters())
        if self._streams:
            self._packets = container.demux([container.streams[index] for index in self._streams])

    def _add(self, stream: av.stream.Stream, path: Path, dst: Path) -> None:
        try:
            if codec_name(stream.codec_context).startswith(UNPLAYABLE.get(self._target.format.name, ())):
                raise ValueError("no player would find it")
            copy = self._target.add_stream_from_template(stream)
        except ValueError as error:
            what = f"{path.name}: {stream.type} stream {stream.index} ({describe(stream)})"
            if stream.type == "audio":
                raise MediaError(f"{what} does not fit into {dst.name}; choose .mkv, which takes all.") from error
            self.notices.append(f"{what} does not fit into {dst.name} and is not copied.")
            return
        copy.metadata.update({k: v for k, v in stream.metadata.items() if k.lower() in KEPT_STREAM_TAGS})
        self._streams[stream.index] = copy

    def until(self, seconds: Fraction | float) -> None:
        """Copy what comes before a time, so that sound lies beside its pictures in the file."""
        while packet := self._waiting or self._next():
            self._waiting = None
            if not packet.size:  # marks the end of a stream
                continue
            if packet.dts is not None and packet.dts * packet.time_base - self._start > seconds:
                self._waiting = packet
                return
            shift = round(self._start / packet.time_base)
            packet.dts = None if packet.dts is None else packet.dts - shift
            packet.pts = None if packet.pts is None else packet.pts - shift
            packet.stream = self._streams[packet.stream_index]
            self._target.mux(packet)

    def _next(self) -> av.Packet | None:
        try:
            return next(self._packets, None)
        except av.FFmpegError as error:
            # Whoever reads the pictures from the same file meets this too, and refuses the file.
            logger.warning("The sound cannot be copied to its end (%s).", error.strerror)
            self._packets = iter(())
            return None

    def __enter__(self) -> StreamCopy:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def _coding(source: MediaInfo, pixel_format: str) -> Coding:
    if av.VideoFormat(pixel_format).is_rgb:
        return Coding("rgb", "full")
    wide = source.color_primaries == "bt2020" or (source.color_matrix or "").startswith("bt2020")
    full = source.color_range == "full" and source.pixel_format.startswith("yuv")
    return Coding("bt2020nc" if wide else "bt709", "full" if full else "limited")


def _movie_timescale(time_base: Fraction) -> int:
    """Ticks per second in which .mp4 and .mov note when a stream starts; the usual 1000 would move it by up to 1 ms."""
    return math.lcm(time_base.denominator, 1000) if time_base.denominator < 1_000_000 else time_base.denominator
