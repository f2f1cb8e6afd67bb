"""What a stage will cost: the numbers of the paper's models, and of a tiny one against what it does cost."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from training import distill, doctor, pretrain, vae
from training.restorer import Restorer

CLIP_720P = (6, 90, 160)  # latent of 21 frames of 1280 x 720


@pytest.fixture
def config(tiny_dit):
    recipe = pretrain.RECIPES["nano"]
    run = replace(recipe.run, parallel=replace(recipe.run.parallel, activation_checkpoint=False))
    return replace(recipe, model=tiny_dit, run=run, batch=4)


@pytest.mark.parametrize(("name", "millions"), [("3b", 3391.5), ("7b", 8239.6)])
def test_the_published_models_have_as_many_parameters_as_the_paper_counts(name, millions):
    restorer = doctor.on_meta(lambda: Restorer(pretrain.RECIPES[name].model))
    assert doctor.count(restorer.dit) / 1e6 == pytest.approx(millions, abs=0.1)


@pytest.mark.parametrize(("kind", "bytes_each"), [("adamw", 20), ("rmsprop", 16)])
def test_a_parameter_takes_its_master_gradient_optimiser_and_average(config, kind, bytes_each):
    config = replace(config, optim=replace(config.optim, kind=kind))
    workload = doctor.of_restorer(config)
    assert doctor.measure(config, workload).states == bytes_each * doctor.count(workload.trained["g"][0])


def test_sharding_divides_the_states_and_recomputation_the_activations(config):
    def cost(**changes):
        changed = replace(config, run=replace(config.run, parallel=replace(config.run.parallel, **changes)))
        return doctor.measure(changed, doctor.of_restorer(changed))

    plain, sharded, recomputed = cost(), cost(shard=4, sp=2), cost(activation_checkpoint=True)
    assert sharded.states == plain.states // 8
    assert sharded.activations == plain.activations // 2
    assert recomputed.activations < 0.5 * plain.activations
    assert recomputed.flops > plain.flops


def test_counted_activations_are_those_that_a_real_pass_keeps(config):
    counted = doctor.saved_bytes(doctor.of_restorer(config).forward)
    restorer = Restorer(config.model)
    x, u = torch.randn(config.batch, 16, *doctor.DEFAULT_SAMPLE), torch.rand(config.batch)
    kept = doctor.saved_bytes(lambda: restorer.velocity(x, x, u).square().mean())
    assert counted == pytest.approx(kept, rel=0.1)


def test_a_guided_teacher_works_twice_as_hard(tiny_dit):
    recipe = replace(distill.RECIPES["nano"], model=tiny_dit)
    plain, guided = (doctor.measure(c, doctor.of_distillation(c)) for c in (recipe, replace(recipe, cfg=7.5)))
    forward = (guided.flops - plain.flops) / 2
    # Two passes of the teacher, one and two backwards of the student.
    assert plain.flops == pytest.approx(5 * forward, rel=0.05)


def test_a_720p_clip_costs_what_the_paper_model_was_estimated_at():
    recipe = pretrain.RECIPES["3b"]
    restorer = doctor.on_meta(lambda: Restorer(recipe.model))
    assert doctor.count(restorer) > 3.39e9
    cost = doctor.measure(recipe, doctor.of_restorer(recipe, CLIP_720P))
    # 116 TFLOP forward; four of them with the backward pass and recomputation.
    assert cost.flops / 1e12 == pytest.approx(4 * 116, rel=0.15)
    # Inputs of 32 layers of 21 600 tokens, 2560 wide, in bf16.
    assert cost.activations / 1e9 == pytest.approx(3.5, rel=0.3)


@pytest.mark.parametrize("stage", [vae, pretrain, distill], ids=lambda stage: stage.__name__)
def test_a_dry_run_prints_config_and_cost_and_trains_nothing(stage, monkeypatch, capsys, tmp_path):
    out = tmp_path / "run"
    monkeypatch.setattr("sys.argv", ["stage", "--config", "nano", "--out", str(out), "--dry-run"])
    stage.main()
    printed = capsys.readouterr().out
    assert "parameters" in printed and "GiB" in printed and "steps:" in printed
    assert not out.exists()


def test_fake_steps_train_and_leave_nothing_behind(config):
    seconds, held = doctor.fake_steps("pretrain", config)
    assert seconds > 0 and held >= 0
