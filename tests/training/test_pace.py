"""One process among several that is slow: found by its own time, since all of them take as long as the slowest."""

from __future__ import annotations

import socket
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from seedvr2_core.models.dit import Block
from tests.training.toys import OPTIM, in_processes
from training import journal, loop, pace
from training.config import ParallelConfig, RunConfig
from training.guards import GuardConfig, Guards
from training.loop import Session
from training.pace import slowest
from training.parallel import connect
from training.pretrain import Pretraining, PretrainStage
from training.restorer import Restorer
from training.shards import Latents


def test_the_slowest_is_measured_by_the_one_in_the_middle_and_single_steps_count_little():
    rank, times = slowest([[1.0, 1.1, 1.5, 0.9]] * 3 + [[9.0, 1.0, 1.5, 1.0]])
    assert rank == 2 and times == pytest.approx(1.5)
    # However long each step takes all of them.
    assert slowest([[n, 2 * n] for n in (1.0, 5.0, 0.1)]) == (1, pytest.approx(2.0))


@pytest.mark.parametrize("own, times", [((0.2, 0.4), 1.25), ((0.5, 1.0), 2.0), ((0.0, 0.0), 1.0)])
def test_what_is_nobodys_own_counts_as_equal(own, times):
    # Both took a second.
    watch = pace.Pace(Session().processes, [], most=1.2)
    watch.processes = SimpleNamespace(device=torch.device("cpu"), gather=lambda mine: [(it, "host") for it in own])
    for _ in range(pace.WINDOW):
        watch.timing, watch.began = True, time.perf_counter() - 1
        sentence = watch.end()
    assert (f"Process 1 on host has taken {times:.2f} times" in sentence) == (times > 1.2)


# What is slow, and by how many seconds.
SLOW = {"layers": (Block, "forward", 0.1), "data": (Latents, "batch", 0.6), "nothing": None}


def train_all(root, model, latents_folder, init_method):
    """Runs of two processes, in which something of the second one is slow."""
    pace.EVERY, pace.WINDOW = 1, 4
    run = RunConfig(steps=5, micro_batches=2, validate_every=5, async_save=False)
    # Two processes on a busy machine are not always equally fast.
    config = Pretraining(model=model, run=run, optim=replace(OPTIM, lr=1e-3), batch=2, guard=GuardConfig(slow=1.5))
    for name, slow in SLOW.items():
        processes = connect(ParallelConfig(activation_checkpoint=True), torch.device("cpu"), init_method)
        stage = PretrainStage(config, Latents(latents_folder, seed=0), Restorer(model))
        session = Session(processes=processes, guards=Guards(config.guard))
        with pytest.MonkeyPatch.context() as patch:
            if slow and processes.rank == 1:
                owner, method, by = slow
                fast = getattr(owner, method)
                patch.setattr(owner, method, lambda *args, by=by, fast=fast: time.sleep(by) or fast(*args))
            loop.run(stage, config, {"g": config.optim}, root / name, session)


def test_a_slow_process_is_named_with_its_host(tmp_path, tiny_dit, latents_folder):
    in_processes(2, train_all, tmp_path / "meeting", tmp_path, tiny_dit, latents_folder)
    rows = {name: journal.read(tmp_path / name / journal.ALERTS) for name in SLOW}
    alerts = {name: [row["message"] for row in found if row["message"].startswith("Process")]
              for name, found in rows.items()}  # fmt: skip
    assert not alerts.pop("nothing")
    for found in alerts.values():
        (alert,) = found
        assert f"Process 1 on {socket.gethostname()} has taken" in alert and " 4 of the last 4 steps" in alert


def test_one_process_is_never_timed(tiny_dit):
    restorer = Restorer(tiny_dit)
    alone = pace.Pace(Session().processes, [restorer], 1.3)
    alone.begin(0)
    assert not alone.timing and alone.end() == ""
    assert not any(block._forward_hooks for block in restorer.dit.blocks)
