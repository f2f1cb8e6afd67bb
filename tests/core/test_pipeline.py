"""The life of a clip: as many frames out as in, whatever its length, and the same however it is cut."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from seedvr2_core import whole_files
from seedvr2_core.diffusion.conditioning import frame_noise, with_mask
from seedvr2_core.errors import Cancelled, MediaError, SettingError
from seedvr2_core.life import PIECE
from seedvr2_core.loading import Models
from seedvr2_core.memory.stages import reach
from seedvr2_core.memory.trial import Ledger
from seedvr2_core.models.vae import posterior
from seedvr2_core.models.vae_fast import FastVAE
from seedvr2_core.pipeline import restore, stream
from seedvr2_core.settings import Settings
from seedvr2_core.video.color import ColorTransfer
from seedvr2_core.video.files import Frame, Moment, Reader
from seedvr2_core.video.geometry import (
    Target,
    mirror_indices,
    pad_to_multiple,
    padded_length,
    resize,
    to_clip,
    to_frames,
)
from seedvr2_core.video.shots import AROUND
from seedvr2_core.whole_files import READ_AHEAD, WRITE_BEHIND, restore_file
from tests.core.conftest import RUNNABLE_VAE, clip

STAGES = ("encode", "restore", "decode")
SAME = Settings(target=Target.same(), color="none")
# Three latents, two of which the next chunk shares.
SHORT = replace(SAME, chunk=9)


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


# --- frames in, frames out -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", range(1, 15))
def test_as_many_frames_come_out_as_went_in(runnable, frames):
    out = restore(clip(frames, 16, 16), runnable, SHORT)
    assert out.shape == (frames, 16, 16, 3)
    assert out.dtype == torch.float32
    assert out.min() >= 0 and out.max() <= 1


@pytest.mark.parametrize("before", [1, 6, 22])
@pytest.mark.parametrize("channels", [3, 4])
def test_nothing_of_a_shot_shows_in_the_next(runnable, before, channels):
    first, second = clip(before, channels=channels), clip(11, channels=channels).flip(2) ** 3
    settings, calls = replace(SHORT, color="lab"), []
    film = torch.cat([first, second])
    out = restore(film, runnable, settings, lambda stage, done, total: calls.append((stage, done, total)))
    alone = [restore(shot, runnable, settings) for shot in (first, second)]
    assert torch.equal(out, torch.cat(alone))
    assert calls[-1][1:] == (len(film), len(film)) and {total for *_, total in calls} == {len(film)}
    bled = restore(film, runnable, replace(settings, one_shot=True))
    assert not torch.allclose(bled[before:], out[before:], atol=1e-3)


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 1), (17, 33), (5, 40), (16, 16)])
def test_any_size_is_restored_at_that_size(runnable, height, width, channels):
    frames = clip(2, height, width, channels)
    for color in ("lab", "none"):
        out = restore(frames, runnable, Settings(target=Target.same(), color=color))
        assert out.shape == frames.shape
        assert out.isfinite().all()


@pytest.mark.parametrize(
    ("target", "size"),
    [
        (Target.same(), (15, 22)),
        (Target.scale(2), (30, 44)),
        (Target.scale(0.5), (8, 11)),
        (Target.short_side(20), (20, 29)),
        (Target.long_side(33), (22, 33)),
        (Target.megapixels(0.001), (26, 38)),
        (Target.exact(31, 17), (31, 17)),
    ],
    ids=str,
)
def test_every_target_gives_its_size(runnable, target, size):
    assert restore(clip(2, 15, 22), runnable, Settings(target=target)).shape == (2, *size, 3)


def test_opaque_stays_opaque_and_a_hole_stays_a_hole(runnable):
    frames = clip(3, 32, 32, 4)
    frames[..., 3] = 1
    assert restore(frames, runnable, SAME)[..., 3].min() > 0.995
    frames[:, 8:24, 8:24, 3] = 0
    alpha = restore(frames, runnable, SAME)[..., 3]
    assert alpha[:, 12:20, 12:20].max() < 0.1 < 0.9 < alpha[:, :4].min()


@pytest.mark.parametrize("frames", range(1, 24))
@pytest.mark.parametrize(("height", "width"), [(24, 32), (13, 21)])
def test_models_that_change_nothing_give_the_source_back(transparent, frames, height, width):
    """Every frame in its place, whatever was mirrored, cut into chunks, cross-faded, padded and cropped."""
    source = clip(frames, height, width)
    torch.testing.assert_close(restore(source, transparent, SHORT), source, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(0, 8, 8, 3), (2, 8, 8, 1), (2, 8, 8, 5), (2, 0, 8, 3), (8, 8, 3)], ids=str)
def test_what_is_no_clip_is_refused(runnable, shape):
    with pytest.raises(MediaError, match="Expected frames T H W c"):
        restore(torch.zeros(shape), runnable, SAME)


def test_a_stream_without_frames_is_refused(runnable):
    with pytest.raises(MediaError, match="no frame"):
        list(stream(iter(()), runnable, SAME, (16, 16)))


# --- the same result by every way ------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, 3, 6])
def test_the_pieces_add_up_to_the_whole_formula(runnable, frames):
    """Encode, predict, decode and correct, all at once, as one would write it on a page."""
    settings, size = Settings(target=Target.scale(1.5), seed=5), (30, 45)
    source = clip(frames, 20, 30)
    style = to_clip(resize(source.permute(0, 3, 1, 2), *size))
    padded = pad_to_multiple(style)[mirror_indices(frames, padded_length(frames))]
    with torch.inference_mode():
        condition = posterior(runnable.vae.encode(padded.transpose(0, 1)[None]))[0] * runnable.vae.config.scale
        noise = frame_noise(5, 0, *condition.shape[2:3], 16, *condition.shape[3:])[None]
        latent = torch.cat([noise, with_mask(condition)], dim=1)
        velocity = torch.stack(runnable.dit(latent, [runnable.prompts.positive], torch.ones(1)))
        decoded = runnable.vae.decode((noise - velocity) / runnable.vae.config.scale)
    content = decoded[0].transpose(0, 1)[:frames, :, :30, :45]
    expected = to_frames(ColorTransfer("lab")(content, style)).permute(0, 2, 3, 1)
    torch.testing.assert_close(restore(source, runnable, settings), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("frames", [9, 10, 14, 21])
def test_chunks_leave_no_seam_where_the_transformer_has_none(pointwise, frames):
    """Noise, cross-fades and the autoencoder's state agree with a single pass, for any number of latents."""
    source = clip(frames)
    whole = restore(source, pointwise, replace(SAME, chunk=45))
    for chunk in (9, 13, 17):
        chunked = restore(source, pointwise, replace(SAME, chunk=chunk))
        torch.testing.assert_close(chunked, whole, atol=1e-5, rtol=0)


