"""A folder goes through a workflow: shared among servers, resumed, and honest about what failed."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import av
import pytest
from PIL import Image

from tests.host.server import ROOT, Graph, Server, free_port

SCRIPT = ROOT / "workflows" / "batch.py"
RESTORE_VIDEO = ROOT / "workflows" / "api" / "restore_video.json"
# Large enough to take a second or two, so that a server can be killed in the middle.
SIDE = 2500
# Seconds, on crowded machines.
STARTED = 120.0
ENDED = 300.0

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("aiohttp") is None, reason="workflows/batch.py needs aiohttp, which comes with ComfyUI"
)


@pytest.fixture(scope="module")
def servers(start_server) -> list[Server]:
    """Two bare hosts; stock nodes are enough here."""
    return [start_server(pack=None), start_server(pack=None)]


@pytest.fixture(scope="module")
def batch() -> ModuleType:
    """The script as a module, for what needs no server."""
    spec = importlib.util.spec_from_file_location("batch", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["batch"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def photos(tmp_path, sample) -> Path:
    """Six different small pictures."""
    folder = tmp_path / "photos"
    folder.mkdir()
    with Image.open(sample("lq/images/sign_japanese_555x418.jpg")) as sign:
        for index in range(6):
            sign.crop((40 * index, 0, 40 * index + 64, 64)).save(folder / f"photo {index}.png")
    return folder


def enlarge(side: int = SIDE) -> Graph:
    """A picture in, a large one out, by the host's own nodes."""
    size = {"width": side, "height": side, "upscale_method": "lanczos", "crop": "disabled"}
    return {
        "1": {"class_type": "LoadImage", "inputs": {"image": "example.png"}},
        "2": {"class_type": "ImageScale", "inputs": {"image": ["1", 0], **size}, "_meta": {"title": "Enlarge"}},
        "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "batch"}},
    }


def remux() -> Graph:
    saved = {"video": ["1", 0], "filename_prefix": "batch", "format": "auto", "codec": "auto"}
    return {
        "1": {"class_type": "LoadVideo", "inputs": {"file": "example.mp4"}},
        "2": {"class_type": "SaveVideo", "inputs": saved},
    }


class Run:
    """The script at work in a process of its own."""

    def __init__(self, command: list[str]):
        # What a shell runs in the background ignores Ctrl-C, and so would whatever it starts.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        signal.signal(signal.SIGINT, before)
        self.stdout = self.stderr = ""

    def end(self, timeout: float = ENDED) -> int:
        """Wait, and return the exit code."""
        self.stdout, self.stderr = self.process.communicate(timeout=timeout)
        return self.process.returncode

    def finished(self) -> list[str]:
        """Inputs that were reported as done, each as often as it was."""
        return [line.split(" -> ")[0] for line in self.stdout.splitlines() if " -> " in line]


@pytest.fixture
def send(tmp_path) -> Iterator[Callable[..., Run]]:
    """Start the script: `send(servers, graph, source)`, and more arguments for it; results go to tmp_path / "out"."""
    runs: list[Run] = []

    def start(servers: Sequence[Server], graph: Graph, source: Path, *more: str) -> Run:
        workflow = tmp_path / "workflow.json"
        workflow.write_text(json.dumps(graph))
        command = [sys.executable, str(SCRIPT), "--workflow", str(workflow), "--input", str(source)]
        command += ["--output", str(tmp_path / "out"), *more]
        runs.append(Run(command + [word for server in servers for word in ("--server", server.url)]))
        return runs[-1]

    yield start
    for run in runs:
        run.process.kill()
        run.process.wait()


@pytest.fixture
def out(tmp_path) -> Path:
    """Takes the results."""
    return tmp_path / "out"


def until(condition: Callable[[], Any], timeout: float = STARTED) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def running(server: Server) -> bool:
    return bool(json.loads(server.get("/queue"))["queue_running"])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def assert_all_arrived(run: Run, source: Path, target: Path, side: int = SIDE) -> None:
    assert run.end() == 0, run.stderr
    assert sorted(run.finished()) == names(source)
    assert names(target) == sorted(["batch.json", *names(source)])
    for path in target.glob("*.png"):
        with Image.open(path) as image:
            image.load()
            assert image.size == (side, side)


