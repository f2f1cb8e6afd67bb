"""Cuts between shots: found where they are, and not where there is only motion or a flash."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from seedvr2_core.video.shots import scene_cuts, split_shots
from training.data import CLIP_SUFFIXES, decode, list_media
from training.randomness import rng


def shot(index: int, frames: int = 6) -> np.ndarray:
    """A camera pans over soft colours, a pixel a frame."""
    colours = rng(0, "shots", index).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    picture = np.asarray(Image.fromarray(colours).resize((120, 100), Image.Resampling.BICUBIC))
    return np.stack([picture[i : i + 80, 2 * i : 2 * i + 90] for i in range(frames)])


def test_a_cut_is_found_at_its_frame():
    assert scene_cuts(np.concatenate([shot(0, 7), shot(1, 5), shot(2, 6)])) == [7, 12]


@pytest.mark.parametrize("index", range(6))
def test_a_moving_camera_is_no_cut(index):
    assert scene_cuts(shot(index, 12)) == []


def test_a_slow_fade_is_no_cut():
    ramp = np.linspace(0, 1, 12)[:, None, None, None]
    fade = (shot(0, 12) * (1 - ramp) + shot(1, 12) * ramp).astype(np.uint8)
    assert scene_cuts(fade) == []


@pytest.mark.parametrize("frames", [1, 2])
def test_a_clip_too_short_to_cut_is_one_shot(frames):
    assert scene_cuts(np.repeat(shot(0, 1), frames, axis=0)) == []


def test_shots_put_together_are_the_clip():
    clip = np.concatenate([shot(0), shot(1)])
    parts = split_shots(clip, scene_cuts(clip))
    assert len(parts) == 2
    np.testing.assert_array_equal(np.concatenate(parts), clip)


def test_two_of_the_training_clips_put_together_are_cut_once(sample):
    clips = list_media(sample("manifest.json").parent / "train" / "clips", CLIP_SUFFIXES)[:2]
    first, second = (decode(path)[:8, ::4, ::4] for path in clips)
    h, w = min(first.shape[1], second.shape[1]), min(first.shape[2], second.shape[2])
    assert scene_cuts(np.concatenate([first[:, :h, :w], second[:, :h, :w]])) == [8]
