"""Whether to go on is asked again and again, however large a frame is; what ends early leaves nothing behind."""

from __future__ import annotations

import threading
import weakref
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from seedvr2_core.errors import Cancelled, SettingError
from seedvr2_core.loading import Models, fast_options
from seedvr2_core.models.vae import SEEDVR2_VAE, VAEConfig, VideoVAE
from seedvr2_core.models.vae_fast import FastVAE
from seedvr2_core.pipeline import restore, stream
from seedvr2_core.settings import Settings
from seedvr2_core.video.geometry import Target
from seedvr2_core.whole_files import restore_file

NARROW = VAEConfig(widths=(16, 32, 64, 96), blocks=1, groups=4)
SAME = Settings(target=Target.same(), chunk=9)


def shares(config: VAEConfig, way: str, frames: int) -> list[float]:
    """What is computed from one look to the next while frames of 640 x 360 pass half an autoencoder, as shares of all
    multiplications. Counted on tensors without contents, so no other program can slow it down."""
    with FakeTensorMode(), torch.inference_mode(), FlopCounterMode(display=False) as counter:
        vae = FastVAE(VideoVAE(config).requires_grad_(False), fast_options(torch.device("cpu")))
        x = torch.empty(1, 3, frames, 360, 640) if way == "encode" else torch.empty(1, 16, (frames + 3) // 4, 45, 80)
        looks = [counter.get_total_flops()]
        with vae.watched(lambda: looks.append(counter.get_total_flops())):
            getattr(vae, way)(x)
        looks.append(counter.get_total_flops())
    return [(after - before) / (looks[-1] - looks[0]) for before, after in pairwise(looks)]


@pytest.mark.slow
@pytest.mark.parametrize(("config", "frames", "way"), [(SEEDVR2_VAE, 1, "decode"), (NARROW, 5, "encode")])
def test_no_part_of_a_large_frame_is_long(config, frames, way):
    assert max(shares(config, way, frames)) < 0.09


def test_somebody_may_cancel_between_any_two_finished_frames(runnable):
    events = []
    pieces = stream(torch.rand(9, 16, 24, 3), runnable, SAME, (16, 24), 9, lambda *_: events.append("look"))
    for piece in pieces:
        events += ["frame"] * len(piece)
    assert events.count("frame") == 9
    assert ("frame", "frame") not in list(pairwise(events))


class Stop:
    """Another thread, which wants to cancel as soon as a stage has begun."""

    def __init__(self, stage: str):
        self.stage, self.reached, self.wanted = stage, threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self.run)

    def run(self) -> None:
        self.reached.wait()
        self.wanted.set()

    def __enter__(self) -> Stop:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.reached.set()
        self.thread.join()

    def __call__(self, stage: str, done: float, total: int | None) -> None:
        if stage == self.stage:
            self.reached.set()
        if self.wanted.is_set():
            raise Cancelled("Stopped.")


@pytest.mark.parametrize("stage", ["encode", "restore", "decode"])
def test_cancelling_from_another_thread_leaves_nothing_half_written(runnable: Models, tmp_path: Path, stage):
    source, out = tmp_path / "source", tmp_path / "out"
    for folder in (source, out):
        folder.mkdir()
    frames: Tensor = torch.randint(0, 256, (60, 48, 64, 3), dtype=torch.uint8)
    for index, frame in enumerate(frames):
        Image.fromarray(frame.numpy()).save(source / f"{index:03}.png")
    (out / "old.mkv").write_bytes(b"old")
    models, running = replace(runnable, vae=FastVAE(runnable.vae)), set(threading.enumerate())
    with Stop(stage) as stop, pytest.raises(Cancelled, match="Stopped"):
        restore_file(source, out / "old.mkv", models, SAME, stop)
    assert [path.name for path in out.iterdir()] == ["old.mkv"]
    assert (out / "old.mkv").read_bytes() == b"old"
    assert set(threading.enumerate()) == running


def test_a_failure_that_somebody_keeps_keeps_no_frames(runnable: Models):
    vae, seen = FastVAE(runnable.vae), []
    forward = vae.decoder[-1].forward

    def fail(frames: list[Tensor], state: object) -> list[Tensor]:
        if frames[0].is_meta:  # the plan is being made
            return forward(frames, state)
        seen.append(weakref.ref(frames[0]))
        raise torch.OutOfMemoryError("CUDA out of memory.")

    vae.decoder[-1].forward = fail
    with pytest.raises(SettingError, match="takes more memory") as kept:
        restore(torch.rand(5, 48, 64, 3), replace(runnable, vae=vae), SAME)
    assert kept.value.__cause__.__traceback__
    assert seen and not [frame for frame in seen if frame() is not None]
