"""Masks follow the picture, and the published fixture."""

import pytest
import torch
from torch.nn.functional import avg_pool2d

from seedvr2_core.video import alpha as alpha_module
from seedvr2_core.video.alpha import EPSILON, guided_filter, upscale_alpha
from seedvr2_core.video.geometry import resize, to_clip, to_frames


@pytest.mark.parametrize("case", ["binary", "gradient"])
def test_masks_match_the_community_node_but_for_its_border(golden, monkeypatch, case):
    monkeypatch.setattr(alpha_module, "_mean", lambda x, radius: avg_pool2d(x, 2 * radius + 1, 1, radius))
    tensors, _ = golden("pipeline/alpha")
    alpha, rgb = tensors[f"{case}/alpha_in"], tensors[f"{case}/rgb_upscaled"]
    enlarged = resize(alpha, *rgb.shape[2:])
    guided = guided_filter(to_frames(rgb).mean(dim=1, keepdim=True), enlarged, radius=2, epsilon=EPSILON)
    assert agreement(guided, tensors[f"{case}/guided_r2"]) > 0.999
    assert agreement(upscale_alpha(alpha, rgb), tensors[f"{case}/alpha_out"]) > 0.999


def agreement(values: torch.Tensor, expected: torch.Tensor) -> float:
    return ((values - expected).abs() < 1e-4).float().mean().item()


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_an_opaque_or_empty_mask_stays_so_where_there_are_no_edges(value):
    rgb = torch.zeros(2, 3, 32, 48)
    result = upscale_alpha(torch.full((2, 1, 16, 24), value), rgb)
    assert torch.equal(result, torch.full((2, 1, 32, 48), value))


def test_a_blurred_edge_of_the_mask_follows_the_picture():
    # The mask is soft from column 12 to 24; the picture has its edge at 18.
    picture = torch.zeros(1, 3, 40, 40)
    picture[..., 18:] = 1
    alpha = torch.linspace(-1, 2, 20).clamp(0, 1).expand(1, 1, 20, 20)
    plain, guided = resize(alpha, 40, 40), upscale_alpha(alpha, to_clip(picture))
    step = (guided[..., 18] - guided[..., 17]).mean()
    assert step > 3 * (plain[..., 18] - plain[..., 17]).mean()


def test_a_cut_out_stays_hard():
    picture = torch.zeros(1, 3, 40, 40)
    picture[..., 18:] = 1
    result = upscale_alpha((picture[:, :1, ::2, ::2]).clone(), to_clip(picture))
    assert torch.equal(result > 0.5, picture[:, :1] > 0.5)
    assert ((result < 0.01) | (result > 0.99)).float().mean() > 0.9


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (3, 2)], ids=str)
def test_tiny_masks_are_finite_and_in_range(size):
    result = upscale_alpha(torch.rand(1, 1, *size), torch.rand(1, 3, *size) * 2 - 1)
    assert result.shape == (1, 1, *size)
    assert 0 <= result.min() <= result.max() <= 1


def test_an_opaque_picture_stays_opaque():
    alpha = upscale_alpha(torch.ones(1, 1, 8, 8), torch.rand(1, 3, 16, 16) * 2 - 1)
    assert alpha.shape == (1, 1, 16, 16)
    assert (alpha == 1).all()