def test_how_frames_arrive_does_not_matter(runnable):
    codes = (clip(11) * 255).round().to(torch.uint8)
    whole = restore(codes / 255, runnable, SHORT)
    for frames in (list(codes), iter(codes), (frame.clone() for frame in codes), codes.float() / 255):
        assert torch.equal(torch.cat(list(stream(frames, runnable, SHORT, (24, 32)))), whole)


def test_the_seed_and_nothing_else_decides(runnable):
    source = clip(5)
    first, again = (restore(source, runnable, replace(SAME, seed=1)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, restore(source, runnable, replace(SAME, seed=2)))


def test_models_in_half_precision_give_nearly_the_same(runnable):
    half = replace(runnable, dit=deepcopy(runnable.dit).bfloat16(), vae=deepcopy(runnable.vae).bfloat16())
    out = restore(clip(11), half, SHORT)
    assert out.dtype == torch.float32
    assert 0 < (out - restore(clip(11), runnable, SHORT)).abs().mean() < 0.02


def test_a_stream_that_is_abandoned_leaves_gradients_as_they_were(runnable):
    half = stream(clip(9), runnable, SHORT, (24, 32))
    next(half)
    half.close()
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


# --- chunks ----------------------------------------------------------------------------------------------------------


# --- settings --------------------------------------------------------------------------------------------------------


def test_several_steps_and_guidance_run_and_listen_to_the_negative_prompt(runnable):
    settings = replace(SHORT, steps=3, cfg=2.0)
    out = restore(clip(10, 16, 16), runnable, settings)
    assert out.shape == (10, 16, 16, 3) and out.isfinite().all()
    other = replace(runnable, prompts=replace(runnable.prompts, negative=runnable.prompts.negative + 1))
    assert not torch.equal(out, restore(clip(10, 16, 16), other, settings))
    ignored = replace(settings, cfg=1.0)
    assert torch.equal(restore(clip(2), runnable, ignored), restore(clip(2), other, ignored))


def test_guidance_without_a_negative_prompt_is_refused_before_a_frame_is_read(runnable):
    alone = replace(runnable, prompts=replace(runnable.prompts, negative=None))
    frames = iter(clip(5))
    with pytest.raises(SettingError, match="negative prompt"):
        list(stream(frames, alone, replace(SAME, cfg=2.0), (24, 32)))
    assert len(list(frames)) == 5
    assert len(restore(clip(1), alone, SAME)) == 1


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"cfg": 0.5}, "cfg is 0.5"),
        ({"cfg": float("nan")}, "cfg is nan"),
        ({"cfg": float("inf")}, "cfg is inf"),
        ({"chunk": 8}, "8 frames is too short"),
        ({"memory_limit": 0}, "memory limit is 0 bytes"),
        ({"memory_limit": -1}, "memory limit is -1 bytes"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(setting, message):
    with pytest.raises(SettingError, match=message):
        Settings(**setting)


@pytest.mark.parametrize("setting", [{"color": "sepia"}, {"attention": "none such"}], ids=str)
def test_a_name_that_does_not_exist_is_refused_before_a_frame_is_read(runnable, setting):
    frames = iter(clip(2))
    with pytest.raises(SettingError, match=next(iter(setting.values()))):
        list(stream(frames, runnable, replace(SAME, **setting), (24, 32)))
    assert len(list(frames)) == 2


# --- progress and cancelling -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "cfg"), [(1, 1.0), (2, 2.0)])
@pytest.mark.parametrize("frames", [1, 6, 22])
def test_every_stage_moves_forward_to_its_end(runnable, frames, steps, cfg):
    calls = {stage: [] for stage in STAGES}

    def on_progress(stage, done, total):
        assert total == frames
        calls[stage].append(done)

    restore(clip(frames, 16, 16), runnable, replace(SHORT, steps=steps, cfg=cfg), on_progress)
    for stage in STAGES:
        assert calls[stage] == sorted(calls[stage])
        assert calls[stage][-1] == frames
        assert calls[stage][0] > 0


def test_without_a_total_progress_still_counts(runnable):
    totals = set()
    list(stream(clip(6), runnable, SHORT, (24, 32), None, lambda stage, done, total: totals.add(total)))
    assert totals == {None}


@pytest.fixture
def folder(tmp_path, runnable) -> Path:
    """Fourteen images, `source`, beside an older result, `old.mkv`, that must survive."""
    (tmp_path / "source").mkdir()
    for i, frame in enumerate((clip(14, 16, 16) * 255).to(torch.uint8)):
        Image.fromarray(frame.numpy()).save(tmp_path / "source" / f"{i}.png")
    (tmp_path / "old.mkv").write_bytes(b"old")
    return tmp_path


@pytest.mark.parametrize("late", [False, True], ids=["at once", "later"])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["old.mkv", "new.mp4", "new"])
def test_cancelling_stops_at_once_and_leaves_no_file(runnable, folder, stage, name, late):
    calls = []

    def on_progress(at, done, total):
        calls.append(at)
        if at == stage and (not late or done > total / 2):
            raise Cancelled("Stopped.")

    before = {path.name for path in folder.iterdir()}
    with pytest.raises(Cancelled, match="Stopped"):
        restore_file(folder / "source", folder / name, runnable, SHORT, on_progress)
    assert calls[-1] == stage
    assert {path.name for path in folder.iterdir()} == before
    assert (folder / "old.mkv").read_bytes() == b"old"


