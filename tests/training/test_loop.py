"""The loop: an interrupted run equals an uninterrupted one, rates follow their curve, bad steps are passed over."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from training import loop, state
from training.config import OptimConfig, RunConfig
from training.randomness import torch_rng

RUN = RunConfig(steps=6, ema=0.9, save_every=3, validate_every=3)
OPTIM = OptimConfig(lr=1e-2, final_lr=1e-3, warmup=2)


class Interrupted(BaseException):
    """What ends a process from outside."""


class Regression:
    """A stage that fits a small network to random numbers drawn from the step."""

    def __init__(self, stop_at: int | None = None, infinite_at: int | None = None):
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.stop_at, self.infinite_at = stop_at, infinite_at

    def loss(self, step):
        if step == self.stop_at:
            raise Interrupted
        x = torch.randn(16, 4, generator=torch_rng(0, "regression", step))
        loss = (self.module(x) - x.sum(1, keepdim=True)).square().mean()
        if step == self.infinite_at:
            loss = loss * math.inf
        return loss, {"examples": 16}

    def validate(self, module):
        return {"weight": module[0].weight.norm().item()}


def assert_identical(a, b):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_identical(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_identical(one, other)
    else:
        assert a == b


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("stop_at", [3, 5], ids=["at a save", "two steps after a save"])
def test_an_interrupted_run_continues_as_if_it_had_never_stopped(tmp_path, stop_at):
    whole = loop.run(Regression(), RUN, OPTIM, tmp_path / "whole")
    with pytest.raises(Interrupted):
        loop.run(Regression(stop_at=stop_at), RUN, OPTIM, tmp_path / "halves")
    assert state.load(tmp_path / "halves")["step"] == 3
    halves = loop.run(Regression(), RUN, OPTIM, tmp_path / "halves")
    assert_identical(state.load(tmp_path / "halves"), state.load(tmp_path / "whole"))
    assert_identical(halves.state_dict(), whole.state_dict())
    assert rows(tmp_path / "halves/validation.jsonl") == rows(tmp_path / "whole/validation.jsonl")


def test_a_finished_run_is_returned_without_another_step(tmp_path):
    first = loop.run(Regression(), RUN, OPTIM, tmp_path)
    again = loop.run(Regression(stop_at=0), RUN, OPTIM, tmp_path)
    assert_identical(again.state_dict(), first.state_dict())
    assert len(rows(tmp_path / "metrics.jsonl")) == 6


def test_every_step_is_logged_with_its_loss_and_the_stages_own_numbers(tmp_path):
    loop.run(Regression(), RUN, OPTIM, tmp_path)
    logged = rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in logged] == list(range(6))
    assert all(row["loss"] > 0 and row["grad_norm"] > 0 and row["examples"] == 16 for row in logged)


def test_training_reaches_a_lower_loss(tmp_path):
    loop.run(Regression(), replace(RUN, steps=60), OPTIM, tmp_path)
    losses = [row["loss"] for row in rows(tmp_path / "metrics.jsonl")]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_a_step_without_a_finite_gradient_changes_nothing(tmp_path):
    stage = Regression(infinite_at=2)
    loop.run(stage, replace(RUN, steps=3), OPTIM, tmp_path / "spoilt")
    spoilt = state.load(tmp_path / "spoilt")
    assert all(value.isfinite().all() for value in spoilt["module"].values())
    assert spoilt["ema"]["updates"] == 2
    # The steps before it are those of a run without it.
    unspoilt = Regression(stop_at=2)
    with pytest.raises(Interrupted):
        loop.run(unspoilt, replace(RUN, steps=3), OPTIM, tmp_path / "stopped")
    assert_identical(stage.module.state_dict(), unspoilt.module.state_dict())


def test_the_learning_rate_rises_in_a_line_and_falls_in_a_cosine():
    optim = OptimConfig(lr=1.0, final_lr=0.1, warmup=4)
    rates = [loop.learning_rate(step, 104, optim) for step in range(105)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[54] == pytest.approx(0.55)
    assert rates[104] == pytest.approx(0.1)
    assert all(after <= before for before, after in pairwise(rates[4:]))


def test_a_run_shorter_than_its_warm_up_still_has_rates():
    optim = OptimConfig(lr=1.0, final_lr=0.1, warmup=4)
    assert [loop.learning_rate(step, 2, optim) for step in range(2)] == pytest.approx([0.25, 0.5])


def test_without_warm_up_the_first_step_has_the_full_rate():
    assert loop.learning_rate(0, 10, OptimConfig(lr=1.0, final_lr=0.1, warmup=0)) == 1.0


def test_wide_layers_learn_slower_in_proportion_and_every_weight_learns_once():
    module = nn.Sequential(nn.Linear(25, 200), nn.Conv2d(2, 4, 5), nn.Linear(200, 3))
    groups = loop.parameter_groups(module, replace(OPTIM, full_rate_inputs=50))
    rates = {id(parameter): group["rate"] for group in groups for parameter in group["params"]}
    assert [rates[id(layer.weight)] for layer in module] == [1.0, 1.0, 0.25]
    assert [rates[id(layer.bias)] for layer in module] == [1.0] * 3
    assert len(rates) == sum(len(group["params"]) for group in groups) == 6


def test_without_a_limit_all_weights_share_one_rate():
    assert [group["rate"] for group in loop.parameter_groups(nn.Linear(500, 2), OPTIM)] == [1.0]
