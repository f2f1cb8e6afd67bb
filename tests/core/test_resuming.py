"""A run that was interrupted goes on where it was, and nobody sees it in the result."""

from __future__ import annotations

import errno
import io
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import zlib
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from seedvr2_core import journal
from seedvr2_core.errors import Cancelled, MediaError
from seedvr2_core.life import Waypoint
from seedvr2_core.loading import Models
from seedvr2_core.memory.stages import reach
from seedvr2_core.pipeline import restored
from seedvr2_core.planning import plan_clip
from seedvr2_core.settings import Settings
from seedvr2_core.video.encoders import ENCODERS
from seedvr2_core.video.files import open_reader, open_writer, probe
from seedvr2_core.video.geometry import Target
from seedvr2_core.video.keep import HEADER, Keep, PacketLog, packets_of
from seedvr2_core.video.media import Moment
from seedvr2_core.video.shots import AROUND
from seedvr2_core.whole_files import check_file, restore_file
from tests.core.conftest import RUNNABLE_VAE, clip
from tests.core.test_whole_files import MEDIA, sound

SETTINGS = Settings(target=Target.exact(20, 28), color="lab", chunk=13)
LARGER = Target.exact(48, 64)
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def saved_at_once(monkeypatch):
    monkeypatch.setattr(journal, "SAVE_EVERY", 0.0)
    # Of tiny frames x264 makes now this, now that otherwise, where the processor has AVX-512.
    monkeypatch.setitem(ENCODERS["h264"].options, "mbtree", "0")


# --- from a place amid a clip ----------------------------------------------------------------------------------------


def film() -> torch.Tensor:
    """Two shots, T H W 3, the second so long that its beginning has no influence on its end."""
    return torch.cat([clip(10, 16, 16), clip(260, 16, 16).flip(2) ** 3])


@pytest.fixture(scope="module")
def whole(runnable) -> list[tuple[torch.Tensor, Waypoint]]:
    """Every frame of the film and the place behind it."""
    return list(_restored(runnable, film(), None))


def _restored(models: Models, frames: torch.Tensor, start: Waypoint | None, calls: list | None = None):
    settings, size = Settings(target=Target.same(), color="lab", chunk=13), frames.shape[1:3]

    def note(stage: str, done: float, total: int | None) -> None:
        if calls is not None:
            calls.append((stage, done, total))

    plan = plan_clip(models, settings, size, len(frames))
    return restored(frames, models, settings, size, len(frames), note, plan, start)


@pytest.mark.parametrize("at", [1, 143, 270])
def test_what_follows_a_place_is_the_same_to_the_bit(runnable, whole, at):
    calls: list[tuple] = []
    rest = list(_restored(runnable, film(), whole[at - 1][1], calls))
    assert len(rest) == len(whole) - at
    for (frame, place), (wanted, wanted_place) in zip(rest, whole[at:], strict=True):
        assert torch.equal(frame, wanted)
        assert place.frames == wanted_place.frames and place.shot == wanted_place.shot
    done = [done for stage, done, _ in calls if stage == "decode"]
    assert done[-1] == len(whole) and {total for *_, total in calls} == {len(whole)}


def test_only_what_the_rest_depends_on_is_computed_again(runnable, whole, monkeypatch):
    counts = dict.fromkeys(("encode_slice", "forward", "decode_slice"), 0)

    def counted(owner: type, name: str):
        plain = getattr(owner, name)

        def call(*arguments, **named):
            counts[name] += 1
            return plain(*arguments, **named)

        monkeypatch.setattr(owner, name, call)

    rest = _restored(runnable, film(), whole[269][1])  # planning, which tries them too, is over
    counted(type(runnable.vae), "encode_slice")
    counted(type(runnable.vae), "decode_slice")
    counted(type(runnable.dit), "forward")
    assert list(rest) == []
    encoder, decoder = reach(RUNNABLE_VAE)
    # The second shot has 66 latents, of which the last begins with the frame that is asked for. A pass has 4 latents,
    # of which neighbours share 2. The first piece that is encoded has 2.
    assert counts["decode_slice"] == decoder + 2
    assert counts["encode_slice"] == decoder + 2 + 4 + encoder + 1
    assert counts["forward"] == math.ceil(counts["decode_slice"] / 2)


