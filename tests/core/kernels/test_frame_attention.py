"""Attention of a single wide head, tile by tile, against its reference; and the reference against torch's."""

import pytest
import torch
import torch.nn.functional as F

from seedvr2_core.kernels.frame_attention import TILES, Tile, attend, reference, tiles
from tests.core.kernels.ground import NEEDS_CUDA, Ground

SMALL = Tile(queries=16, keys=16, warps=4, stages=1)
# Frames, positions, channels: no tile divides the positions, nor a power of two the channels.
SHAPES = ((1, 5, 16), (2, 37, 24), (1, 64, 32))
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES, ids=str)
# A frame of 720p, and a wide one.
REAL = ((1, 90 * 160, 512), (2, 48 * 84, 512))


def qkv(ground, shape):
    return ground.random(3, *shape).unbind()


@EVERY_SHAPE
def test_the_reference_is_attention_with_one_head(shape):
    cpu = Ground(torch.device("cpu"), torch.float32, 1e-5)
    q, k, v = qkv(cpu, shape)
    cpu.assert_close(reference(q, k, v), F.scaled_dot_product_attention(q, k, v))


@EVERY_SHAPE
def test_agrees_with_the_reference(ground, shape):
    call = qkv(ground, shape)
    ground.assert_close(attend(*call, SMALL), reference(*call))


def test_agrees_with_the_reference_in_fp16(ground):
    call = qkv(ground.half(), SHAPES[1])
    out = attend(*call, SMALL)
    assert out.dtype == torch.float16
    ground.half().assert_close(out, reference(*call))


def test_scores_may_be_large(ground):
    q, k, v = qkv(ground, SHAPES[1])
    ground.assert_close(attend(30 * q, 30 * k, v, SMALL), reference(30 * q, 30 * k, v), 10 * ground.tolerance)


def test_a_frame_sees_itself_alone(ground):
    q, k, v = qkv(ground, SHAPES[1])
    out = attend(q, k, v, SMALL)
    v[1] += 100
    changed = attend(q, k, v, SMALL)
    assert torch.equal(out[0], changed[0])
    assert not torch.equal(out[1], changed[1])


def test_wider_heads_are_left_to_the_library():
    assert tiles((9, 0), 512) == TILES
    assert tiles((9, 0), 513) == ()


def test_a_gpu_with_little_shared_memory_gets_the_smallest_tile():
    assert tiles((8, 9), 512) == tiles((12, 0), 512) == TILES[-1:]


def test_names_of_tiles_are_unique():
    assert len({tile.name for tile in TILES}) == len(TILES)


@pytest.mark.gpu
@NEEDS_CUDA
@pytest.mark.parametrize("tile", TILES, ids=lambda tile: tile.name)
@pytest.mark.parametrize("shape", REAL, ids=str)
def test_agrees_with_the_reference_at_real_sizes_on_a_gpu(ground, tile, shape):
    if tile not in tiles(torch.cuda.get_device_capability(), shape[-1]):
        pytest.skip("not a tile for this GPU")
    call = qkv(ground, shape)
    ground.assert_close(attend(*call, tile), reference(*call))
