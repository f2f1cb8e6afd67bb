"""Media on disk: every frame, timestamp, sound packet and bit of colour that goes in comes out again."""

from __future__ import annotations

import os
import re
import struct
import zlib
from dataclasses import replace
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from seedvr2_core.errors import MediaError
from seedvr2_core.video.files import MediaInfo, Moment, open_reader, open_writer, probe
from seedvr2_core.video.stills import why_no_clip

AV = int(av.__version__.partition(".")[0])
AS_IT_IS = {"opaque": True} if AV >= 15 else {}
TICK = Fraction(1, 90000)
# Durations in ticks of a variable frame rate, the last one long.
UNEVEN = (3000, 4000, 2500, 9000, 3003, 7000, 12345)


def clip(frames: int = 7, height: int = 48, width: int = 64, channels: int = 3) -> torch.Tensor:
    """A smooth moving pattern, (T, H, W, c) 0..1."""
    t, y, x = torch.meshgrid(torch.arange(frames), torch.arange(height), torch.arange(width), indexing="ij")
    waves = [torch.sin((x + 3 * t) / (7 + i) + i) + torch.cos((y - t) / (5 + i)) for i in range(channels)]
    return torch.stack(waves, dim=-1) / 4 + 0.5


def moments(durations: tuple[int, ...] = UNEVEN, start: int = 0) -> list[Moment]:
    starts = [start + sum(durations[:i]) for i in range(len(durations))]
    return [Moment(s * TICK, d * TICK) for s, d in zip(starts, durations, strict=True)]


def described(path: Path, **changes: object) -> MediaInfo:
    """What a probed video would look like, for a clip that comes from nowhere."""
    plain = MediaInfo(
        path=path,
        kind="image",
        width=64,
        height=48,
        frames=1,
        fps=Fraction(25),
        duration=None,
        bit_depth=8,
        has_alpha=False,
        codec="none",
        pixel_format="rgb24",
        time_base=TICK,
    )
    return replace(plain, **changes)


def save(dst: Path, frames: torch.Tensor, times: list[Moment] | None = None, codec: str = "auto", **source) -> Path:
    _, height, width, channels = frames.shape
    info = described(dst.parent, frames=len(frames), **source)
    with open_writer(dst, info, width=width, height=height, alpha=channels == 4, codec=codec) as out:
        out.write(frames, times or moments((3600,) * len(frames)))
    return dst


def load(path: Path) -> tuple[torch.Tensor, list[Moment]]:
    with open_reader(probe(path)) as reader:
        frames = list(reader)
    return torch.stack([frame.floats() for frame in frames]), [frame.time for frame in frames]


def copy(src: Path, dst: Path) -> None:
    """Every frame out as it came in."""
    info = probe(src)
    with open_reader(info) as reader, open_writer(dst, info, width=info.width, height=info.height) as out:
        for frame in reader:
            out.write(frame.floats()[None], [frame.time])


def packets(path: Path, kind: str) -> list[tuple[Fraction, bytes]]:
    with av.open(str(path)) as container:
        stream = getattr(container.streams, kind)[0]
        return [(p.pts * p.time_base, bytes(p)) for p in container.demux(stream) if p.size]


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(-10 * torch.log10((a - b).square().mean()))


