"""Condition, input and augmentation against the published numbers; noise that does not depend on chunking."""

import pytest
import torch

from seedvr2_core.diffusion.conditioning import augment, frame_noise, with_mask
from seedvr2_core.diffusion.schedule import interpolate, shift, shift_factor

CASES = pytest.mark.parametrize("case", ["case0", "case1"])


def channels_first(x):
    """t h w c -> b c t h w"""
    return x.permute(3, 0, 1, 2)[None]


def test_the_condition_is_the_latent_and_a_mask_of_ones(golden):
    tensors, _ = golden("dit/sampling")
    condition = with_mask(channels_first(tensors["cond_latent"]))
    assert torch.equal(condition, channels_first(tensors["condition"]))


@CASES
def test_the_input_is_noise_latent_and_mask(golden, case):
    tensors, _ = golden("pipeline/diffusion")
    latent, noise = (channels_first(tensors[f"{case}/{name}"]) for name in ("lq_latent", "noise"))
    condition = with_mask(latent)
    assert torch.equal(condition, channels_first(tensors[f"{case}/condition"]))
    assert torch.equal(torch.cat([noise, condition], dim=1), channels_first(tensors[f"{case}/dit_input"]))


@CASES
@pytest.mark.parametrize("level", [0.1, 0.5])
def test_augmentation_matches(golden, case, level):
    tensors, meta = golden("pipeline/diffusion")
    latent, noise = (channels_first(tensors[f"{case}/{name}"]) for name in ("lq_latent", "aug_noise"))
    expected = channels_first(tensors[f"{case}/aug_scale{level}_shape_thw"])
    torch.testing.assert_close(augment(latent, noise, level), expected, atol=1e-6, rtol=0)
    time = 1000 * shift(level, shift_factor(*latent.shape[2:]))
    assert time == pytest.approx(meta["one_step"][case][f"scale{level}"]["t_thw"], rel=1e-5)


@CASES
@pytest.mark.parametrize("level", [0.1, 0.5])
def test_the_published_augmentation_differs_by_its_mixed_up_shape_only(golden, case, level):
    tensors, meta = golden("pipeline/diffusion")
    latent, noise = (channels_first(tensors[f"{case}/{name}"]) for name in ("lq_latent", "aug_noise"))
    _, channels, _, h, w = latent.shape
    u = shift(level, shift_factor(h, w, channels))
    assert 1000 * u == pytest.approx(meta["one_step"][case][f"scale{level}"]["t_as_published"], rel=1e-5)
    expected = channels_first(tensors[f"{case}/aug_scale{level}_shape_as_published"])
    torch.testing.assert_close(interpolate(latent, noise, u), expected, atol=1e-6, rtol=0)


def test_no_augmentation_returns_the_latent_itself():
    latent = torch.randn(1, 16, 2, 3, 4)
    assert augment(latent, torch.randn_like(latent), 0) is latent


def test_a_frame_meets_the_same_noise_however_the_clip_is_cut():
    whole = frame_noise(7, 0, 11, 16, 4, 6)
    assert whole.shape == (16, 11, 4, 6)
    assert torch.equal(frame_noise(7, 3, 5, 16, 4, 6), whole[:, 3:8])
    assert torch.equal(torch.cat([frame_noise(7, i, 1, 16, 4, 6) for i in range(11)], dim=1), whole)


def test_seeds_and_frames_have_noise_of_their_own():
    first = frame_noise(0, 0, 2, 16, 8, 8)
    assert not torch.equal(first[:, 0], first[:, 1])
    assert not torch.equal(first, frame_noise(1, 0, 2, 16, 8, 8))


def test_all_64_bits_of_a_seed_count():
    last, before = (frame_noise(2**64 - i, 0, 1, 16, 2, 2) for i in (1, 2))
    assert not torch.equal(last, before)
    assert torch.equal(last, frame_noise(-1, 0, 1, 16, 2, 2))


def test_a_seed_means_the_same_noise_forever():
    noise = frame_noise(42, 3, 1, 16, 2, 2)[0, 0]
    torch.testing.assert_close(noise, torch.tensor([[0.214849, -0.499021], [-1.043242, 0.144154]]), atol=1e-6, rtol=0)


def test_noise_is_unit_gaussian():
    noise = frame_noise(3, 0, 8, 16, 32, 32)
    assert noise.dtype == torch.float32
    assert noise.mean().abs() < 0.01
    assert noise.std() == pytest.approx(1, abs=0.01)
    # Neighbouring frames, whose streams differ by a count of one, are independent.
    assert (noise[:, 0] * noise[:, 1]).mean().abs() < 0.05
