"""What a trial counts: the bytes alive on the way, to the byte, of operations that compute nothing."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from seedvr2_core.memory.trial import SMALL_CONVOLUTION, footprint
from seedvr2_core.models.dit import SwiGLU
from seedvr2_core.models.linear import pack

KILO = 1 << 10


def test_the_peak_is_what_is_alive_at_once_and_kept_what_comes_back():
    def call() -> torch.Tensor:
        x = torch.empty(KILO, dtype=torch.uint8)
        y = torch.empty(3 * KILO, dtype=torch.uint8)
        del x
        return y[: 2 * KILO].clone()

    assert footprint(call, "cpu") == (5 * KILO, 2 * KILO)


def test_views_and_in_place_results_count_once():
    def call() -> torch.Tensor:
        x = torch.empty(KILO, dtype=torch.uint8)
        return x.view(2, -1).t().add_(1)

    assert footprint(call, "cpu") == (KILO, KILO)


def test_a_view_keeps_all_of_what_it_looks_at():
    assert footprint(lambda: torch.empty(KILO, dtype=torch.uint8)[:1], "cpu").kept == KILO


def test_weights_count_for_nothing_and_are_left_as_they_are():
    layer = nn.Linear(8, 4)
    before = layer.weight.detach().clone()
    assert footprint(lambda: layer(torch.empty(2, 8)), "cpu") == (2 * 8 * 4 + 2 * 4 * 4, 2 * 4 * 4)
    assert footprint(lambda: layer.weight.mul_(2), "cpu") == (0, 0)
    assert torch.equal(layer.weight, before)


def test_nothing_is_computed_however_large():
    assert footprint(lambda: torch.zeros(1 << 50, dtype=torch.uint8) + 1, "cpu").peak == 1 << 51


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [0, 1, (1, 0)])
@pytest.mark.parametrize("dims", [2, 3])
def test_convolutions_have_the_shape_and_layout_that_they_have(dims, padding, stride):
    convolve, layout = (F.conv2d, torch.channels_last) if dims == 2 else (F.conv3d, torch.channels_last_3d)
    padding = padding if isinstance(padding, int) else (0,) * (dims - 2) + padding
    x = torch.randn(2, 3, *(9, 7, 8)[:dims]).contiguous(memory_format=layout)
    weight = torch.randn(4, 3, *[3] * dims).contiguous(memory_format=layout)
    seen = []

    def call() -> None:
        y = convolve(x, weight, None, stride, padding)
        seen.append((y.shape, y.stride()))

    footprint(call, "cuda")
    expected = convolve(x, weight, None, stride, padding)
    assert seen == [(expected.shape, expected.stride())]


def test_what_a_convolution_takes_inside_counts_on_a_cpu():
    x, weight = torch.empty(1, 4, 3, 8, 8), torch.empty(4, 4, 3, 3, 3)
    out, positions = 4 * 6 * 6 * 4, 6 * 6
    assert footprint(lambda: F.conv3d(x, weight), "cuda").peak == out
    # Torch's own writes down what the kernel sees from every position; oneDNN reorders the kernel.
    assert footprint(lambda: F.conv3d(x, weight), "cpu").peak == out + positions * weight[0].nbytes + x.nbytes
    wide = torch.empty(1, 4, 3, SMALL_CONVOLUTION, 3)
    taken = footprint(lambda: F.conv3d(wide, weight), "cpu")
    assert taken.peak - taken.kept == weight.nbytes


def test_what_is_written_to_a_given_tensor_counts_once():
    def call() -> torch.Tensor:
        x = torch.empty(KILO, dtype=torch.uint8)
        return torch.stack([x, x], out=torch.empty(2, KILO, dtype=torch.uint8))

    assert footprint(call, "cpu") == (3 * KILO, 2 * KILO)


OPERATIONS = {
    "statistics": lambda x: torch.batch_norm_update_stats(x, torch.zeros(4), torch.ones(4), 0.0)[1],
    "attention": lambda x: F.scaled_dot_product_attention(x, x[:, :, :5], x[:, :, :5, :3]),
    "moments": lambda x: torch.var_mean(x, dim=(-2, -1), keepdim=True)[0],
    "transposed product": lambda x: x.transpose(1, 2) @ torch.ones(8, 5),
    "scalar that is no integer": lambda x: x.sum() + (x.long() * 1.5).sum() + (x.long() * True).sum(),
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_what_an_operation_makes_is_what_torch_makes_the_second_time_as_well(name, layout):
    x, seen = torch.randn(2, 4, 6, 8).contiguous(memory_format=layout), []

    def call() -> None:
        seen.append(OPERATIONS[name](x))

    footprint(call, "cpu")
    footprint(call, "cpu")
    expected = OPERATIONS[name](x)
    for y in seen:
        assert (y.shape, y.stride(), y.dtype) == (expected.shape, expected.stride(), expected.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_linear_layers_are_tried_as_well(dtype):
    mlp = pack(SwiGLU(32, 64).to(dtype).requires_grad_(False))
    x = torch.randn(5, 32, dtype=dtype)
    result = mlp(x)
    assert footprint(lambda: mlp(x), "cpu").kept == result.nbytes


def test_a_trial_lets_go_of_the_weights_it_has_seen():
    weights = [torch.randn(4, 4)]
    storage = weakref.ref(weights[0].untyped_storage())
    gc.disable()
    try:
        footprint(lambda: torch.empty(4, 4) @ weights[0], "cpu")
        weights.clear()
        assert storage() is None
    finally:
        gc.enable()