def add_sound(src: Path, dst: Path, codec: str, offset: float = 0.25) -> Path:
    """Put the pictures of `src` beside half a second of noise that starts late."""
    if AV < 15:
        pytest.skip("this version of av cannot copy pictures unchanged")
    with av.open(str(src)) as source, av.open(str(dst), "w") as out:
        pictures = out.add_stream_from_template(source.streams.video[0], **AS_IT_IS)
        sound = out.add_stream(codec, rate=48000, layout="mono")
        out.metadata["title"] = "a title"
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = pictures
                out.mux(packet)
        noise = np.random.default_rng(0).normal(0, 0.1, (1, 960)).astype(np.float32)
        for i in range(25):
            frame = av.AudioFrame.from_ndarray(noise, format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 48000, int(offset * 48000) + i * 960, Fraction(1, 48000)
            out.mux(sound.encode(frame))
        out.mux(sound.encode(None))
    return dst


# --- videos: frames and time -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_every_timestamp_of_a_variable_rate_and_the_last_duration_survive(tmp_path, suffix):
    times = moments(start=4500)
    src = save(tmp_path / "a.mp4", clip(), times, variable_frame_rate=True)
    copy(src, tmp_path / f"b{suffix}")
    frames, copied = load(tmp_path / f"b{suffix}")
    slack = Fraction(1, 1000) if suffix == ".mkv" else 0  # Matroska counts milliseconds
    assert len(frames) == len(times)
    if AV < 16:  # whose FFmpeg does not tell how long the last frame of an .mp4 stays
        times[-1] = copied[-1] = Moment(times[-1].start, Fraction(0))
    for got, expected in zip(copied, times, strict=True):
        assert abs(got.start - expected.start) <= slack
        assert abs(got.duration - expected.duration) <= 2 * slack
    info = probe(tmp_path / f"b{suffix}")
    assert info.variable_frame_rate
    assert suffix == ".mkv" or AV < 16 or info.duration == sum(UNEVEN) * TICK
    assert psnr(frames, clip()) > 38


@pytest.mark.parametrize(
    ("name", "suffix", "count"),
    [
        ("chaplin_640x360_audio.mp4", ".mp4", 90),
        ("portrait_480x908_audio.mp4", ".mov", 60),
        ("oldfilm_odd_579x340.mp4", ".mp4", 24),
        ("roadtrip_10bit_426x240.webm", ".mp4", 72),  # and 8 packets that show nothing
        ("palms_shaky_480x270.webm", ".webm", 76),
    ],
)
def test_a_real_clip_keeps_its_frames_times_depth_and_sound(sample, tmp_path, name, suffix, count):
    src, dst = sample(f"lq/clips/{name}"), tmp_path / f"out{suffix}"
    info = probe(src)
    width, height = (131, 96) if info.width % 2 else (128, 96)  # a corner is enough, and quick to encode
    with open_reader(info) as reader, open_writer(dst, info, width=width, height=height) as out:
        sent = [replace(frame, pixels=frame.pixels[:height, :width].clone()) for frame in reader]
        for frame in sent:
            out.write(frame.floats()[None], [frame.time])
    with open_reader(probe(dst)) as reader:
        received = list(reader)
    assert len(sent) == len(received) == count
    for one, two in zip(sent, received, strict=True):
        assert abs(one.time.start - two.time.start) <= Fraction(1, 2000)
        assert psnr(one.floats(), two.floats()) > 38
    assert abs(sent[-1].time.duration - received[-1].time.duration) <= Fraction(1, 1000)
    after = probe(dst)
    assert (after.width, after.height, after.bit_depth) == (width, height, info.bit_depth)
    assert abs(info.duration - after.duration) <= 1 / info.fps
    assert info.audio == after.audio
    if info.audio:
        before, copied = packets(src, "audio"), packets(dst, "audio")
        assert [data for _, data in before] == [data for _, data in copied]
        assert all(abs(a - b) < Fraction(1, 10000) for (a, _), (b, _) in zip(before, copied, strict=True))


def test_an_upside_down_phone_clip_comes_out_upright_without_its_rotation_tag(sample, tmp_path):
    src, dst = sample("lq/clips/shaky_vfr_rot180_1280x720_audio.mp4"), tmp_path / "out.mp4"
    info = probe(src)
    assert (info.rotation, info.variable_frame_rate) == (180, True)
    with av.open(str(src)) as container:
        stored = next(container.decode(video=0)).to_ndarray(format="rgb24")
    with open_reader(info) as reader, open_writer(dst, info, width=320, height=180) as out:
        shown = list(islice(reader, 5))
        assert psnr(torch.from_numpy(stored[::-1, ::-1].copy()) / 255, shown[0].floats()) > 25
        for frame in shown:
            out.write(frame.floats()[None, ::4, ::4], [frame.time])
    assert probe(dst).rotation == 0
    assert load(dst)[1] == [frame.time for frame in shown]
    assert [data for _, data in packets(src, "audio")] == [data for _, data in packets(dst, "audio")]


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation_is_applied_clockwise(tmp_path, degrees):
    if not hasattr(av.VideoStream, "set_display_rotation"):
        pytest.skip("this version of av cannot write rotation tags")
    frames, src, dst = clip(2), tmp_path / "a.mp4", tmp_path / "b.mp4"
    save(src, frames)
    with av.open(str(src)) as source, av.open(str(dst), "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0], **AS_IT_IS)
        stream.set_display_rotation(-degrees)  # counts counter-clockwise
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                out.mux(packet)
    info = probe(dst)
    assert info.rotation == degrees
    assert (info.width, info.height) == ((64, 48) if degrees == 180 else (48, 64))
    shown, _ = load(dst)
    assert psnr(shown, torch.rot90(frames, -degrees // 90, dims=(1, 2))) > 38


def test_a_reader_decodes_lazily_starts_over_and_closes_its_file(tmp_path):
    src = save(tmp_path / "a.mp4", clip(30))
    with open_reader(probe(src)) as reader:
        first = next(iter(reader))
        again = next(iter(reader))
        unfinished = iter(reader)
        next(unfinished)
    assert torch.equal(first.pixels, again.pixels)
    assert list(unfinished) == []


def test_probing_tells_what_a_file_is(tmp_path):
    silent = save(tmp_path / "a.mp4", clip())
    info = probe(silent)
    assert (info.kind, info.width, info.height, info.frames, info.fps) == ("video", 64, 48, 7, 25)
    assert (info.duration, info.bit_depth, info.has_alpha, info.codec) == (Fraction(7, 25), 8, False, "h264")
    assert (info.color_range, info.color_matrix, info.color_primaries) == ("limited", "bt709", "bt709")
    assert info.variable_frame_rate is False
    assert info.audio == ()
    (sound,) = probe(add_sound(silent, tmp_path / "b.mp4", "aac")).audio
    assert sound == "aac 48000 Hz mono"


# --- videos: sound ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("codec", "suffix"), [("aac", ".mp4"), ("aac", ".mkv"), ("libopus", ".webm")])
def test_sound_that_starts_late_is_copied_byte_for_byte_at_its_times(tmp_path, codec, suffix):
    silent = save(tmp_path / f"a{suffix}", clip(), codec="vp9")  # without frames out of order, simple to copy
    src = add_sound(silent, tmp_path / f"b{suffix}", codec)
    copy(src, tmp_path / f"c{suffix}")
    before, after = packets(src, "audio"), packets(tmp_path / f"c{suffix}", "audio")
    assert [data for _, data in before] == [data for _, data in after]
    assert all(abs(a - b) <= Fraction(1, 10000) for (a, _), (b, _) in zip(before, after, strict=True))
    with av.open(str(tmp_path / f"c{suffix}")) as container:
        assert container.metadata["title"] == "a title"


def test_sound_the_container_cannot_hold_is_refused_before_any_work(tmp_path):
    src = add_sound(save(tmp_path / "a.mp4", clip()), tmp_path / "b.mp4", "aac")
    with pytest.raises(MediaError, match=r"aac.*\.mkv"):
        open_writer(tmp_path / "c.webm", probe(src), width=64, height=48)
    assert {each.name for each in tmp_path.iterdir()} == {"a.mp4", "b.mp4"}


def test_vorbis_is_refused_in_mp4_but_not_in_mkv(sample, tmp_path):
    info = probe(sample("lq/clips/palms_shaky_480x270.webm"))
    with pytest.raises(MediaError, match="vorbis"):
        open_writer(tmp_path / "a.mp4", info, width=64, height=48)
    with open_reader(info) as reader, open_writer(tmp_path / "a.mkv", info, width=480, height=270) as out:
        out.write(next(iter(reader)).floats()[None], [Moment(Fraction(0), Fraction(1, 30))])
    assert probe(tmp_path / "a.mkv").audio == info.audio


def test_subtitles_are_copied_where_they_fit_and_named_in_a_notice_where_not(tmp_path):
    (tmp_path / "a.srt").write_text("1\n00:00:00,040 --> 00:00:00,200\nHello\n\n")
    pictures, titled = save(tmp_path / "a.mkv", clip(), codec="ffv1"), tmp_path / "b.mkv"
    with av.open(str(pictures)) as source, av.open(str(tmp_path / "a.srt")) as text, av.open(str(titled), "w") as out:
        copies = [out.add_stream_from_template(each.streams[0], **AS_IT_IS) for each in (source, text)]
        copies[1].metadata["language"] = "eng"
        for stream, packet in [*((copies[0], p) for p in source.demux()), *((copies[1], p) for p in text.demux())]:
            if packet.size:
                packet.stream = stream
                out.mux(packet)
    copy(titled, tmp_path / "c.mkv")
    assert probe(tmp_path / "c.mkv").subtitles == probe(titled).subtitles == ("subrip eng",)
    assert packets(tmp_path / "c.mkv", "subtitles") == packets(titled, "subtitles")
    info = probe(titled)
    lost = "b.mkv: subtitle stream 1 (subrip eng) does not fit into d.mp4 and is not copied."
    for name, notices in (("d.mkv", []), ("d.mp4", [lost])):
        writer = open_writer(tmp_path / name, info, width=info.width, height=info.height)
        writer.discard()
        assert writer.notices == notices and not (tmp_path / name).exists()


def test_chapters_are_kept(tmp_path):
    src, chaptered = save(tmp_path / "a.mkv", clip(), codec="ffv1"), tmp_path / "b.mkv"
    with av.open(str(src)) as source, av.open(str(chaptered), "w") as out:
        if not hasattr(out, "set_chapters"):
            pytest.skip("this version of av has no chapters")
        stream = out.add_stream_from_template(source.streams.video[0], **AS_IT_IS)
        title = {"title": "first"}
        out.set_chapters([{"id": 1, "start": 0, "end": 100, "time_base": Fraction(1, 1000), "metadata": title}])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                out.mux(packet)
    copy(chaptered, tmp_path / "c.mkv")
    with av.open(str(tmp_path / "c.mkv")) as container:
        assert [chapter["metadata"] for chapter in container.chapters()] == [title]


# --- videos: colour and depth ----------------------------------------------------------------------------------------

PRIMARY = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1], [0, 0, 0], [0.5, 0.5, 0.5]], dtype=torch.float32)


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
@pytest.mark.parametrize("tags", [{}, {"color_primaries": "bt2020", "color_transfer": "smpte2084"}], ids=["sdr", "hdr"])
def test_saturated_colours_come_back_and_the_tags_tell_the_truth(tmp_path, suffix, tags):
    frames = PRIMARY[:, None, None].expand(-1, 64, 64, -1)
    dst = save(tmp_path / f"a{suffix}", frames, **tags)
    info = probe(dst)
    assert (info.color_range, info.color_matrix) == ("limited", "bt2020nc" if tags else "bt709")
    assert info.color_primaries == tags.get("color_primaries", "bt709")
    assert info.color_transfer == tags.get("color_transfer", "bt709")
    assert (load(dst)[0] - frames).abs().max() <= 3 / 255
    # FFmpeg, told nothing but what the file says, must see the same colours.
    with av.open(str(dst)) as container:
        for frame, expected in zip(container.decode(video=0), PRIMARY, strict=True):
            graph = av.filter.Graph()
            source = graph.add_buffer(template=container.streams.video[0])
            scale, sink = graph.add("scale", f"in_color_matrix={info.color_matrix[:6]}"), graph.add("buffersink")
            form = graph.add("format", "rgb24")
            graph.link_nodes(source, scale, form, sink).configure()
            graph.push(frame)
            seen = graph.pull().to_ndarray()
            assert np.abs(seen / 255 - expected.numpy()).max() <= 4 / 255


def test_full_range_and_its_tag_are_kept(tmp_path):
    src = save(tmp_path / "a.mp4", clip(3), color_range="full", pixel_format="yuvj420p")
    assert probe(src).color_range == "full"
    assert psnr(load(src)[0], clip(3)) > 38


@pytest.mark.parametrize(("height", "matrix"), [(720, (0.2126, 0.0722)), (480, (0.299, 0.114))])
def test_untagged_video_is_bt709_in_hd_and_bt601_below(tmp_path, height, matrix):
    kr, kb = matrix
    color = np.array([0.8, 0.3, 0.1])
    y = color @ np.array([kr, 1 - kr - kb, kb])
    numbers = [16 + 219 * y, 128 + 112 * (color[2] - y) / (1 - kb), 128 + 112 * (color[0] - y) / (1 - kr)]
    with av.open(str(tmp_path / "a.mkv"), "w") as out:
        stream = out.add_stream("ffv1", rate=25, width=64, height=height)
        frame = av.VideoFrame(64, height, "yuv420p")
        for plane, number in zip(frame.planes, numbers, strict=True):
            plane.update(bytes([round(number)]) * plane.buffer_size)
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    frames, _ = load(tmp_path / "a.mkv")
    assert probe(tmp_path / "a.mkv").color_matrix is None
    np.testing.assert_allclose(frames[0, 5, 5].numpy(), color, atol=2 / 255)


@pytest.mark.parametrize("form", ["auto.mp4", "h264.mp4", "ffv1.mkv", "prores.mov"])
def test_ten_bits_are_ten_bits(tmp_path, form):
    # A grey ramp of 160 steps, four to each step that 8 bits can hold.
    ramp = ((torch.arange(160) + 263) / 876).repeat_interleave(8).expand(2, 32, -1)[..., None].expand(-1, -1, -1, 3)
    dst = save(tmp_path / form, ramp, codec=form.partition(".")[0], bit_depth=10)
    assert probe(dst).bit_depth >= 10
    frames, _ = load(dst)
    assert len(frames[0, 16, :, 1].unique()) >= 140
    assert (frames - ramp).mean().abs() < 0.3 / 876  # cut off to 8 bits it would be 1.5


def test_ten_bits_stay_ten_bits_in_webm(tmp_path):
    if AV < 15 or "libsvtav1" not in av.codecs_available:
        pytest.skip("this version of av has no usable AV1 encoder")
    assert probe(save(tmp_path / "a.webm", clip(), bit_depth=10)).bit_depth == 10


@pytest.mark.skipif(AV < 15 or "libsvtav1" not in av.codecs_available, reason="av has no usable AV1 encoder")
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux, which tells what threads there are")
def test_no_encoder_makes_real_time_threads(tmp_path):
    """As root SVT-AV1 would: the whole machine, and threads of this process that a real-time one waits for, stood still
    for minutes."""
    before = os.sched_getscheduler(0)
    with open_writer(tmp_path / "a.mkv", described(tmp_path), width=64, height=48, codec="av1") as out:
        out.write(clip(1), moments((3600,)))
        tasks = [int(task.name) for task in Path("/proc/self/task").iterdir()]
        assert len(tasks) > 8 and {os.sched_getscheduler(task) for task in tasks} == {before}


def test_values_are_rounded_not_cut_off(tmp_path):
    frames = torch.linspace(0, 1, 256)[None, None, :, None].expand(2, 32, -1, 3)
    back, _ = load(save(tmp_path / "a.mkv", frames, codec="ffv1"))
    assert torch.equal((back * 255).round(), (frames * 255).round())
    noise = torch.rand(1, 64, 64, 3)
    save(tmp_path / "a.png", noise)
    assert (load(tmp_path / "a.png")[0] - noise).mean().abs() < 0.02 / 255


@pytest.mark.parametrize(("width", "height"), [(63, 48), (64, 47), (63, 47)])
@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_odd_sizes_are_kept(tmp_path, width, height, suffix):
    dst = save(tmp_path / f"a{suffix}", clip(2, height, width))
    assert psnr(load(dst)[0], clip(2, height, width)) > 36
    assert (probe(dst).width, probe(dst).height) == (width, height)


@pytest.mark.parametrize("suffix", [".mov", ".mkv", ".webm"])
def test_transparency_is_kept_in_video(tmp_path, suffix):
    frames = clip(3, channels=4)
    dst = save(tmp_path / f"a{suffix}", frames)
    assert probe(dst).has_alpha
    assert psnr(load(dst)[0], frames) > 36


def test_transparency_is_refused_in_mp4(tmp_path):
    with pytest.raises(MediaError, match=r"transparency.*\.mov"):
        save(tmp_path / "a.mp4", clip(1, channels=4))
    with pytest.raises(MediaError, match=r"prores"):
        save(tmp_path / "a.mkv", clip(1, channels=4), codec="h264")


def test_a_codec_asked_for_by_name_is_used_or_refused(tmp_path):
    assert probe(save(tmp_path / "a.mkv", clip(2), codec="h265")).codec == "hevc"
    with pytest.raises(MediaError, match=r"prores.*\.mov"):
        save(tmp_path / "b.mp4", clip(2), codec="prores")
    with pytest.raises(MediaError, match="not a video"):
        save(tmp_path / "b.png", clip(1), codec="h264")


# --- whole or not at all ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.mp4", "a.png", "folder"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_nothing_and_keeps_the_old_file(tmp_path, name, error):
    dst = tmp_path / name
    if name != "folder":
        dst.write_text("old")
    with pytest.raises(error), open_writer(dst, described(tmp_path), width=64, height=48) as out:
        out.write(clip(1), moments((3600,)))
        assert out.partial.exists()
        raise error
    assert [each.name for each in tmp_path.iterdir()] == ([] if name == "folder" else [name])
    assert name == "folder" or dst.read_text() == "old"


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path):
    resource = pytest.importorskip("resource", reason="no way to make a disk seem full")
    noise = torch.rand(8, 128, 128, 3)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(MediaError, match=r"could not be written \(File too large\)"):
            save(tmp_path / "a.mkv", noise, codec="ffv1")
        with pytest.raises(MediaError, match=r"could not be written \(File too large\)"):
            save(tmp_path / "a.tiff", torch.rand(1, 256, 256, 3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_writing_nothing_is_an_error(tmp_path):
    out = open_writer(tmp_path / "a.mp4", described(tmp_path), width=64, height=48)
    with pytest.raises(MediaError, match="no frame"), out:
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_never_written_over_itself(tmp_path):
    src = save(tmp_path / "a.mp4", clip(2))
    (tmp_path / "link.mp4").symlink_to(src)
    for dst in (src, tmp_path / "link.mp4"):
        with pytest.raises(MediaError, match="being read"):
            open_writer(dst, probe(src), width=64, height=48)


def test_frames_of_another_size_or_out_of_order_are_refused(tmp_path):
    out = open_writer(tmp_path / "a.mp4", described(tmp_path), width=64, height=48)
    with pytest.raises(MediaError, match="takes frames"), out:
        out.write(clip(1, 50), moments((3600,)))
    with pytest.raises(MediaError, match="after a later one"):
        save(tmp_path / "a.mp4", clip(2), moments((3600, 3600))[::-1])
    assert list(tmp_path.iterdir()) == []


# --- whole numbers ---------------------------------------------------------------------------------------------------


def encoded(path: Path) -> list[bytes]:
    """What is in a file or folder, timestamps and random identifiers of containers left aside."""
    if path.is_dir():
        return [each.name.encode() + each.read_bytes() for each in sorted(path.iterdir())]
    return [data for _, data in packets(path, "video")] if path.suffix == ".mkv" else [path.read_bytes()]


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("name", ["a.mkv", "a.png", "a.tiff", "a.webp", "folder"])
def test_frames_packed_first_or_given_as_codes_make_the_same_file(tmp_path, name, depth):
    frames = torch.rand(1 if "." in name and name != "a.mkv" else 3, 33, 57, 4) * 1.2 - 0.1
    info = described(tmp_path, frames=len(frames), bit_depth=depth)
    times = moments((3600,) * len(frames))
    codes = frames.clamp(0, 1).mul(2**depth - 1).round().to(torch.uint8 if depth == 8 else torch.uint16)
    files = []
    for folder, pixels in (("whole", frames), ("packed", frames), ("codes", codes), ("floats of codes", codes.float())):
        (tmp_path / folder).mkdir()
        dst = tmp_path / folder / name
        with open_writer(dst, info, width=57, height=33, alpha=True, codec="ffv1" if ".mkv" in name else "auto") as out:
            if folder == "packed":
                for planes, time in [(out.pack(frame), time) for frame, time in zip(pixels, times, strict=True)]:
                    out.write_packed(planes, time)
            else:
                out.write(pixels / (2**depth - 1) if folder == "floats of codes" else pixels, times)
        files.append(encoded(dst))
    assert files[0] == files[1]
    assert files[2] == files[3]


@pytest.mark.parametrize(
    ("name", "depth", "dtype", "bytes_per_pixel"),
    [
        ("a.mp4", 8, torch.uint8, 1.5),
        ("a.mp4", 10, torch.uint16, 3),
        ("a.mov", 8, torch.uint8, 1.5),
        ("a.png", 8, torch.uint8, 3),
        ("a.png", 16, torch.uint16, 6),
        ("a.jpg", 16, torch.uint8, 3),
        ("folder", 10, torch.uint16, 6),
    ],
)
def test_a_packed_frame_is_as_small_as_what_the_encoder_takes(tmp_path, name, depth, dtype, bytes_per_pixel):
    with pytest.raises(InterruptedError), open_writer(
        tmp_path / name, described(tmp_path, bit_depth=depth), width=64, height=48
    ) as out:
        planes = out.pack(clip(1)[0])
        assert {plane.dtype for plane in planes} == {dtype}
        assert sum(plane.nbytes for plane in planes) == 64 * 48 * bytes_per_pixel
        raise InterruptedError


def test_an_image_of_fewer_bits_in_a_folder_of_more_is_rounded_once(tmp_path):
    """Half of an 8-bit step is half of a 16-bit step too, so that nothing is rounded up twice."""
    (tmp_path / "in").mkdir()
    save(tmp_path / "in" / "1.png", clip(1), bit_depth=16)
    save(tmp_path / "in" / "2.webp", clip(1))
    frames = torch.rand(2, 48, 64, 3)
    with open_writer(tmp_path / "out", probe(tmp_path / "in"), width=64, height=48) as out:
        out.write(frames, moments((3600, 3600)))
    save(tmp_path / "alone.webp", frames[1:])
    one, two = (Image.open(path).convert("RGB") for path in (tmp_path / "out" / "2.webp", tmp_path / "alone.webp"))
    assert np.mean(np.asarray(one) != np.asarray(two)) < 0.001


# --- images and folders ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
@pytest.mark.parametrize("channels", [3, 4])
def test_sixteen_bit_images_keep_sixteen_bits(tmp_path, suffix, channels):
    frames = torch.rand(1, 9, 13, channels)
    dst = save(tmp_path / f"a{suffix}", frames, bit_depth=16)
    info = probe(dst)
    assert (info.bit_depth, info.has_alpha) == (16, channels == 4)
    assert (load(dst)[0] - frames).abs().max() <= 0.51 / 65535


def test_a_real_sixteen_bit_transparent_png_survives_exactly(sample, tmp_path):
    src = sample("lq/images/tree_rgba16_342x256.png")
    copy(src, tmp_path / "a.png")
    before, after = (next(iter(open_reader(probe(path)))).pixels for path in (src, tmp_path / "a.png"))
    assert before.dtype == torch.uint16
    assert len(before.to(torch.int32).unique()) > 256
    assert torch.equal(before, after)


def test_sixteen_bit_grey_is_expanded_exactly(tmp_path):
    grey = np.arange(0, 60000, 250, dtype=np.uint16).reshape(12, 20)
    Image.fromarray(grey).save(tmp_path / "a.png")
    pixels = next(iter(open_reader(probe(tmp_path / "a.png")))).pixels
    assert torch.equal(pixels.to(torch.int32), torch.from_numpy(grey.astype(np.int32))[..., None].expand(-1, -1, 3))


def test_a_real_grey_jpeg_becomes_rgb(sample):
    info = probe(sample("lq/images/wolf_gray_236x236.jpg"))
    pixels = next(iter(open_reader(info))).pixels
    assert pixels.shape == (236, 236, 3)
    assert torch.equal(pixels[..., 0], pixels[..., 2])


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp", ".tif"])
def test_every_image_format_is_written_and_read(tmp_path, suffix):
    frames = clip(1, 33, 47)
    dst = save(tmp_path / f"a{suffix}", frames)
    assert psnr(load(dst)[0], frames) > (40 if suffix == ".jpg" else 50)


def test_a_single_pixel_is_an_image(tmp_path):
    save(tmp_path / "a.png", torch.full((1, 1, 1, 3), 0.5))
    copy(tmp_path / "a.png", tmp_path / "b.png")
    assert load(tmp_path / "b.png")[0].flatten().tolist() == pytest.approx([128 / 255] * 3)


# Where the stored top left pixel is shown, by Exif orientation.
CORNERS = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}


@pytest.mark.parametrize("orientation", CORNERS)
@pytest.mark.parametrize("depth", [8, 16])
def test_exif_orientation_is_applied(tmp_path, orientation, depth):
    stored, exif = clip(1, 6, 10), Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "a.png", stored, bit_depth=depth)
    chunk, png = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0"), path.read_bytes()
    size, check = struct.pack(">I", len(chunk) - 4), struct.pack(">I", zlib.crc32(chunk))
    path.write_bytes(png[:33] + size + chunk + check + png[33:])
    info, upright = probe(path), load(path)[0][0]
    assert info.bit_depth == depth
    assert upright.shape == (info.height, info.width, 3) == ((10, 6, 3) if orientation >= 5 else (6, 10, 3))
    turned = stored[0].transpose(0, 1) if orientation >= 5 else stored[0]
    corner = CORNERS[orientation]
    turned = turned.flip([axis for axis in (0, 1) if corner[axis]])
    torch.testing.assert_close(upright, turned, atol=0.51 / (2**depth - 1), rtol=0)