def test_passing_by_what_is_done_can_be_cancelled(runnable, whole):
    read = []

    def frames():
        for frame in film():
            read.append(frame)
            yield frame

    def stop(*_: object) -> None:
        raise Cancelled("Stopped.")

    plan = plan_clip(runnable, SETTINGS, (16, 16), len(whole))
    with pytest.raises(Cancelled):
        list(restored(frames(), runnable, SETTINGS, (16, 16), len(whole), stop, plan, whole[100][1]))
    assert len(read) <= 1 + AROUND


# --- files -----------------------------------------------------------------------------------------------------------


def source(path: Path, frames: int = 40, bits: int = 8) -> Path:
    """A video that never repeats itself, with a cut."""
    form = "yuv420p" if bits == 8 else "yuv420p10le"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 32, 24, form
        pixels = (clip(frames).flip(2) * 255).round().to(torch.uint8).numpy()
        pixels[frames // 3 :] = 255 - pixels[frames // 3 :]
        for frame in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24")))
        container.mux(stream.encode(None))
    return path


def images(folder: Path, alpha: bool = False) -> Path:
    folder.mkdir()
    info = probe(source(folder.parent / "images.mp4", 24))
    frames = clip(24, channels=4 if alpha else 3)
    with open_writer(folder / "all", info, width=32, height=24, alpha=alpha) as out:
        out.write(frames, [Moment(Fraction(n, 25), Fraction(1, 25)) for n in range(24)])
    return folder / "all"


def stopping(at: int):
    """An `on_frame` that interrupts when so many frames are done."""
    seen = []

    def on_frame(frame: torch.Tensor) -> None:
        seen.append(frame)
        if len(seen) > at:
            raise Cancelled("Stopped.")

    return on_frame


def interrupted(src: Path, dst: Path, models: Models, settings: Settings, at: int) -> int:
    """Interrupt a run; how many frames were kept."""
    with pytest.raises(Cancelled):
        restore_file(src, dst, models, settings, on_frame=stopping(at))
    assert not dst.exists()
    return kept_of(left(dst)[0])


def kept_of(folder: Path) -> int:
    """How many frames a journal has kept."""
    data = (folder / "state").read_bytes()[journal.CHECKSUM :]
    return torch.load(io.BytesIO(data), weights_only=True)["keep"]["frames"]


def left(dst: Path) -> list[Path]:
    """Journals of interrupted runs, and what else they have left."""
    others = [path for path in dst.parent.iterdir() if path.name.startswith(f".{dst.stem}.partial")]
    return others + sorted(path for path in dst.parent.glob(f".{dst.name}.resume/*") if path.is_dir())


def frames_of(path: Path) -> torch.Tensor:
    with open_reader(probe(path)) as reader:
        return torch.stack([frame.floats() for frame in reader])


def times_of(path: Path) -> list[Moment]:
    with open_reader(probe(path)) as reader:
        return [frame.time for frame in reader]


@pytest.mark.parametrize(
    ("kind", "suffix", "exactly"),
    [
        ("8 bits", ".mp4", False),
        ("8 bits", ".mkv", False),
        ("8 bits", ".webm", False),
        ("10 bits", ".mov", False),
        ("images", ".mp4", False),
        ("images", "", True),
        ("transparent", ".mkv", True),
        ("transparent", ".mov", False),
        ("sound", ".mp4", False),
    ],
)
def test_a_file_is_completed_by_a_second_run(runnable, transparent, tmp_path, monkeypatch, kind, suffix, exactly):
    # What a lossy encoder makes of noise depends on where it begins.
    models, settings = (runnable, SETTINGS) if exactly else (transparent, replace(SETTINGS, target=LARGER))
    if kind in ("images", "sound"):  # short ones, of which it would hold back all
        monkeypatch.setitem(ENCODERS["h264"].options, "rc-lookahead", "2")
    match kind:
        case "images" | "transparent":
            src = images(tmp_path / "in", kind == "transparent")
        case "sound":
            src = MEDIA / "stream.mp4"
        case _:
            src = source(tmp_path / "in.mp4", 75, bits=int(kind.split()[0]))
    frames = probe(src).frames
    dst, whole = tmp_path / f"out{suffix}", tmp_path / f"whole{suffix}"
    restore_file(src, whole, models, settings)
    restore_file(src, tmp_path / "pixels", models, settings)
    kept = interrupted(src, dst, models, settings, at=frames - 5)
    report = restore_file(src, dst, models, settings)
    assert 0 < report.resumed == kept <= frames - 4 and report.frames == frames
    assert times_of(dst) == times_of(whole)
    if exactly:
        assert torch.equal(frames_of(dst), frames_of(whole))
    else:
        # The same packets as far as they were kept, and as near to what was encoded in all that follows.
        lossless = frames_of(tmp_path / "pixels")
        kept, resumed = frames_of(whole), frames_of(dst)
        assert torch.equal(resumed[: report.resumed], kept[: report.resumed])
        errors = [(clip - lossless)[report.resumed :].abs().mean() for clip in (resumed, kept)]
        assert errors[0] < 1.3 * errors[1] < 0.03
    assert not left(dst)
    if suffix:
        assert sound(dst) == sound(whole)
        if kind == "sound":
            assert sound(dst) == sound(src) and len(sound(src)) > 10


def test_times_that_vary_stay_exact(sample, transparent, tmp_path, monkeypatch):
    monkeypatch.setitem(ENCODERS["h264"].options, "rc-lookahead", "2")
    src = sample("lq/clips/shaky_vfr_rot180_1280x720_audio.mp4")
    settings = replace(SETTINGS, target=Target.exact(16, 28), color="none")
    interrupted(src, tmp_path / "out.mp4", transparent, settings, at=probe(src).frames - 10)
    report = restore_file(src, tmp_path / "out.mp4", transparent, settings)
    assert report.resumed > 0
    with open_reader(probe(src)) as old, open_reader(probe(tmp_path / "out.mp4")) as new:
        assert [frame.time.start for frame in old] == [frame.time.start for frame in new]
    assert sound(tmp_path / "out.mp4") == sound(src)


def test_what_can_be_read_of_a_damaged_source_is_completed_too(transparent, tmp_path, monkeypatch):
    monkeypatch.setitem(ENCODERS["h264"].options, "rc-lookahead", "2")
    src, dst, settings = tmp_path / "in.mp4", tmp_path / "out.mp4", replace(SETTINGS, target=LARGER)
    src.write_bytes((MEDIA / "stream.mp4").read_bytes()[:-20000])
    dst.write_bytes(b"old")
    with pytest.raises(MediaError, match=r"\d+ of 33 frames were restored and are in .*out\.partial\.mp4"):
        restore_file(src, dst, transparent, settings)
    whole = (tmp_path / "out.partial.mp4").rename(tmp_path / "whole.mp4")
    good = len(times_of(whole))
    with pytest.raises(Cancelled):
        restore_file(src, dst, transparent, settings, on_frame=stopping(good - 3))
    assert kept_of(left(dst)[0]) > 0 and dst.read_bytes() == b"old"
    with pytest.raises(MediaError, match=rf"; {good} of 33 frames were restored and are in .*out\.partial\.mp4"):
        restore_file(src, dst, transparent, settings)
    landed = tmp_path / "out.partial.mp4"
    assert times_of(landed) == times_of(whole) and sound(landed) == sound(whole) and sound(whole)
    assert {path.name for path in tmp_path.iterdir()} == {"in.mp4", "out.mp4", "out.partial.mp4", "whole.mp4"}
    assert dst.read_bytes() == b"old"


def test_several_interruptions_are_no_worse_than_one(runnable, tmp_path):
    src, dst = images(tmp_path / "in"), tmp_path / "out"
    restore_file(src, tmp_path / "whole", runnable, SETTINGS)
    kept = []
    for at in (5, 5, 5):
        with pytest.raises(Cancelled):
            restore_file(src, dst, runnable, SETTINGS, on_frame=stopping(at))
        kept.append(kept_of(left(dst)[0]))
    assert kept[0] < kept[1] < kept[2]
    assert restore_file(src, dst, runnable, SETTINGS).resumed == kept[2]
    assert torch.equal(frames_of(dst), frames_of(tmp_path / "whole"))


KILLED = """
import os, signal, sys, torch
from seedvr2_core import journal, load_models, restore_file, pick, Settings, Target
from seedvr2_core.video.encoders import ENCODERS
journal.SAVE_EVERY = 0.0
ENCODERS["h264"].options.update({"mbtree": "0", "rc-lookahead": "2"})  # the clip is short
seen = []
def on_frame(frame):
    seen.append(frame)
    if len(seen) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
models = load_models(*pick("nano"), torch.device("cpu"), torch.float32)
print(restore_file(sys.argv[1], sys.argv[2], models, Settings(target=Target.exact(48, 64)), on_frame=on_frame).resumed)
"""


def test_a_process_that_is_killed_loses_only_what_the_encoder_holds_back(tmp_path):
    def run(dst: Path, dies_at: int) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", KILLED, str(MEDIA / "stream.mp4"), str(dst), str(dies_at)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    src, dst = MEDIA / "stream.mp4", tmp_path / "out.mp4"
    assert run(dst, 30).returncode == -signal.SIGKILL and not dst.exists()
    kept = kept_of(left(dst)[-1])
    assert run(dst, 0).stdout == f"{kept}\n" and 10 < kept < 30
    assert times_of(dst) == times_of(src) and sound(dst) == sound(src)
    # Nor is there the file any more into which the first was writing.
    assert {path.name for path in tmp_path.iterdir()} == {"out.mp4"}


# --- what is not gone on with ----------------------------------------------------------------------------------------


@pytest.fixture
def broken_off(runnable, tmp_path) -> tuple[Path, Path]:
    """A source, and the destination of a run that was interrupted."""
    src = images(tmp_path / "in")
    interrupted(src, tmp_path / "out", runnable, SETTINGS, at=15)
    return src, tmp_path / "out"


@pytest.mark.parametrize("change", [{"seed": 1}, {"strength": 0.5}, {"chunk": 17}, {"target": Target.exact(24, 28)}])
def test_a_run_with_other_settings_begins_anew_and_ends_the_matter(runnable, broken_off, change):
    src, dst = broken_off
    assert restore_file(src, dst, runnable, replace(SETTINGS, **change)).resumed == 0
    assert not left(dst)


def test_where_and_in_how_much_memory_it_computes_may_change(runnable, broken_off):
    src, dst = broken_off
    settings = replace(SETTINGS, memory_limit=1 << 30, attention="sdpa")
    assert restore_file(src, dst, runnable, settings).resumed > 0


def test_another_source_or_model_begins_anew(runnable, broken_off, tmp_path):
    src, dst = broken_off
    (tmp_path / "weights").write_text("of a model")
    assert restore_file(src, tmp_path / "out", replace(runnable, files=(tmp_path / "weights",)), SETTINGS).resumed == 0
    shutil.rmtree(dst)
    interrupted(src, dst, runnable, SETTINGS, at=15)
    first = sorted(src.iterdir())[0]
    first.write_bytes(sorted(src.iterdir())[1].read_bytes())
    assert restore_file(src, dst, runnable, SETTINGS).resumed == 0


@pytest.mark.parametrize("damage", ["state", "code", "missing", "empty", "packets"])
def test_what_is_damaged_is_told_and_begun_anew(runnable, broken_off, tmp_path, caplog, monkeypatch, damage):
    src, dst = broken_off
    if damage == "packets":
        monkeypatch.setitem(ENCODERS["h264"].options, "rc-lookahead", "2")
        dst = tmp_path / "out.mp4"
        interrupted(src, dst, runnable, SETTINGS, at=22)
    (folder,) = left(dst)
    match damage:
        case "state":
            (folder / "state").write_bytes((folder / "state").read_bytes()[:100])
        case "code":
            write_state(folder, {"keep": Harmful()})
        case "missing":
            sorted((folder / "images").iterdir())[0].unlink()
        case "empty":  # as when power ends
            sorted((folder / "images").iterdir())[3].write_bytes(b"")
        case "packets":
            with (folder / "packets").open("r+b") as file:
                file.seek(HEADER.size + 10)
                file.write(b"not what it was")
    assert restore_file(src, dst, runnable, SETTINGS).resumed == 0
    assert "beginning anew" in caplog.text and not left(dst) and not Harmful.done
    assert probe(dst).frames == probe(src).frames


def write_state(folder: Path, state: object) -> None:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    checksum = zlib.crc32(buffer.getvalue()).to_bytes(journal.CHECKSUM, "big")
    (folder / "state").write_bytes(checksum + buffer.getvalue())


@pytest.mark.parametrize(
    ("of", "change"),
    [
        ("waypoint", {"frames": 10**12}),
        ("waypoint", {"frames": "many"}),
        ("waypoint", {"shot": -1}),
        ("waypoint", {"shot": 10**6}),
        ("waypoint", {"length": 2}),
        ("waypoint", {"color": None}),
        ("waypoint", {"more": 1}),
        ("keep", {"frames": 3}),
        ("keep", {"bytes": -1}),
        ("keep", {"checksum": "none"}),
        ("keep", {"folder": "/"}),
    ],
)
def test_a_state_that_makes_no_sense_is_told_and_begun_anew(broken_off, caplog, of, change):
    (folder,) = left(broken_off[1])
    state = torch.load(io.BytesIO((folder / "state").read_bytes()[journal.CHECKSUM :]), weights_only=True)
    write_state(folder, state)
    assert journal.Journal(folder, torch.device("cpu")).start
    state[of] |= change
    write_state(folder, state)
    book = journal.Journal(folder, torch.device("cpu"))
    assert book.start is None and book.keep.frames == 0 and "beginning anew" in caplog.text


def test_whatever_byte_of_a_state_is_damaged_it_is_begun_anew(broken_off):
    (folder,) = left(broken_off[1])
    whole, chance = (folder / "state").read_bytes(), random.Random(0)
    for _ in range(60):
        data = bytearray(whole)
        data[chance.randrange(len(data))] ^= chance.randrange(1, 256)
        (folder / "state").write_bytes(data)
        assert journal.Journal(folder, torch.device("cpu")).start is None


class Harmful:
    done: list[str] = []  # noqa: RUF012

    def __reduce__(self):
        return Harmful.done.append, ("executed",)


@pytest.mark.parametrize("name", ["out.mp4", "out"])
def test_two_runs_do_not_write_one_file(transparent, tmp_path, name):
    """Whatever their settings; and the first does not notice that there was a second."""
    src, dst, refusals = images(tmp_path / "in"), tmp_path / name, []

    def meanwhile(frame: torch.Tensor) -> None:
        for settings in (SETTINGS, replace(SETTINGS, seed=1)):
            for begin, models in ((check_file, ()), (restore_file, (transparent,))):
                with pytest.raises(MediaError, match="is being written by another process") as caught:
                    begin(src, dst, *models, settings)
                refusals.append(caught)

    report = restore_file(src, dst, transparent, SETTINGS, on_frame=meanwhile)
    assert report.frames == probe(dst).frames == len(frames_of(dst)) == len(refusals) / 4
    assert {path.name for path in tmp_path.iterdir()} == {"in", "images.mp4", name}


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError("no flock here")])
def test_a_folder_that_cannot_be_locked_is_written_to(runnable, tmp_path, monkeypatch, error):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(journal.FileLock, "acquire", fail)
    assert restore_file(images(tmp_path / "in"), tmp_path / "out", runnable, SETTINGS).frames == 24
    assert not list(tmp_path.glob(".out*"))


