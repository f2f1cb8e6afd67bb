"""What is shown and said of held-out samples: pixels where they can be had, and whether a condition counts."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from seedvr2_core.video.geometry import to_clip
from training import journal, loop, precompute
from training.config import OptimConfig, RunConfig
from training.data import Dataset
from training.precompute import PairCrops, make_sample
from training.pretrain import Pretraining, PretrainStage
from training.shards import HELD_OUT, Latents
from training.vae import reconstruct
from training.validation import latent_errors, latent_previews
from training.weights import open_vae

PICO = replace(
    precompute.RECIPES["pico"],
    crops=(PairCrops(kind="image", count=HELD_OUT + 2, size=64), PairCrops(kind="clip", count=2, size=32, frames=5)),
)
OPTIM = OptimConfig(lr=1e-3, final_lr=1e-3, warmup=0)


@pytest.fixture(scope="module")
def decodable(tmp_path_factory) -> Latents:
    """Latents by nano."""
    folder = tmp_path_factory.mktemp("decodable")
    precompute.run(PICO, folder, None, open_vae("nano"))
    return Latents(folder, seed=0)


class Echo:
    """A restorer that returns a share of its condition."""

    device = torch.device("cpu")

    def __init__(self, share: float = 1.0):
        self.share = share

    def velocity(self, x, condition, u, dropped=None, texts=None):
        return (x - self.share * condition) / u.view(-1, 1, 1, 1, 1)


@torch.no_grad()
def test_previews_are_what_the_autoencoder_makes_of_the_latents(decodable, caplog):
    caplog.set_level(logging.INFO)
    picture, clip = latent_previews(Echo(), decodable, steps=1)
    assert picture.wanted.shape == (1, 3, 64, 64) and clip.wanted.shape == (5, 3, 32, 32)
    vae, dataset = open_vae("nano"), Dataset.load(None, PICO.data)
    for shown, crops in zip((picture, clip), PICO.crops, strict=True):
        sample = make_sample(dataset, PICO, crops, 0)
        for frames, pixels in ((shown.wanted, sample.clean), (shown.given, sample.degraded[0])):
            expected = reconstruct(vae, to_clip(pixels[None] / 255))[0].transpose(0, 1) / 2 + 0.5
            # Where a CPU has it, bf16.
            assert (frames - expected).abs().mean() < 0.01 and 0 <= frames.min() < frames.max() <= 1
        torch.testing.assert_close(shown.restored, shown.given, atol=0.05, rtol=0)
        assert (shown.wanted - shown.given).abs().mean() > 0.03
    assert "colours" not in caplog.text


@pytest.mark.parametrize(("autoencoder", "reason"), [(None, "plain files"), ("gone/vae", "gone/vae is neither a run")])
def test_without_the_autoencoder_previews_are_colours_and_say_why(latents, monkeypatch, caplog, autoencoder, reason):
    monkeypatch.setattr(latents.store, "autoencoder", autoencoder)
    caplog.set_level(logging.INFO)
    shapes = [tuple(shown.wanted.shape) for shown in latent_previews(Echo(), latents, steps=1)]
    assert shapes == [(2, 3, 4, 4), (1, 3, 4, 4)]
    assert [reason in record.getMessage() for record in caplog.records] == [True]


def test_a_condition_that_is_ignored_has_no_effect_and_one_that_is_followed_a_large_one(latents):
    effects = [latent_errors(Echo(share), latents, (1, 2))["condition_effect"] for share in (0.0, 0.5, 1.0)]
    # Two independent unit latents, and the noise that was added to each.
    assert effects[0] < 1e-5 and effects[1] == pytest.approx(effects[2] / 2, rel=1e-3) and 1.2 < effects[2] < 1.8


def test_samples_are_looked_at_one_by_one_whatever_there_is_of_a_shape(latents):
    sizes = []

    class Counting(Echo):
        def velocity(self, x, *others):
            sizes.append(len(x))
            return super().velocity(x, *others)

    latent_errors(Counting(), latents, (1, 2))
    assert max(len(hq) for hq, _ in latents.held_out()) > 1 and set(sizes) == {1}


def test_a_sample_that_has_no_other_to_be_swapped_with_says_nothing_of_conditions(latents):
    alone = SimpleNamespace(held_out=lambda: [(hq[:1], lq[:1]) for hq, lq in latents.held_out()])
    assert latent_errors(Echo(), alone, (1,)).keys() == {"lq", "rms_1", "std_1"}


def test_a_run_shows_pixels_says_that_it_ignores_its_condition_and_how_long_it_waited_for_data(
    decodable, tiny_dit, tmp_path
):
    # Nothing is learnt before the first step, and a fresh transformer predicts nothing.
    run = RunConfig(steps=1, preview_every=1, async_save=False)
    config = Pretraining(model=tiny_dit, run=run, optim=replace(OPTIM, lr=1e-9), batch=2)
    loop.run(PretrainStage(config, decodable), config, {"g": config.optim}, tmp_path)
    with Image.open(tmp_path / "previews/step_000001/1x8x8.png") as picture:
        assert picture.size == (4 * 64, 64)
    with Image.open(tmp_path / "previews/step_000001/2x4x4_time.png") as profile:
        assert profile.size == (4 * 32, 5)
    # What is decoded is noise, and may be called over-sharpened as well.
    messages = [alert["message"] for alert in journal.read(tmp_path / "alerts.jsonl")]
    (message,) = (message for message in messages if "over-sharpened" not in message)
    assert "ignores its condition" in message
    (row,) = journal.read(tmp_path / "metrics.jsonl")
    assert 0 < row["data_seconds"] < row["seconds"]
