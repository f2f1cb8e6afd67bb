"""Each formula against the published numbers; then what a clip needs beyond them: no pumping, cuts, any chunking."""

import pickle
import time

import pytest
import torch
import torch.nn.functional as F

from seedvr2_core.errors import SettingError
from seedvr2_core.video import color
from seedvr2_core.video.color import COLOR_METHODS, ColorTransfer

CASES = ("small_20x28", "mid_64x80", "large_136x152")
FORMULAS = {"wavelet": color.wavelet, "lab": color.lab, "adain": color.adain, "hsv": color.hsv,
            "wavelet_adaptive": color.wavelet_adaptive, "none": lambda content, style: content}


def landscape(frames: int = 1, size: tuple[int, int] = (48, 64), seed: int = 0) -> torch.Tensor:
    """A smooth random picture held for some frames, T 3 H W, within -0.8..0.8."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 6, 8, generator=generator) * 2 - 1
    return F.interpolate(coarse, size, mode="bilinear").mul(0.8).expand(frames, -1, -1, -1)


def restored(style: torch.Tensor, seed: int = 1) -> torch.Tensor:
    """What a model might make of it: a tint, more contrast, new detail."""
    generator = torch.Generator().manual_seed(seed)
    detail = torch.randn(style[:1].shape, generator=generator) * 0.03
    return (style * 1.05 + torch.tensor([0.05, -0.03, 0.02]).view(3, 1, 1) + detail).clamp(-1, 1)


def pulse(frames: int) -> torch.Tensor:
    return torch.tensor([1.0, -1.0]).repeat(frames)[:frames].view(-1, 1, 1, 1)


# The formulas


@pytest.mark.parametrize("case", CASES)
def test_wavelet_and_adain_match_the_published_code(golden, case):
    tensors, _ = golden("pipeline/color")
    content, style = tensors[f"{case}/content"], tensors[f"{case}/style"]
    results = {"wavelet": color.wavelet(content, style), "wavelet_capped": color.capped_wavelet(content, style),
               "wavelet_low_level5_of_style": color.low_band(style), "adain": color.adain(content, style)}
    for name, result in results.items():
        torch.testing.assert_close(result, tensors[f"{case}/{name}"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_histogram_methods_match_the_community_node(golden, case):
    tensors, _ = golden("pipeline/color")
    content, style = tensors[f"{case}/content"], tensors[f"{case}/style"]
    results = {"hsv": color.hsv(content, style), "wavelet_adaptive": color.wavelet_adaptive(content, style)}
    results |= {f"lab_l{kept}": color.lab(content, style, lightness_kept=kept) for kept in (0.0, 0.8, 1.0)}
    for name, result in results.items():
        difference = (result - tensors[f"{case}/{name}"]).abs()
        # Rank matching can swap neighbours.
        assert difference.max() < 2e-2, name
        assert (difference < 1e-5).float().mean() > 0.999, name


@pytest.mark.parametrize("case", CASES)
def test_colour_spaces_match_and_return(golden, case):
    tensors, _ = golden("pipeline/color")
    if f"{case}/rgb01" not in tensors:
        pytest.skip("this case has no colour spaces")
    rgb, lab, hsv = (tensors[f"{case}/{name}"] for name in ("rgb01", "rgb_to_lab", "rgb_to_hsv"))
    torch.testing.assert_close(color.rgb_to_lab(rgb), lab, atol=1e-4, rtol=0)
    torch.testing.assert_close(color.lab_to_rgb(lab), tensors[f"{case}/lab_to_rgb"], atol=1e-6, rtol=0)
    torch.testing.assert_close(color.rgb_to_hsv(rgb), hsv, atol=1e-6, rtol=0)
    torch.testing.assert_close(color.hsv_to_rgb(hsv), rgb, atol=1e-6, rtol=0)
    torch.testing.assert_close(color.lab_to_rgb(color.rgb_to_lab(rgb)), rgb, atol=1e-5, rtol=0)


# One frame


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", COLOR_METHODS)
def test_a_single_image_gets_the_plain_formula(golden, method, case):
    tensors, _ = golden("pipeline/color")
    content, style = tensors[f"{case}/content"][:1], tensors[f"{case}/style"][:1]
    expected = FORMULAS[method](content, style)
    difference = (ColorTransfer(method)(content, style) - expected).abs()
    if method in ("none", "wavelet", "adain"):
        assert difference.max() < 1e-6
    else:
        # A table of quantiles stands for the sorted pixels: a fifth of an 8-bit code on average.
        assert difference.mean() < 0.2 * 2 / 255
        assert (difference < 2 * 2 / 255).float().mean() > 0.98


@pytest.mark.parametrize("method", COLOR_METHODS)
def test_equal_clips_stay_as_they_are(method):
    clip = landscape(3)
    torch.testing.assert_close(ColorTransfer(method)(clip, clip), clip, atol=2e-4, rtol=0)


@pytest.mark.parametrize("method", COLOR_METHODS)
@pytest.mark.parametrize("size", [(16, 16), (1, 1), (1, 5)], ids=str)
def test_flat_and_tiny_frames_stay_finite(method, size):
    black, grey = torch.full((2, 3, *size), -1.0), torch.zeros(2, 3, *size)
    for content, style in ((black, grey), (grey, black), (black, black)):
        result = ColorTransfer(method)(content, style)
        assert result.isfinite().all()
        if method not in ("none", "hsv"):
            torch.testing.assert_close(result, style, atol=1e-5, rtol=0)


def test_letterbox_bars_stay_flat_and_take_the_colour_of_the_input():
    style, content = landscape(5).clone(), restored(landscape(5))
    style[..., :12, :], content[..., :12, :] = -0.9, -1
    for method in ("lab", "adain"):
        bar = ColorTransfer(method)(content, style)[..., :8, :]
        assert bar.std() < 0.06, method
        assert (bar.mean() + 0.9).abs() < 0.06, method


def test_an_unknown_method_is_refused():
    with pytest.raises(SettingError, match="wavelet_adaptive"):
        ColorTransfer("sepia")


def test_lab_leaves_the_contrast_of_fine_detail_as_it_was_restored():
    # Half the pixels of a fine pattern are bright, half dark; in the blurred input all are grey.
    style = landscape(1, (64, 64)) * 0.2
    pattern = 0.3 * pulse(64).view(64, 1) * pulse(64).view(1, 64)
    content = style + pattern

    def contrast(clip: torch.Tensor) -> torch.Tensor:
        return (color.rgb_to_lab((clip + 1) / 2)[:, 0] * pattern.sign()).mean()

    torch.testing.assert_close(contrast(ColorTransfer("lab")(content, style)), contrast(content), rtol=0.01, atol=0)
    assert contrast(color.lab(content, style, lightness_kept=0.8)) < 0.9 * contrast(content)


# A clip


@pytest.mark.parametrize("method", COLOR_METHODS)
def test_the_result_does_not_depend_on_where_the_clip_is_cut(method):
    style = torch.cat([landscape(6), landscape(5, seed=9)]) + 0.05 * torch.randn(11, 3, 1, 1)
    content = restored(style) + 0.05 * torch.randn(11, 1, 1, 1)
    whole = ColorTransfer(method)(content, style)
    for lengths in ([1] * 11, [4, 3, 4], [10, 1]):
        transfer = ColorTransfer(method)
        pieces = [transfer(c, s) for c, s in zip(content.split(lengths), style.split(lengths), strict=True)]
        torch.testing.assert_close(torch.cat(pieces), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["wavelet", "lab", "adain", "wavelet_adaptive"])
def test_flicker_of_the_restored_clip_gives_way_to_a_steady_input(method):
    style = landscape(20)
    content = restored(style) + 0.1 * pulse(20)
    result = ColorTransfer(method)(content, style)

    def flicker(clip: torch.Tensor) -> torch.Tensor:
        return clip.mean(dim=(2, 3)).std(dim=0).max()

    assert flicker(result) < 0.05 * flicker(content)
    assert (result - style).mean(dim=(2, 3)).abs().max() < 0.02


def test_flicker_of_saturation_gives_way_to_a_steady_input():
    style = landscape(20)
    grey = restored(style).mean(dim=1, keepdim=True)
    content = grey + (restored(style) - grey) * (1 + 0.3 * pulse(20))

    def saturation(clip: torch.Tensor) -> torch.Tensor:
        return color.rgb_to_hsv((clip + 1) / 2)[:, 1].mean(dim=(1, 2))

    result = ColorTransfer("hsv")(content, style)
    assert saturation(result).std() < 0.1 * saturation(content).std()
    assert (saturation(result) - saturation(style)).abs().max() < 0.02


@pytest.mark.parametrize("method", ["lab", "adain"])
def test_an_input_whose_contrast_pulses_does_not_make_the_result_pump(method):
    # As key frames do: every other frame of the input is noisier in colour; the restored clip is clean.
    frames = 24
    tint = torch.tensor([1.0, -1.0, 1.0]).view(3, 1, 1)
    style = landscape(frames) + tint * torch.randn(frames, 1, 48, 64) * (0.12 + 0.08 * pulse(frames))
    content = restored(landscape(frames))

    def pumping(clip: torch.Tensor) -> torch.Tensor:
        """How much the spread of red against green changes between neighbours, once averages have settled."""
        return (clip[:, 0] - clip[:, 1]).std(dim=(1, 2))[12:].diff().abs().mean()

    plain = torch.cat([FORMULAS[method](content[t : t + 1], style[t : t + 1]) for t in range(frames)])
    assert pumping(ColorTransfer(method)(content, style)) < 0.2 * pumping(plain)


@pytest.mark.parametrize("method", COLOR_METHODS)
def test_a_cut_is_followed_at_once(method):
    first, second = landscape(8), landscape(4, seed=5) * 0.5 + 0.3
    transfer = ColorTransfer(method)
    transfer(restored(first), first)
    after = transfer(restored(second), second)
    torch.testing.assert_close(after, ColorTransfer(method)(restored(second), second), atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", ["wavelet", "lab", "adain", "wavelet_adaptive"])
def test_a_fade_arrives_on_time(method):
    # To black in a second: a lag of a few frames would be seen.
    light = torch.linspace(1, 0, 24).view(-1, 1, 1, 1)
    style = (landscape(24) + 1) * light - 1
    content = (restored(landscape(24)) + 1) * light - 1
    result = ColorTransfer(method)(content, style)
    assert (result - style).mean(dim=(2, 3)).abs().max() < 0.03


@pytest.mark.parametrize("method", ["lab", "adain", "hsv"])
def test_memory_does_not_grow_with_the_clip(method):
    transfer = ColorTransfer(method)
    transfer(restored(landscape(2)), landscape(2))
    early = len(pickle.dumps(transfer))
    transfer(restored(landscape(20)), landscape(20))
    assert len(pickle.dumps(transfer)) == early


@pytest.mark.parametrize("method", ["wavelet", "lab", "adain"])
def test_no_frame_waits_for_the_device(method):
    # Nobody can look at values there.
    clip = torch.empty(3, 3, 32, 48, device="meta")
    assert ColorTransfer(method)(clip, clip).shape == clip.shape


@pytest.mark.parametrize("method", ["lab", "hsv"])
def test_a_full_hd_frame_takes_seconds_not_minutes(method):
    style = landscape(1, (1080, 1920))
    content = restored(style)
    start = time.perf_counter()
    ColorTransfer(method)(content, style)
    assert time.perf_counter() - start < 30


def test_half_precision_clips_are_corrected_in_fp32():
    style = landscape(2)
    content = restored(style).half()
    result = ColorTransfer("wavelet")(content, style)
    assert result.dtype == torch.float32
    assert torch.equal(result, color.wavelet(content.float(), style))
