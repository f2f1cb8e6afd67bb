"""The causal convolution, tile by tile, against its reference; small tiles in the interpreter, all of them on a GPU."""

import pytest
import torch
import torch.nn.functional as F

from seedvr2_core.kernels.causal_conv3d import (
    TILES,
    Tile,
    causal_conv3d,
    causal_conv3d_with_statistics,
    reference,
    reference_with_statistics,
    tiles,
)
from tests.core.kernels.ground import NEEDS_CUDA, Ground

SMALL = (
    Tile(loads="pointers", rows=2, columns=8, channels=16, depth=16, warps=4, stages=2),
    Tile(loads="descriptors", rows=2, columns=8, channels=64, depth=16, warps=4, stages=2),
)
EVERY_LOAD = pytest.mark.parametrize("tile", SMALL, ids=lambda tile: tile.loads)
LAST = torch.channels_last_3d


@pytest.fixture(autouse=True)
def _descriptors_need_hopper(request, ground):
    tile = request.node.callspec.params.get("tile") if hasattr(request.node, "callspec") else None
    on_cuda = ground.device.type == "cuda"
    if tile and tile.loads == "descriptors" and on_cuda and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("tensor descriptors need compute capability 9.0 or later")


def problem(ground, c_in=16, c_out=24, taps=3, b=1, t=1, h=3, w=9):
    """Sides that no tile divides. Input, weight, bias, residual."""
    x = ground.random(b, c_in, t + taps - 1, h, w).to(memory_format=LAST)
    weight = (ground.random(c_out, c_in, taps, 3, 3) * (c_in * taps * 9) ** -0.5).to(memory_format=LAST)
    return x, weight, ground.random(c_out), ground.random(b, c_out, t, h, w).to(memory_format=LAST)


def test_the_reference_is_a_convolution_padded_in_space_alone():
    cpu = Ground(torch.device("cpu"), torch.float32, 1e-5)
    x, weight, bias, residual = problem(cpu)
    cpu.assert_close(reference(x, weight, bias, residual), F.conv3d(F.pad(x, (1,) * 4), weight, bias) + residual)


@EVERY_LOAD
@pytest.mark.parametrize("taps", (1, 2, 3))
def test_agrees_with_the_reference(ground, tile, taps):
    x, weight, bias, residual = problem(ground, taps=taps, c_out=tile.channels + 8)
    ground.assert_close(causal_conv3d(x, weight, tile, bias, residual), reference(x, weight, bias, residual))


@EVERY_LOAD
def test_input_channels_are_taken_in_parts_and_nothing_need_be_added(ground, tile):
    x, weight, _, _ = problem(ground, c_in=48, c_out=16, taps=1)
    ground.assert_close(causal_conv3d(x, weight, tile), reference(x, weight))


@EVERY_LOAD
def test_agrees_with_the_reference_in_fp16(ground, tile):
    x, weight, bias, residual = problem(ground.half(), c_out=16, taps=1)
    out, moments = causal_conv3d_with_statistics(x, weight, tile, 8, bias, residual)
    expected, expected_moments = reference_with_statistics(x, weight, 8, bias, residual)
    assert out.dtype == torch.float16
    ground.half().assert_close(out, expected)
    ground.half().assert_close(moments.squares, expected_moments.squares)


def test_pointers_take_any_number_of_channels(ground):
    x, weight, bias, _ = problem(ground, c_in=20, c_out=3, taps=1)
    ground.assert_close(causal_conv3d(x, weight, SMALL[0], bias), reference(x, weight, bias))


@EVERY_LOAD
def test_clips_lie_where_their_strides_say(ground, tile):
    x, weight, bias, residual = problem(ground, b=2, t=2, taps=2, h=2, c_out=16)
    buffer = ground.random(2, 16, 5, 2, 9).to(memory_format=LAST)
    beside = ground.random(2, 16, 4, 2, 9).to(memory_format=LAST)
    buffer[:, :, 1:4], beside[:, :, 2:] = x, residual
    out = causal_conv3d(buffer[:, :, 1:4], weight, tile, bias, beside[:, :, 2:])
    ground.assert_close(out, reference(x, weight, bias, residual))


@EVERY_LOAD
def test_a_clip_in_two_slices_is_the_clip(ground, tile):
    x, weight, bias, _ = problem(ground, t=2, h=2, c_out=16)
    whole = causal_conv3d(x, weight, tile, bias)
    parts = [causal_conv3d(x[:, :, start : start + 3], weight, tile, bias) for start in (0, 1)]
    assert torch.equal(torch.cat(parts, dim=2), whole)


@EVERY_LOAD
# Groups of two channels; and of three, which no tile holds whole.
@pytest.mark.parametrize("groups", (12, 8))
def test_statistics_are_those_of_what_is_stored(ground, tile, groups):
    x, weight, bias, residual = problem(ground, t=2, taps=1)
    out, moments = causal_conv3d_with_statistics(x, weight, tile, groups, bias, residual)
    expected, expected_moments = reference_with_statistics(x, weight, groups, bias, residual)
    ground.assert_close(out, expected)
    for got, value in zip(moments, expected_moments, strict=True):
        assert got.dtype == torch.float32
        ground.assert_close(got, value)


def test_descriptors_are_for_hopper_and_whole_blocks_of_channels():
    assert {tile.loads for tile in tiles((9, 0), 128, 128)} == {"descriptors", "pointers"}
    assert {tile.loads for tile in tiles((8, 9), 128, 128)} == {"pointers"}
    assert {tile.loads for tile in tiles((9, 0), 96, 128)} == {"pointers"}


def test_three_colours_are_left_to_the_library_on_the_way_in_but_not_on_the_way_out():
    assert tiles((9, 0), 3, 128) == []
    assert [tile.channels for tile in tiles((9, 0), 128, 3)] == [16]


def test_names_of_tiles_are_unique():
    assert len({tile.name for tile in TILES}) == len(TILES)


@pytest.mark.gpu
@NEEDS_CUDA
@pytest.mark.parametrize("tile", TILES, ids=lambda tile: tile.name)
@pytest.mark.parametrize("channels", ((128, 128), (512, 512), (512, 256), (128, 3)), ids=str)
def test_agrees_with_the_reference_at_real_sizes_on_a_gpu(ground, tile, channels):
    c_in, c_out = channels
    if tile not in tiles(torch.cuda.get_device_capability(), c_in, c_out):
        pytest.skip("not a tile for this GPU and these channels")
    x, weight, bias, residual = problem(ground, c_in, c_out, t=3, h=90, w=168)
    ground.assert_close(causal_conv3d(x, weight, tile, bias, residual), reference(x, weight, bias, residual))
    if c_out % 32 == 0:
        out, moments = causal_conv3d_with_statistics(x, weight, tile, 32, bias, residual)
        _, expected = reference_with_statistics(x, weight, 32, bias, residual)
        ground.assert_close(out, causal_conv3d(x, weight, tile, bias, residual))
        for got, value in zip(moments, expected, strict=True):
            ground.assert_close(got, value)
