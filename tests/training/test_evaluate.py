"""The metrics: known values, zero for equal frames, and the right direction under noise and blur."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from seedvr2_core.errors import MediaError, SettingError
from training.degradation import gaussian_kernel
from training.evaluate import (
    MS_SSIM_MIN_SIDE,
    compare_folders,
    eval_items,
    gmsd,
    lsd,
    means,
    measure,
    ms_ssim,
    psnr,
    ssim,
    swd,
    temporal_profile,
)
from training.procedural import still


@pytest.fixture(scope="module")
def photo():
    return torch.from_numpy(still(1, 0, 176).copy()).permute(2, 0, 1)[None].float() / 255


def blurred(frames, sigma):
    kernel = gaussian_kernel("iso", 15, sigma, sigma).expand(3, 1, -1, -1)
    return F.conv2d(F.pad(frames, (7,) * 4, mode="reflect"), kernel, groups=3)


def noisy(frames, deviation):
    noise = torch.randn(frames.shape, generator=torch.Generator().manual_seed(0))
    return (frames + deviation * noise).clamp(0, 1)


@pytest.mark.parametrize(("metric", "best"), [(ssim, 1), (ms_ssim, 1), (gmsd, 0), (lsd, 0), (swd, 0)])
def test_equal_frames_score_perfectly(photo, metric, best):
    assert metric(photo, photo) == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("metric", [psnr, ssim, ms_ssim])
@pytest.mark.parametrize("damage", [noisy, blurred])
def test_similarity_falls_with_more_damage(photo, metric, damage):
    mild, strong = (0.02, 0.1) if damage is noisy else (0.7, 2.0)
    assert metric(damage(photo, mild), photo) > metric(damage(photo, strong), photo)


@pytest.mark.parametrize("metric", [gmsd, lsd, swd])
def test_distance_grows_with_blur(photo, metric):
    values = [metric(blurred(photo, sigma), photo) for sigma in (0.5, 1.0, 2.0)]
    assert 0 < values[0] < values[1] < values[2]


def test_psnr_of_a_constant_offset_is_known():
    gt = torch.full((2, 3, 8, 8), 100 / 255)
    assert psnr(gt + 10 / 255, gt) == pytest.approx(20 * math.log10(255 / 10), abs=1e-4)
    assert psnr(gt, gt) == math.inf


def test_psnr_rounds_to_8_bits():
    gt = torch.full((1, 3, 8, 8), 100 / 255)
    assert psnr(gt + 0.4 / 255, gt) == math.inf


def test_psnr_is_a_mean_over_frames():
    gt = torch.zeros(2, 3, 8, 8)
    pred = torch.stack((gt[0] + 1 / 255, gt[1] + 10 / 255))
    assert psnr(pred, gt) == pytest.approx((20 * math.log10(255) + 20 * math.log10(25.5)) / 2, abs=1e-4)


def test_ssim_of_flat_pictures_is_the_luminance_term():
    a, b = 50.0, 90.0
    c1 = (0.01 * 255) ** 2
    expected = (2 * a * b + c1) / (a**2 + b**2 + c1)
    frames = [torch.full((1, 3, 24, 24), level / 255) for level in (a, b)]
    assert ssim(*frames) == pytest.approx(expected, abs=1e-4)


def test_ssim_of_an_inverted_picture_is_negative():
    stripes = (torch.arange(32) % 2).float().expand(1, 3, 32, 32) * 0.5 + 0.25
    assert ssim(1 - stripes, stripes) < -0.9


def test_ssim_agrees_with_its_definition_at_one_window():
    pred, gt = (torch.rand(1, 3, 11, 11).mul(255).round() for _ in range(2))
    line = torch.exp(-((torch.arange(11.0) - 5) ** 2) / (2 * 1.5**2))
    window = torch.outer(line, line) / line.sum() ** 2
    values = []
    for p, g in zip(pred[0].double(), gt[0].double(), strict=True):
        mp, mg = (window * p).sum(), (window * g).sum()
        vp, vg = (window * (p - mp) ** 2).sum(), (window * (g - mg) ** 2).sum()
        cov = (window * (p - mp) * (g - mg)).sum()
        c1, c2 = 2.55**2, 7.65**2
        values.append((2 * mp * mg + c1) * (2 * cov + c2) / ((mp**2 + mg**2 + c1) * (vp + vg + c2)))
    assert ssim(pred / 255, gt / 255) == pytest.approx(float(sum(values) / 3), abs=1e-5)


def test_lsd_and_swd_prefer_misplaced_texture_to_none():
    texture = noisy(torch.full((1, 3, 96, 96), 0.5), 0.1)
    misplaced = texture.roll((5, 9), dims=(2, 3))
    flat = blurred(texture, 2.0)
    assert psnr(misplaced, texture) < psnr(flat, texture)
    assert lsd(misplaced, texture) < 0.2 * lsd(flat, texture)
    assert swd(misplaced, texture) < 0.2 * swd(flat, texture)


def test_swd_ignores_a_change_of_brightness():
    gt = noisy(torch.full((1, 3, 64, 64), 0.4), 0.05)
    assert swd(gt + 20 / 255, gt) < 0.05


def test_lsd_of_flat_pictures_is_zero():
    assert lsd(torch.full((1, 3, 32, 32), 0.2), torch.full((1, 3, 32, 32), 0.7)) == pytest.approx(0, abs=1e-3)


def test_lsd_of_halved_contrast_is_six_decibels():
    # Strong enough that rounding to 8 bits adds nothing.
    texture = (torch.rand(1, 3, 96, 96) - 0.5) * 0.9
    assert lsd(0.5 + texture / 2, 0.5 + texture) == pytest.approx(20 * math.log10(2), abs=0.1)


def test_the_temporal_profile_sees_flicker_and_not_a_constant_error(photo):
    gt = photo.repeat(4, 1, 1, 1) * 0.8
    flicker = gt + torch.tensor([0.0, 0.05, 0.0, 0.05])[:, None, None, None]
    assert temporal_profile(gt, gt) == 0
    assert temporal_profile(blurred(gt, 2.0), gt) == 0
    assert temporal_profile(flicker, gt) > 2


def test_a_clip_is_measured_by_the_mean_of_its_frames(photo):
    gt = photo.repeat(2, 1, 1, 1)
    pred = torch.cat((noisy(photo, 0.02), blurred(photo, 1.0)))
    for metric in (psnr, ssim, ms_ssim, gmsd, lsd, swd):
        parts = [metric(pred[i : i + 1], gt[i : i + 1]) for i in range(2)]
        assert metric(pred, gt) == pytest.approx(sum(parts) / 2, rel=1e-4)


def test_measure_leaves_out_what_does_not_fit(photo):
    small = photo[..., :64, :64]
    assert set(measure(small, small)) == {"psnr", "ssim", "gmsd", "lsd", "swd"}
    assert set(measure(photo.repeat(2, 1, 1, 1), photo.repeat(2, 1, 1, 1))) >= {"ms_ssim", "temporal_profile"}


def test_means_are_over_the_items_that_have_a_metric():
    assert means({"a": {"psnr": 20.0}, "b": {"psnr": 30.0, "ms_ssim": 0.5}}) == {"psnr": 25.0, "ms_ssim": 0.5}


def test_frames_of_different_size_are_refused(photo):
    with pytest.raises(SettingError, match="equal shape"):
        psnr(photo[..., 1:], photo)


def test_a_picture_too_small_for_a_metric_is_refused():
    with pytest.raises(SettingError, match=str(MS_SSIM_MIN_SIDE)):
        ms_ssim(torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 64))


def test_eval_items_are_cut_and_degraded_the_same_every_time(tmp_path):
    (tmp_path / "eval/images").mkdir(parents=True)
    Image.fromarray(still(2, 0, 90)).save(tmp_path / "eval/images/leaves.png")
    (item,) = eval_items(tmp_path, side=64)
    (whole,) = eval_items(tmp_path)
    assert item.name == "leaves" and item.frames.shape == (1, 3, 64, 64)
    assert torch.equal(item.frames, whole.frames[..., 13:77, 13:77])
    assert item.degraded().shape == (1, 3, 16, 16)
    assert torch.equal(item.degraded(), item.degraded())


def test_eval_items_need_something_to_evaluate(tmp_path):
    with pytest.raises(MediaError, match="nothing to evaluate"):
        next(eval_items(tmp_path))


def test_folders_are_compared_by_name(tmp_path):
    for name in ("pred", "gt"):
        (tmp_path / name).mkdir()
        Image.fromarray(still(2, 0, 48)).save(tmp_path / name / "leaves.png")
    results = compare_folders(tmp_path / "pred", tmp_path / "gt")
    assert results["leaves"]["ssim"] == 1
    json.dumps(results)
    Image.fromarray(still(2, 1, 48)).save(tmp_path / "gt" / "more.png")
    with pytest.raises(MediaError, match="more"):
        compare_folders(tmp_path / "pred", tmp_path / "gt")