@pytest.mark.parametrize("depth", [8, 16])
def test_the_colour_profile_is_kept(tmp_path, depth):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    save(tmp_path / "a.png", clip(1), bit_depth=depth)
    with Image.open(tmp_path / "a.png") as image:
        image.save(tmp_path / "b.png", icc_profile=profile)
    info = probe(tmp_path / "b.png")
    source = described(info.path, bit_depth=depth)
    with open_writer(tmp_path / "c.png", source, width=64, height=48) as out:
        out.write(clip(1), moments((3600,)))
    assert probe(tmp_path / "c.png").bit_depth == depth
    assert Image.open(tmp_path / "c.png").info["icc_profile"] == profile


@pytest.mark.parametrize("suffix", [".jpg", ".bmp"])
def test_transparency_is_refused_where_the_image_format_has_none(tmp_path, suffix):
    with pytest.raises(MediaError, match=r"transparency.*\.png"):
        save(tmp_path / f"a{suffix}", clip(1, channels=4))


def test_a_folder_is_read_in_natural_order_and_written_back_under_its_names(tmp_path):
    (tmp_path / "in").mkdir()
    for i, name in enumerate(["f2.png", "f10.png", "f1.png"]):
        Image.new("RGB", (8, 6), (i, i, i)).save(tmp_path / "in" / name)
    info = probe(tmp_path / "in", fps=Fraction(12))
    assert (info.kind, info.frames, info.fps, info.duration) == ("folder", 3, 12, Fraction(1, 4))
    copy(tmp_path / "in", tmp_path / "out")
    assert sorted(each.name for each in (tmp_path / "out").iterdir()) == ["f1.png", "f10.png", "f2.png"]
    assert (load(tmp_path / "out")[0][:, 0, 0, 0] * 255).tolist() == [2, 0, 1]
    with pytest.raises(MediaError, match="not empty"):
        copy(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["f_8.png", "f_9.png", "f_10.png"], None),
        (["shot2_0001.png", "shot2_0002.jpg"], None),
        (["1.png", "2.png", "4.png"], None),
        (["1.png", "2.png", "9.png"], "most numbers between 1 and 9 are missing"),
        (["kodim08.png", "kodim13.png"], "most numbers"),
        (["ann.png", "bob.png"], "not one numbered sequence"),
        (["a1.png", "b2.png"], "not one numbered sequence"),
        (["1_1.png", "2_2.png"], "not one numbered sequence"),
        (["1.png", "01.png", "2.png"], "not one numbered sequence"),
        (["1.png", "1.jpg"], "not one numbered sequence"),
        (["1.png"], "only one"),
        (["1.png", "2.png", "3-wide.png"], "not one numbered sequence"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_clip_has_names_that_count_up(tmp_path, names, reason):
    for name in names:
        Image.new("RGB", (8, 6)).save(tmp_path / name)
    found = why_no_clip(tmp_path)
    assert found is None if reason is None else reason in found


def test_images_of_different_sizes_are_no_clip(tmp_path):
    for width in (8, 9):
        Image.new("RGB", (width, 6)).save(tmp_path / f"{width}.png")
    assert why_no_clip(tmp_path) == "they differ in size"


def test_a_folder_has_no_sound_and_says_so(tmp_path):
    info = described(tmp_path / "a.mp4", kind="video", frames=2, audio=("aac 48000 Hz stereo",))
    writer = open_writer(tmp_path / "out", info, width=8, height=6)
    writer.discard()
    assert writer.notices == ["A folder of images holds no sound: that of a.mp4 is left out."]


def test_a_folder_becomes_a_video_and_a_video_a_folder(tmp_path):
    (tmp_path / "in").mkdir()
    for i, frame in enumerate(clip(5)):
        save(tmp_path / "in" / f"{i}.png", frame[None])
    info = probe(tmp_path / "in", fps=Fraction(30000, 1001))
    with open_reader(info) as reader, open_writer(tmp_path / "a.mp4", info, width=64, height=48) as out:
        for frame in reader:
            out.write(frame.floats()[None], [frame.time])
    assert probe(tmp_path / "a.mp4").fps == Fraction(30000, 1001)
    copy(tmp_path / "a.mp4", tmp_path / "back")
    assert sorted(each.name for each in (tmp_path / "back").iterdir()) == [f"{i:06d}.png" for i in range(1, 6)]
    assert psnr(load(tmp_path / "back")[0], clip(5)) > 38


def test_a_folder_of_mixed_images_is_read_in_the_richest_form(tmp_path):
    for name, channels, depth in (("1.png", 3, 8), ("2.png", 4, 8), ("3.png", 3, 16)):
        save(tmp_path / name, torch.ones(1, 6, 8, channels), bit_depth=depth)
    info = probe(tmp_path)
    assert (info.bit_depth, info.has_alpha) == (16, True)
    assert torch.equal(load(tmp_path)[0], torch.ones(3, 6, 8, 4))


def test_a_real_folder_of_frames_is_one_clip(sample):
    info = probe(sample("lq/frames/oldfilm_scratched_640x480"))
    assert (info.kind, info.width, info.height, info.frames) == ("folder", 640, 480, 20)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_read_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "text.mp4").write_text("hello\n" * 100)
    (tmp_path / "text.png").write_text("hello\n" * 100)
    (tmp_path / "notes.txt").write_text("hello\n" * 100)
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed").mkdir()
    Image.new("RGB", (8, 6)).save(tmp_path / "mixed" / "a.png")
    Image.new("RGB", (9, 6)).save(tmp_path / "mixed" / "b.png")
    add_sound(save(tmp_path / "silent.mp4", clip(2)), tmp_path / "both.mp4", "aac")
    with av.open(str(tmp_path / "both.mp4")) as source, av.open(str(tmp_path / "sound.mp4"), "w") as out:
        stream = out.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux(audio=0):
            if packet.size:
                packet.stream = stream
                out.mux(packet)
    for name, message in {
        "missing.mp4": "does not exist",
        "text.mp4": "not a video",
        "text.png": "not a readable image",
        "notes.txt": "ends in none of",
        "empty": "holds no images",
        "mixed": r"b\.png is 9x6 and a\.png is 8x6",
        "sound.mp4": "no video, only sound",
    }.items():
        with pytest.raises(MediaError, match=message) as refusal:
            probe(tmp_path / name)
        assert str(refusal.value).count("\n") == 0 and str(refusal.value).endswith(".")


