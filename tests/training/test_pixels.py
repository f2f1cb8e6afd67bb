"""Pairs that are made when they are asked for: those that shards would hold, and stages learn from them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from seedvr2_core.device import pick_dtype
from seedvr2_core.errors import SettingError
from tests.training.test_data import write_clip
from training import apt, loop, pixels, precompute, pretrain
from training.buckets import Deal
from training.config import OptimConfig, RunConfig
from training.data import DataConfig
from training.precompute import PairCrops, Precompute, main, note, run
from training.procedural import still
from training.shards import HELD_OUT, PIXELS, Latents
from training.weights import open_vae

CONFIG = Precompute(
    vae=Path("nano"),
    crops=(
        PairCrops(kind="image", count=HELD_OUT + 4, size=32, aspects=3),
        PairCrops(kind="clip", count=HELD_OUT + 4, size=32, frames=5),
    ),
    degradation="nano",
    variants=2,
    data=DataConfig(seed=1, stills=2, still_size=96),
    batch=1,
    workers=0,
)


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    for number in range(2):
        Image.fromarray(still(number, 0, 96)).save(folder / f"photo{number}.png")
    write_clip(folder / "walk.mp4", frames=8)
    save_file({"text": torch.full((3, 8), 2.0)}, folder / "photo0.txt.safetensors")
    return folder


@pytest.fixture(scope="module")
def both(tmp_path_factory, media) -> tuple[Latents, Latents]:
    """From shards, and from pixels."""
    written, noted = tmp_path_factory.mktemp("shards"), tmp_path_factory.mktemp("pixels")
    run(CONFIG, written, media, open_vae("nano", pick_dtype("auto", torch.device("cpu"))))
    note(noted, CONFIG, media)
    return Latents(written, seed=0), Latents(noted, seed=0)


def test_pairs_are_those_of_shards_to_the_bit(both):
    shards, made = both
    assert (made.scale, made.autoencoder, made.text_width) == (shards.scale, "nano", 8)
    assert made.store.buckets == shards.store.buckets
    assert np.array_equal(made.store.bucket_of, shards.store.bucket_of)
    captioned = 0
    for number in range(2 * (HELD_OUT + 4)):
        for variant in range(2):
            *written, text, _ = shards.store.read(number, variant)
            *now, same, really = made.store.read(number, variant)
            assert really == number and all(torch.equal(a, b) for a, b in zip(written, now, strict=True))
            assert (text is None and same is None) or torch.equal(text, same)
            captioned += text is not None
    assert captioned


def test_batches_and_what_is_held_out_are_those_of_shards(both):
    shards, made = both
    for step in range(4):
        ours, theirs = (latents.batch(step, Deal(samples=3)) for latents in (made, shards))
        assert np.array_equal(ours.ids, theirs.ids)
        assert torch.equal(ours.hq, theirs.hq) and torch.equal(ours.lq, theirs.lq)
    for ours, theirs in zip(made.held_out(), shards.held_out(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_stages_learn_from_pixels(both, tiny_dit, tmp_path):
    _, latents = both
    optim = OptimConfig(lr=1e-3, final_lr=1e-3)
    steps = RunConfig(steps=2, validate_every=2, async_save=False)
    first = pretrain.Pretraining(model=tiny_dit, run=steps, optim=optim, batch=2)
    loop.run(pretrain.PretrainStage(first, latents), first, {"g": optim}, tmp_path / "pretrain")
    last = apt.PostTraining(model=tiny_dit, run=steps, g=optim, d=optim, batch=2, pretrained=str(tmp_path / "pretrain"),
                            distilled=str(tmp_path / "pretrain"))  # fmt: skip
    loop.run(apt.load_stage(last, latents), last, {"g": optim, "d": optim}, tmp_path / "apt")


def test_the_command_makes_nothing_and_shards_come_first_where_there_are_some(media, tmp_path, monkeypatch):
    monkeypatch.setitem(precompute.RECIPES, "few", replace(CONFIG, crops=(PairCrops(count=2, size=32),)))
    command = ["--config", "few", "--data", str(media), "--out", str(tmp_path)]
    assert main([*command, "mode=pixels"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == [PIXELS]
    assert type(Latents(tmp_path, seed=0).store).__name__ == "Pixels"
    assert main(command) == 0
    assert type(Latents(tmp_path, seed=0).store).__name__ == "_Shards"


def test_they_are_made_on_the_device_of_the_stage(media, tmp_path):
    note(tmp_path, replace(CONFIG, crops=(PairCrops(count=2, size=32),)), media)
    with pytest.raises(SettingError, match="cannot be used here"):
        Latents(tmp_path, 0, "nowhere")


def test_a_new_autoencoder_gets_the_scale_of_what_is_held_out(media, tmp_path, monkeypatch):
    monkeypatch.setattr(pixels, "latent_scale", lambda *args: None)
    note(tmp_path, replace(CONFIG, crops=(PairCrops(count=2, size=32),)), media)
    latents = Latents(tmp_path, seed=0)
    (batch,) = latents.held_out_captioned()
    assert batch.hq.std().item() == pytest.approx(1.0, rel=1e-3)


def test_what_is_noted_is_checked_like_any_config(media, tmp_path):
    note(tmp_path, CONFIG, media)
    about = json.loads((tmp_path / PIXELS).read_text())
    about["config"]["degradaton"] = about["config"].pop("degradation")
    (tmp_path / PIXELS).write_text(json.dumps(about))
    with pytest.raises(SettingError, match=r"degradaton.*Did you mean 'degradation'"):
        Latents(tmp_path, seed=0)
