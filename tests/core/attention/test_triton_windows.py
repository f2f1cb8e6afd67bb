"""Attention of windows that share their text: the kernel against its reference, the reference against sequences."""

from dataclasses import replace
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F

from seedvr2_core.attention import AttentionCall, Sequences
from seedvr2_core.attention import reference as sequences_reference
from seedvr2_core.attention.windows import (
    TILES,
    StreamCall,
    Tile,
    WindowCall,
    attend,
    mean_over_windows,
    reference,
    tiles,
    window_map,
)
from tests.core.kernels.ground import NEEDS_CUDA, Ground, find_ground

# Queries and keys of a tile; no window of the tests is a multiple of either.
SMALL = Tile(queries=16, keys=16, warps=4, stages=2)
EPS = 1e-5
CPU = Ground(torch.device("cpu"), torch.float32, 1e-5)
# Tokens of each window of each sample, and of each sample's text.
BATCHES = (([[21]], [5]), ([[3, 18], [17]], [20, 3]), ([[1, 9]], [1]))
EVERY_BATCH = pytest.mark.parametrize("batch", BATCHES, ids=str)


@pytest.fixture
def ground() -> Ground:
    return find_ground()


def stream(ground, tokens, heads, d):
    """As a projection leaves it: one tensor, queries, keys and values side by side."""
    q, k, v = ground.random(tokens, 3 * heads * d).unflatten(1, (3, heads, d)).unbind(1)
    norms = (1 + 0.1 * torch.randn(2, d)).to(ground.device, ground.dtype)
    return StreamCall(q=q, k=k, v=v, norm_q=norms[0], norm_k=norms[1])


def random_call(ground, batch, heads=2, d=16, pairs=7):
    windows, texts = batch
    n, text = sum(map(sum, windows)), sum(texts)
    angles = 10 * torch.randn(n + text, pairs, device=ground.device)
    return WindowCall(
        vid=stream(ground, n, heads, d),
        txt=stream(ground, text, heads, d),
        cos=angles.cos(),
        sin=angles.sin(),
        eps=EPS,
        windows=window_map(torch.randperm(n), windows, texts, ground.device),
    )


def without_text_queries(call):
    return replace(call, txt=replace(call.txt, q=None))


def rotated(x, turn):
    """Adjacent channels of tokens heads d as complex numbers, multiplied by tokens m of length 1."""
    pairs, rest = x[..., : 2 * turn.shape[1]], x[..., 2 * turn.shape[1] :]
    turned = torch.view_as_complex(pairs.unflatten(-1, (-1, 2)).contiguous()) * turn[:, None]
    return torch.cat([torch.view_as_real(turned).flatten(-2), rest], dim=-1)


def assert_agrees(ground, call, tile):
    for got, expected in zip(attend(call, tile), reference(call), strict=True):
        if expected is None:
            assert got is None
        else:
            assert got.dtype == ground.dtype
            ground.assert_close(got, expected)


@EVERY_BATCH
def test_the_reference_is_attention_over_gathered_sequences(batch):
    """What can be done without the kernel: normalise, rotate, copy text into every window, attend."""
    call = random_call(CPU, batch)
    vid, txt, windows = call.vid, call.txt, call.windows

    def both(name, norm=None):
        parts = (getattr(vid, name), getattr(txt, name))
        if norm is None:
            return torch.cat(parts)
        weights = (getattr(vid, norm), getattr(txt, norm))
        normed = [F.rms_norm(x, x.shape[-1:], w, EPS) for x, w in zip(parts, weights, strict=True)]
        return rotated(torch.cat(normed), torch.complex(call.cos, call.sin))

    n = len(vid.k)
    lengths = [length for sample in batch[0] for length in sample]
    gather, sizes, is_text = [], [], []
    for video, first, length in zip(
        windows.order.long().split(lengths), windows.text_starts.tolist(), windows.text_lengths.tolist(), strict=True
    ):
        gather.append(torch.cat([video, n + first + torch.arange(length)]))
        sizes.append(len(gather[-1]))
        is_text.append(gather[-1] >= n)
    gather, is_text = torch.cat(gather), torch.cat(is_text)
    packed = (both("q", "norm_q")[gather], both("k", "norm_k")[gather], both("v")[gather])
    out = sequences_reference.run(AttentionCall(*packed, Sequences(tuple(sizes), CPU.device)))
    vid_out, txt_out = reference(call)
    CPU.assert_close(vid_out[gather[~is_text]], out[~is_text])
    CPU.assert_close(txt_out, out[is_text])