def test_a_server_killed_in_the_middle_loses_nothing_when_there_is_another(servers, photos, send, out):
    run = send(servers, enlarge(), photos)
    until(lambda: running(servers[1]))
    servers[1].restart()
    assert_all_arrived(run, photos, out)
    assert "will be tried again (1 of 3)" in run.stdout


def test_the_only_server_is_waited_for_and_gets_its_file_again(servers, photos, send, out):
    run = send(servers[:1], enlarge(), photos)
    until(lambda: list(out.glob("*.png")) and running(servers[0]))
    done = len(list(out.glob("*.png")))
    servers[0].restart()
    assert_all_arrived(run, photos, out)
    assert done < len(names(photos))
    assert "will be tried again (1 of 3)" in run.stdout


def test_work_is_spread_over_the_servers(servers, photos, send, out):
    before = [len(json.loads(server.get("/history"))) for server in servers]
    assert_all_arrived(send(servers, enlarge(), photos), photos, out)
    done = [len(json.loads(server.get("/history"))) - was for server, was in zip(servers, before, strict=True)]
    assert sum(done) == len(names(photos)) and min(done) >= 2


def test_what_is_finished_is_not_done_again_unless_it_changed(servers, photos, send, out):
    assert_all_arrived(send(servers, enlarge(64), photos), photos, out, 64)

    again = send(servers, enlarge(64), photos)
    assert again.end() == 0 and again.finished() == [] and "6 of 6 files were finished before" in again.stdout

    Image.new("RGB", (64, 64), "red").save(photos / "photo 3.png")
    changed = send(servers, enlarge(64), photos)
    assert changed.end() == 0 and changed.finished() == ["photo 3.png"]
    assert Image.open(out / "photo 3.png").getpixel((0, 0)) == (255, 0, 0)

    assert_all_arrived(send(servers, enlarge(64), photos, "--again"), photos, out, 64)
    larger = send(servers, enlarge(64), photos, "--set", "Enlarge.width=80", "--set", "2.height=80")
    assert_all_arrived(larger, photos, out, 80)


def test_a_corrupt_file_fails_with_a_sentence_and_the_others_succeed(servers, photos, send, out):
    (photos / "broken.png").write_bytes(b"not a picture")
    run = send(servers, enlarge(64), photos)
    assert run.end() == 1
    assert "1 of 7 files failed:\n  broken.png: LoadImage (node 1): cannot identify image file" in run.stderr
    assert "Traceback" not in run.stderr
    assert names(out) == sorted(["batch.json", *(name for name in names(photos) if name != "broken.png")])


def test_a_refused_workflow_names_the_node_and_the_value(servers, photos, send, out):
    run = send(servers, enlarge(), photos, "--set", "2.width=-1")
    assert run.end() == 1
    assert "6 of 6 files failed" in run.stderr
    assert "the workflow was refused: Enlarge (node 2): Value -1 smaller than min of 0: width" in run.stderr


def test_ctrl_c_stops_the_servers_and_leaves_only_whole_files(servers, photos, send, out):
    # Large, so that much is left to do when the signal comes.
    run = send(servers, enlarge(2 * SIDE), photos)
    until(lambda: list(out.glob("*.png")) and all(running(server) for server in servers))
    run.process.send_signal(signal.SIGINT)
    assert run.end(20) == 130
    assert "Traceback" not in run.stderr
    until(lambda: not any(running(server) for server in servers), 30)
    left = names(out)
    assert not [name for name in left if name.startswith(".")]

    rest = send(servers, enlarge(2 * SIDE), photos)
    assert rest.end() == 0
    assert len(rest.finished()) == len(names(photos)) - len([name for name in left if name.endswith(".png")])


