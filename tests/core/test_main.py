"""The command line: what it writes, what it says when it refuses, and how it stops."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from seedvr2_core import __main__ as command
from seedvr2_core.__main__ import Bar, main
from seedvr2_core.checkpoints.folders import NANO_DIT, NANO_VAE, pick
from seedvr2_core.errors import CheckpointError
from seedvr2_core.models.dit import SEEDVR2_3B, SEEDVR2_7B, DiT
from seedvr2_core.models.vae import SEEDVR2_VAE, VideoVAE
from seedvr2_core.video.files import probe

ROOT = Path(__file__).parent.parent.parent
# What a machine may take to notice a signal, in seconds; two when it is idle.
PATIENCE = 5


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Iterator[Path]:
    """A machine without models; and signals as they were."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # Whoever runs tests in the background may have them ignore Ctrl-C, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield tmp_path / "home"
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def tiny(runnable_files) -> list[str]:
    """Arguments that choose the tiny models."""
    dit, vae = runnable_files
    return ["--model", str(dit), "--vae", str(vae), "--device", "cpu", "--dtype", "fp32"]


def picture(path: Path, height: int = 12, width: int = 20) -> Path:
    y, x = np.mgrid[:height, :width]
    Image.fromarray(np.stack([x * 9 % 256, y * 14 % 256, (x + y) * 5 % 256], axis=-1).astype(np.uint8)).save(path)
    return path


def video(path: Path, frames: int) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for i in range(frames):
            picture = np.full((32, 32, 3), i % 256, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode(None))
    return path


def sentence(text: str) -> str:
    """The one line that a refusal is."""
    assert text.count("\n") == 1 and text.endswith("\n"), text
    assert text.startswith("seedvr2: ")
    return text


# --- restore ---------------------------------------------------------------------------------------------------------


def test_a_video_is_restored_and_reported(tiny, tmp_path):
    src, dst, log = video(tmp_path / "in.mp4", 10), tmp_path / "out.mp4", tmp_path / "run.json"
    assert main(["restore", str(src), str(dst), *tiny, "--scale", "1.5", "--chunk", "9", "--memory-limit", "2G",
                 "--json", str(log)]) == 0
    before, after = probe(src), probe(dst)
    assert (after.width, after.height, after.frames, after.duration) == (48, 48, 10, before.duration)
    report = json.loads(log.read_text())
    assert report.pop("seconds") > 0
    assert report.pop("peak_resident_bytes") > 1 << 20
    assert report == {
        "source": str(src),
        "destination": str(dst),
        "model": "tiny",
        "frames": 10,
        "resumed": 0,
        "width": 48,
        "height": 48,
        "chunk": 9,
        "settings": {
            "target": "scale 1.5",
            "color": "lab",
            "seed": 0,
            "steps": 1,
            "cfg": 1.0,
            "condition_noise": None,
            "strength": 1.0,
            "windows": None,
            "attention": "auto",
            "chunk": 9,
            "one_shot": False,
            "memory_limit": 2 << 30,
        },
        "device": "cpu",
        "torch": torch.__version__,
    }


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ([], (24, 40)),
        (["--scale", "0.5"], (6, 10)),
        (["--short-side", "18"], (18, 30)),
        (["--long-side", "30"], (18, 30)),
        (["--megapixels", "0.001"], (24, 41)),
        (["--size", "17x33"], (33, 17)),
        (["--same"], (12, 20)),
    ],
    ids=str,
)
def test_an_image_comes_out_in_the_size_asked_for(tiny, tmp_path, size, expected):
    src, dst = picture(tmp_path / "in.png"), tmp_path / "out.png"
    assert main(["restore", str(src), str(dst), *tiny, *size]) == 0
    assert Image.open(dst).size == expected[::-1]


def test_the_same_seed_gives_the_same_bytes(tiny, tmp_path):
    src = picture(tmp_path / "in.png")
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert main(["restore", str(src), str(tmp_path / f"{name}.png"), *tiny, "--color", "none", "--seed", seed]) == 0
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c