@EVERY_BATCH
def test_agrees_with_the_reference(ground, batch):
    assert_agrees(ground, random_call(ground, batch), SMALL)


def test_agrees_with_the_reference_in_fp16(ground):
    assert_agrees(ground.half(), random_call(ground.half(), BATCHES[1]), SMALL)


@EVERY_BATCH
def test_agrees_with_the_reference_where_text_does_not_ask(ground, batch):
    assert_agrees(ground, without_text_queries(random_call(ground, batch)), SMALL)


def test_every_pair_of_channels_may_be_rotated_or_none(ground):
    for pairs in (8, 1):
        assert_agrees(ground, random_call(ground, BATCHES[2], pairs=pairs), SMALL)


def test_heads_need_not_be_a_power_of_two_wide(ground):
    assert_agrees(ground, random_call(ground, BATCHES[0], heads=1, d=20, pairs=9), SMALL)


def test_a_window_sees_itself_and_its_text_alone(ground):
    call = random_call(ground, BATCHES[1])
    out, _ = attend(call, SMALL)
    v = call.vid.v.clone()
    inside = call.windows.order[:3].long()
    v[inside] += 100
    changed, _ = attend(replace(call, vid=replace(call.vid, v=v)), SMALL)
    outside = call.windows.order[3:].long()
    assert torch.equal(out[outside], changed[outside])
    assert not torch.equal(out[inside], changed[inside])
    v = call.txt.v.clone()
    v[:20] += 100  # the text of the first sample
    changed, _ = attend(replace(call, txt=replace(call.txt, v=v)), SMALL)
    second = call.windows.order[21:].long()
    assert torch.equal(out[second], changed[second])


def test_text_is_averaged_over_the_windows_of_its_sample():
    call = random_call(CPU, BATCHES[1])
    rows = torch.randn(2 * 20 + 3, 2, 16)
    out = mean_over_windows(rows, call.windows)
    assert out.shape == (23, 2, 16)
    CPU.assert_close(out[:20], (rows[:20] + rows[20:40]) / 2)
    assert torch.equal(out[20:], rows[40:])


def test_a_map_knows_where_windows_and_texts_begin():
    windows, texts = BATCHES[1]
    made = window_map(torch.arange(38), windows, texts)
    assert made.starts.tolist() == [0, *accumulate((3, 18, 17))]
    assert made.text_starts.tolist() == [0, 0, 20]
    assert made.text_lengths.tolist() == [20, 20, 3]
    assert made.text_rows.tolist() == [0, 20, 40]
    assert (made.longest, made.rows, made.samples) == (38, 43, ((2, 20), (1, 3)))


def test_heads_wider_than_a_tile_are_left_to_the_library():
    assert tiles(256) == TILES
    assert tiles(257) == ()


@pytest.mark.gpu
@NEEDS_CUDA
@pytest.mark.parametrize("tile", TILES, ids=lambda tile: tile.name)
# Half a window and whole ones of 720p with the published prompt; heads as in the 3B and the 7B model.
@pytest.mark.parametrize("pairs", (63, 30))
def test_agrees_with_the_reference_at_real_sizes_on_a_gpu(ground, tile, pairs):
    call = random_call(ground, ([[405, 810, 810, 27]], [58]), heads=20, d=128, pairs=pairs)
    assert_agrees(ground, call, tile)
    assert_agrees(ground, without_text_queries(call), tile)
