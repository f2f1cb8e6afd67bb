"""The metrics: known values, those of other implementations, and the right direction under noise and blur."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from seedvr2_core.errors import SettingError
from training.degradation import gaussian_kernel
from training.metrics import (
    MS_SSIM_MIN_SIDE,
    PANEL,
    gmsd,
    lsd,
    means,
    measure,
    ms_ssim,
    psnr,
    ssim,
    swd,
    temporal_profile,
    to_y,
    warp,
    warp_error,
)
from training.procedural import CameraMove, follow, still
from training.randomness import rng

# Of `damaged_photo` against the photo, made once. PSNR and the interior of SSIM by torchmetrics 1.9.0, MS-SSIM by
# pytorch-msssim 1.0.0, in fp64; in RGB, and in the Y of BT.601.
REFERENCE = {
    ("psnr", "rgb"): 28.90597174691495,
    ("psnr", "y"): 30.508655302618767,
    ("ssim", "rgb"): 0.9701007542163963,
    ("ssim", "y"): 0.9730740532640925,
    ("ms_ssim", "rgb"): 0.9794678103985931,
    ("ms_ssim", "y"): 0.9779597977714248,
}


@pytest.fixture(scope="module")
def photo():
    return torch.from_numpy(still(1, 0, 176).copy()).permute(2, 0, 1)[None].float() / 255


@pytest.fixture(scope="module")
def damaged_photo(photo):
    """Duller, and striped."""
    y, x = torch.meshgrid(torch.arange(176.0), torch.arange(176.0), indexing="ij")
    return (photo * 255 * 0.9 + 12 + 10 * torch.sin(x / 3 + y / 5)).clamp(0, 255).round() / 255


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


@pytest.mark.parametrize(("name", "plane"), REFERENCE)
def test_values_are_those_of_other_implementations(photo, damaged_photo, name, plane):
    metric = {"psnr": psnr, "ssim": ssim, "ms_ssim": ms_ssim}[name]
    assert metric(damaged_photo, photo, plane) == pytest.approx(REFERENCE[name, plane], rel=2e-6)


def test_codes_and_floats_have_the_same_values(photo, damaged_photo):
    codes = [(frames * 255).round().to(torch.uint8) for frames in (damaged_photo, photo)]
    assert measure(*codes) == measure(damaged_photo, photo)


def test_y_runs_from_16_to_235():
    black, white = (to_y(torch.full((1, 3, 1, 1), level)).item() for level in (0.0, 255.0))
    assert black == 16 and white == pytest.approx(235, abs=1e-3)


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
    assert set(measure(small, small)) == {"psnr", "psnr_y", "ssim", "ssim_y", "gmsd", "lsd", "swd"}
    assert set(measure(photo.repeat(2, 1, 1, 1), photo.repeat(2, 1, 1, 1))) == {metric.name for metric in PANEL}


def test_means_are_over_the_items_that_have_a_metric():
    assert means({"a": {"psnr": 20.0}, "b": {"psnr": 30.0, "ms_ssim": 0.5}}) == {"psnr": 25.0, "ms_ssim": 0.5}


def test_frames_of_different_size_are_refused(photo):
    with pytest.raises(SettingError, match="equal shape"):
        psnr(photo[..., 1:], photo)


def test_a_picture_too_small_for_a_metric_is_refused():
    with pytest.raises(SettingError, match=str(MS_SSIM_MIN_SIDE)):
        ms_ssim(torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 64))


def test_the_warping_error_of_a_still_clip_is_zero(photo):
    still_clip = photo[..., :40, :50].repeat(3, 1, 1, 1)
    assert warp_error(still_clip, lambda i, j: torch.zeros(2, 40, 50)) < 1e-9


def test_exact_flow_explains_a_camera_move_and_flicker_it_does_not():
    picture, view = still(3, 0, 160), (48, 64)
    move = CameraMove.drawn(rng(0, "warp"), 4, picture.shape[:2], view)
    clip = torch.from_numpy(follow(picture, move, view).copy()).permute(0, 3, 1, 2)

    def flow(i, j):
        return move.flow(i, j, view)

    steady = warp_error(clip, flow)
    assert steady < 0.1 * warp_error(clip, lambda i, j: torch.zeros(2, *view))
    flickering = clip.clone()
    flickering[1::2] = (flickering[1::2].float() * 0.8).to(torch.uint8)
    assert warp_error(flickering, flow) > 5 * steady


def test_what_moves_out_of_the_frame_does_not_count():
    clip = torch.zeros(2, 3, 8, 8)
    clip[0, :, :, 4:] = 1  # leaves the frame
    shift = torch.stack((torch.full((8, 8), 4.0), torch.zeros(8, 8)))
    assert warp_error(clip, lambda i, j: shift if j > i else -shift) == 0


def test_warping_fetches_from_where_the_flow_points():
    frame = torch.arange(12.0).view(1, 1, 3, 4)
    flow = torch.stack((torch.ones(3, 4), torch.zeros(3, 4)))
    warped, inside = warp(frame, flow)
    torch.testing.assert_close(warped[..., :3], frame[..., 1:])
    assert inside[:, :3].all() and not inside[:, 3].any()


@pytest.mark.parametrize("metric", [temporal_profile, lambda a, b: warp_error(a, lambda i, j: torch.zeros(2, 8, 8))])
def test_one_frame_has_no_steadiness(metric):
    with pytest.raises(SettingError, match="at least 2 frames"):
        metric(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))