def test_a_folder_becomes_a_video_at_the_rate_given(tiny, tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(3):
        picture(tmp_path / "in" / f"{i}.png")
    dst = tmp_path / "out.mkv"
    assert main(["restore", str(tmp_path / "in"), str(dst), *tiny, "--same", "--fps", "24000/1001"]) == 0
    assert (probe(dst).frames, probe(dst).fps) == (3, Fraction(24000, 1001))


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path) -> Path:
    """Pictures that have nothing to do with each other, nor all one size."""
    (tmp_path / "photos").mkdir()
    for name, height in (("ann.png", 12), ("bob.png", 20), ("eve.jpg", 12)):
        picture(tmp_path / "photos" / name, height)
    return tmp_path / "photos"


def test_separate_pictures_are_restored_each_by_itself(tiny, photos, tmp_path, caplog):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with caplog.at_level("INFO"):
        assert main(["restore", str(photos), str(tmp_path / "out"), *tiny]) == 0
    assert caplog.messages[0] == (
        f"{photos}: 3 separate pictures, because their names are not one numbered sequence; --clip if they are frames"
    )
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"ann.png", "bob.png", "eve.jpg", "mine.txt"}
    for name in ("ann.png", "bob.png", "eve.jpg"):
        assert main(["restore", str(photos / name), str(tmp_path / name), *tiny]) == 0
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_pictures_that_an_interrupted_run_has_finished_are_left_alone(tiny, photos, tmp_path, monkeypatch, caplog):
    out, restore = tmp_path / "out", command.restore_file

    def until_eve(source: Path, *others: object) -> object:
        if source.name == "eve.jpg":
            raise KeyboardInterrupt
        return restore(source, *others)

    def run(*options: str, stops: bool = False) -> dict[str, int]:
        """Restore all; when each file was written."""
        monkeypatch.setattr(command, "restore_file", until_eve if stops else restore)
        assert main(["restore", str(photos), str(out), *tiny, *options]) == (130 if stops else 0)
        return {path.name: path.stat().st_mtime_ns for path in out.iterdir()}

    begun = run(stops=True)
    assert begun.keys() == {"ann.png", "bob.png", ".pictures.resume"}
    with caplog.at_level("INFO"):
        done = run()
    assert done.keys() == {"ann.png", "bob.png", "eve.jpg"} and done["ann.png"] == begun["ann.png"]
    assert caplog.messages[-1] == "2 pictures had been restored by a run that was interrupted"
    again = run(stops=True)
    assert again["ann.png"] > done["ann.png"]  # nothing had been interrupted
    other = run("--seed", "1", stops=True)
    assert other["ann.png"] > again["ann.png"]  # it makes other pictures
    assert run()["ann.png"] > other["ann.png"]  # which are not those


def test_what_is_finished_is_known_after_another_picture_has_failed(tiny, photos, tmp_path, capsys):
    good = (photos / "bob.png").read_bytes()
    (photos / "bob.png").write_bytes(b"no picture")
    arguments = ["restore", str(photos), str(tmp_path / "out"), *tiny]
    for _ in range(2):
        assert main(arguments) == 1
        assert "1 of 3 pictures could not be restored (bob.png), for the reasons above; the" in capsys.readouterr().err
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.*g")}
    (photos / "bob.png").write_bytes(good)
    assert main(arguments) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"ann.png", "bob.png", "eve.jpg"}
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == time for name, time in times.items())


def test_a_picture_that_cannot_be_read_does_not_keep_others_from_being_restored(tiny, photos, tmp_path, capsys):
    (photos / "bob.png").write_bytes(b"no picture")
    report = tmp_path / "run.json"
    assert main(["restore", str(photos), str(tmp_path / "out"), *tiny, "--json", str(report)]) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("seedvr2: ")]
    assert "bob.png is not a readable image" in said[0]
    assert "1 of 3 pictures could not be restored (bob.png)" in said[1]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"ann.png", "eve.jpg", ".pictures.resume"}
    rows = json.loads(report.read_text())
    assert [Path(row["source"]).name for row in rows["pictures"]] == ["ann.png", "eve.jpg"]
    assert list(rows["failed"]) == ["bob.png"] and rows["finished_before"] == 0


