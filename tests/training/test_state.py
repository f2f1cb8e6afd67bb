"""Checkpoints: there is a whole one at every moment, and it comes back as it was."""

from __future__ import annotations

import os
import random
import resource
import shutil

import numpy as np
import pytest
import torch
from torch import nn

from seedvr2_core.errors import CheckpointError
from training import state
from training.parallel import Processes
from training.state import Checkpoints


def tensors(value, size=4):
    return {"g/weight": torch.full((size,), float(value)), "ema/weight": torch.arange(float(size))}


def load(checkpoints, path, size=4):
    found = tensors(-1, size)
    meta = checkpoints.load(path, found)
    return meta, found


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_was_saved_comes_back(tmp_path, asynchronous):
    checkpoints = Checkpoints(tmp_path, asynchronous=asynchronous)
    saved = tensors(3)
    checkpoints.save(7, saved, {"note": "seven"})
    # What happens to the tensors afterwards is none of the checkpoint's business.
    saved["g/weight"].zero_()
    checkpoints.settle(wait=True)
    meta, found = load(checkpoints, checkpoints.newest())
    assert (meta["step"], meta["note"]) == (7, "seven")
    assert found["g/weight"].tolist() == [3.0] * 4
    assert (tmp_path / "checkpoints/latest").resolve().name == "step_000007"


def test_a_new_directory_holds_no_run(tmp_path):
    assert Checkpoints(tmp_path).newest() is None


def test_only_the_newest_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, tensors(step))
    assert [path.name for path in state.complete(tmp_path / "checkpoints")] == ["step_000002", "step_000003"]


def test_what_the_first_process_cannot_do_fails_in_all_of_them_and_none_waits(tmp_path, monkeypatch):
    class Second(Processes):
        def gather(self, value):
            return ["No space left on device", value]

    class First(Processes):
        def gather(self, value):
            said.append(value)
            return [value]

    def full(*args):
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="No space left"):
        Checkpoints(tmp_path, Second(rank=1, world=2)).save(1, tensors(1))
    for name in ("_prepare", "_complete"):
        checkpoints, said = Checkpoints(tmp_path, First()), []
        monkeypatch.setattr(checkpoints, name, full)
        with pytest.raises(CheckpointError, match="No space left"):
            checkpoints.save(1, tensors(1))
        # Whoever waits for this word goes on as well.
        assert "No space left" in said[-1]
        assert checkpoints.last is None and not list((tmp_path / "checkpoints").glob("step_*"))


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    size = 4 << 20
    checkpoints.save(1, tensors(1, size))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The system refuses to write more than this into a file, in the middle of it.
    resource.setrlimit(resource.RLIMIT_FSIZE, (8 << 20, hard))
    try:
        with pytest.raises(CheckpointError, match=r"could not be saved.*before it are whole"):
            checkpoints.save(2, tensors(2, size))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["latest", "step_000001"]
    assert load(checkpoints, checkpoints.newest(), size)[1]["g/weight"].unique().tolist() == [1.0]
    checkpoints.save(3, tensors(3, size))
    assert load(checkpoints, checkpoints.newest(), size)[0]["step"] == 3


def test_a_process_killed_while_writing_leaves_the_last_checkpoint_whole(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, tensors(1))
    half = tmp_path / "checkpoints/step_000002"
    shutil.copytree(tmp_path / "checkpoints/step_000001", half)
    (half / state.META).unlink()
    assert checkpoints.newest().name == "step_000001"
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        load(checkpoints, half)
    checkpoints.save(2, tensors(2))
    assert load(checkpoints, checkpoints.newest())[1]["g/weight"].tolist() == [2.0] * 4


def test_a_checkpoint_is_not_complete_any_more_from_the_moment_on_that_it_is_being_removed(tmp_path, monkeypatch):
    Checkpoints(tmp_path).save(1, tensors(1))
    (path,) = state.complete(tmp_path / "checkpoints")
    monkeypatch.setattr(state.shutil, "rmtree", lambda path, ignore_errors: None)
    state.remove(path)
    assert state.complete(tmp_path / "checkpoints") == []


def test_what_a_killed_process_of_the_same_number_left_behind_does_not_matter(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.directory.mkdir()
    (checkpoints.directory / f".latest.{os.getpid()}").symlink_to("step_000000")
    checkpoints.save(1, tensors(1))
    assert checkpoints.newest().name == "step_000001"


def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, tensors(1))
    with pytest.raises(CheckpointError, match=r"'g/weight' is \(4,\) there and \(5,\) here"):
        checkpoints.load(checkpoints.newest(), {"g/weight": torch.zeros(5), "ema/weight": torch.zeros(4)})
    with pytest.raises(CheckpointError, match=r"'g/bias' and 0 more names"):
        checkpoints.load(checkpoints.newest(), {**tensors(0), "g/bias": torch.zeros(1)})


def test_averaged_weights_are_read_from_a_run_and_asked_for_where_there_is_none(tmp_path):
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        state.load_averaged(tmp_path)
    Checkpoints(tmp_path).save(1, tensors(5))
    assert state.load_averaged(tmp_path)["weight"].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert state.load_averaged(tmp_path, "g")["weight"].tolist() == [5.0] * 4


def test_averaged_weights_kept_for_good_outlive_the_checkpoints(tmp_path):
    state.save_averaged(tmp_path, 3, {"weight": torch.ones(2)}, Processes())
    assert state.load_averaged(tmp_path)["weight"].tolist() == [1.0, 1.0]


def test_an_optimiser_comes_back_with_the_state_of_every_weight_that_it_has_updated(tmp_path):
    def make():
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
        module[1].requires_grad_(False)
        return module, torch.optim.AdamW([{"params": module[0].parameters()}], lr=0.1, fused=True)

    module, optimizer = make()
    module(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state.optimizer_tensors("g", module, optimizer))
    other, unused = make()
    state.prepare_optimizer("g", other, unused, state.stored(checkpoints.newest()))
    found = state.optimizer_tensors("g", other, unused)
    checkpoints.load(checkpoints.newest(), found)
    expected = state.optimizer_tensors("g", module, optimizer)
    assert found.keys() == expected.keys() == {f"g.optim/0.{name}/{key}" for name in ("weight", "bias")
                                               for key in ("step", "exp_avg", "exp_avg_sq")}  # fmt: skip
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_global_generators_come_back_though_nothing_depends_on_them(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {**tensors(1), **state.generators(0)})
    drawn = [random.random(), np.random.rand(), torch.rand(1).item()]
    state.restore_generators(checkpoints.newest(), rank=0)
    assert [random.random(), np.random.rand(), torch.rand(1).item()] == drawn
    # A process that had no place in that run keeps its own.
    state.restore_generators(checkpoints.newest(), rank=1)
    assert torch.rand(1).item() != drawn[2]
