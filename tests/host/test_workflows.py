"""Every workflow, in API format, in a real ComfyUI with nano and with real clips and pictures, made short and small."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import av
import pytest
from PIL import Image

from tests.host.clips import cut
from tests.host.server import ROOT, File, Graph, Server, failure, files, succeeded

API = ROOT / "workflows" / "api"
# The widgets that name what is restored: nodes of these kinds have them.
SOURCES = {"LoadImage": "image", "LoadVideo": "file", "SVR2RestoreVideo": "path"}


@dataclass(frozen=True)
class Seen:
    """What a video file holds."""

    size: tuple[int, int]
    frames: int
    rate: float
    sound: list[bytes]  # packets

    @classmethod
    def of(cls, path: Path) -> Seen:
        with av.open(str(path)) as container:
            video = container.streams.video[0]
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video)]
            assert max(frame.std() for frame in frames) > 1, "all frames are empty"
            container.seek(0)
            sound = [bytes(packet) for packet in container.demux(container.streams.audio) if packet.size]
            return cls((video.width, video.height), len(frames), float(video.average_rate), sound)


def graph(name: str, *sources: str) -> Graph:
    """A workflow with other media than those it names, in the order of its nodes."""
    nodes = json.loads((API / f"{name}.json").read_text("utf-8"))
    remaining = list(sources)
    for node in nodes.values():
        widget = SOURCES.get(node["class_type"])
        if widget and node["inputs"][widget]:
            node["inputs"][widget] = remaining.pop(0)
    assert not remaining, f"{name} has no use for {remaining}"
    return nodes


def run(server: Server, name: str, *sources: str) -> list[File]:
    """The files that a workflow leaves."""
    entry = server.run(graph(name, *sources))
    assert succeeded(entry), failure(entry)
    return files(entry)


@pytest.fixture(scope="module")
def clip(sample: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a short, small copy of a sample clip."""

    def make(name: str, frames: int, height: int = 64) -> Path:
        return cut(
            sample(f"lq/clips/{name}"), tmp_path_factory.mktemp("clips") / f"{Path(name).stem}.mp4", frames, height
        )

    return make


@pytest.fixture(scope="module")
def picture(server: Server, sample: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory):
    """Uploads the middle of a sample picture and gives its name."""

    def make(name: str, width: int, height: int) -> str:
        with Image.open(sample(f"lq/images/{name}")) as image:
            left, top = (image.width - width) // 2, (image.height - height) // 2
            path = tmp_path_factory.mktemp("pictures") / f"{Path(name).stem}.png"
            image.convert("RGB").crop((left, top, left + width, top + height)).save(path)
        return server.upload(path)

    return make


def size(server: Server, file: File) -> tuple[int, int]:
    image = Image.open(io.BytesIO(server.view(file))).convert("RGB")
    assert any(low < high for low, high in image.getextrema()), "the picture is empty"
    return image.size


def test_image_upscale_makes_one_picture_of_twice_the_size(server, picture):
    (file,) = run(server, "image_upscale", picture("wolf_gray_236x236.jpg", 100, 84))
    assert file["type"] == "output"
    assert size(server, file) == (200, 168)


def test_image_batch_keeps_the_size_of_each_picture(server, picture):
    names = picture("sadhu_320x478.png", 64, 96), picture("sign_japanese_555x418.jpg", 110, 50)
    assert [size(server, file) for file in run(server, "image_batch", *names)] == [(128, 192), (220, 100)]


def test_restore_video_keeps_frames_rate_and_sound(server, clip):
    source = clip("chaplin_640x360_audio.mp4", 7)
    (file,) = run(server, "restore_video", server.upload(source))
    before, after = Seen.of(source), Seen.of(server.path(file))
    assert file["type"] == "output"
    assert after.size == (2 * before.size[0], 2 * before.size[1])
    assert (after.frames, after.rate) == (7, before.rate)
    assert before.sound and after.sound == before.sound


def test_long_video_is_read_where_it_lies(server, clip):
    source = clip("portrait_480x908_audio.mp4", 10, 92)
    (file,) = run(server, "long_video_low_memory", str(source))
    before, after = Seen.of(source), Seen.of(server.path(file))
    assert after.size == (2 * before.size[0], 2 * before.size[1])
    assert (after.frames, after.rate) == (10, before.rate)
    assert before.sound and after.sound == before.sound
    assert not (server.base / "input" / source.name).exists()


def test_video_stages_keep_frames_rate_and_sound(server, clip):
    source = clip("stream_of_water_480x360_audio.mp4", 6)
    (file,) = run(server, "video_stages", server.upload(source))
    before, after = Seen.of(source), Seen.of(server.path(file))
    assert after.size == (2 * before.size[0], 2 * before.size[1])
    assert after.frames == 6
    assert after.rate == pytest.approx(before.rate, rel=1e-3)
    assert after.sound  # encoded anew by ComfyUI


def test_compare_shows_one_second(server, clip):
    source = clip("plants_256x128.mp4", 20, 48)
    shown = run(server, "compare", server.upload(source))
    (video,) = (file for file in shown if file["filename"].endswith(".mp4"))
    (profile,) = (file for file in shown if file["filename"].endswith(".png"))
    before, after = Seen.of(source), Seen.of(server.path(video))
    assert after.size == (2 * before.size[0], 2 * before.size[1])
    assert after.frames == round(before.rate) < before.frames
    assert profile["type"] == "temp" and size(server, profile)


def test_every_workflow_is_run_here():
    tests = Path(__file__).read_text("utf-8")
    assert not [path.stem for path in API.glob("*.json") if f'(server, "{path.stem}"' not in tests]
