"""Flow matching: the sign, the batch it is given, and that it learns."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from seedvr2_core.diffusion.sampler import sample
from seedvr2_core.diffusion.schedule import interpolate, velocity
from seedvr2_core.errors import CheckpointError, SettingError
from tests.training.toys import untimed
from training import loop, pretrain
from training.buckets import Deal
from training.config import OptimConfig, RunConfig
from training.pretrain import Growth, Pretraining, PretrainStage, noised_condition
from training.restorer import Restorer
from training.shards import HELD_OUT, Latents

OPTIM = OptimConfig(lr=3e-3, final_lr=1e-3, warmup=2, weight_decay=0.0)


@pytest.fixture
def config(tiny_dit):
    return Pretraining(
        model=tiny_dit,
        run=RunConfig(steps=4, save_every=2, validate_every=4, preview_every=4, async_save=False),
        optim=OPTIM,
        batch=4,
    )


class Stopping(PretrainStage):
    """The stage in a process that ends at step 2."""

    def backward(self, name, step, micro, scale):
        if step == 2:
            raise KeyboardInterrupt
        return super().backward(name, step, micro, scale)


class Perfect(nn.Module):
    """A restorer that knows the clean latents."""

    def __init__(self, data: torch.Tensor):
        super().__init__()
        self.data = data
        self.weight, self.prompt = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1, 24))
        self.device = self.weight.device

    def velocity(self, x, condition, u, dropped=None, texts=None):
        return (x - self.data) / u.view(-1, 1, 1, 1, 1) + self.weight


def test_noise_minus_velocity_is_data():
    data, noise = torch.randn(2, 2, 16, 1, 4, 4).unbind()
    assert torch.equal(interpolate(data, noise, 1.0), noise)
    torch.testing.assert_close(noise - velocity(data, noise), data)
    torch.testing.assert_close(sample(lambda x, u: velocity(data, noise), noise, steps=1), data)


def test_a_restorer_that_knows_the_answer_has_no_loss(config, latents):
    stage = PretrainStage(config, latents)
    data = latents.batch(0, Deal(samples=config.batch)).hq
    stage.modules = {"g": Perfect(data)}
    assert stage.backward("g", 0, 0, 1.0)["loss"] < 1e-9


def test_a_prompt_is_learnt_only_where_a_model_begins(config, latents):
    assert PretrainStage(config, latents).modules["g"].prompt.requires_grad
    assert not PretrainStage(replace(config, init="3b"), latents).modules["g"].prompt.requires_grad


def test_samples_grow_with_the_run(config, latents):
    growing = (Growth(share=0.5, frames=(1,)), Growth(share=0.5, frames=(5,)))
    config = replace(config, run=replace(config.run, steps=8), batch_tokens=16, curriculum=growing)
    stage = PretrainStage(config, latents)
    lengths = [stage.draw(step, 0, torch.device("cpu"))[0].shape[2] for step in range(8)]
    assert lengths == [1] * 4 + [2] * 4
    with pytest.raises(SettingError, match="asks for 97 frames"):
        PretrainStage(replace(config, curriculum=(Growth(share=1.0, frames=(97,)),)), latents)


def test_a_fresh_restorer_predicts_nothing_and_has_the_loss_of_that(config, latents):
    loss = PretrainStage(config, latents).backward("g", 0, 0, 1.0)["loss"]
    # Unit noise minus unit data.
    assert loss == pytest.approx(2.0, rel=0.25)


def test_the_loss_of_a_micro_batch_depends_on_its_number_alone(config, latents):
    stage = PretrainStage(config, latents)
    first = stage.backward("g", 3, 1, 1.0)
    torch.manual_seed(99)
    torch.randn(10)
    assert untimed(stage.backward("g", 3, 1, 0.5)) == untimed(first)
    assert stage.backward("g", 4, 1, 1.0)["loss"] != first["loss"] != stage.backward("g", 3, 0, 1.0)["loss"]
    # 2 x 2 latent positions are a token.
    assert (first["samples"], first["tokens"]) == (4, 4 * first["frames"] * 2 * 2)


def test_training_lowers_the_loss_on_a_fixed_batch(config, latents):
    stage = PretrainStage(config, latents)
    optimizer = torch.optim.AdamW(stage.modules["g"].parameters(), lr=OPTIM.lr)
    losses = []
    for _ in range(30):
        losses.append(stage.backward("g", 0, 0, 1.0)["loss"])
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.7 * losses[0]


def test_every_weight_that_matters_receives_a_gradient(config, latents):
    stage = PretrainStage(config, latents)
    for parameter in stage.modules["g"].parameters():
        # Gates and the last projection start at zero and hide what lies behind them.
        nn.init.normal_(parameter, std=0.1)
    stage.backward("g", 0, 0, 1.0)
    silent = {name for name, p in stage.modules["g"].named_parameters() if p.grad is None or not p.grad.any()}
    assert not silent


def test_an_interrupted_run_continues_to_the_bit(config, latents, tmp_path):
    optims = {"g": OPTIM}
    whole = loop.run(PretrainStage(config, latents), config, optims, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        loop.run(Stopping(config, latents), config, optims, tmp_path / "halves")
    loop.run(PretrainStage(config, latents), config, optims, tmp_path / "halves")
    halves = pretrain.load_run(tmp_path / "halves", config.model)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), halves.parameters(), strict=True))
    pictures = {path.name for path in (tmp_path / "halves/previews/step_000004").iterdir()}
    assert pictures == {"1x4x4.png", "2x4x4.png", "2x4x4_time.png"}


def test_latents_come_in_unit_variance_and_take_turns_between_kinds(latents):
    everything = torch.cat([torch.cat(pair).flatten() for pair in latents.held_out()])
    assert everything.std() == pytest.approx(1.0, abs=0.1)
    assert [latents.batch(step, Deal(samples=2)).hq.shape[2] for step in range(4)] == [1, 2, 1, 2]


def test_held_out_latents_are_never_trained_on(latents):
    kept = {latent.sum().item() for hq, _ in latents.held_out() for latent in hq}
    drawn = {latent.sum().item() for step in range(50) for latent in latents.batch(step, Deal(samples=8)).hq}
    assert len(kept) == 2 * HELD_OUT
    assert not kept & drawn


def test_an_empty_folder_of_latents_names_the_stage_before(tmp_path):
    with pytest.raises(CheckpointError, match="precompute"):
        Latents(tmp_path, seed=0)


def test_condition_noise_differs_between_samples_and_can_be_off():
    lq = torch.randn(6, 16, 2, 4, 4)
    assert torch.equal(noised_condition(lq, seed=0, step=1, most=0.0), lq)
    noised = noised_condition(lq, seed=0, step=1, most=0.25)
    changes = (noised - lq).flatten(1).norm(dim=1)
    assert (changes > 0).all() and changes.unique().numel() == 6
    assert torch.equal(noised, noised_condition(lq, seed=0, step=1, most=0.25))


def test_a_dropped_prompt_is_a_prompt_of_zeros(tiny_dit):
    torch.manual_seed(0)
    restorer = Restorer(tiny_dit).requires_grad_(False)
    for parameter in restorer.parameters():
        nn.init.normal_(parameter, std=0.1)
    x, condition = torch.randn(2, 2, 16, 1, 4, 4).unbind()
    u = torch.tensor([0.5, 0.9])
    one_dropped = restorer.velocity(x, condition, u, torch.tensor([True, False]))
    with_prompt = restorer.velocity(x, condition, u)
    restorer.prompt.zero_()
    without = restorer.velocity(x, condition, u)
    torch.testing.assert_close(one_dropped[0], without[0])
    torch.testing.assert_close(one_dropped[1], with_prompt[1])
    assert not torch.allclose(with_prompt[0], without[0])
