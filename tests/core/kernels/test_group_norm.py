"""GroupNorm of single frames against its reference, and the reference against torch's."""

import pytest
import torch
import torch.nn.functional as F

from seedvr2_core.kernels.group_norm import (
    Moments,
    add_residual,
    apply_norm_silu,
    group_statistics,
    reference_add_residual,
    reference_apply_norm_silu,
    reference_statistics,
    torch_apply_norm_silu,
    torch_statistics,
)
from tests.core.kernels.ground import NEEDS_CUDA, Ground

EPS = 1e-6
# Channels, groups, clips, frames, height, width: less than a block, several blocks, a width that is no power of two.
SHAPES = ((32, 8, 1, 3, 5, 7), (32, 4, 2, 2, 20, 23), (24, 4, 1, 2, 9, 31))
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES, ids=str)
REAL = ((128, 4, 720, 1280), (256, 4, 360, 640), (512, 3, 90, 160))


def activation(ground, shape):
    """Channels-last b c t h w, a mean and a spread of its own in every channel."""
    c, _, b, t, h, w = shape
    x = ground.random(b, c, t, h, w) * ground.random(1, c, 1, 1, 1) + ground.random(1, c, 1, 1, 1)
    return x.to(memory_format=torch.channels_last_3d)


def assert_moments(ground, got, expected):
    for x, y in zip(got, expected, strict=True):
        assert x.dtype == torch.float32
        ground.assert_close(x, y, 1e-5)


def slot(x, before=2):
    """The frames after the first ones of a larger buffer, and that buffer."""
    b, c, t, h, w = x.shape
    buffer = torch.full_like(x[:, :, :1].expand(b, c, t + before, h, w), 7, memory_format=torch.channels_last_3d)
    buffer[:, :, before:] = x
    return buffer[:, :, before:], buffer


@EVERY_SHAPE
def test_the_reference_is_group_norm_of_every_frame_alone(shape):
    cpu = Ground(torch.device("cpu"), torch.float32, 1e-5)
    x, groups = activation(cpu, shape), shape[1]
    weight, bias = torch.randn(2, shape[0])
    frames = x.transpose(1, 2).flatten(0, 1)
    expected = F.group_norm(frames, groups, weight, bias, EPS).unflatten(0, (x.shape[0], -1)).transpose(1, 2)
    cpu.assert_close(reference_apply_norm_silu(x, reference_statistics(x, groups), weight, bias, EPS), F.silu(expected))


@EVERY_SHAPE
def test_the_way_of_the_library_agrees_with_the_reference_and_stays_channels_last(shape):
    for cpu in (Ground(torch.device("cpu"), torch.float32, 1e-5), Ground(torch.device("cpu"), torch.bfloat16, 5e-3)):
        groups, (weight, bias) = shape[1], cpu.random(2, shape[0])
        x = activation(cpu, shape).transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        moments = torch_statistics(x, groups)
        assert_moments(cpu, moments, reference_statistics(x, groups))
        out = torch_apply_norm_silu(x, moments, weight, bias, EPS)
        assert out.is_contiguous(memory_format=torch.channels_last)
        cpu.assert_close(out, reference_apply_norm_silu(x, moments, weight, bias, EPS))


@EVERY_SHAPE
def test_statistics_agree_with_the_reference(ground, shape):
    x, groups = activation(ground, shape), shape[1]
    assert_moments(ground, group_statistics(x, groups), reference_statistics(x, groups))


@EVERY_SHAPE
def test_norm_and_silu_agree_with_the_reference_inside_a_larger_buffer(ground, shape):
    groups, (weight, bias) = shape[1], ground.random(2, shape[0])
    x, _ = slot(activation(ground, shape))
    moments = reference_statistics(x, groups)
    ground.assert_close(
        apply_norm_silu(x, moments, weight, bias, EPS), reference_apply_norm_silu(x, moments, weight, bias, EPS)
    )


@EVERY_SHAPE
def test_residual_and_bias_are_added_and_the_sum_is_measured(ground, shape):
    x, residual, groups = activation(ground, shape), activation(ground, shape), shape[1]
    bias = ground.random(shape[0])
    expected, moments = reference_add_residual(x, residual, groups, bias)
    place, buffer = slot(x)
    out, got = add_residual(x, residual, groups, bias, out=place)
    assert out is place and (buffer[:, :, :2] == 7).all()
    ground.assert_close(out, expected)
    assert_moments(ground, got, moments)
    expected_alone, moments = reference_add_residual(x, None, groups, bias)
    out, got = add_residual(x, None, groups, bias)
    ground.assert_close(out, expected_alone)
    assert_moments(ground, got, moments)
    # Where nobody needs a summand any more, the sum may take its place.
    out, _ = add_residual(x, residual, groups, bias, out=residual)
    assert out is residual
    ground.assert_close(residual, expected)


def test_moments_of_bands_add_up_to_those_of_the_frame(ground):
    x = activation(ground, SHAPES[1])
    parts = [group_statistics(x[:, :, :1, :8], 4), group_statistics(x[:, :, :1, 8:], 4)]
    whole = group_statistics(x[:, :, :1], 4)
    assert_moments(ground, Moments(*(sum(column) for column in zip(*parts, strict=True))), whole)


def test_frames_and_clips_are_the_same_thing(ground):
    x = activation(ground, SHAPES[0])
    frames = x[0].transpose(0, 1)
    for got, expected in zip(group_statistics(frames, 8), group_statistics(x, 8), strict=True):
        assert torch.equal(got, expected)


def test_frames_that_are_not_channels_last_are_refused(ground):
    with pytest.raises(ValueError, match="channels-last"):
        group_statistics(ground.random(1, 32, 2, 4, 4), 8)


@pytest.mark.gpu
@NEEDS_CUDA
@pytest.mark.parametrize("shape", REAL, ids=str)
def test_agrees_with_the_reference_at_real_sizes_on_a_gpu(ground, shape):
    c, t, h, w = shape
    x, residual = activation(ground, (c, 32, 1, t, h, w)), activation(ground, (c, 32, 1, t, h, w))
    weight, bias, before = ground.random(3, c)
    expected, moments = reference_add_residual(x, residual, 32, before)
    out, got = add_residual(x, residual, 32, before)
    ground.assert_close(out, expected)
    # Sums of up to 15 million values, which may cancel.
    assert_moments(ground, (got.squares,), (moments.squares,))
    assert ((got.sums - moments.sums).abs() <= 1e-4 * (moments.squares * (c // 32) * h * w).sqrt()).all()
    ground.assert_close(
        apply_norm_silu(x, group_statistics(x, 32), weight, bias, EPS),
        reference_apply_norm_silu(x, reference_statistics(x, 32), weight, bias, EPS),
    )
