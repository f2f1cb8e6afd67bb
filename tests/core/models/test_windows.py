"""Windows against the published partitions, and what makes them partitions."""

import hashlib
import json
import random
from dataclasses import replace

import pytest
import torch

from seedvr2_core.errors import SettingError
from seedvr2_core.models.windows import Span, WindowConfig, spans, window_size, window_tokens, windows
from seedvr2_core.video.geometry import Grid


def test_every_published_partition_is_reproduced(golden):
    partitions = golden("dit/windows")[1]["partitions"]
    assert len(partitions) > 100
    for case in partitions:
        grid, shifted = Grid(*case["grid"]), case["shifted"]
        config = replace(WindowConfig(), splits=Grid(*case["num_windows"]))
        size = window_size(grid, config)
        assert list(size) == case["window"], case["grid"]
        for axis, length, window in zip("thw", grid, size, strict=True):
            assert [list(span) for span in spans(length, window, shifted)] == case["segments"][axis], case["grid"]
        found = [[edge for span in window for edge in span] for window in windows(grid, config, shifted)]
        assert len(found) == case["count"]
        # Long lists are published as a hash only.
        assert case["windows"] in (found, None)
        assert hashlib.sha256(json.dumps(found, separators=(",", ":")).encode()).hexdigest() == case["sha256"]


@pytest.mark.parametrize("kind", ["regular", "shifted"])
@pytest.mark.parametrize("grid", [Grid(5, 12, 10), Grid(3, 21, 29), Grid(2, 30, 16)], ids=str)
def test_tokens_are_dealt_in_the_published_order(golden, grid, kind):
    tensors, _ = golden("dit/window_order")
    prefix = f"{grid.t}x{grid.h}x{grid.w}.{kind}"
    order, shapes = window_tokens(grid, WindowConfig(), kind == "shifted")
    assert torch.equal(order.int(), tensors[f"{prefix}.order"])
    assert torch.equal(order.argsort().int(), tensors[f"{prefix}.inverse"])
    assert [list(shape) for shape in shapes] == tensors[f"{prefix}.window_shapes"].tolist()


@pytest.mark.parametrize("seed", range(20))
def test_every_token_lies_in_exactly_one_window(seed):
    rng = random.Random(seed)
    grid = Grid(rng.randint(1, 40), rng.randint(1, 30), rng.randint(1, 60))
    for shifted in (False, True):
        order, shapes = window_tokens(grid, WindowConfig(), shifted)
        assert torch.equal(order.sort().values, torch.arange(grid.t * grid.h * grid.w))
        size = window_size(grid, WindowConfig())
        assert all(side <= most for shape in shapes for side, most in zip(shape, size, strict=True))


def test_a_larger_frame_gets_more_windows_not_larger_ones():
    assert window_size(Grid(5, 45, 80), WindowConfig()) == window_size(Grid(5, 135, 240), WindowConfig())
    assert len(windows(Grid(1, 45, 80), WindowConfig(), False)) == 9
    assert len(windows(Grid(1, 135, 240), WindowConfig(), False)) == 81


def test_a_longer_clip_gets_more_windows_not_longer_ones():
    assert window_size(Grid(30, 45, 80), WindowConfig()).t == window_size(Grid(300, 45, 80), WindowConfig()).t == 8


def test_an_axis_that_one_window_covers_is_not_cut_by_the_shift():
    assert spans(8, 8, shifted=True) == spans(8, 8, shifted=False) == [Span(0, 8)]
    assert spans(9, 8, shifted=True) == [Span(0, 4), Span(4, 9)]


FIXED = WindowConfig(size=Grid(2, 4, 6))


@pytest.mark.parametrize("grid", [Grid(1, 12, 12), Grid(5, 45, 80), Grid(31, 3, 90)], ids=str)
def test_fixed_windows_have_one_size_whatever_the_clip(grid):
    assert window_size(grid, FIXED) == FIXED.size
    for shifted in (False, True):
        for window in windows(grid, FIXED, shifted):
            assert all(b - a <= most for (a, b), most in zip(window, FIXED.size, strict=True))


@pytest.mark.parametrize("seed", range(10))
def test_every_token_lies_in_exactly_one_fixed_window(seed):
    rng = random.Random(seed)
    grid = Grid(rng.randint(1, 12), rng.randint(1, 30), rng.randint(1, 40))
    config = WindowConfig(size=Grid(rng.randint(1, 6), rng.randint(1, 12), rng.randint(1, 50)))
    for shifted in (False, True):
        order, shapes = window_tokens(grid, config, shifted)
        assert torch.equal(order.sort().values, torch.arange(grid.t * grid.h * grid.w))
        assert sum(t * h * w for t, h, w in shapes) == len(order)


def test_shifted_fixed_windows_begin_with_half_a_window():
    _, shapes = window_tokens(Grid(4, 8, 12), FIXED, shifted=True)
    assert shapes[0] == (1, 2, 3)
    assert {t for t, _, _ in shapes} == {1, 2} and {h for _, h, _ in shapes} == {2, 4}
    assert {w for _, _, w in shapes} == {3, 6}


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("grid", [Grid(7, 45, 80), Grid(1, 67, 120), Grid(3, 20, 20)], ids=str)
def test_fixed_windows_of_the_adaptive_size_are_the_adaptive_ones(grid, shifted):
    adaptive = WindowConfig(train_area=(16, 16))
    fixed = replace(adaptive, size=window_size(grid, adaptive))
    (order, shapes), (expected, expected_shapes) = (window_tokens(grid, c, shifted) for c in (fixed, adaptive))
    assert torch.equal(order, expected) and shapes == expected_shapes


def test_squares_have_the_same_adaptive_windows_at_every_size():
    config = WindowConfig(train_area=(16, 16))
    assert {window_size(Grid(1, side, side), config) for side in (12, 16, 32, 48, 100)} == {Grid(1, 6, 6)}


def test_a_window_that_holds_nothing_is_refused():
    with pytest.raises(SettingError, match="2 x 0 x 6 tokens"):
        WindowConfig(size=Grid(2, 0, 6))
