"""Phases of a run: which samples belong to one, how long they are, and what is said of those that are missing."""

import logging
from dataclasses import replace

import pytest

from seedvr2_core.errors import SettingError
from seedvr2_core.video.geometry import Grid, latent_grid
from training import apt, precompute, pretrain
from training.buckets import aspect_sizes
from training.config import check
from training.curriculum import Phase, check_phases, phase_at

PICTURE, SHORT, LONG = Grid(1, 8, 8), Grid(2, 8, 8), Grid(6, 8, 8)


def test_the_last_stage_grows_from_images_to_clips():
    seen = [phase_at(step, 100, apt.CURRICULUM).frames for step in (0, 19, 20, 39, 40, 64, 65, 99, 100)]
    assert seen == [(1,)] * 2 + [(1, 5, 9)] * 2 + [(1, 9, 21)] * 2 + [(1, 21, 49, 97)] * 3


def test_longer_clips_stand_in_for_shorter_ones_and_pictures_for_pictures_alone():
    phase = Phase(share=1.0, frames=(1, 5, 17))
    assert [phase.lengths(sample) for sample in (PICTURE, SHORT, LONG)] == [(1,), (2,), (2, 5)]
    assert Phase(share=1.0).lengths(LONG) == (6,)


def test_a_phase_with_a_size_takes_samples_of_that_area_in_any_aspect():
    phase = Phase(share=1.0, size=64)
    assert phase.lengths(Grid(2, 8, 8)) == (2,) and phase.lengths(Grid(2, 6, 12)) == (2,)
    assert phase.lengths(Grid(2, 12, 12)) == () and phase.lengths(Grid(2, 6, 6)) == ()


def test_a_phase_without_samples_is_refused_before_the_run_and_lengths_that_are_missing_are_named(caplog):
    caplog.set_level(logging.WARNING)
    check_phases([Phase(share=1.0, frames=(1, 5, 97))], [PICTURE, LONG])
    assert "without samples of 97 frames" in caplog.text
    with pytest.raises(SettingError, match=r"curriculum\.1 asks for 9 frames, .* 1 x 64 x 64, 5 x 64 x 64"):
        check_phases([Phase(share=0.5), Phase(share=0.5, frames=(9,))], [PICTURE, SHORT])
    with pytest.raises(SettingError, match="of about 512 x 512 pixels"):
        check_phases([Phase(share=1.0, size=512)], [PICTURE])


def test_the_latents_of_a_recipe_fill_every_phase_of_the_recipe_that_they_are_for(caplog):
    caplog.set_level(logging.WARNING)
    made = {
        crops: [latent_grid(crops.frames, *size) for size in aspect_sizes(crops.size**2, crops.aspects)]
        for crops in precompute.RECIPES["7b_scratch"].crops
    }
    check_phases(pretrain.GROWTH, [sample for samples in made.values() for sample in samples])
    check_phases(apt.CURRICULUM, [sample for samples in made.values() for sample in samples])
    assert not caplog.text
    # Whatever its aspect, a sample is of the one phase that has its size.
    for crops, samples in made.items():
        for phase in pretrain.GROWTH:
            assert all(bool(phase.lengths(sample)) == (phase.size == crops.size) for sample in samples)


def test_growth_deals_batches_by_tokens():
    with pytest.raises(SettingError, match="batch_tokens"):
        replace(pretrain.RECIPES["nano"], curriculum=pretrain.GROWTH)
    check(pretrain.RECIPES["7b_scratch"])