def test_numbered_images_are_frames_unless_told_otherwise(tiny, tmp_path, caplog):
    (tmp_path / "in").mkdir()
    for number in (1, 2, 4):
        picture(tmp_path / "in" / f"IMG_{number:04d}.png")
    for kind, line in (
        ([], "3 frames of a clip; 1 number missing between them, the first is 3; --pictures if they are separate"),
        (["--pictures"], "3 separate pictures"),
        (["--clip"], "3 frames of a clip; 1 number missing between them, the first is 3"),
    ):
        caplog.clear()
        with caplog.at_level("INFO"):
            assert main(["restore", str(tmp_path / "in"), str(tmp_path / f"out{kind}"), *tiny, *kind]) == 0
        assert caplog.messages[0] == f"{tmp_path / 'in'}: {line}"
    frame = [(tmp_path / f"out{kind}" / "IMG_0004.png").read_bytes() for kind in ([], ["--clip"], ["--pictures"])]
    assert frame[0] == frame[1] != frame[2]


def test_a_file_goes_into_a_folder_under_its_own_name(tiny, tmp_path, caplog):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "clip.mp4").write_bytes(b"old")
    (tmp_path / "out" / ".gone.partial.mp4").touch()
    (tmp_path / "out" / ".gone.mp4.resume" / "01234567").mkdir(parents=True)
    (tmp_path / "out" / ".gone.mp4.resume" / "01234567" / "state").touch()
    for path in (tmp_path / "out").glob(".gone*"):
        os.utime(path, (0, 0))
    for source in (picture(tmp_path / "in.png"), video(tmp_path / "clip.mp4", 2), video(tmp_path / "tape.avi", 2)):
        with caplog.at_level("INFO"):
            assert main(["restore", str(source), str(tmp_path / "out"), *tiny, "--same"]) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"in.png", "clip.mp4", "tape.mkv", ".gone.partial.mp4", ".gone.mp4.resume"}
    assert probe(tmp_path / "out" / "clip.mp4").frames == 2
    assert sum(message.endswith("in place of the file that was there") for message in caplog.messages) == 1
    assert ".gone.partial.mp4 seems to be left by a run that was killed" in caplog.text
    assert ".gone.mp4.resume holds what an interrupted run has restored; begin it again" in caplog.text


# --- the bar ---------------------------------------------------------------------------------------------------------