@pytest.mark.parametrize("frame", [0, 5, 13])
def test_a_disk_that_fills_up_while_others_are_restored_leaves_no_file(runnable, folder, monkeypatch, frame):
    written = []

    def write_image(path: Path, *_: object) -> bytes:
        if len(written) == frame:
            raise OSError(28, "No space left on device")
        written.append(path)
        return b""

    monkeypatch.setattr("seedvr2_core.video.stills.write_image", write_image)
    with pytest.raises(MediaError, match=r"new could not be written \(No space left on device\)"):
        restore_file(folder / "source", folder / "new", runnable, SHORT)
    assert {path.name for path in folder.iterdir()} == {"source", "old.mkv"}
    assert len(written) == frame


def test_a_report_tells_what_became_of_a_file(runnable, folder):
    report = restore_file(folder / "source", folder / "new.mkv", runnable, Settings(target=Target.scale(1.5)), fps=25)
    assert (report.frames, report.width, report.height, report.model) == (14, 24, 24, "tiny")
    assert report.seconds > 0 and report.chunk % PIECE == 1
    assert {path.name for path in folder.iterdir()} == {"source", "old.mkv", "new.mkv"}


# --- memory ----------------------------------------------------------------------------------------------------------


# Source frames that are inside: a chunk, or what the encoder would need to begin anew, and a few on their way.
INSIDE = max(SHORT.chunk, 4 * reach(RUNNABLE_VAE)[0]) + 3 * PIECE
FRAMES = 4 * max(reach(RUNNABLE_VAE)) + 80


