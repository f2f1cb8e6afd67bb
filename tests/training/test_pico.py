"""The toy: its latent loses nothing, its pictures are the same everywhere, and its stages run under the loop."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from training import loop, pico
from training.buckets import Deal
from training.pico import (
    PICO_DIT,
    POST_TRAINING,
    SIDE,
    PicoAdversarialStage,
    PicoLatents,
    degrade,
    draw_pictures,
    to_frames,
    to_latent,
)
from training.restorer import Restorer


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    return PicoLatents(tmp_path_factory.mktemp("pico"), seed=0, pictures=3, held_out=1)


def test_the_latent_loses_nothing():
    frames = torch.rand(2, 3, SIDE, SIDE)
    assert to_latent(frames).shape == (2, 12, 1, 16, 16)
    torch.testing.assert_close(to_frames(to_latent(frames)), frames)


def test_latents_have_about_unit_variance_and_fit_the_transformer(latents):
    batch = latents.batch(0, Deal(samples=8))
    hq, lq = batch.hq, batch.lq
    assert hq.std().item() == pytest.approx(1.0, rel=0.35)
    restorer = Restorer(PICO_DIT)
    assert restorer.velocity(hq, lq, torch.rand(8)).shape == hq.shape
    assert sum(parameter.numel() for parameter in restorer.parameters()) == pytest.approx(1e6, rel=0.15)


def test_a_window_covers_a_whole_picture(latents):
    layout = Restorer(PICO_DIT).dit.layout_of([torch.empty(25, 1, 16, 16)], [torch.empty(8, 32)])
    assert layout.regular.sequences.lengths == layout.shifted.sequences.lengths == (64 + 8,)


def test_pictures_are_drawn_once_and_are_the_same_for_every_seed(latents, tmp_path):
    again = PicoLatents(tmp_path, seed=5, pictures=3, held_out=1)
    assert torch.equal(again.store.kinds[0]["lq"], latents.store.kinds[0]["lq"])
    assert torch.equal(again.exam.given, latents.exam.given)
    assert not torch.equal(*(one.batch(0, Deal(samples=8)).hq for one in (again, latents)))


def test_quarters_make_up_the_drawn_picture_and_mirrors_are_mirrors():
    quarters, mirrored = draw_pictures(1, 0, flips=False), draw_pictures(1, 0, flips=True)
    assert quarters.shape == (4, 3, SIDE, SIDE) and len(mirrored) == 16
    assert torch.equal(mirrored[:4], quarters) and torch.equal(mirrored[4:8].flip(3), quarters)


def test_degraded_pictures_say_roughly_what_the_originals_do(latents):
    exam = latents.exam
    assert exam.given.shape == exam.wanted.shape == (4, 3, SIDE, SIDE)
    bicubic, other = (exam.marks(frames)["psnr"] for frames in (exam.given, exam.wanted.flip(0)))
    assert min(bicubic) > 10 and sum(bicubic) > sum(other)
    assert not torch.equal(degrade(exam.wanted, 1), degrade(exam.wanted, 2))


def test_a_perfect_restorer_gets_full_marks(latents):
    exam = latents.exam

    class Perfect:
        def velocity(self, x, condition, u):
            return (x - to_latent(exam.wanted[: len(x)])) / u.view(-1, 1, 1, 1, 1)

    for steps in (1, 4):
        marks = exam.marks(exam.restore(Perfect(), steps))
        assert all(value == 0 for name in ("gmsd", "lsd", "swd") for value in marks[name])
    assert exam.restore(Perfect(), 1, count=2).shape == (2, 3, SIDE, SIDE)


def test_a_resumed_adversarial_run_ends_as_an_unsplit_one(latents, tmp_path):
    tiny = replace(PICO_DIT, dim=16, depth=2, heads=2, head_dim=8, mlp_hidden=16)
    run = replace(POST_TRAINING.run, steps=4, save_every=2, validate_every=2)
    config = replace(POST_TRAINING, model=tiny, run=run, batch=2)

    def stage():
        torch.manual_seed(0)
        return PicoAdversarialStage(config, latents, Restorer(tiny), Restorer(tiny))

    optims = {"d": config.d, "g": config.g}
    whole = loop.run(stage(), config, optims, tmp_path / "whole")
    with pytest.raises(loop.Preempted):
        loop.run(stage(), config, optims, tmp_path / "halves", loop.Session(most_steps=3))
    halves = loop.run(stage(), config, optims, tmp_path / "halves")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), halves.parameters(), strict=True))
    lines = [(tmp_path / name / "validation.jsonl").read_text() for name in ("whole", "halves")]
    assert lines[0] == lines[1] and lines[0].count("psnr") == 2


def test_recipes_take_the_toys_size():
    assert (POST_TRAINING.run.steps, POST_TRAINING.batch, POST_TRAINING.g.lr) == (250, 8, 2e-4)
    assert POST_TRAINING.model == pico.PRETRAINING.model == pico.DISTILLATION.model == PICO_DIT