def test_videos_keep_their_sound_on_the_way(servers, send, out, tmp_path, sample):
    source = tmp_path / "clips"
    source.mkdir()
    for clip in ("chaplin_640x360_audio.mp4", "eyes_212x120.mp4"):
        (source / clip).write_bytes(sample(f"lq/clips/{clip}").read_bytes())
    (source / "poster.jpg").write_bytes(sample("lq/images/wolf_gray_236x236.jpg").read_bytes())
    run = send(servers, remux(), source)
    assert run.end() == 0, run.stderr
    assert "Left out, since the loader 1.file takes videos: poster.jpg" in run.stdout
    assert names(out) == ["batch.json", "chaplin_640x360_audio.mp4", "eyes_212x120.mp4"]
    with av.open(str(out / "chaplin_640x360_audio.mp4")) as container:
        assert container.streams.audio and container.streams.video


def test_without_a_server_every_file_is_listed_as_failed(photos, send, comfyui):
    address = f"http://127.0.0.1:{free_port()}"
    run = send([], enlarge(), photos, "--server", address, "--timeout", "1")
    assert run.end() == 1
    assert run.stderr.count("no server was left to do it") == len(names(photos))


def test_our_own_workflow_restores_a_folder(server, send, out, tmp_path, sample):
    if not RESTORE_VIDEO.exists():
        pytest.skip("workflows/api/restore_video.json is not there")
    source = tmp_path / "clips"
    source.mkdir()
    shorten(sample("lq/clips/eyes_212x120.mp4"), source / "eyes.mp4", frames=5)
    run = send([server], json.loads(RESTORE_VIDEO.read_text()), source)
    assert run.end() == 0, run.stderr
    with av.open(str(out / "eyes.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 5


def shorten(source: Path, target: Path, frames: int) -> None:
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        picture = old.streams.video[0]
        stream = new.add_stream("libx264", rate=picture.average_rate)
        stream.width, stream.height, stream.pix_fmt = picture.width, picture.height, "yuv420p"
        for _, frame in zip(range(frames), old.decode(picture), strict=False):
            new.mux(stream.encode(frame))
        new.mux(stream.encode())


# Without a server


def refused(batch: ModuleType, graph: Any, *settings: str, folder: Path) -> str:
    path = folder / "workflow.json"
    path.write_text(json.dumps(graph))
    with pytest.raises(batch.BatchError) as error:
        batch.Workflow.read(path, settings)
    return str(error.value)


def test_a_workflow_needs_one_loader(batch, tmp_path):
    graph = enlarge()
    two = {**graph, "4": {"class_type": "LoadVideo", "inputs": {"file": "a.mp4"}}}
    assert "several loaders, 1.image and 4.file" in refused(batch, two, folder=tmp_path)
    assert str(batch.Workflow(two, ["4.file=b.mp4"]).loader) == "1.image"
    assert "no loader" in refused(batch, {"2": graph["2"]}, folder=tmp_path)


def test_an_empty_path_beside_a_loader_is_not_a_second_one(batch):
    graph = {**remux(), "3": {"class_type": "Any", "inputs": {"video": ["1", 0], "path": ""}}}
    assert str(batch.Workflow(graph).loader) == "1.file"
    assert str(batch.Workflow({"3": graph["3"]}).loader) == "3.path"


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("width=3", "needs NODE.INPUT=VALUE"),
        ("Shrink.width=3", "0 nodes are called 'Shrink'"),
        ("2.with=3", "no input 'with'"),
    ],
)
def test_a_setting_that_fits_nothing_is_refused(batch, tmp_path, setting, said):
    assert said in refused(batch, enlarge(), setting, folder=tmp_path)


def test_the_page_format_is_refused_with_advice(batch, tmp_path):
    assert "Export (API)" in refused(batch, {"nodes": [], "links": []}, folder=tmp_path)


def test_results_of_inputs_with_the_same_stem_do_not_meet(batch, tmp_path):
    for name in ("scan.png", "scan.jpg", "other.png"):
        (tmp_path / name).touch()
    jobs = batch.find_jobs(tmp_path, batch.Workflow(enlarge()))
    assert [job.base for job in jobs] == ["other", "scan.jpg", "scan.png"]


def test_the_file_in_the_workflow_does_not_matter_but_its_settings_do(batch):
    first, second, third = enlarge(), enlarge(), enlarge(100)
    second["1"]["inputs"]["image"] = "another.png"
    digests = [batch.Workflow(graph).digest for graph in (first, second, third)]
    assert digests[0] == digests[1] != digests[2]