def test_memory_does_not_grow_with_the_number_of_frames(runnable):
    read: list[weakref.ref] = []
    yielded, ahead, alive, held = 0, [], [], []

    def source() -> Iterator[Tensor]:
        for _ in range(FRAMES):
            frame = torch.rand(16, 16, 3)
            read.append(weakref.ref(frame))
            yield frame

    for out in stream(source(), runnable, SHORT, (16, 16)):
        ahead.append(len(read) - yielded)
        yielded += len(out)
        alive.append(sum(frame() is not None for frame in read))
        if yielded % 16 == 1:
            held.append(sum(each.nbytes for each in gc.get_objects() if type(each) is Tensor))
    assert yielded == FRAMES
    assert max(ahead) <= SHORT.chunk + 3 * PIECE + AROUND
    assert max(alive) <= INSIDE + PIECE + AROUND
    assert max(held[-3:]) <= held[-4]


def test_reading_ahead_and_writing_behind_add_no_more_than_they_may(runnable, tmp_path, monkeypatch):
    """The disk is slower than the models, so that frames would pile up before it."""
    read: list[weakref.ref] = []
    written, ahead, alive, threads = 0, [], [], []

    class Source(Reader):
        def _frames(self) -> Iterator[Frame]:
            for index in range(FRAMES):
                frame = Frame(torch.randint(256, (16, 16, 3), dtype=torch.uint8), Moment(index, 1))
                read.append(weakref.ref(frame.pixels))
                ahead.append(len(read) - written)
                alive.append(sum(pixels() is not None for pixels in read))
                threads.append(threading.current_thread())
                yield frame

    def write_image(path: Path, *_: object) -> bytes:
        nonlocal written
        time.sleep(0.005)
        written += 1
        threads.append(threading.current_thread())
        return b""

    (tmp_path / "source").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "source" / "1.png")
    monkeypatch.setattr(whole_files, "open_reader", Source)
    monkeypatch.setattr("seedvr2_core.video.stills.write_image", write_image)
    report = restore_file(tmp_path / "source", tmp_path / "new", runnable, SHORT)
    assert report.frames == written == FRAMES
    assert len(set(threads)) == 2 and threading.current_thread() not in threads
    # One more is in each thread's hands.
    assert max(ahead) <= SHORT.chunk + 3 * PIECE + AROUND + READ_AHEAD + WRITE_BEHIND + 2
    assert max(alive) <= INSIDE + PIECE + AROUND + READ_AHEAD + 1


