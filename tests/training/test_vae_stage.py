"""The autoencoder's stage: its crops, its loss, its held-out score, and an exact resume."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from training import loop, state
from training import vae as vae_stage
from training.config import OptimConfig, RunConfig
from training.data import DataConfig, Dataset
from training.procedural import still
from training.vae import NANO_VAE, Crops, VAEStage, VAETraining, held_out_crops

CONFIG = VAETraining(
    model=NANO_VAE,
    run=RunConfig(steps=4, save_every=2, validate_every=4, preview_every=4, async_save=False),
    optim=OptimConfig(lr=1e-4, final_lr=1e-5, warmup=0, full_rate_inputs=50),
    crops=(Crops(batch=1, size=32, frames=5), Crops(batch=2, size=32)),
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
    assert stage.backward("g", 1, 0, 0.5) == first
    assert stage.backward("g", 3, 0, 1.0)["loss"] != first["loss"] != stage.backward("g", 1, 1, 1.0)["loss"]


def test_the_loss_is_the_weighted_sum_of_the_logged_terms(stage):
    terms = stage.backward("g", 0, 0, 1.0)
    expected = terms["l1"] + CONFIG.w_spectral * terms["spectral"] + CONFIG.w_kl * terms["kl"]
    assert terms["loss"] == pytest.approx(expected, rel=1e-5)


def test_the_score_of_pictures_and_of_clips_is_their_psnr(stage, held_out):
    scores = stage.validate(stage.modules["g"])
    assert scores.keys() == {"psnr_image", "psnr_clip"}
    # A linear codec on leaves and gratings: rough, but a picture.
    assert all(12 < score < 40 for score in scores.values())

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


def test_an_interrupted_run_continues_to_the_bit(data, held_out, tmp_path):
    optims = {"g": CONFIG.optim}
    whole = loop.run(VAEStage(CONFIG, data, held_out), CONFIG, optims, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        loop.run(Stopping(CONFIG, data, held_out), CONFIG, optims, tmp_path / "halves")
    assert [path.name for path in state.complete(tmp_path / "halves/checkpoints")] == ["step_000002"]
    loop.run(VAEStage(CONFIG, data, held_out), CONFIG, optims, tmp_path / "halves")
    halves = vae_stage.load_run(tmp_path / "halves", NANO_VAE)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), halves.parameters(), strict=True))


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


def test_a_frozen_encoder_keeps_its_latents_while_the_decoder_learns(data, held_out, tmp_path):
    optims = {"g": CONFIG.optim}
    loop.run(VAEStage(CONFIG, data, held_out), CONFIG, optims, tmp_path / "both")
    config = replace(CONFIG, init=tmp_path / "both", freeze_encoder=True)
    before = vae_stage.load_run(tmp_path / "both", NANO_VAE).state_dict()
    loop.run(VAEStage(config, data, held_out), config, optims, tmp_path / "decoder")
    after = vae_stage.load_run(tmp_path / "decoder", NANO_VAE).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("decoder.")}