def test_a_run_for_another_file_of_nearly_the_same_name_is_left_alone(runnable, broken_off, tmp_path):
    src, _ = broken_off
    with pytest.raises(Cancelled):
        restore_file(src, tmp_path / "out.webm", runnable, SETTINGS, on_frame=stopping(20))
    (tmp_path / ".out.mp4.resume" / "01234567").mkdir(parents=True)
    restore_file(src, tmp_path / "out", runnable, SETTINGS)
    assert left(tmp_path / "out.mp4") and not left(tmp_path / "out")


@pytest.mark.parametrize("name", ["out.mkv", "out"])
def test_a_disk_that_fills_up_while_a_place_is_written_down_is_one_sentence(runnable, tmp_path, monkeypatch, name):
    """And what was kept before still is."""
    src, dst, plain, calls = images(tmp_path / "in", alpha=True), tmp_path / name, os.replace, []

    def full(new: Path, old: Path) -> None:
        calls.append(new)
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(new, old)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(MediaError, match=rf"{name} could not be written \(No space left on device\)"):
        restore_file(src, dst, runnable, SETTINGS)
    monkeypatch.undo()
    assert restore_file(src, dst, runnable, SETTINGS).resumed == 3


def test_a_short_run_leaves_nothing(runnable, tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "SAVE_EVERY", 10.0)
    src = images(tmp_path / "in")
    with pytest.raises(Cancelled):
        restore_file(src, tmp_path / "out", runnable, SETTINGS, on_frame=stopping(15))
    assert not left(tmp_path / "out")