class Failing:
    """Models of which one raises at its n-th call, once or from then on."""

    def __init__(self, models: Models, part: str, call: int, times: int = 1):
        self.calls, self.part, self.call, self.times = 0, part, call, times
        vae, dit = FastVAE(models.vae), deepcopy(models.dit)
        # Of the autoencoder the last part: all others have used up their state by then.
        failing = {"encode": vae.encoder[-1], "restore": dit, "decode": vae.decoder[-1]}[part]
        failing.register_forward_pre_hook(lambda *_: self.count())
        self.models = replace(models, vae=vae, dit=dit)

    def count(self) -> None:
        if _in_trial():
            return
        self.calls += 1
        if self.call <= self.calls < self.call + self.times:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def _in_trial() -> bool:
    """Whether the plan is being made, where nothing is computed."""
    return any(isinstance(mode, Ledger) for mode in _get_current_dispatch_mode_stack())


@pytest.mark.parametrize("call", [1, 2, 7])
@pytest.mark.parametrize("part", STAGES)
def test_when_memory_runs_out_the_work_goes_on_from_there(runnable, pointwise, part, call, caplog):
    # A shorter chunk makes no difference to the second; for the first there is none, and all else makes no difference.
    models, settings = (pointwise, replace(SAME, chunk=25)) if part == "restore" else (runnable, SHORT)
    source = clip(60)
    expected = restore(source, replace(models, vae=FastVAE(models.vae)), settings)
    failing = Failing(models, part, min(call, 2) if part == "restore" else call)
    done = {stage: [] for stage in STAGES}
    with caplog.at_level("WARNING"):
        out = restore(source, failing.models, settings, lambda stage, count, total: done[stage].append(count))
    assert failing.calls > failing.call
    assert out.shape == expected.shape
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
    (said,) = [record.message for record in caplog.records]
    assert said.startswith("Memory ran out (CUDA out of memory.") and "going on with a smaller plan" in said
    if part == "restore":
        assert "passes of 17 frames" in said
    # What was finished is not done again, as far as anyone can see.
    for stage in ("encode", "decode"):
        assert done[stage] == sorted(done[stage])


def test_memory_that_runs_out_late_in_a_long_clip_loses_nothing(runnable):
    """The state is made again from part of the clip, as far back as it matters."""
    source = clip(4 * max(reach(RUNNABLE_VAE)) + 60, 16, 16)
    expected = restore(source, replace(runnable, vae=FastVAE(runnable.vae)), SHORT)
    for part, calls_per_latent in (("encode", 1), ("decode", 2)):
        failing = Failing(runnable, part, calls_per_latent * (max(reach(RUNNABLE_VAE)) + 8))
        out = restore(source, failing.models, SHORT)
        assert failing.calls > failing.call
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("part", STAGES)
def test_memory_that_runs_out_twice_is_told_in_one_sentence(runnable, folder, part):
    failing = Failing(runnable, part, 1, times=2)
    with pytest.raises(SettingError, match=r"takes more memory than cpu has free; choose a smaller size") as caught:
        restore_file(folder / "source", folder / "new", failing.models, SHORT)
    assert str(caught.value).count(".") == 1
    assert {path.name for path in folder.iterdir()} == {"source", "old.mkv"}


@pytest.mark.parametrize("place", ["life.upload", "whole_files.download", "life.ColorTransfer.__call__"])
def test_memory_that_runs_out_beside_the_models_is_told_in_one_sentence(runnable, folder, monkeypatch, place):
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(f"seedvr2_core.{place}", fail)
    with pytest.raises(SettingError, match="takes more memory than cpu has free"):
        restore_file(folder / "source", folder / "new", runnable, SHORT)
    assert {path.name for path in folder.iterdir()} == {"source", "old.mkv"}


def test_the_plan_is_one_line_with_its_peak(runnable, folder, caplog):
    with caplog.at_level("INFO"):
        restore_file(folder / "source", folder / "new", runnable, replace(SHORT, memory_limit=1 << 30))
    (line,) = [record.message for record in caplog.records if record.name.startswith("seedvr2_core")]
    assert line.startswith("source, 16 x 16: 14 frames -> 16 x 16, tiny on cpu in float32")
    assert "passes of 9 frames" in line and "of 1.0 GiB (weights" in line


def test_running_out_of_memory_is_told_in_one_sentence(runnable):
    def greedy(stage: str, done: float, total: int | None) -> None:
        torch.empty(1 << 50)

    with pytest.raises(SettingError, match="takes more memory than cpu has free; choose a smaller size"):
        list(stream(clip(1), runnable, SAME, (24, 32), 1, greedy))
