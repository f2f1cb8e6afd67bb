"""Adversarial post-training: whose gradient is whose, both ways to compute it, and what each switch switches."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from seedvr2_core.errors import SettingError
from seedvr2_core.video.geometry import Grid
from tests.training.toys import untimed
from training import apt, doctor, journal, loop, losses, state
from training.apt import AdversarialStage, DiscConfig, LossConfig, PostTraining
from training.config import OptimConfig, RunConfig, check, override
from training.curriculum import Phase
from training.guards import GuardConfig, Guards
from training.randomness import torch_rng
from training.restorer import Restorer
from training.shards import HELD_OUT, InMemory, Latents

OPTIM = OptimConfig(lr=1e-3, final_lr=1e-3, betas=(0.0, 0.99), warmup=0)


IMAGE, CLIP = Grid(1, 4, 4), Grid(2, 4, 4)


class Noise(Latents):
    """Latents of noise and of noisier noise: images, and clips of 5 frames."""

    def __init__(self, dtype=torch.float32, shapes=(IMAGE, CLIP)):
        real = [torch.randn(HELD_OUT + 24, 16, *shape, generator=torch_rng(0, "noise", shape.t)) for shape in shapes]
        super().__init__(InMemory([{"hq": hq, "lq": hq + 0.5 * hq.flip(0)} for hq in real], scale=1.0), seed=0)
        self.dtype = dtype

    def batch(self, *args):
        found = super().batch(*args)
        return replace(found, hq=found.hq.to(self.dtype), lq=found.lq.to(self.dtype))


@pytest.fixture
def config(tiny_dit, tmp_path):
    return PostTraining(
        model=tiny_dit,
        run=RunConfig(steps=10),
        g=OPTIM,
        d=OPTIM,
        pretrained=str(tmp_path),
        distilled=str(tmp_path),
        curriculum=(Phase(share=0.5, frames=(1,)), Phase(share=0.5, frames=(1, 5))),
        batch=3,
    )


def make(config, dtype=torch.float32):
    """A stage whose weights are all alive, so that every gradient has somewhere to go."""
    torch.manual_seed(0)
    restorers = [Restorer(config.model).to(dtype) for _ in range(2)]
    for restorer in restorers:
        for parameter in restorer.parameters():
            nn.init.normal_(parameter, std=0.1)
    stage = AdversarialStage(config, Noise(dtype), *restorers)
    for parameter in stage.discriminator.parameters():
        nn.init.normal_(parameter, std=0.1)
    return stage


def everything(directory):
    """Every tensor of the last checkpoint, by name."""
    path = state.complete(directory / "checkpoints")[-1]
    tensors = {name: torch.empty(size) for name, size in state.stored(path).items() if not name.startswith("rng/")}
    state.Checkpoints(directory).load(path, tensors)
    return tensors


def gradients(stage, name, **arguments):
    stage.modules[name].zero_grad(set_to_none=True)
    scalars = stage.backward(name, **{"step": 6, "micro": 0, "scale": 1.0} | arguments)
    found = {key: p.grad.clone() for key, p in stage.modules[name].named_parameters() if p.grad is not None}
    return found, untimed(scalars)


def train(stage, name, steps):
    """One side alone, over and over on the batch of step 0."""
    optimizer = torch.optim.AdamW(stage.modules[name].parameters(), lr=5e-3)
    rows = []
    for _ in range(steps):
        rows.append(stage.backward(name, 0, 0, 1.0))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return rows


def assert_equal(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("loss", [
    LossConfig(), LossConfig(adv="ns", r2=0.0), LossConfig(r1=0.0, r2=0.0)
], ids=["rp", "ns+r1", "unregularised"])  # fmt: skip
def test_5_replayed_gradients_are_those_of_the_joint_graph(config, loss):
    joint = make(replace(config, loss=loss, disc=DiscConfig(backward="joint")), torch.float64)
    replay = make(replace(config, loss=loss, disc=DiscConfig(backward="replay")), torch.float64)
    (expected, a), (found, b) = gradients(joint, "d"), gradients(replay, "d")
    assert a == pytest.approx(b)
    assert max(gradient.abs().max() for gradient in expected.values()) > 1e-3
    assert_equal(found, expected, atol=1e-10, rtol=1e-10)


def test_6_the_generators_turn_leaves_the_discriminator_without_gradients(config):
    stage = make(config)
    found, _ = gradients(stage, "g")
    assert all(parameter.grad is None for parameter in stage.discriminator.parameters())
    assert all(parameter.requires_grad for parameter in stage.discriminator.parameters())
    trained = [name for name, parameter in stage.generator.named_parameters() if parameter.requires_grad]
    silent = [name for name in trained if name not in found or not found[name].any()]
    assert found and not silent


def test_6_feature_matching_alone_reaches_the_generator_and_not_the_discriminator(config):
    stage = make(replace(config, loss=LossConfig(w_adv=0.0, w_1=0.0, w_F=1.0)))
    found, scalars = gradients(stage, "g")
    assert all(parameter.grad is None for parameter in stage.discriminator.parameters())
    assert any(gradient.any() for gradient in found.values())
    assert scalars["g_loss"] == pytest.approx(scalars["feature_matching"])


def test_6_l1_can_be_a_share_of_what_the_condition_is_off_by(config):
    stage = make(replace(config, loss=LossConfig(w_adv=0.0, w_1=2.0, w_F=0.0, relative_1=True)))
    _, scalars = gradients(stage, "g")
    sample = stage.draw("g", 6, 0)
    expected = losses.relative_l1(stage.restore(sample), sample.real, sample.condition).item()
    assert scalars["g_loss"] == pytest.approx(2 * expected) and expected != pytest.approx(scalars["l1"])


def test_6_the_discriminators_turn_leaves_the_generator_without_gradients(config):
    stage = make(config)
    gradients(stage, "d")
    assert all(parameter.grad is None for parameter in stage.generator.parameters())


def test_a_failed_turn_of_the_generator_gives_the_discriminator_back(config):
    stage = make(config)
    stage.restore = lambda sample: 1 / 0
    with pytest.raises(ZeroDivisionError):
        stage.backward("g", 0, 0, 1.0)
    assert all(parameter.requires_grad for parameter in stage.discriminator.parameters())


def test_gradients_of_micro_batches_add_up(config):
    stage = make(config, torch.float64)
    first, _ = gradients(stage, "d", micro=0)
    second, _ = gradients(stage, "d", micro=1)
    stage.discriminator.zero_grad(set_to_none=True)
    for micro in range(2):
        stage.backward("d", 6, micro, 0.5)
    both = {name: p.grad for name, p in stage.discriminator.named_parameters() if p.grad is not None}
    assert_equal(both, {name: (first[name] + second[name]) / 2 for name in first}, atol=1e-10, rtol=1e-8)
    assert not torch.equal(first["readout.to_logit.weight"], second["readout.to_logit.weight"])


@pytest.mark.parametrize("name", ["d", "g"])
def test_a_step_depends_on_its_number_alone(config, name):
    stage = make(config)
    found, scalars = gradients(stage, name)
    torch.manual_seed(99)
    again, same = gradients(stage, name)
    assert_equal(again, found, atol=0, rtol=0)
    assert same == scalars
    assert gradients(stage, name, step=7)[1] != scalars


def test_the_halves_of_a_step_have_batches_and_noise_of_their_own(config):
    stage = make(config)
    d, g = (stage.draw(half, 3, 0) for half in ("d", "g"))
    for part in ("real", "condition", "noise", "u"):
        assert not torch.equal(getattr(d, part), getattr(g, part))


def test_real_restored_and_perturbed_share_condition_and_time(config):
    stage = make(config)
    sample = stage.draw("d", 0, 0)
    shown = stage.members(sample, torch.zeros_like(sample.real))
    assert list(shown) == ["r", "f", "r_near", "f_near"]
    seen = []
    stage.discriminator.register_forward_pre_hook(lambda module, args: seen.append(args))
    stage._judge(torch.cat(list(shown.values())), sample, copies=4)
    samples, condition, _, u = seen[0]
    for part in (condition, u):
        assert all(torch.equal(part.chunk(4)[0], other) for other in part.chunk(4))
    real, restored, near, near_restored = samples.chunk(4)
    assert (near - real).std().item() == pytest.approx(config.loss.sigma, rel=0.1)
    assert not torch.allclose(near - real, near_restored - restored)


def test_times_of_clips_lie_nearer_to_noise_than_those_of_images(config):
    stage = make(replace(config, batch=400))
    image = stage.draw("d", 0, 0)
    clip = next(sample for step in range(5, 10) if (sample := stage.draw("d", step, 0)).real.shape[2] == 2)
    assert image.u.mean().item() == pytest.approx(0.5, abs=0.05)
    assert clip.u.median().item() == pytest.approx(12 / 13, abs=0.02)


def test_the_generator_starts_from_pure_noise_and_lands_on_data(config):
    stage = make(config)
    sample = stage.draw("g", 0, 0)

    class Perfect:
        def velocity(self, x, condition, u, *texts):
            assert (u == 1).all() and torch.equal(x, sample.noise)
            return x - sample.real

    stage.generator = Perfect()
    torch.testing.assert_close(stage.restore(sample), sample.real)


def test_a_perfect_generator_is_measured_as_one(config):
    real = torch.randn(2, 16, 2, 8, 8)
    assert set(apt.comparison(real, real).values()) == {1.0}
    blurred = apt.comparison(real.mean(dim=(-2, -1), keepdim=True).expand_as(real), real)
    assert blurred["std_ratio_max"] < 1e-3 and blurred["high_frequency_ratio"] < 1e-3


def test_equal_logits_are_a_draw():
    _, scalars = apt.discriminator_loss({"r": torch.ones(4), "f": torch.ones(4)}, LossConfig(r1=0.0, r2=0.0))
    assert scalars["accuracy"] == 0.5 and scalars["gap"] == 0 and scalars["d_loss"] == pytest.approx(math.log(2))


def test_a_switched_off_penalty_is_neither_computed_nor_logged(config):
    whole = gradients(make(config), "d")[1]
    without = gradients(make(replace(config, loss=LossConfig(r2=0.0))), "d")[1]
    assert {"ar1", "ar2"} <= whole.keys() and "ar1" in without and "ar2" not in without
    assert whole["d_loss"] == pytest.approx(whole["d_adv"] + 1000 * (whole["ar1"] + whole["ar2"]))


def test_a_generator_without_any_loss_is_refused():
    with pytest.raises(SettingError, match="w_adv"):
        LossConfig(w_adv=0.0, w_1=0.0, w_F=0.0)


def test_the_lengths_of_a_step_are_those_of_its_phase(config):
    stage = make(replace(config, run=RunConfig(steps=10, micro_batches=2)))
    assert {stage.draw("d", step, 0).real.shape[2] for step in range(5)} == {1}
    assert {stage.draw("d", step, 0).real.shape[2] for step in range(5, 30)} == {1, 2}
    assert stage.draw("g", 7, 0).real.shape[2] == stage.draw("g", 7, 1).real.shape[2]


def test_a_phase_without_latents_is_refused_before_the_first_step(config):
    with pytest.raises(SettingError, match="asks for 9 frames"):
        make(replace(config, curriculum=(Phase(share=1.0, frames=(9,)),)))


def test_clips_are_cut_to_the_lengths_of_a_phase_and_more_of_them_fit(config):
    config = replace(config, curriculum=(Phase(share=1.0, frames=(5, 17)),), batch_tokens=40)
    latents = Noise(shapes=(IMAGE, Grid(5, 4, 4)))
    drawn = [apt.draw_pairs(latents, config, "g", step, 0) for step in range(20)]
    assert {tuple(pairs.hq.shape) for pairs in drawn} == {(5, 16, 2, 4, 4), (2, 16, 5, 4, 4)}
    assert all(pairs.hq.shape == pairs.lq.shape and pairs.bucket == pairs.hq.shape[2:] for pairs in drawn)


@pytest.mark.parametrize("batch_tokens, steps, image_epochs", [
    # 24 pictures and 24 clips: either are four batches of 2 x 3, those of clips long and short in turn.
    (None, 8, 1),
    # Two batches of 2 x 6 pictures, six of 2 x 3 short and 2 x 1 long clips.
    (24, 12, 3),
], ids=["so many pairs", "so many tokens"])  # fmt: skip
def test_10_each_half_sees_every_pair_once_an_epoch_at_one_of_the_lengths(config, batch_tokens, steps, image_epochs):
    latents = Noise(shapes=(IMAGE, Grid(5, 4, 4)))
    config = replace(config, run=RunConfig(steps=100, micro_batches=2), batch=3, batch_tokens=batch_tokens,
                     curriculum=(Phase(share=1.0, frames=(1, 5, 17)),))  # fmt: skip
    orders = []
    for half in ("d", "g"):
        drawn = [apt.draw_pairs(latents, config, half, step, micro) for step in range(steps) for micro in range(2)]
        assert {pairs.bucket.t for pairs in drawn} == {1, 2, 5}
        images, clips = ([n for pairs in drawn for n in pairs.ids if (pairs.bucket.t == 1) == wanted]
                         for wanted in (True, False))  # fmt: skip
        # Kinds take turns; the first samples of each are held out.
        assert sorted(images) == sorted([*range(HELD_OUT, HELD_OUT + 24)] * image_epochs)
        assert sorted(clips) == [*range(2 * HELD_OUT + 24, 2 * HELD_OUT + 48)]
        orders.append(clips)
    assert orders[0] != orders[1]


def test_a_prompt_that_was_learnt_before_stays_what_it_is(config):
    stage = make(config)
    assert not stage.generator.prompt.requires_grad
    assert all(parameter.requires_grad for parameter in stage.generator.dit.parameters())


def test_each_side_alone_lowers_its_own_loss(config):
    # A discriminator that has seen but three pairs may have nothing to say about three others.
    stage = make(replace(config, run=RunConfig(steps=1000), loss=LossConfig(r1=1.0, r2=1.0), batch=12))
    telling = train(stage, "d", 12)
    assert telling[-1]["d_adv"] < 0.7 * telling[0]["d_adv"]
    pleasing = train(stage, "g", 12)
    assert pleasing[-1]["g_adv"] < 0.7 * pleasing[0]["g_adv"]
    assert all(math.isfinite(value) for row in telling + pleasing for value in row.values())


def test_the_stage_starts_from_copies_of_stage_1(config):
    restorer = Restorer(config.model)
    before = copy.deepcopy(restorer.state_dict())
    stage = AdversarialStage(config, Noise(), Restorer(config.model), restorer)
    assert stage.backward("d", 0, 0, 1.0)["d_loss"] == pytest.approx(math.log(2))
    for parameter in stage.discriminator.parameters():
        nn.init.zeros_(parameter)
    assert all(torch.equal(a, before[name]) for name, a in restorer.state_dict().items())


def test_a_budget_of_tokens_makes_long_samples_few(config):
    budget = replace(config, batch_tokens=16)
    sizes = [apt.deal_of(budget).size(Grid(t, 4, 4)) for t in (1, 2, 9)]
    assert sizes == [4, 2, 1]
    assert len(make(budget).draw("d", 0, 0).real) == 4


@pytest.mark.parametrize("recipe", ["nano", "3b", "7b"])
def test_recipes_are_valid_and_can_be_changed_by_dotted_keys(recipe):
    config = override(apt.RECIPES[recipe], ["loss.adv=ns", "loss.w_F=0", "init=pretrain", "disc.t_shift=1,1"])
    check(config)
    assert (config.loss.adv, config.loss.w_F, config.init, config.disc.t_shift) == ("ns", 0.0, "pretrain", (1.0, 1.0))


def test_the_estimate_counts_both_networks_and_what_a_step_does(config):
    joint, replay = (
        doctor.measure(replaced, apt.workload(replaced))
        for replaced in (config, replace(config, disc=DiscConfig(backward="replay")))
    )
    stage = make(config)
    assert joint.parameters == {name: doctor.count(module) for name, module in stage.modules.items()}
    assert replay.activations < 0.3 * joint.activations and replay.peak < joint.peak
    assert joint.flops < replay.flops < 1.5 * joint.flops


def test_the_discriminator_starts_again_when_clips_join_the_images_if_that_is_wanted(config, tmp_path):
    again = replace(config, disc=replace(config.disc, reset_on_phase=True),
                    run=RunConfig(steps=8, save_every=8, validate_every=8, async_save=False))  # fmt: skip
    assert make(config).restarted == ()
    assert [step for step in range(1, 8) if make(again).restarts(step - 1, step)] == [4]

    def run(name, wanted):
        stage, seen = make(wanted), {}
        start = {key: value.clone() for key, value in stage.discriminator.state_dict().items()}
        backward = stage.backward

        def watched(half, step, micro, scale):
            if half == "d":
                weights = stage.discriminator.state_dict()
                seen[step] = all(torch.equal(weights[key], value) for key, value in start.items())
            return backward(half, step, micro, scale)

        stage.backward, stage.validate = watched, lambda module: {}
        loop.run(stage, wanted, {"d": OPTIM, "g": OPTIM}, tmp_path / name)
        return [step for step, is_fresh in seen.items() if is_fresh]

    assert run("kept", replace(again, disc=config.disc)) == [0]
    assert run("again", again) == [0, 4]
    steps = {name: value for name, value in everything(tmp_path / "again").items() if name.endswith("/step")}
    assert {value.item() for name, value in steps.items() if name.startswith("d.")} == {4.0}
    assert {value.item() for name, value in steps.items() if name.startswith("g.")} == {8.0}


def test_a_generator_that_is_outplayed_gets_more_turns_on_batches_of_their_own(config, tmp_path):
    stage, calls = make(config), []
    backward = stage.backward

    def watched(half, step, micro, scale):
        calls.append((half, step, micro))
        return backward(half, step, micro, scale) | ({"accuracy": 1.0} if half == "d" else {})

    stage.backward, stage.validate = watched, lambda module: {}
    changed = replace(config, run=RunConfig(steps=4, micro_batches=2, save_every=4, validate_every=4))
    guards = Guards(GuardConfig(on_spike="alert", patience=3, extra_turns=2))
    loop.run(stage, changed, {"d": OPTIM, "g": OPTIM}, tmp_path, loop.Session(guards=guards))
    turns = {step: [micro for half, at, micro in calls if half == "g" and at == step] for step in range(4)}
    # Found in the third step, after the discriminator's update.
    assert turns == {0: [0, 1], 1: [0, 1], 2: [0, 1, 2, 3, 4, 5], 3: [0, 1, 2, 3, 4, 5]}
    assert [row.get("g_turns") for row in journal.read(tmp_path / "metrics.jsonl")] == [None, None, 3, 3]
    first, later = (stage.draw("g", 3, micro) for micro in (0, 2))
    assert not torch.equal(first.noise, later.noise)