def test_the_bar_ends_with_the_frames_there_were_and_fills_no_log(capsys):
    with Bar() as bar:
        for stage in ("encode", "decode"):
            for done in range(300):
                bar(stage, done / 30, 13)
        bar.finish(9)
    written = capsys.readouterr().err
    assert written.endswith("9/9 frames\n") and "100%" in written
    assert written.count("\r") < 5


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["missing.mp4", "out.mp4"], "missing.mp4 does not exist"),
        (["notes.txt", "out.mp4"], "ends in none of"),
        (["text.mp4", "out.mp4"], "not a video"),
        (["empty", "out.mp4"], "holds no images"),
        (["in.png", "out.xyz"], "ends in none of"),
        (["in.png", "in.png"], "is the file being read"),
        (["in.png", "no/out.png"], "make it first"),
        (["in.png", "out.png", "--scale", "-1"], "above zero"),
        (["in.png", "out.png", "--size", "99999x9"], "beyond the limit"),
        (["in.png", "out.png", "--steps", "0"], "steps is 0"),
        (["in.png", "out.png", "--cfg", "nan"], "cfg is nan"),
        (["in.png", "out.png", "--chunk", "4"], "4 frames is too short"),
        (["in.png", "out.png", "--memory-limit", "some"], "'some' is no amount of memory"),
        (["in.png", "out.png", "--memory-limit=-8G"], "'-8G' is no amount of memory"),
        (["in.png", "out.png", "--memory-limit", "0G"], "'0G' is no amount of memory"),
        (["in.png", "out.png", "--memory-limit", "8"], "a unit, such as 8G"),
        (["in.png", "out.png", "--memory-limit", "1K"], "of memory or more, of which 1 MiB may be used"),
        (["in.png", "plain"], "plain is a file without a suffix"),
        (["in.png", "out.png", "--scale", "9999"], "beyond the limit"),
        (["in.png", "out.png", "--size", "0x10"], "exact 0 x 10"),
        (["in.png", "out.png", "--json", "no/run.json"], "run.json cannot be written"),
        (["in.png", "out.png", "--json", "empty"], "empty cannot be written"),
        (["in.png", "out.png", "--size", "40000x40000"], "Restoring at 40000 x 40000 takes"),
        (["in.png", "out.png", "--device", "toaster"], "'toaster' cannot be used"),
        (["in.png", "out.png", "--attention", "flash_3"], "'flash_3' cannot run here"),
        (["in.png", "out.png", "--vae", "missing.pth"], "There is no file missing.pth"),
        (["in.png", "out.png", "--vae", "notes.txt"], "not a weights file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_sentence(tiny, tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "in.png")
    (tmp_path / "notes.txt").write_text("hello\n" * 100)
    (tmp_path / "text.mp4").write_text("hello\n" * 100)
    (tmp_path / "plain").write_text("hello\n")
    (tmp_path / "empty").mkdir()
    assert main(["restore", *arguments[:2], *tiny, *arguments[2:]]) == 1
    assert said in sentence(capsys.readouterr().err)
    assert {path.name for path in tmp_path.iterdir()} == {"in.png", "notes.txt", "text.mp4", "plain", "empty"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["clip.mp4", "no/out.mp4"], "make it first"),
        (["clip.mp4", "clip.mp4"], "is the file being read"),
        (["clip.mp4", "out.avi"], "ends in none of"),
        (["clip.mp4", "out.png"], "holds one picture"),
        (["clear.png", "out.jpg"], "cannot hold transparency"),
        (["clear.png", "out.mp4"], "cannot hold transparency"),
        (["numbered", "full"], "is not empty"),
        (["photos", "photos"], "is the folder being read"),
        (["photos", "no/out"], "make it first"),
        (["clear.png", "out.png", "--clip"], "clear.png is a file"),
        (["photos", "clear.png", "--pictures"], "go into a folder"),
        (["clip.mp4", "out.mp4", "--scale", "9999"], "beyond the limit"),
        (["clip.mp4", "out.mp4", "--json", "no/run.json"], "cannot be written"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_output_is_refused_before_models_are_loaded(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("seedvr2_core.__main__.load_models", lambda *_: pytest.fail("models were loaded"))
    video(tmp_path / "clip.mp4", 2)
    Image.new("RGBA", (8, 8)).save(tmp_path / "clear.png")
    for name in ("photos/ann.png", "photos/bob.png", "full/1.png", "numbered/1.png", "numbered/2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture(tmp_path / name)
    before = set(tmp_path.rglob("*"))
    assert main(["restore", *arguments]) == 1
    assert said in sentence(capsys.readouterr().err)
    assert set(tmp_path.rglob("*")) == before


def test_the_memory_that_a_refusal_asks_for_is_enough(tiny, tmp_path, capsys):
    command = ["restore", str(picture(tmp_path / "in.png")), str(tmp_path / "out.png"), *tiny, "--memory-limit"]
    assert main([*command, "1M"]) == 1
    needed = re.search(r"takes (\d+) MiB of memory or more", capsys.readouterr().err)[1]
    assert main([*command, f"{int(needed) - 2}M"]) == 1
    assert main([*command, f"{needed}M"]) == 0


def test_a_refusal_prints_nothing_else(tmp_path):
    (tmp_path / "text.mp4").write_text("hello\n" * 100)
    run = subprocess.run(
        [sys.executable, "-m", "seedvr2_core", "restore", tmp_path / "text.mp4", tmp_path / "out.mp4"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert (run.returncode, run.stdout) == (1, "")
    assert "not a video" in sentence(run.stderr)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["repair"],
        ["restore", "in.png"],
        ["restore", "in.png", "out.png", "--color", "sepia"],
        ["restore", "in.png", "out.png", "--size", "10by10"],
        ["restore", "in.png", "out.png", "--same", "--scale", "2"],
        ["restore", "in.png", "out.png", "--chunk", "some"],
        ["restore", "in.png", "out.png", "--fps", "1/0"],
        ["restore", "in.png", "out.png", "--fps", "-3"],
        ["restore", "in.png", "out.png", "--dtype", "int4"],
        ["info"],
        ["download", "everything"],
    ],
    ids=" ".join,
)
def test_wrong_arguments_exit_with_two(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: seedvr2" in capsys.readouterr().err


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert re.match(r"seedvr2 \S+", capsys.readouterr().out)


# --- info ------------------------------------------------------------------------------------------------------------


def test_info_describes_a_video(tmp_path, capsys):
    assert main(["info", str(video(tmp_path / "in.mp4", 3))]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert (lines["kind"], lines["width"], lines["frames"], lines["fps"]) == ("video", "32", "3", "25")


def test_info_gives_decimals_and_says_whether_a_folder_is_a_clip(tmp_path, photos, capsys):
    with av.open(str(tmp_path / "in.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(24000, 1001))
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for each in (av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8)), None):
            container.mux(stream.encode(each))
    assert main(["info", str(tmp_path / "in.mkv")]) == main(["info", str(photos)]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[1:])
    assert lines["fps"] == "23.976" and re.fullmatch(r"0\.04\d? s", lines["duration"])
    assert lines["kind"] == "folder of separate pictures" and lines["pictures"] == "3"


def test_info_describes_a_checkpoint(runnable_files, capsys):
    assert main(["info", str(runnable_files[0])]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["kind"] == "tiny"
    assert lines["prompts"] == "positive, negative"
    assert lines["loadable"] == "yes"


def test_info_is_cut_short_by_whoever_reads_it():
    read, write = os.pipe()
    os.close(read)
    run = subprocess.run([sys.executable, "-m", "seedvr2_core", "info", str(NANO_DIT)], cwd=ROOT, stdout=write,
                         stderr=subprocess.PIPE, text=True)  # fmt: skip
    os.close(write)
    assert (run.returncode, run.stderr) == (141, "")


@pytest.mark.parametrize("name", ["missing.mp4", "missing.safetensors", "text.mp4", "text.pth"])
def test_info_refuses_in_one_sentence(tmp_path, capsys, name):
    for path in (tmp_path / "text.mp4", tmp_path / "text.pth"):
        path.write_text("hello\n" * 100)
    assert main(["info", str(tmp_path / name)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and name in sentence(err)


# --- which model -----------------------------------------------------------------------------------------------------


def published(path: Path, build: type[nn.Module], config: object) -> Path:
    """A file of the shapes of a published model, all zeros that take no room on the disk."""
    with torch.device("meta"):
        tensors = build(config).state_dict()
    header, end = {}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [end, end + 2 * tensor.numel()]}
        end += 2 * tensor.numel()
    data = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(data).to_bytes(8, "little") + data)
        file.truncate(8 + len(data) + end)
    return path


@pytest.fixture
def cache(home) -> Path:
    return home / ".cache" / "seedvr2"


def test_without_any_model_nano_is_used_and_that_is_said(caplog):
    with caplog.at_level("INFO"):
        assert pick() == (NANO_DIT, NANO_VAE)
    assert "nano is used" in caplog.text and "seedvr2 download" in caplog.text


def test_the_largest_published_model_is_used_and_that_is_said(cache, caplog):
    published(cache / "a.safetensors", DiT, SEEDVR2_3B)
    large = published(cache / "b.safetensors", DiT, SEEDVR2_7B)
    vae = published(cache / "c.safetensors", VideoVAE, SEEDVR2_VAE)
    with caplog.at_level("INFO"):
        assert pick() == (large, vae)
    assert "SeedVR2 7B" in caplog.text
    assert pick("3b") == (cache / "a.safetensors", vae)
    assert pick("nano") == (NANO_DIT, NANO_VAE)


def test_a_multi_step_model_is_used_only_by_its_file(cache):
    older = published(cache / "seedvr_ema_3b.pth", DiT, SEEDVR2_3B)
    vae = published(cache / "vae.safetensors", VideoVAE, SEEDVR2_VAE)
    assert pick() == (NANO_DIT, NANO_VAE)
    assert pick(str(older)) == (older, vae)
    with pytest.raises(CheckpointError, match="No 3b model"):
        pick("3b")


def test_a_published_model_without_its_autoencoder_is_passed_over_aloud(cache, caplog):
    small = published(cache / "a.safetensors", DiT, SEEDVR2_3B)
    with caplog.at_level("INFO"):
        assert pick() == (NANO_DIT, NANO_VAE)
    assert "no autoencoder for a.safetensors" in caplog.text
    with pytest.raises(CheckpointError, match="seedvr2 download vae"):
        pick("3b")
    assert pick("3b", Path("mine.pth")) == (small, Path("mine.pth"))


def test_autoencoders_have_names_too_and_a_fine_tuned_nano_has_that_of_nano(cache, tmp_path):
    mine = tmp_path / "mine.safetensors"
    mine.write_bytes(NANO_DIT.read_bytes())
    assert pick(str(mine)) == pick(str(mine), "nano") == (mine, NANO_VAE)
    with pytest.raises(CheckpointError, match=r"no autoencoder for 3b.*seedvr2 download vae"):
        pick(str(mine), "3b")
    usual = published(cache / "vae.safetensors", VideoVAE, SEEDVR2_VAE)
    assert pick(str(mine), "3b") == (mine, usual)


def test_the_autoencoder_beside_a_model_comes_before_the_published_one(cache, tmp_path, runnable_files):
    published(cache / "vae.safetensors", VideoVAE, SEEDVR2_VAE)
    assert pick(str(runnable_files[0])) == runnable_files
    elsewhere = tmp_path / "elsewhere" / "dit.safetensors"
    elsewhere.parent.mkdir()
    elsewhere.write_bytes(runnable_files[0].read_bytes())
    assert pick(str(elsewhere)) == (elsewhere, cache / "vae.safetensors")


@pytest.mark.parametrize("model", ["3b", "7b", "mine.safetensors"])
def test_a_model_that_is_not_there_tells_how_to_get_one(tmp_path, capsys, model):
    assert main(["restore", str(picture(tmp_path / "in.png")), str(tmp_path / "out.png"), "--model", model]) == 1
    line = sentence(capsys.readouterr().err)
    assert model in line and "seedvr2 download" in line


# --- stopping --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
def test_an_interrupt_stops_soon_and_leaves_nothing(tiny, tmp_path):
    """Ctrl-C and a polite kill in the middle of the work, in two processes at once to save time."""
    src, folder = video(tmp_path / "in.mp4", 800), tmp_path / "out"
    folder.mkdir()
    (folder / "SIGINT.mp4").write_bytes(b"old")
    runs = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        dst = folder / f"{number.name}.mp4"
        runs[number] = subprocess.Popen(
            [sys.executable, "-m", "seedvr2_core", "restore", src, dst, *tiny, "--chunk", "9"],
            cwd=ROOT, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    try:
        for number, run in runs.items():
            # Before models are loaded it is there for a moment, to see whether it can be.
            seen = 0
            while seen < 10 and run.poll() is None:
                seen = seen + 1 if (folder / f".{number.name}.partial.mp4").exists() else 0
                time.sleep(0.03)
        sent = time.monotonic()
        for number, run in runs.items():
            run.send_signal(number)
        for run in runs.values():
            _, errors = run.communicate(timeout=60)
            assert time.monotonic() - sent < PATIENCE
            assert run.returncode == 130
            assert "Traceback" not in errors and errors.endswith("interrupted; what was there before is untouched.\n")
    finally:
        for run in runs.values():
            run.kill()
    assert [path.name for path in folder.iterdir()] == ["SIGINT.mp4"]
    assert (folder / "SIGINT.mp4").read_bytes() == b"old"
