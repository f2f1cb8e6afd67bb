"""Whole files through tiny models, and through some that change nothing: what a medium was, it still is."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from seedvr2_core.errors import MediaError
from seedvr2_core.loading import Models
from seedvr2_core.pipeline import stream
from seedvr2_core.settings import Settings
from seedvr2_core.video.files import Frame, open_reader, open_writer, probe
from seedvr2_core.video.geometry import Target, resize
from seedvr2_core.whole_files import Report, restore_file

MEDIA = Path(__file__).parent.parent / "media"
AV = int(av.__version__.partition(".")[0])
# Small, and not a multiple of 16.
WIDTH, HEIGHT = 60, 44


def run(source: Path, destination: Path, models: Models, width: int = WIDTH, height: int = HEIGHT) -> Report:
    settings = Settings(target=Target.exact(height, width), color="none", chunk=13)
    return restore_file(source, destination, models, settings)


def frames(path: Path) -> list[Frame]:
    with open_reader(probe(path)) as reader:
        return list(reader)


def sound(path: Path) -> list[tuple[Fraction, bytes]]:
    with av.open(str(path)) as container:
        if not container.streams.audio:
            return []
        return [(p.pts * p.time_base, bytes(p)) for p in container.demux(container.streams.audio[0]) if p.size]


def still(path: Path, height: int, width: int, blue: int = 0) -> Path:
    y, x = np.mgrid[:height, :width]
    Image.fromarray(np.stack([x * 9 % 256, y * 14 % 256, x * 0 + blue], axis=-1).astype(np.uint8)).save(path)
    return path


def difference(now: Frame, was: Frame) -> float:
    """Mean difference between the colours, 0..1, of a frame and of the larger or smaller one it comes from."""
    new, old = (frame.floats()[None, ..., :3].permute(0, 3, 1, 2) for frame in (now, was))
    return float((new - resize(old, *new.shape[-2:])).abs().mean())


@pytest.fixture(scope="session")
def shipped() -> Path:
    """The clip with sound that comes with the tests, for those who have no others."""
    return MEDIA / "stream.mp4"


# --- video -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "suffix", "size"),
    [
        ("chaplin_640x360_audio.mp4", ".mp4", (64, 48)),
        ("portrait_480x908_audio.mp4", ".mp4", (36, 68)),
        ("oldfilm_odd_579x340.mp4", ".mp4", (57, 33)),
        ("roadtrip_10bit_426x240.webm", ".mp4", (60, 34)),
        ("roadtrip_10bit_426x240.webm", ".webm", (60, 34)),
        ("shaky_vfr_rot180_1280x720_audio.mp4", ".mov", (64, 36)),
        ("bunny_176x144_15fps.mp4", ".mkv", (44, 36)),
    ],
)
def test_a_real_video_keeps_its_frames_times_sound_and_depth(sample, transparent, tmp_path, name, suffix, size):
    source, destination = sample(f"lq/clips/{name}"), tmp_path / f"out{suffix}"
    report = run(source, destination, transparent, *size)
    before, after = probe(source), probe(destination)
    assert (after.width, after.height) == size == (report.width, report.height)
    assert (after.bit_depth, after.rotation) == (before.bit_depth, 0)
    assert (after.variable_frame_rate, after.audio) == (before.variable_frame_rate, before.audio)
    assert sound(destination) == sound(source)
    if AV >= 16:  # older ones do not tell how long the last frame of an .mp4 stays
        assert abs(after.duration - before.duration) <= 1 / before.fps

    old, new = frames(source), frames(destination)
    assert len(new) == len(old) == report.frames
    # Matroska counts milliseconds.
    slack = Fraction(1, 1000) if destination.suffix in (".mkv", ".webm") else 0
    for was, now in zip(old, new, strict=True):
        assert abs(now.time.start - was.time.start) <= slack
        assert difference(now, was) < 0.02


def test_a_clip_with_sound_passes_through_real_layers(shipped, runnable, tmp_path):
    report = run(shipped, tmp_path / "out.mp4", runnable)
    before, after = probe(shipped), probe(tmp_path / "out.mp4")
    assert (after.frames, after.duration, after.fps) == (report.frames, before.duration, before.fps)
    assert [frame.time for frame in frames(tmp_path / "out.mp4")] == [frame.time for frame in frames(shipped)]
    assert len(sound(shipped)) > 10 and sound(tmp_path / "out.mp4") == sound(shipped)


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("clips/bunny_176x144_15fps.mp4", ""),
        ("clips/roadtrip_10bit_426x240.webm", ""),
        ("images/tree_rgba16_342x256.png", ".png"),
        ("images/tree_rgba16_342x256.png", ".mkv"),
        ("images/wolf_gray_236x236.jpg", ".jpg"),
    ],
)
def test_whole_numbers_and_threads_change_no_pixel(sample, runnable, tmp_path, name, suffix):
    """The same file as from floats that are written one after another; encoders without loss show every bit."""
    source, size = sample(f"lq/{name}"), (HEIGHT, WIDTH)
    settings = Settings(target=Target.exact(*size), chunk=13)
    restore_file(source, tmp_path / f"file{suffix}", runnable, settings)
    info, old = probe(source), frames(source)
    with open_writer(tmp_path / f"floats{suffix}", info, width=WIDTH, height=HEIGHT) as out:
        restored = torch.cat(list(stream([frame.pixels for frame in old], runnable, settings, size)))
        out.write(restored, [frame.time for frame in old])
    for one, other in zip(frames(tmp_path / f"file{suffix}"), frames(tmp_path / f"floats{suffix}"), strict=True):
        assert torch.equal(one.pixels, other.pixels)


@pytest.mark.parametrize("interlaced", [False, True])
def test_combs_are_warned_of(transparent, tmp_path, caplog, interlaced):
    with av.open(str(tmp_path / "in.mkv"), "w") as container:
        options = {"x264-params": "interlaced=1"} if interlaced else {}
        stream = container.add_stream("libx264", rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), "rgb24")))
        container.mux(stream.encode(None))
    run(tmp_path / "in.mkv", tmp_path / "out.mkv", transparent)
    assert ("in.mkv is marked as interlaced" in caplog.text) == interlaced


# --- images and folders ----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    """Images 8, 9, 10, 11, 12, 13, whose natural order is not that of their names."""
    (tmp_path / "in").mkdir()
    for number in range(8, 14):
        still(tmp_path / "in" / f"{number}.png", 12, 16, blue=10 * number)
    return tmp_path / "in"


def test_a_folder_becomes_a_folder_of_the_same_names(folder, transparent, tmp_path):
    run(folder, tmp_path / "out", transparent)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in folder.iterdir()}
    for was, now in zip(frames(folder), frames(tmp_path / "out"), strict=True):
        assert now.pixels.shape == (HEIGHT, WIDTH, 3)
        assert difference(now, was) < 0.003


def test_a_folder_becomes_a_video(folder, transparent, tmp_path):
    run(folder, tmp_path / "out.mp4", transparent)
    info = probe(tmp_path / "out.mp4")
    assert (info.frames, info.fps, info.duration) == (6, 24, Fraction(6, 24))
    for was, now in zip(frames(folder), frames(tmp_path / "out.mp4"), strict=True):
        assert difference(now, was) < 0.02


def test_a_real_folder_becomes_a_video(sample, runnable, tmp_path):
    source = sample("lq/frames/oldfilm_scratched_640x480")
    assert run(source, tmp_path / "out.mkv", runnable).frames == len(frames(tmp_path / "out.mkv")) == 20


def test_a_video_becomes_a_folder(shipped, transparent, tmp_path):
    report = run(shipped, tmp_path / "out", transparent, 16, 12)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [f"{i + 1:06d}.png" for i in range(report.frames)]


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_a_transparent_image_in_sixteen_bits_stays_one(sample, transparent, tmp_path, suffix):
    source, destination = sample("lq/images/tree_rgba16_342x256.png"), tmp_path / f"out{suffix}"
    run(source, destination, transparent)
    info = probe(destination)
    assert (info.bit_depth, info.has_alpha, info.width, info.height) == (16, True, WIDTH, HEIGHT)
    (was,), (now,) = frames(source), frames(destination)
    assert now.pixels.dtype == torch.uint16
    assert difference(now, was) < 2**-16  # no rounding to eight bits on the way
    alpha, expected = (frame.floats()[None, None, ..., 3] for frame in (now, was))
    assert (alpha - resize(expected, HEIGHT, WIDTH)).abs().mean() < 0.1


@pytest.mark.parametrize("name", ["wolf_gray_236x236.jpg", "sign_japanese_555x418.jpg"])
def test_a_real_photo_comes_back(sample, transparent, tmp_path, name):
    run(sample(f"lq/images/{name}"), tmp_path / "out.jpg", transparent)
    (was,), (now,) = frames(sample(f"lq/images/{name}")), frames(tmp_path / "out.jpg")
    assert difference(now, was) < 0.02


@pytest.mark.parametrize(("width", "height"), [(1, 1), (2, 2), (3, 1)])
def test_the_smallest_image_is_enlarged(runnable, tmp_path, width, height):
    source = still(tmp_path / "in.png", height, width)
    restore_file(source, tmp_path / "out.png", runnable, Settings(target=Target.scale(2)))
    assert Image.open(tmp_path / "out.png").size == (2 * width, 2 * height)


# --- refusals --------------------------------------------------------------------------------------------------------


def refusal(source: Path, models: Models, left: str = "", name: str = "out.mp4") -> str:
    """The sentence with which a file is refused; nothing is left of the attempt but the file named."""
    folder = source.parent
    before = {path.name for path in folder.iterdir()}
    with pytest.raises(MediaError) as error:
        run(source, folder / name, models)
    assert {path.name for path in folder.iterdir()} - before == ({left} if left else set())
    said = str(error.value)
    assert said.endswith(".") and "\n" not in said and source.name in said
    return said


def test_a_text_is_no_video(runnable, tmp_path):
    (tmp_path / "in.mp4").write_text("hello\n" * 100)
    assert "not a video" in refusal(tmp_path / "in.mp4", runnable)


def test_what_can_be_read_of_a_video_cut_short_is_kept_with_its_sound(shipped, transparent, tmp_path):
    (tmp_path / "in.mp4").write_bytes(shipped.read_bytes()[:-20000])
    (tmp_path / "out.mp4").write_bytes(b"old")
    said = refusal(tmp_path / "in.mp4", transparent, left="out.partial.mp4")
    assert (tmp_path / "out.mp4").read_bytes() == b"old"
    good, whole = int(re.search(r"(\d+) frames \(", said)[1]), probe(shipped).frames
    assert f"; {good} of {whole} frames were restored and are in {tmp_path / 'out.partial.mp4'}." in said
    kept, source = frames(tmp_path / "out.partial.mp4"), frames(shipped)[:good]
    assert 0 < len(kept) == good < whole
    for was, now in zip(source, kept, strict=True):
        assert now.time.start == was.time.start and difference(now, was) < 0.02
    end = kept[-1].time.start + kept[-1].time.duration
    heard = sound(tmp_path / "out.partial.mp4")
    assert heard == sound(shipped)[: len(heard)] and end - Fraction(1, 10) < heard[-1][0] <= end
    refusal(tmp_path / "in.mp4", transparent, left="out.partial2.mp4")


def test_sound_beyond_the_last_good_frame_is_left_out(shipped, transparent, tmp_path):
    """The pictures in the middle are damaged, all of the sound is there."""
    data = bytearray(shipped.read_bytes())
    with av.open(str(shipped)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    for packet in packets[len(packets) // 2 :]:
        data[packet.pos : packet.pos + packet.size] = b"\xff" * packet.size
    (tmp_path / "in.mp4").write_bytes(data)
    refusal(tmp_path / "in.mp4", transparent, left="out.partial.mp4")
    end = sum((frame.time.duration for frame in frames(tmp_path / "out.partial.mp4")), Fraction(0))
    assert 0 < sound(tmp_path / "out.partial.mp4")[-1][0] <= end < sound(shipped)[-1][0]


def test_a_video_damaged_in_the_middle_tells_how_much_of_it_is_good(sample, transparent, tmp_path):
    data = sample("lq/clips/roadtrip_10bit_426x240.webm").read_bytes()
    (tmp_path / "in.webm").write_bytes(data[: len(data) // 3])
    assert " frames (" in refusal(tmp_path / "in.webm", transparent, left="out.partial.mp4")


def test_pictures_before_one_that_is_damaged_are_kept(folder, transparent, tmp_path):
    for image in folder.iterdir():
        still(image.with_suffix(".jpg"), 32, 32)
        image.unlink()
    (folder / "11.jpg").write_bytes((folder / "11.jpg").read_bytes()[:-100])
    with pytest.raises(MediaError, match=r"11\.jpg .*; 3 of 6 frames were restored and are in .*out\.partial\.$"):
        run(folder, tmp_path / "out", transparent)
    assert {path.name for path in (tmp_path / "out.partial").iterdir()} == {"8.jpg", "9.jpg", "10.jpg"}


def test_a_video_without_a_frame_is_refused(shipped, runnable, tmp_path):
    with av.open(str(shipped)) as source, av.open(str(tmp_path / "in.mkv"), "w") as out:
        stream = out.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        copy = out.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux(audio=0):
            if packet.size:
                packet.stream = copy
                out.mux(packet)
    assert "not a single frame" in refusal(tmp_path / "in.mkv", runnable)


def test_images_of_different_sizes_are_no_clip(folder, runnable):
    still(folder / "14.png", 10, 10)
    with pytest.raises(MediaError, match=r"14\.png is 10x10"):
        run(folder, folder.parent / "out.mp4", runnable)
