"""Sizes, padding and ranges against the published tables, and the inverses they must have."""

import math

import pytest
import torch

from seedvr2_core.errors import SettingError
from seedvr2_core.video import geometry
from seedvr2_core.video.geometry import Target
from tests.core.published import area_size, centre_crop, repeat_last_indices


def black_padded(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The node's padding, which the product replaces by reflection."""
    padding = (0, width - frames.shape[-1], 0, height - frames.shape[-2])
    return torch.nn.functional.pad(frames, padding)


# Sizes


@pytest.fixture
def no_size_limit(monkeypatch):
    # The tables enlarge a strip of 1 x 1000 pixels beyond what the product agrees to.
    monkeypatch.setattr(geometry, "MAX_SIDE", math.inf)


def test_short_side_sizes_match_the_published_table(golden, no_size_limit):
    for case in golden("pipeline/size_table")[1]["side_then_pad16"]:
        if case["max_resolution"]:
            # The node limits the longer side; who wants that asks for the longer side.
            continue
        rows, columns = Target.short_side(case["resolution"]).size(*case["in"])
        assert [rows, columns] == case["resized"]
        assert [rows // 2 * 2, columns // 2 * 2] == case["even"]
        assert list(geometry.padded_size(rows, columns)) == case["padded"]


@pytest.mark.parametrize(("target", "expected"), [
    (Target.same(), (1080, 1920)),
    (Target.scale(1.5), (1620, 2880)),
    (Target.scale(0.25), (270, 480)),
    (Target.short_side(720), (720, 1280)),
    (Target.long_side(1000), (562, 1000)),
    (Target.megapixels(0.5184), (540, 960)),
    (Target.exact(100, 301), (100, 301)),
], ids=str)
def test_size_of_a_full_hd_frame(target, expected):
    assert target.size(1080, 1920) == expected
    if target.kind != "exact":
        assert target.size(1920, 1080) == expected[::-1]


def test_an_extreme_shape_keeps_at_least_one_pixel():
    assert Target.long_side(16).size(1, 1000) == (1, 16)


@pytest.mark.parametrize("bad", [0, -1, math.inf, math.nan])
@pytest.mark.parametrize("build", [Target.scale, Target.short_side, Target.long_side, Target.megapixels,
                                   lambda v: Target.exact(64, v)])
def test_an_impossible_size_is_refused_when_it_is_built(build, bad):
    with pytest.raises(SettingError, match="above zero"):
        build(bad)


@pytest.mark.parametrize("target", [Target.scale(100), Target.exact(70000, 10), Target.megapixels(1e7)], ids=str)
def test_an_absurdly_large_output_is_refused(target):
    with pytest.raises(SettingError, match="65536"):
        target.size(1080, 1920)


# Resizing, cropping, padding


def test_area_transform_matches_the_published_script(golden):
    tensors, meta = golden("pipeline/resize_area")
    for name, case in meta["cases"].items():
        frames = tensors[f"{name}/frames_u8"].float() / 255
        resized = geometry.resize(frames, *area_size(case["res_h"], case["res_w"], *case["input_thw"][1:]))
        assert list(resized.shape[2:]) == case["resized_hw"]
        torch.testing.assert_close(resized, tensors[f"{name}/resized"].clamp(0, 1), atol=2e-6, rtol=0)
        clip = geometry.to_clip(centre_crop(resized)).transpose(0, 1)
        torch.testing.assert_close(clip, tensors[f"{name}/output"], atol=2e-6, rtol=0)


def test_side_transform_matches_the_node(golden):
    tensors, meta = golden("pipeline/resize_side")
    for name, case in meta["cases"].items():
        frames = tensors[f"{name}/frames_u8"].float() / 255
        size = frames.shape[-2:]
        resized = geometry.resize(frames, *Target.short_side(case["resolution"]).size(*size))
        # The node resamples a second time where the longer side is limited.
        resized = geometry.resize(resized, *case["resized_hw"])
        torch.testing.assert_close(resized, tensors[f"{name}/resized"].clamp(0, 1), atol=2e-6, rtol=0)
        clip = geometry.to_clip(black_padded(resized, *case["padded_hw"])).transpose(0, 1)
        torch.testing.assert_close(clip, tensors[f"{name}/output"], atol=2e-6, rtol=0)


def test_resize_to_the_same_size_changes_no_bit():
    frames = torch.rand(2, 3, 9, 11)
    assert torch.equal(geometry.resize(frames, 9, 11), frames)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_frames_are_resized_in_fp32(dtype):
    frames = torch.rand(1, 3, 20, 30).to(dtype)
    resized = geometry.resize(frames, 33, 50)
    assert resized.dtype == dtype
    assert torch.equal(resized, geometry.resize(frames.float(), 33, 50).to(dtype))


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (16, 17), (31, 32), (5, 50)], ids=str)
def test_crop_undoes_padding(size):
    clip = torch.rand(1, 3, 5, *size)
    padded = geometry.pad_to_multiple(clip)
    assert all(side % 16 == 0 and 0 <= side - before < 16 for side, before in zip(padded.shape[-2:], size, strict=True))
    assert torch.equal(geometry.crop(padded, *size), clip)