def test_an_output_that_makes_no_sense_is_refused(tmp_path):
    info = probe(save(tmp_path / "a.mp4", clip(2)))
    for name, message in {"b.xyz": "ends in none of", "b.png": "one picture", "no/b.mp4": "does not exist"}.items():
        with pytest.raises(MediaError, match=message):
            open_writer(tmp_path / name, info, width=64, height=48)


@pytest.mark.parametrize("name", ["a.mkv", "a.webm"])
def test_a_video_that_lacks_less_than_a_second_is_read_and_that_is_said(tmp_path, caplog, name):
    src = save(tmp_path / name, clip(40))
    assert len(load(src)[0]) == 40 and not caplog.records
    src.write_bytes(src.read_bytes()[: src.stat().st_size * 9 // 10])
    assert len(load(src)[0]) < 39
    assert re.search(rf"{name} announces 1\.60 s, but only 1\.[345]\d s were found", caplog.text)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_truncated_video_tells_how_much_of_it_is_good(tmp_path, suffix):
    src = save(tmp_path / f"a{suffix}", torch.rand(60, 48, 64, 3), codec="h264")
    data = src.read_bytes()
    if suffix == ".mp4":  # the index lies at the end; damage the pictures instead
        start, end = len(data) // 2, len(data) * 3 // 4
        damaged = data[:start] + bytes(end - start) + data[end:]  # as long as it was, or the index is not found
    else:
        damaged = data[: len(data) // 3]
    src.write_bytes(damaged)
    dst = tmp_path / "out.mp4"
    with pytest.raises(MediaError, match=r"\d+ frames \(\d\.\d\d s\) can be read"):
        copy(src, dst)
    assert not dst.exists()


def test_a_video_that_lost_its_index_is_refused(tmp_path):
    src = save(tmp_path / "a.mp4", clip())
    data = src.read_bytes()
    for kept in (data[:-200], data[: len(data) // 2], b""):
        src.write_bytes(kept)
        with pytest.raises(MediaError, match="cut short"):
            probe(src)
