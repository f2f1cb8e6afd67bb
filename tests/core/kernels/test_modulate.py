"""Norm with modulation, and the gated residual, against their references."""

import pytest
import torch

from seedvr2_core.kernels.modulate import (
    gate_residual,
    norm_modulate,
    reference_gate_residual,
    reference_norm_modulate,
)
from tests.core.kernels.ground import NEEDS_CUDA

EPS = 1e-5
# Tokens, channels, rows of modulation.
SHAPES = ((5, 48, 1), (7, 64, 3))
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES, ids=str)
REAL = ((25200, 2560, 1), (8040, 3072, 2))


def inputs(ground, shape):
    tokens, channels, rows = shape
    sample = None
    if rows > 1:
        sample = (torch.arange(tokens, dtype=torch.int32) * rows // tokens).to(ground.device)
    x, y = ground.random(2, tokens, channels)
    scale, shift = torch.randn(2, rows, channels, device=ground.device)
    return x, y, scale, shift, sample


def assert_agrees(ground, shape):
    x, y, scale, shift, sample = inputs(ground, shape)
    ground.assert_close(
        norm_modulate(x, scale, shift, EPS, sample), reference_norm_modulate(x, scale, shift, EPS, sample)
    )
    ground.assert_close(gate_residual(x, y, scale, sample), reference_gate_residual(x, y, scale, sample))


@EVERY_SHAPE
def test_agrees_with_the_reference(ground, shape):
    assert_agrees(ground, shape)


def test_every_sample_has_a_row_of_its_own(ground):
    x, _, scale, shift, sample = inputs(ground, SHAPES[1])
    out = norm_modulate(x, scale, shift, EPS, sample)
    for row in range(3):
        inside = sample == row
        alone = norm_modulate(x[inside], scale[row : row + 1], shift[row : row + 1], EPS)
        assert torch.equal(out[inside], alone)


def test_rows_may_lie_anywhere(ground):
    """As the timestep embedding has them: channels slowest."""
    x, y, scale, shift, sample = inputs(ground, SHAPES[1])
    apart = [torch.stack([row, row], dim=-1)[..., 0] for row in (scale, shift)]
    assert apart[0].stride(1) == 2
    assert torch.equal(norm_modulate(x, *apart, EPS, sample), norm_modulate(x, scale, shift, EPS, sample))
    assert torch.equal(gate_residual(x, y, apart[0], sample), gate_residual(x, y, scale, sample))


def test_a_residual_may_be_added_in_place(ground):
    x, y, gate, _, sample = inputs(ground, SHAPES[1])
    expected = gate_residual(x, y, gate, sample)
    assert gate_residual(x, y, gate, sample, out=x) is x
    assert torch.equal(x, expected)


@pytest.mark.gpu
@NEEDS_CUDA
@pytest.mark.parametrize("shape", REAL, ids=str)
def test_agrees_with_the_reference_at_real_sizes_on_a_gpu(ground, shape):
    assert_agrees(ground, shape)
