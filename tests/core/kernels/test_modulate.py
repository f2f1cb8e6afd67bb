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
# Tokens, channels.
SHAPES = ((5, 48), (7, 64))
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES, ids=str)
REAL = ((25200, 2560), (8040, 3072))


def inputs(ground, shape):
    """Two tensors of tokens, then scale and shift."""
    return *ground.random(2, *shape), *torch.randn(2, 1, shape[1], device=ground.device)


def assert_agrees(ground, shape):
    x, y, scale, shift = inputs(ground, shape)
    ground.assert_close(norm_modulate(x, scale, shift, EPS), reference_norm_modulate(x, scale, shift, EPS))
    ground.assert_close(gate_residual(x, y, scale), reference_gate_residual(x, y, scale))


@EVERY_SHAPE
def test_agrees_with_the_reference(ground, shape):
    assert_agrees(ground, shape)


def test_rows_may_lie_anywhere(ground):
    """As the timestep embedding has them: channels slowest."""
    x, y, scale, shift = inputs(ground, SHAPES[1])
    apart = [torch.stack([row, row], dim=-1)[..., 0] for row in (scale, shift)]
    assert apart[0].stride(1) == 2
    assert torch.equal(norm_modulate(x, *apart, EPS), norm_modulate(x, scale, shift, EPS))
    assert torch.equal(gate_residual(x, y, apart[0]), gate_residual(x, y, scale))


@pytest.mark.gpu
@NEEDS_CUDA
@pytest.mark.parametrize("shape", REAL, ids=str)
def test_agrees_with_the_reference_at_real_sizes_on_a_gpu(ground, shape):
    assert_agrees(ground, shape)
