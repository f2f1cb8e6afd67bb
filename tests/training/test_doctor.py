"""What a stage will cost: the numbers of the paper's models, and of a tiny one against what it does cost."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch

from seedvr2_core.errors import SettingError
from tests.training.toys import in_processes
from training import apt, distill, doctor, lora, pretrain, vae
from training.adapters import AdaptedLinear
from training.config import ParallelConfig
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
        run = replace(config.run, micro_batches=None, parallel=replace(config.run.parallel, **changes))
        changed = replace(config, run=run)
        return doctor.measure(changed, doctor.of_restorer(changed))

    plain, sharded, recomputed = cost(), cost(shard=4, sp=2), cost(activation_checkpoint=True)
    assert sharded.states == plain.states // 8
    assert sharded.activations == plain.activations // 2
    assert recomputed.activations < 0.5 * plain.activations
    assert recomputed.flops > plain.flops


def test_the_estimate_is_for_the_processes_that_torchrun_starts(config, monkeypatch):
    config = replace(config, run=replace(config.run, micro_batches=None))
    alone = doctor.measure(config, doctor.of_restorer(config))
    monkeypatch.setenv("WORLD_SIZE", "4")
    shared = doctor.measure(config, doctor.of_restorer(config))
    assert (alone.processes, shared.processes, shared.states) == (1, 4, alone.states // 4)
    assert "memory of each of 4 processes" in doctor.estimate(config, doctor.of_restorer(config))
    three = replace(config, run=replace(config.run, parallel=replace(config.run.parallel, sp=3)))
    with pytest.raises(SettingError, match="4 processes cannot be"):
        doctor.estimate(three, doctor.of_restorer(three))
    fixed = replace(config, run=replace(config.run, micro_batches=2))
    with pytest.raises(SettingError, match="2 micro-batches cannot be dealt to 4"):
        doctor.estimate(fixed, doctor.of_restorer(fixed))


def test_what_is_too_much_for_a_card_is_estimated_for_a_machine_of_eight_too(config, monkeypatch):
    run = replace(config.run, micro_batches=None)
    config = replace(config, run=run)
    assert "8 processes" not in doctor.estimate(config, doctor.of_restorer(config))
    monkeypatch.setattr(doctor, "CARD_BYTES", 0)
    alone, eight = doctor.costs(config, doctor.of_restorer(config))
    assert (alone.processes, eight.processes, eight.states) == (1, 8, alone.states // 8)
    assert doctor.in_words(alone, eight).endswith(f"8 processes: {eight.total / doctor.GIB:.1f} GiB each")
    # As many as are asked for are not estimated for others.
    sharded = replace(config, run=replace(run, parallel=replace(run.parallel, shard=2)))
    assert len(doctor.costs(sharded, doctor.of_restorer(sharded))) == 1


def test_counted_activations_are_those_that_a_real_pass_keeps(config):
    workload = doctor.of_restorer(config)
    counted = doctor.followed(workload.forward, [workload.trained["g"][0]])
    restorer = Restorer(config.model)
    x, u = torch.randn(config.batch, 16, *doctor.DEFAULT_SAMPLE), torch.rand(config.batch)
    real = doctor.followed(lambda: restorer.velocity(x, x, u).square().mean(), [restorer])
    assert counted.kept == pytest.approx(real.kept, rel=0.1)
    assert counted.peak() == pytest.approx(real.peak(), rel=0.1)


def test_a_guided_teacher_works_twice_as_hard(tiny_dit):
    recipe = replace(distill.RECIPES["nano"], model=tiny_dit)
    plain, guided = (doctor.measure(c, doctor.of_distillation(c)) for c in (recipe, replace(recipe, cfg=7.5)))
    forward = (guided.flops - plain.flops) / 2
    # Two passes of the teacher, one and two backwards of the student.
    assert plain.flops == pytest.approx(5 * forward, rel=0.05)


@pytest.mark.slow
def test_a_720p_clip_costs_what_the_paper_model_was_estimated_at():
    recipe = pretrain.RECIPES["3b"]
    restorer = doctor.on_meta(lambda: Restorer(recipe.model))
    assert doctor.count(restorer) > 3.39e9
    cost = doctor.measure(recipe, doctor.of_restorer(recipe, CLIP_720P))
    # 116 TFLOP forward; four of them with the backward pass and recomputation.
    assert cost.flops / 1e12 == pytest.approx(4 * 116, rel=0.15)
    # Inputs of 32 layers of 21 600 tokens, 2560 wide, in bf16.
    assert cost.activations / 1e9 == pytest.approx(3.5, rel=0.3)


@pytest.mark.parametrize("stage", [vae, pretrain, distill, apt, lora], ids=lambda stage: stage.__name__)
def test_a_dry_run_prints_config_and_cost_and_trains_nothing(stage, monkeypatch, capsys, tmp_path):
    out = tmp_path / "run"
    monkeypatch.setattr("sys.argv", ["stage", "--config", "nano", "--out", str(out), "--dry-run"])
    stage.main()
    printed = capsys.readouterr().out
    assert "parameters" in printed and "GiB" in printed and "steps:" in printed
    assert not out.exists()


def take(configs, init_method):
    """Estimated and measured bytes of every stage."""
    doctor.give_back_at_once()
    found = {}
    for name, config in configs.items():
        # What torch loads at first, and compiles for these sizes, is none of a stage's: 26 MB on a CPU with bf16.
        doctor.fake_steps(name, config)
        estimated = doctor.measure(config, doctor.workload_of(name, config)).total
        found[name] = estimated, doctor.fake_steps(name, config).held
    return found


def test_fake_steps_take_the_memory_that_was_estimated(config, tmp_path):
    pretraining = replace(config, model=replace(config.model, dim=64, mlp_hidden=128), batch=64)
    training = replace(apt.RECIPES["nano"], model=pretraining.model, batch=16)
    (found,) = in_processes(1, take, tmp_path, {"pretrain": pretraining, "apt": training})
    for name, (estimated, taken) in found.items():
        assert estimated == pytest.approx(taken, rel=0.15), name


def test_fake_steps_of_bf16_weights_take_the_memory_that_was_estimated(config, tmp_path):
    pytest.importorskip("torchao")
    run = replace(config.run, parallel=ParallelConfig(precision="pure_bf16"))
    config = replace(config, model=replace(config.model, dim=128, mlp_hidden=256), run=run, batch=32)
    config = replace(config, optim=replace(config.optim, kind="adamw8bit"))
    (found,) = in_processes(1, take, tmp_path, {"pretrain": config})
    estimated, taken = found["pretrain"]
    assert estimated == pytest.approx(taken, rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "card"), [("3b_48gb", 48), ("7b_80gb", 80)])
def test_a_recipe_for_one_gpu_leaves_room_on_it(name, card):
    recipe = pretrain.RECIPES[name]
    cost = doctor.measure(recipe, doctor.of_restorer(recipe))
    # For fragments of memory, and what CUDA takes itself.
    assert cost.processes == 1 and cost.total < (card - 8) * 1e9


@pytest.mark.parametrize("stage", ["distill", "vae", "lora"])
def test_every_stage_has_fake_steps_and_leaves_nothing_behind(stage, tiny_dit, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    recipe = importlib.import_module(f"training.{stage}").RECIPES["nano"]
    if stage == "vae":
        config = replace(recipe, crops=(vae.Crops(batch=1, size=32),), model=replace(recipe.model, widths=(8, 8, 8, 8)))
    else:
        config = replace(recipe, model=tiny_dit, batch=1)
    fake = doctor.fake_steps(stage, config)
    assert fake.seconds > 0 and fake.speed.endswith("/s") and fake.held >= 0
    assert not list(tmp_path.iterdir())


def test_what_a_backward_pass_frees_makes_room_for_gradients(config):
    config = replace(config, model=replace(config.model, dim=256, mlp_hidden=512), batch=1)
    cost = doctor.measure(config, doctor.of_restorer(config))
    assert max(cost.gradients, cost.activations) < cost.peak < cost.gradients + cost.activations
    accumulated = replace(config, run=replace(config.run, micro_batches=2))
    # The gradients of the first micro-batch are there while the second runs.
    assert doctor.measure(accumulated, doctor.of_restorer(accumulated)).peak > cost.gradients + cost.activations


@pytest.mark.parametrize(("kind", "bytes_each", "of_others"), [("fp32", 4, 4), ("bf16", 2, 2), ("fp8", 1, 2)])
def test_a_frozen_base_is_counted_in_the_type_it_has(tiny_dit, kind, bytes_each, of_others):
    recipe = lora.RECIPES["nano_flow"]
    config = replace(recipe, model=replace(tiny_dit, dim=256, heads=4, head_dim=64, mlp_hidden=512), batch=1)
    config = replace(config, lora=replace(config.lora, base=kind))
    workload = lora.workload(config)
    layers = [layer for layer in workload.helpers["base"].modules() if isinstance(layer, AdaptedLinear)]
    weights = sum(layer.weight.numel() for layer in layers)
    assert sum(layer.weight.numel() * layer.weight.element_size() for layer in layers) == bytes_each * weights
    counted = doctor.measure(config, workload).helpers
    others = doctor.count(workload.helpers["base"]) - weights
    assert counted == pytest.approx(bytes_each * weights + of_others * others, rel=0.1)


def test_adversarial_adapters_cost_two_sets_on_one_base(tiny_dit):
    recipes = (replace(lora.RECIPES[name], model=tiny_dit, batch=2) for name in ("nano_flow", "nano"))
    flow, game = (doctor.measure(config, lora.workload(config)) for config in recipes)
    assert flow.helpers == game.helpers and game.states > 2 * flow.states and game.peak > flow.peak


def test_offloaded_blocks_take_two_places_of_the_device_and_wait_on_the_host(tiny_dit):
    recipe = lora.RECIPES["3b_lora_flow_24gb"]
    recipe = replace(recipe, model=replace(tiny_dit, depth=6, separate_layers=6), batch=1)

    def cost(blocks: int) -> doctor.Cost:
        config = replace(recipe, lora=replace(recipe.lora, offload_blocks=blocks))
        return doctor.measure(config, lora.workload(config))

    none, four, six = cost(0), cost(4), cost(6)
    block = doctor.count(Restorer(recipe.model).dit.blocks[0]) * 2
    assert (none.host, none.peak) == (0, six.peak)
    # A buffer's parts begin at multiples of 256 bytes.
    assert four.host == pytest.approx(4 * block, rel=0.1) and six.host == pytest.approx(6 * block, rel=0.1)
    assert none.helpers - four.helpers == pytest.approx((4 - 2) * block, rel=0.1)
    assert four.helpers - six.helpers == pytest.approx(2 * block, rel=0.1)
    assert "host" in doctor.in_words(four) and "host" not in doctor.in_words(none)


def test_a_whole_generator_is_counted_and_a_discriminators_base_beside_it(tiny_dit):
    recipe = replace(lora.RECIPES["nano"], model=tiny_dit, batch=1)
    changes = ({}, {"disc": replace(recipe.disc, base="other")}, {"generator": "full"})
    configs = (replace(recipe, **change) for change in changes)
    adapters, apart, full = (doctor.measure(config, lora.workload(config)) for config in configs)
    weights = doctor.count(Restorer(tiny_dit))
    assert apart.helpers == 2 * adapters.helpers == 2 * full.helpers and apart.states == adapters.states
    assert full.parameters["g"] == weights
    assert full.states - adapters.states == 20 * (weights - adapters.parameters["g"])


def test_what_a_bf16_base_computes_is_not_halved_again_in_a_bf16_run(tiny_dit):
    recipe = replace(lora.RECIPES["3b_lora_flow_24gb"], model=replace(tiny_dit, dim=64, mlp_hidden=128), batch=1)
    parallel = replace(recipe.run.parallel, precision="bf16", activation_checkpoint=False)
    config = replace(recipe, run=replace(recipe.run, parallel=parallel))
    plain = replace(config, run=replace(config.run, parallel=replace(parallel, precision="fp32")))
    half, whole = (doctor.measure(each, lora.workload(each)).activations for each in (config, plain))
    exact = replace(config, lora=replace(config.lora, base="fp32"))
    assert half > 0.8 * whole
    assert half == pytest.approx(doctor.measure(exact, lora.workload(exact)).activations, rel=0.2)


def test_replay_needs_no_more_than_the_generators_half(tiny_dit):
    recipe = replace(apt.RECIPES["nano"], model=tiny_dit, batch=2)
    joint = doctor.measure(recipe, apt.workload(recipe))
    recipe = replace(recipe, disc=replace(recipe.disc, backward="replay"))
    replay = doctor.measure(recipe, apt.workload(recipe))
    assert replay.activations < replay.peak - replay.gradients
    assert replay.peak < 0.6 * joint.peak
