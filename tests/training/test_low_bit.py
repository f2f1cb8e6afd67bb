"""Weights in bf16 and moments in 8 bits: they move, they take what they should, and they resume to the bit."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_module

from seedvr2_core.errors import SettingError
from tests.training.toys import OPTIM, RUN, Regression, ToyConfig
from training import apt, doctor, journal, loop, pretrain, state
from training.config import OptimConfig, ParallelConfig, check, override
from training.discriminator import Discriminator
from training.ema import EMA
from training.loop import Session
from training.parallel import Processes, halve

PURE = ParallelConfig(precision="pure_bf16")
EIGHT_BIT = OptimConfig(kind="adamw8bit", lr=1e-6, final_lr=1e-6, weight_decay=0.0, warmup=0)


class Wide(nn.Sequential):
    """Wide enough for a moment of 8 bits: torchao leaves those of less than 4096 values as they are."""

    def __init__(self):
        super().__init__(nn.Linear(4, 1024), nn.Tanh(), nn.Linear(1024, 1))

    def forward(self, x):
        return super().forward(x.to(self[0].weight.dtype))


class WideRegression(Regression):
    def __init__(self, disturbs: bool):
        super().__init__()
        torch.manual_seed(0)
        self.modules, self.disturbs = {"g": Wide()}, disturbs

    def backward(self, *args):
        if self.disturbs:
            torch.rand(1)
        return super().backward(*args)


def train(directory, most_steps=None, optim=EIGHT_BIT, disturbs=False, **changes):
    pytest.importorskip("torchao")
    config = ToyConfig(run=replace(RUN, parallel=PURE, **changes), optim=optim)
    session = Session(processes=Processes(config=PURE), most_steps=most_steps)
    return loop.run(WideRegression(disturbs), config, {"g": optim}, directory, session)


def bytes_of(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def stepped(kind, steps):
    """A bf16 weight of 0.02 after steps of one sign, each a ten thousandth of it."""
    weight = nn.Linear(256, 64, bias=False)
    nn.init.constant_(weight.weight, 0.02)
    halve(weight)
    optimizer = loop.make_optimizer(weight, replace(EIGHT_BIT, kind=kind, lr=2e-6))
    torch.manual_seed(0)
    start = weight.weight.detach().clone()
    for _ in range(steps):
        weight.weight.grad = torch.ones_like(weight.weight)
        optimizer.step()
    return (weight.weight.detach() - start).float()


def test_a_bf16_weight_moves_on_average_as_far_as_it_should_where_rounding_to_the_nearest_leaves_it():
    pytest.importorskip("torchao")
    assert stepped("adamw", 10).abs().max() == 0
    moved = stepped("adamw8bit", 10)
    assert 0.05 < (moved != 0).float().mean() < 0.5
    assert moved.mean().item() == pytest.approx(-10 * 2e-6, rel=0.1)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_six_steps_of_bf16_weights_are_three_and_three_to_the_bit(tmp_path, asynchronous):
    whole = train(tmp_path / "whole", async_save=asynchronous)
    with pytest.raises(loop.Preempted):
        train(tmp_path / "halves", 3, async_save=asynchronous)
    # Rounding depends on the step alone, whatever else has been drawn.
    halves = train(tmp_path / "halves", async_save=asynchronous, disturbs=True)
    for name, value in whole.state_dict().items():
        assert value.dtype == torch.bfloat16 and torch.equal(value, halves.state_dict()[name]), name
    paths = [state.complete(tmp_path / run / "checkpoints")[-1] for run in ("whole", "halves")]
    names = [name for name in state.stored(paths[0]) if not name.startswith("rng/")]
    assert "g.optim/0.weight/exp_avg.codes" in names and "g.optim/0.bias/exp_avg" in names
    found = [{name: torch.empty(state.stored(path)[name]) for name in names} for path in paths]
    for path, tensors in zip(paths, found, strict=True):
        state.Checkpoints(path.parent).load(path, tensors)
    assert all(torch.equal(found[0][name], found[1][name]) for name in names)
    losses = [[row["loss"] for row in journal.read(tmp_path / run / "metrics.jsonl")] for run in ("whole", "halves")]
    assert losses[0] == losses[1]


def test_the_average_of_bf16_weights_is_kept_in_fp32(tmp_path):
    train(tmp_path, optim=replace(EIGHT_BIT, lr=1e-3, final_lr=1e-3))
    kept = load_file(tmp_path / "ema/step_000006.safetensors")
    assert all(value.dtype == torch.float32 for value in kept.values())
    assert any((value != value.bfloat16()).any() for value in kept.values())


@pytest.mark.parametrize("device", ["same", "cpu"])
def test_an_average_follows_where_bf16_would_stand_still(device):
    module = nn.Linear(8, 8).bfloat16()
    nn.init.constant_(module.weight, 1.0)
    ema = EMA(module, decay=0.9999, device=device)
    ema.updates = 10**6
    nn.init.constant_(module.weight, 2.0)
    for _ in range(10):
        ema.update(module)
    assert ema.averages["weight"].mean().item() == pytest.approx(2 - 0.9999**10, rel=1e-6)


def test_a_parameter_takes_six_bytes(tiny_dit):
    pytest.importorskip("torchao")
    dit = replace(tiny_dit, dim=128, heads=2, head_dim=64, mlp_hidden=256, text_dim=128)
    recipe = pretrain.RECIPES["nano"]
    run = replace(recipe.run, parallel=PURE, ema_device="cpu")
    config = replace(recipe, model=dit, run=run, optim=EIGHT_BIT)
    workload = doctor.of_restorer(config)
    estimated = doctor.measure(config, workload).states
    assert estimated / doctor.count(workload.trained["g"][0]) == pytest.approx(6.03, abs=0.01)
    module = Processes(config=PURE).place(pretrain.Restorer(dit))
    optimizer = loop.make_optimizer(module, EIGHT_BIT)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    # Each moment has its own copy of the 256 values that its codes stand for.
    moments = {name: value for name, value in state.optimizer_tensors("g", module, optimizer).items()
               if not name.endswith((".qmap", "/step"))}  # fmt: skip
    held = bytes_of(module.parameters()) + bytes_of(p.grad for p in module.parameters()) + bytes_of(moments.values())
    assert estimated == pytest.approx(held, rel=0.05)


def test_what_a_discriminator_computes_in_fp32_stays_in_it(tiny_dit):
    discriminator = Discriminator(tiny_dit)
    Processes(config=PURE).place(discriminator)
    exact = {name for name, p in discriminator.named_parameters() if p.dtype == torch.float32}
    assert {name.partition(".")[0] for name in exact} == set(Discriminator.in_fp32)
    assert all(name in exact for name, _ in discriminator.named_parameters() if name.startswith("readout."))


def test_the_adversarial_game_is_played_in_pure_bf16(tiny_dit, latents, tmp_path):
    pytest.importorskip("torchao")
    recipe = apt.RECIPES["nano"]
    run = replace(recipe.run, steps=2, validate_every=2, save_every=2, parallel=PURE, async_save=False)
    config = replace(recipe, model=tiny_dit, run=run, g=EIGHT_BIT, d=EIGHT_BIT, batch=2,
                     curriculum=(apt.Phase(share=1.0, frames=(1, 5)),))  # fmt: skip
    check(config)
    stage = apt.AdversarialStage(config, latents, *(apt.Restorer(tiny_dit) for _ in range(2)))
    loop.run(stage, config, {"d": EIGHT_BIT, "g": EIGHT_BIT}, tmp_path, Session(processes=Processes(config=PURE)))
    row = journal.read(tmp_path / "metrics.jsonl")[-1]
    assert row["d_grad_norm"] > 0 and row["g_grad_norm"] > 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ("run.parallel.precision=pure_bf16", r"optim\.kind is adamw, .* lose its steps at a rate of 1e-06"),
        ("run.parallel.precision=pure_bf16 optim.kind=rmsprop", r"optim\.kind is rmsprop.*Set optim\.kind=adamw8bit"),
        ("optim.kind=adamw8bit", r"optim\.kind is adamw8bit.*Set run\.parallel\.precision=pure_bf16"),
        ("run.parallel.precision=pure_bf16 optim.lr=1e-4 optim.final_lr=1e-5", "lose its steps at a rate of 1e-05"),
    ],
)
def test_weights_and_optimisers_that_do_not_go_together_are_refused(changes, words):
    with pytest.raises(SettingError, match=words):
        check(override(pretrain.RECIPES["3b"], changes.split()))


@pytest.mark.parametrize(
    "changes",
    ["run.parallel.precision=pure_bf16 optim.kind=adamw8bit", "run.parallel.precision=fp32 optim.kind=adamw8bit",
     "run.parallel.precision=pure_bf16 optim.lr=1e-3 optim.final_lr=1e-4"],
)  # fmt: skip
def test_weights_and_optimisers_that_go_together_are_not(changes):
    check(override(pretrain.RECIPES["3b"], changes.split()))


def test_an_optimiser_of_a_game_is_refused_by_its_own_name():
    with pytest.raises(SettingError, match=r"^d\.kind is adamw,"):
        check(override(apt.RECIPES["3b_80gb"], ["d.kind=adamw"]))


def test_a_missing_library_is_named_with_the_way_to_get_it(monkeypatch):
    monkeypatch.delitem(sys.modules, "training.low_bit", raising=False)
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(SettingError, match=r"needs the library torchao.*pip install torchao"):
        loop.make_optimizer(nn.Linear(2, 2), EIGHT_BIT)


def test_sharded_weights_are_refused():
    pytest.importorskip("torchao")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        module = distribute_module(nn.Linear(2, 2), init_device_mesh("cpu", (1,)))
        with pytest.raises(SettingError, match="these are sharded"):
            loop.make_optimizer(module, replace(OPTIM, kind="adamw8bit"))
    finally:
        dist.destroy_process_group()
