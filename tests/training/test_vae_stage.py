"""The autoencoder's stage: its crops, its loss, its game, its held-out score, and an exact resume."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from seedvr2_core.errors import MediaError, SettingError
from tests.training.toys import untimed
from training import doctor, loop, losses, state
from training import vae as vae_stage
from training.config import OptimConfig, ParallelConfig, RunConfig, check
from training.data import DataConfig, Dataset
from training.ema import local
from training.journal import METRICS, read
from training.patch_discriminator import PatchConfig
from training.procedural import still
from training.vae import (
    NANO_VAE,
    RECIPES,
    Crops,
    DiscConfig,
    PerceptualConfig,
    Phase,
    VAEStage,
    VAETraining,
    crops_at,
    held_out_crops,
    optims,
)
from training.weights import open_vae

CONFIG = VAETraining(
    model=NANO_VAE,
    run=RunConfig(steps=4, save_every=2, validate_every=4, preview_every=4, async_save=False),
    optim=OptimConfig(lr=1e-4, final_lr=1e-5, warmup=0, full_rate_inputs=50),
    crops=(Crops(batch=1, size=32, frames=5), Crops(batch=2, size=32)),
)
ALONE = replace(CONFIG, model=replace(NANO_VAE, widths=(8, 16, 16, 16)), start="random")
GAME = replace(
    ALONE,
    w_g=0.05,
    adv_from=0.5,
    disc=DiscConfig(model=PatchConfig(width=8, levels=2, groups=4)),
)


class Stopping(VAEStage):
    """The stage in a process that ends at step 2."""

    def backward(self, name, step, micro, scale):
        if step == 2:
            raise KeyboardInterrupt
        return super().backward(name, step, micro, scale)


@pytest.fixture(scope="module")
def data():
    pictures = [still(0, index, 192)[None] for index in range(3)]
    return Dataset(pictures, [], [], DataConfig(stills=0, max_reduction=1.0))


@pytest.fixture(scope="module")
def held_out(data):
    return [
        data.sample_batch(1000, batch=1, size=32),
        data.sample_batch(1000, kind="clip", batch=1, size=32, frames=5),
    ]


@pytest.fixture(scope="module")
def stage(data, held_out):
    """Shared, so leave it as it is."""
    return VAEStage(CONFIG, data, held_out)


def test_kinds_of_crops_take_turns(stage):
    assert [stage.backward("g", step, 0, 1.0)["frames"] for step in range(4)] == [5, 1, 5, 1]


def test_the_loss_of_a_micro_batch_depends_on_its_number_alone(stage):
    first = stage.backward("g", 1, 0, 1.0)
    torch.manual_seed(99)
    assert untimed(stage.backward("g", 1, 0, 0.5)) == untimed(first)
    assert stage.backward("g", 3, 0, 1.0)["loss"] != first["loss"] != stage.backward("g", 1, 1, 1.0)["loss"]


def test_the_loss_is_the_weighted_sum_of_the_logged_terms(stage):
    terms = stage.backward("g", 0, 0, 1.0)
    expected = terms["l1"] + CONFIG.perceptual.weight * terms["spectral"] + CONFIG.w_kl * terms["kl"]
    assert terms["loss"] == pytest.approx(expected, rel=1e-5)


def test_the_score_of_pictures_and_of_clips_is_their_psnr(stage, held_out):
    scores = stage.validate(stage.modules["g"])
    assert list(scores) == ["detail_clip", "detail_image", "psnr_clip", "psnr_image"]
    # A linear codec on leaves and gratings: rough, but a picture.
    assert all(12 < scores[f"psnr_{kind}"] < 40 and 0.01 < scores[f"detail_{kind}"] < 1 for kind in ("image", "clip"))

    class Identity(nn.Linear):
        def encode(self, clip):
            return torch.cat([clip, torch.zeros_like(clip)], dim=1)

        def decode(self, latent):
            return latent + 0.2

    # 0.2 in -1..1 is a tenth of the range, less where the sum is clamped.
    assert stage.validate(Identity(1, 1))["psnr_image"] == pytest.approx(20.0, abs=1.0)


def test_training_lowers_the_loss_on_a_fixed_batch(data, held_out):
    stage = VAEStage(replace(CONFIG, crops=CONFIG.crops[1:]), data, held_out)
    module = stage.modules["g"]
    groups = loop.parameter_groups(module, CONFIG.optim)
    optimizer = torch.optim.AdamW([{**group, "lr": 1e-3 * group["rate"]} for group in groups], weight_decay=0.0)
    losses = []
    for _ in range(20):
        losses.append(stage.backward("g", 0, 0, 1.0)["loss"])
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("config", [ALONE, replace(GAME, adv_from=0.25)], ids=["alone", "game_from_step_1"])
def test_an_interrupted_run_continues_to_the_bit(config, data, held_out, tmp_path):
    loop.run(VAEStage(config, data, held_out), config, optims(config), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        loop.run(Stopping(config, data, held_out), config, optims(config), tmp_path / "halves")
    assert [path.name for path in state.complete(tmp_path / "halves/checkpoints")] == ["step_000002"]
    loop.run(VAEStage(config, data, held_out), config, optims(config), tmp_path / "halves")
    for name in ("ema", *optims(config)):
        whole, halves = (state.load_averaged(tmp_path / run, name) for run in ("whole", "halves"))
        assert whole and all(torch.equal(whole[key], halves[key]) for key in whole)


def test_held_out_crops_are_the_middle_of_every_picture(tmp_path):
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[8:40, 16:48] = 255
    for kind in ("images", "clips"):
        (tmp_path / "eval" / kind).mkdir(parents=True)
    Image.fromarray(pixels).save(tmp_path / "eval/images/middle.png")
    (tmp_path / "eval/images/notes.txt").write_text("not a picture")
    (crop,) = held_out_crops(tmp_path, size=32)
    assert crop.shape == (1, 3, 1, 32, 32)
    assert (crop == 1).all()


@pytest.mark.parametrize("second", [ALONE, replace(GAME, adv_from=0.0)], ids=["alone", "game"])
def test_a_frozen_encoder_keeps_its_latents_while_the_decoder_learns(second, data, held_out, tmp_path):
    first = replace(CONFIG, start=second.start, model=second.model)
    loop.run(VAEStage(first, data, held_out), first, optims(first), tmp_path / "both")
    config = replace(second, init=tmp_path / "both", freeze_encoder=True)
    before = open_vae(tmp_path / "both").state_dict()
    loop.run(VAEStage(config, data, held_out), config, optims(config), tmp_path / "decoder")
    after = open_vae(tmp_path / "decoder").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("decoder.")}


def test_a_start_of_other_sizes_is_refused(data):
    config = replace(CONFIG, init="nano", model=replace(NANO_VAE, widths=(16, 32, 64, 64)))
    with pytest.raises(SettingError, match="other sizes"):
        VAEStage(config, data, [])


def test_crops_grow_by_shares_of_the_steps():
    small, middle, large = (Crops(batch=1, size=32, frames=frames) for frames in (1, 5, 9))
    phases = (Phase(share=0.3, crops=(small,)), Phase(share=0.2, crops=(small, middle)))
    config = replace(CONFIG, run=RunConfig(steps=10), curriculum=phases, crops=(large, small))
    frames = [crops_at(step, config).frames for step in range(10)]
    assert frames == [1, 1, 1, 5, 1, 1, 9, 1, 9, 1]


# The game.


@pytest.fixture
def game(data, held_out):
    """A stage whose discriminator has an opinion: a new one has none, and no gradient goes through it."""
    stage = VAEStage(GAME, data, held_out)
    nn.init.normal_(stage.critic.to_logit.weight, std=0.1)
    return stage


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def test_there_is_no_discriminator_without_a_weight(stage):
    assert list(stage.modules) == ["g"] and not hasattr(stage, "critic")
    assert optims(CONFIG) == {"g": CONFIG.optim}


def test_before_its_time_the_discriminator_costs_nothing(game, monkeypatch):
    def refuse(*args):
        raise AssertionError("asked too early")

    monkeypatch.setattr(game.critic, "forward", refuse)
    assert game.backward("d", 1, 0, 1.0) == {}
    assert "g_adv" not in game.backward("g", 1, 0, 1.0)
    with pytest.raises(AssertionError, match="too early"):
        game.backward("d", 2, 0, 1.0)


def test_the_discriminators_half_leaves_the_autoencoder_alone(game):
    scalars = game.backward("d", 2, 0, 1.0)
    assert not gradients(game.vae)
    assert gradients(game.critic).keys() == dict(game.critic.named_parameters()).keys()
    assert {"d_loss", "gap", "accuracy"} <= scalars.keys()
    assert 0 <= scalars["accuracy"] <= 1


def test_6_the_autoencoders_half_leaves_the_discriminator_alone(game):
    before = gradients_of_autoencoder(game, 0.05)
    assert not gradients(game.critic)
    assert all(p.requires_grad for p in game.critic.parameters())
    without = gradients_of_autoencoder(game, 0.0)
    # The opinion reaches the encoder too, through the latents.
    assert before.keys() == without.keys() == dict(game.vae.named_parameters()).keys()
    for name in ("decoder.conv_out.weight", "encoder.conv_in.bias"):
        assert not torch.equal(before[name], without[name])


def gradients_of_autoencoder(stage, weight):
    stage.vae.zero_grad(set_to_none=True)
    stage.config = replace(GAME, w_g=weight)
    stage.backward("g", 2, 0, 1.0)
    return gradients(stage.vae)


def test_with_a_frozen_encoder_the_opinion_reaches_the_decoder_alone(data):
    stage = VAEStage(replace(GAME, freeze_encoder=True), data, [])
    stage.backward("g", 2, 0, 1.0)
    assert {name.partition(".")[0] for name in gradients(stage.vae)} == {"decoder"}


def test_the_two_halves_share_no_batch(game, monkeypatch):
    drawn = []
    sample_batch = game.data.sample_batch

    def watched(place, **kind):
        drawn.append(place)
        return sample_batch(place, **kind)

    monkeypatch.setattr(game.data, "sample_batch", watched)
    for step in (2, 3):
        for name in ("d", "g"):
            game.backward(name, step, 0, 1.0)
    assert drawn == [-3, 2, -4, 3]


@pytest.mark.parametrize("loss, value, logged", [("hinge", 2.0, "d_hinge"), ("rp", 0.6931, "d_adv")])
def test_an_indifferent_discriminator_has_the_loss_of_one(data, loss, value, logged):
    stage = VAEStage(replace(GAME, disc=replace(GAME.disc, loss=loss)), data, [])
    scalars = stage.backward("d", 2, 0, 1.0)
    assert scalars[logged] == scalars["d_loss"] == pytest.approx(value, abs=1e-4)
    assert scalars["accuracy"] == 0.5 and scalars["gap"] == 0


def test_the_loss_with_an_opinion_is_the_weighted_sum_of_the_logged_terms(game):
    terms = game.backward("g", 2, 0, 1.0)
    expected = terms["l1"] + 0.01 * terms["spectral"] + 1e-6 * terms["kl"] + 0.05 * terms["g_adv"]
    assert terms["loss"] == pytest.approx(expected, rel=1e-5)
    assert terms["adv_weight"] == 0.05


def test_an_adaptive_opinion_pulls_half_as_hard_as_all_else(game):
    game.config = replace(GAME, adaptive=True, w_g=1.0, w_kl=0.0)
    weight = game.backward("g", 2, 0, 1.0)["adv_weight"]
    clip = game.draw(2, 2)
    restored = game.restore(clip, "posterior", 2, 0)[0]
    terms = (losses.l1(restored, clip) + 0.01 * losses.spectral(restored, clip), game.critic(restored).mean())
    pulls = [torch.autograd.grad(term, restored, retain_graph=True)[0].norm() for term in terms]
    assert weight == pytest.approx((0.5 * pulls[0] / pulls[1]).item(), rel=0.01)


def test_an_opinion_adapts_in_bf16_as_in_fp32_and_leaves_the_same_gradient(data):
    found = []
    for precision in ("fp32", "bf16"):
        run = replace(GAME.run, parallel=ParallelConfig(precision=precision))
        stage = VAEStage(replace(GAME, adaptive=True, w_g=1.0, run=run), data, [])
        torch.manual_seed(0)
        nn.init.normal_(stage.critic.to_logit.weight, std=0.1)
        processes = loop.connect(run.parallel, torch.device("cpu"))
        for module in stage.modules.values():
            processes.place(module)
        weight = stage.backward("g", 2, 0, 1.0)["adv_weight"]
        assert not gradients(stage.critic)
        layers = stage.vae.decoder.conv_out, stage.vae.encoder.conv_in
        found.append((weight, [local(layer.weight.grad).flatten() for layer in layers]))
    (weight, exact), (rounded, near) = found
    assert rounded == pytest.approx(weight, rel=0.1)
    for a, b in zip(exact, near, strict=True):
        assert b.norm().item() == pytest.approx(a.norm().item(), rel=0.1)
        assert torch.cosine_similarity(a, b, dim=0) > 0.97


def test_playing_teaches_the_discriminator_and_is_logged(data, held_out, tmp_path):
    run = replace(GAME.run, steps=30, save_every=30, validate_every=30, preview_every=None)
    config = replace(GAME, adv_from=0.0, run=run)
    fast = OptimConfig(lr=3e-3, final_lr=3e-3, betas=(0.5, 0.9), weight_decay=0.0, warmup=0)
    config = replace(config, crops=config.crops[1:], disc=replace(config.disc, optim=fast))
    loop.run(VAEStage(config, data, held_out), config, optims(config), tmp_path)
    rows = read(tmp_path / METRICS)
    assert {"loss", "l1", "spectral", "kl", "g_adv", "d_loss", "gap", "accuracy", "high_frequency_ratio", "d_grad_norm",
            "g_grad_norm"} <= rows[-1].keys()  # fmt: skip
    assert rows[0]["d_loss"] == 2.0
    assert sum(row["accuracy"] for row in rows[-5:]) / 5 > 0.6 and rows[-1]["gap"] > 0


# The perceptual term.


def test_without_a_perceptual_term_there_is_none(data):
    terms = VAEStage(replace(CONFIG, perceptual=PerceptualConfig(kind="none")), data, []).backward("g", 0, 0, 1.0)
    assert "spectral" not in terms
    assert terms["loss"] == pytest.approx(terms["l1"] + 1e-6 * terms["kl"], rel=1e-5)


def test_lpips_looks_at_eight_frames_drawn_at_random(data, monkeypatch):
    class Counting(nn.Module):
        def forward(self, restored, clip):
            seen.append(clip)
            return (restored - clip).square().mean(dim=(1, 2, 3))

    seen = []
    monkeypatch.setattr(vae_stage, "open_lpips", Counting)
    crops = (Crops(batch=2, size=32, frames=5), Crops(batch=2, size=32))
    config = replace(CONFIG, perceptual=PerceptualConfig(kind="lpips-vgg", weight=1.0), crops=crops)
    stage = VAEStage(config, data, [])
    terms = [stage.backward("g", step, 0, 1.0) for step in (0, 1, 0)]
    assert [tuple(frames.shape) for frames in seen] == [(8, 3, 32, 32), (2, 3, 32, 32), (8, 3, 32, 32)]
    assert terms[0]["lpips"] > 0 and untimed(terms[0]) == untimed(terms[2])


# Recipes.


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_in_range_and_can_be_costed(name):
    config = RECIPES[name]
    check(config)
    if name != "published":
        cost = doctor.measure(config, vae_stage.workload(config))
        assert list(cost.parameters) == list(optims(config))


def test_the_published_recipe_has_the_published_sizes():
    config = RECIPES["published"]
    vae = doctor.on_meta(lambda: vae_stage.VideoVAE(config.model))
    assert doctor.count(vae) / 1e6 == pytest.approx(250.6, abs=0.1)
    steps = config.run.steps
    places = (0.0, 0.298, 0.35, 0.6, 0.99)
    assert [crops_at(round(share * steps), config).frames for share in places] == [1, 1, 5, 17, 17]
    final = [crops_at(step, config) for step in range(steps - 5, steps)]
    assert sorted(crops.frames for crops in final) == [1, 17, 17, 17, 17]


def test_in_bf16_masters_stay_fp32_and_the_loss_is_that_of_fp32_but_for_rounding(data, held_out, tmp_path, monkeypatch):
    config = replace(GAME, adv_from=0.0, run=replace(GAME.run, steps=1, validate_every=1, preview_every=None))
    rows = []
    for precision in ("fp32", "bf16"):
        own = replace(config, run=replace(config.run, parallel=ParallelConfig(precision=precision)))
        session = loop.Session(processes=loop.connect(own.run.parallel, torch.device("cpu")))
        module = loop.run(VAEStage(own, data, held_out), own, optims(own), tmp_path / precision, session)
        assert all(p.dtype == torch.float32 for p in module.parameters())
        rows.append(read(tmp_path / precision / METRICS)[0])
    assert rows[1]["l1"] == pytest.approx(rows[0]["l1"], rel=0.05)


def test_how_crops_are_drawn_is_a_setting(tmp_path, monkeypatch):
    drawn = []

    def load(root, config):
        drawn.append((root, config))
        raise MediaError("seen")

    monkeypatch.setattr(Dataset, "load", load)
    where = ["--data", str(tmp_path), "--out", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["vae", "--config", "nano", *where, "data.stills=2", "data.moving_photo=0.5"])
    with pytest.raises(MediaError, match="seen"):
        vae_stage.main()
    assert drawn == [(tmp_path, DataConfig(stills=2, moving_photo=0.5))]