def test_padding_mirrors_the_picture_as_often_as_needed():
    row = torch.arange(3.0).expand(1, 1, 1, 3)
    assert geometry.pad_to_multiple(row, 8)[0, 0, 0].tolist() == [0, 1, 2, 1, 0, 1, 2, 1]
    large = torch.rand(1, 3, 30, 40)
    expected = torch.nn.functional.pad(large, (0, 8, 0, 2), mode="reflect")
    assert torch.equal(geometry.pad_to_multiple(large), expected)


# Frame counts


def test_frame_indices_match_the_published_tables(golden):
    tables = golden("pipeline/frame_padding")[1]
    for name, table in tables["pad_repeat_last"].items():
        for frames, expected in table.items():
            assert repeat_last_indices(int(frames), ranks=int(name.removeprefix("sp"))) == expected
    for frames, expected in tables["pad_reverse_append"].items():
        assert geometry.mirror_indices(int(frames), geometry.padded_length(int(frames))) == expected
    for name, table in tables["pad_reverse_append_count"].items():
        for frames, expected in table.items():
            assert geometry.mirror_indices(int(frames), int(frames) + int(name.removeprefix("n"))) == expected
    for name, table in tables["pad_reverse_prepend"].items():
        for frames, expected in table.items():
            assert geometry.mirror_indices_before(int(frames), int(name.removeprefix("n"))) == expected


def test_grids_of_a_720p_clip():
    assert geometry.latent_grid(121, 720, 1280) == (31, 90, 160)
    assert geometry.latent_grid(1, 16, 16) == (1, 2, 2)


# Ranges


def test_quantisation_rounds_as_published(golden):
    tensors, _ = golden("pipeline/quantize_u8")
    assert torch.equal(geometry.to_uint8(geometry.to_frames(tensors["x"])), tensors["u8_round"])


def test_eight_bit_codes_survive_the_model_range():
    codes = torch.arange(256, dtype=torch.uint8)
    clip = geometry.to_clip(codes.float() / 255)
    assert (clip.min(), clip.max()) == (-1, 1)
    assert torch.equal(geometry.to_uint8(geometry.to_frames(clip)), codes)
    # bf16 keeps 8 bits of mantissa, too few at white but enough that the conversion itself must not lose more.
    assert torch.equal(geometry.to_frames(clip.bfloat16()), geometry.to_frames(clip.bfloat16().float()))


def test_values_out_of_range_are_clamped():
    assert geometry.to_uint8(torch.tensor([-0.5, 1.5])).tolist() == [0, 255]
    assert geometry.to_frames(torch.tensor([-2.0, 2.0])).tolist() == [0, 1]
