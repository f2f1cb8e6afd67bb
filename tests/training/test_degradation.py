"""The degradation chain: reproducible, within its bounds, and able to take any size and length."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import av
import numpy as np
import pytest
import torch
from av.video.frame import PictureType

from seedvr2_core.errors import SettingError
from training.degradation import (
    CODECS,
    FULL,
    IDENTITY,
    KERNELS,
    LIGHT,
    MIXTURES,
    NANO,
    PROFILES,
    VARIED,
    Pass,
    Profile,
    Walk,
    bit_budget,
    code,
    degrade,
    draw_profile,
    encode_stream,
    gaussian_kernel,
    luma,
    sinc_kernel,
    unsharp_mask,
    upsample,
)
from training.procedural import still
from training.randomness import rng

# Changes nothing but what a test asks for.
QUIET = Pass(blur=0, resize=(0, 0, 1), gaussian=Walk(0, 0), poisson=Walk(0, 0), jpeg=Walk(95, 95), codec=0,
             codec_image=0)  # fmt: skip


def clip(frames: int = 3, height: int = 64, width: int = 64) -> torch.Tensor:
    picture = torch.from_numpy(still(0, 0, max(height, width) + frames).copy()).permute(2, 0, 1).float() / 255
    return torch.stack([picture[:, i : i + height, i : i + width] for i in range(frames)])


@pytest.mark.parametrize("profile", PROFILES.values(), ids=lambda profile: profile.name)
def test_9_the_same_seed_gives_the_same_bytes(profile):
    first, log = degrade(clip(), 7, profile)
    again, log_again = degrade(clip(), 7, profile)
    assert torch.equal(first, again)
    assert log == log_again


def test_another_seed_gives_other_bytes():
    assert not torch.equal(degrade(clip(), 1, NANO)[0], degrade(clip(), 2, NANO)[0])


@pytest.mark.parametrize("profile", PROFILES.values(), ids=lambda profile: profile.name)
@pytest.mark.parametrize("size", [(1, 64, 64), (1, 37, 51), (3, 50, 33), (2, 4, 5)], ids=str)
def test_any_size_and_length_comes_back_reduced_as_the_profile_says(profile, size):
    for seed in range(4):
        degraded, _ = degrade(clip(*size), seed, profile)
        assert degraded.shape == (size[0], 3, size[1] // profile.reduction, size[2] // profile.reduction)
        assert degraded.min() >= 0 and degraded.max() <= 1


def test_the_result_lies_on_the_8_bit_grid():
    codes = degrade(clip(), 3, NANO)[0] * 255
    torch.testing.assert_close(codes, codes.round(), atol=1e-4, rtol=0)


def test_the_input_is_left_alone():
    before = clip()
    given = before.clone()
    degrade(given, 0, FULL)
    assert torch.equal(given, before)


def test_the_log_is_json_and_holds_every_pass():
    _, log = degrade(clip(), 5, FULL)
    assert json.loads(json.dumps(log)) == log
    assert [set(stage) for stage in log["passes"]] == [
        {"blur", "resize", "noise", "jpeg", "reduced_before_codec", "codec"}
    ] * 2
    assert set(log["final"]) == {"filter", "sinc"}
    assert {"seed", "profile", "lead"} < set(log)


def test_9_drawn_parameters_stay_inside_their_bounds_and_steps():
    walks = 0
    for seed in range(12):
        _, log = degrade(clip(4, 48, 48), seed, FULL)
        for stage, done in zip(FULL.passes, log["passes"], strict=True):
            noise = stage.gaussian if done["noise"]["kind"] == "gaussian" else stage.poisson
            drawn = [(noise, done["noise"]["strength"]), (stage.scale, done["resize"]["scale"])]
            if blur := done["blur"]:
                assert blur["kernel"] in KERNELS and blur["size"] % 2 == 1 and 7 <= blur["size"] <= 21
                drawn += [(stage.sigma, blur[name]) for name in ("sigma_x", "sigma_y") if name in blur]
            for walk, values in drawn:
                assert len(values) == 4
                assert all(walk.low <= value <= walk.high for value in values)
                assert max(abs(np.diff(values))) <= walk.step + 1e-12
                walks += 1
            # Qualities are rounded, which may add one to a step.
            assert all(stage.jpeg.low <= quality <= stage.jpeg.high for quality in done["jpeg"]["quality"])
            assert max(abs(np.diff(done["jpeg"]["quality"]))) <= stage.jpeg.step + 1
            assert done["codec"]["codec"] in CODECS
    assert walks > 60


def test_9_a_walk_moves_by_at_most_its_step_and_stays_inside():
    values = Walk(-1, 1, 0.4).draw(rng(0, "test"), 500)
    steps = np.abs(np.diff(values))
    assert steps.max() <= 0.4 and steps.max() > 0.3
    assert min(values) == -1 and max(values) == 1


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("size", [(1, 33, 47), (1, 8, 8), (5, 64, 64), (6, 7, 130)], ids=str)
def test_9_a_codec_keeps_size_and_frame_count(codec, size):
    frames = clip(*size)
    coded = code(frames, codec, 4e4)
    assert coded.shape == frames.shape
    assert (coded - frames).abs().mean() < 0.15


@pytest.mark.parametrize("codec", CODECS)
def test_more_bits_make_a_larger_file_and_a_smaller_error(codec):
    frames = clip(5, 128, 128)
    pictures = (frames * 255).byte().permute(0, 2, 3, 1).contiguous().numpy()
    sizes = [len(encode_stream(pictures, codec, bits)) for bits in (5e3, 5e4)]
    errors = [(code(frames, codec, bits) - frames).square().mean() for bits in (5e3, 5e4)]
    assert sizes[1] > 1.5 * sizes[0]
    assert errors[1] < errors[0]


def test_9_the_bit_rate_scales_with_area():
    span = (1e4, 1e5)
    assert bit_budget(span, 0, 256, 256) == pytest.approx(1e4)
    assert bit_budget(span, 1, 256, 256) == pytest.approx(1e5)
    assert bit_budget(span, 0.5, 512, 512) == pytest.approx(4 * bit_budget(span, 0.5, 256, 256))


def test_the_logged_bit_rate_is_that_of_the_coded_size():
    always = Profile(name="coded", passes=(replace(QUIET, codec=1.0),), final_sinc=0)
    seen = set()
    for seed in range(8):
        _, log = degrade(clip(2, 64, 64), seed, always)
        (stage,) = log["passes"]
        side = 16 if stage["reduced_before_codec"] else 64
        low, high = (bit_budget(QUIET.bits, share, side, side) for share in (0, 1))
        assert low <= stage["codec"]["bits_per_frame"] <= high
        seen.add(side)
    assert seen == {16, 64}


@pytest.mark.parametrize("kind", KERNELS[:-1])
def test_a_blur_kernel_sums_to_one_and_is_symmetric(kind):
    kernel = gaussian_kernel(kind, 9, 1.5, 1.5, rotation=0.0, beta=1.3)
    assert kernel.sum() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(kernel, kernel.flip(0, 1))
    torch.testing.assert_close(kernel, kernel.T)


def test_an_anisotropic_kernel_turns_with_its_angle():
    flat = gaussian_kernel("aniso", 13, 3, 0.8)
    turned = gaussian_kernel("aniso", 13, 3, 0.8, rotation=np.pi / 2)
    torch.testing.assert_close(turned, flat.T)
    assert flat[6, 2] > 10 * flat[2, 6]


def test_a_sinc_kernel_rings_and_passes_everything_at_pi():
    kernel = sinc_kernel(21, np.pi / 3)
    assert kernel.sum() == pytest.approx(1, abs=1e-5)
    assert kernel.min() < 0
    assert sinc_kernel(21, np.pi)[10, 10] > 0.7


def test_a_flat_picture_survives_blur_and_resizing():
    blurred = Profile(name="blurred", passes=(replace(QUIET, blur=1.0, resize=(0.5, 0.5, 0)),), final_sinc=1.0)
    grey = torch.full((2, 3, 40, 40), 0.5)
    for seed in range(4):
        assert (degrade(grey, seed, blurred)[0] - 0.5).abs().max() <= 1.5 / 255


def test_grey_noise_is_the_same_in_every_channel():
    noisy = Profile(name="noisy", passes=(replace(QUIET, gaussian=Walk(20, 20), jpeg=Walk(100, 100)),), final_sinc=0)
    grey = torch.full((1, 3, 64, 64), 0.5)
    spread = {}
    for seed in range(12):
        degraded, log = degrade(grey, seed, noisy)
        noise = log["passes"][0]["noise"]
        if noise["kind"] == "gaussian":
            spread[noise["grey"]] = float((degraded - luma(degraded)).abs().mean())
    assert spread[False] > 3 * spread[True]


def test_most_images_skip_the_codec_and_clips_do_not():
    images = [degrade(clip(1, 16, 16), seed, NANO)[1]["passes"][0]["codec"] for seed in range(30)]
    clips = [degrade(clip(2, 16, 16), seed, NANO)[1]["passes"][0]["codec"] for seed in range(5)]
    assert sum(codec is not None for codec in images) < 10
    assert all(codec is not None for codec in clips)


def test_leading_frames_are_degraded_and_dropped():
    frames = clip(6, 48, 48)
    for seed in range(4):
        degraded, log = degrade(frames, seed, NANO, lead=4)
        assert degraded.shape == (2, 3, 12, 12) and log["lead"] == 4
        assert len(log["passes"][0]["jpeg"]["quality"]) == 6
        codec = log["passes"][0]["codec"]
        assert codec is None or codec["mirrored_lead"] == 0
    with pytest.raises(SettingError, match="at least one frame"):
        degrade(frames, 0, NANO, lead=6)


def test_without_leading_frames_mirrored_ones_take_their_place():
    leads = {degrade(clip(5, 32, 32), seed, NANO)[1]["passes"][0]["codec"]["mirrored_lead"] for seed in range(12)}
    assert max(leads) == 4 and len(leads) > 2


def test_the_codec_predicts_between_frames_in_both_directions():
    pictures = (clip(12, 64, 64) * 255).byte().permute(0, 2, 3, 1).contiguous().numpy()
    with av.open(io.BytesIO(encode_stream(pictures, "libx264", 4e4))) as container:
        kinds = [PictureType(frame.pict_type).name for frame in container.decode(video=0)]
    assert kinds.count("I") == 1 and "P" in kinds and "B" in kinds


@pytest.mark.parametrize("codec", CODECS)
def test_a_codec_gives_the_same_bytes_every_time(codec):
    frames = clip(4, 32, 48)
    assert torch.equal(code(frames, codec, 2e4), code(frames, codec, 2e4))


def test_the_varied_profile_uses_every_codec():
    varied = replace(VARIED, passes=VARIED.passes[1:])
    names = {degrade(clip(2, 16, 16), seed, varied)[1]["passes"][0]["codec"]["codec"] for seed in range(14)}
    assert names == set(CODECS)


def test_an_unsharp_mask_makes_edges_steeper_and_leaves_flat_areas():
    step = torch.full((1, 3, 80, 80), 0.3)
    step[..., 40:] = 0.7
    sharpened = unsharp_mask(step)
    assert sharpened[..., 39].mean() < 0.28 and sharpened[..., 40].mean() > 0.72
    flat = torch.full((1, 3, 80, 80), 0.5)
    torch.testing.assert_close(unsharp_mask(flat), flat, atol=1e-4, rtol=0)


def test_sharpening_before_degrading_is_drawn_and_logged():
    logs = [degrade(clip(1, 24, 24), seed, replace(NANO, unsharp=0.5))[1]["unsharp"] for seed in range(6)]
    assert set(logs) == {True, False}
    assert "unsharp" not in degrade(clip(1, 24, 24), 0, NANO)[1]


def test_light_damage_is_within_the_bounds_that_keep_it_light():
    (stage,) = LIGHT.passes
    assert stage.gaussian.high <= 10 and stage.jpeg.low >= 60 and stage.scale.low >= 0.5


def test_identity_is_a_plain_reduction_that_enlarges_to_the_size_asked_for():
    frames = clip(2, 50, 70)
    degraded, log = degrade(frames, 0, IDENTITY)
    assert log["passes"] == []
    enlarged = upsample(degraded, 50, 70)
    assert enlarged.shape == frames.shape
    assert (enlarged - frames).abs().mean() < 0.15


def test_training_at_scale_mixes_strengths_in_their_shares():
    names = [draw_profile(MIXTURES["mixed"], seed).name for seed in range(400)]
    for profile, share in MIXTURES["mixed"]:
        assert names.count(profile.name) / len(names) == pytest.approx(share, abs=0.06)


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 1, 64, 64), (1, 3, 3, 64)], ids=str)
def test_a_wrong_shape_is_refused(shape):
    with pytest.raises(SettingError, match="T x 3 x H x W"):
        degrade(torch.zeros(shape), 0, NANO)