def test_transparent_vp9_is_completed_from_the_beginning(transparent, tmp_path):
    src = images(tmp_path / "in", alpha=True)
    with pytest.raises(Cancelled):
        restore_file(src, tmp_path / "out.webm", transparent, SETTINGS, on_frame=stopping(20))
    assert not left(tmp_path / "out.webm")
    assert restore_file(src, tmp_path / "out.webm", transparent, SETTINGS).resumed == 0
    assert probe(tmp_path / "out.webm").has_alpha


# --- packets ---------------------------------------------------------------------------------------------------------


def test_a_beginning_is_kept_when_no_frame_of_it_is_missing(tmp_path):
    """Key frame 0, then 3 before 1 and 2 that refer to it, then 5 before 4."""
    log, kept = PacketLog(Keep(tmp_path)), []
    for pts in range(6):
        log.expect(pts)
    for pts in (0, 3, 1, 2, 5):
        packet = av.Packet(bytes([pts]) * (pts + 1))
        packet.pts, packet.dts, packet.duration = pts, pts, 1
        log.append(packet)
        kept.append(log.kept.frames)
    log.flush()
    assert kept == [1, 1, 1, 4, 4]
    assert log.kept.is_whole([log.kept.packets])
    read = list(packets_of(log.kept, Fraction(1, 25)))
    assert [(packet.pts, bytes(packet)) for packet in read] == [(n, bytes([n]) * (n + 1)) for n in (0, 3, 1, 2)]
    log.close()
    again = PacketLog(log.kept)
    again.close()
    assert log.kept.packets.stat().st_size == log.kept.bytes  # the half of what came after is gone
