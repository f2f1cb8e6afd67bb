"""The batch plan: every sample once an epoch, one shape a batch, and nothing that depends on who asks."""

from __future__ import annotations

import time
from itertools import pairwise

import numpy as np
import pytest

from seedvr2_core.errors import SettingError
from seedvr2_core.video.geometry import Grid
from training.buckets import ASPECT_RANGE, BatchPlan, aspect_sizes, batch_size, members_of, tokens

IMAGE, WIDE, CLIP = Grid(1, 24, 24), Grid(1, 16, 36), Grid(2, 16, 16)


@pytest.fixture
def members():
    column = np.repeat([0, 1, 2], [40, 17, 23])
    np.random.default_rng(0).shuffle(column)
    return members_of([IMAGE, WIDE, CLIP], column)


SIZES = {IMAGE: 8, WIDE: 4, CLIP: 5}


@pytest.mark.parametrize("epoch", [0, 3])
def test_10_every_id_comes_up_once_in_every_epoch(members, epoch):
    plan = BatchPlan(members, SIZES, seed=1)
    first = epoch * plan.steps_in_epoch
    drawn = np.concatenate([plan(step).ids for step in range(first, first + plan.steps_in_epoch)])
    times = np.bincount(drawn)
    assert len(times) == 80 and times.min() == 1
    # 17 samples in batches of 4, and 23 in batches of 5: the last ones are filled up.
    assert times.max() == 2 and (times == 2).sum() == 3 + 2


def test_10_a_batch_comes_from_one_bucket(members):
    plan = BatchPlan(members, SIZES, seed=1)
    for step in range(40):
        batch = plan(step)
        assert set(batch.ids) <= set(members[batch.bucket])
        assert len(batch.ids) == SIZES[batch.bucket]


def test_a_bucket_that_never_fills_a_batch_still_makes_a_whole_one():
    plan = BatchPlan({IMAGE: np.arange(20), CLIP: np.arange(20, 22)}, {IMAGE: 4, CLIP: 8}, seed=0)
    batches = [plan(step) for step in range(plan.steps_in_epoch)]
    assert {i for batch in batches for i in batch.ids} == set(range(22))
    assert sorted(len(batch.ids) for batch in batches) == [4] * 5 + [8]


def test_the_order_is_another_in_each_epoch_and_for_each_seed(members):
    plan, other = BatchPlan(members, SIZES, seed=1), BatchPlan(members, SIZES, seed=2)
    orders = [[plan(e * plan.steps_in_epoch + i).ids.tolist() for i in range(3)] for e in range(2)]
    assert orders[0] != orders[1]
    assert orders[0] != [other(i).ids.tolist() for i in range(3)]


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_10_the_batch_of_a_step_is_the_same_on_any_number_of_ranks(members, world):
    whole = BatchPlan(members, SIZES, seed=1)(7).ids
    shares = []
    for rank in range(world):
        batch = BatchPlan(members, SIZES, seed=1)(7)  # every rank has a plan of its own
        shares.append(batch.ids[list(batch.slots(rank, world))])
    assert np.array_equal(np.concatenate(shares), whole)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_10_any_step_is_reached_without_the_ones_before(members):
    one_by_one = BatchPlan(members, SIZES, seed=1)
    for step in range(30):
        expected = one_by_one(step)
    batch = BatchPlan(members, SIZES, seed=1)(29)
    assert batch.bucket == expected.bucket and np.array_equal(batch.ids, expected.ids)


def test_10_seeking_far_ahead_costs_as_much_as_the_first_step():
    plan = BatchPlan({IMAGE: np.arange(200_000)}, {IMAGE: 64}, seed=0)

    def seconds(step: int) -> float:
        start = time.perf_counter()
        plan(step)
        return time.perf_counter() - start

    first = min(seconds(epoch * plan.steps_in_epoch) for epoch in range(3))
    far = min(seconds(epoch * plan.steps_in_epoch) for epoch in range(10**9, 10**9 + 3))
    assert far < 20 * first + 0.05


def test_images_and_clips_mix_evenly_in_the_share_asked_for(members):
    plan = BatchPlan(members, SIZES, seed=1, image_share=0.3)
    images = [plan(step).bucket.t == 1 for step in range(100)]
    assert sum(images) == 30
    assert all(abs(sum(images[:n]) - 0.3 * n) < 1 for n in range(1, 101))


def test_with_a_share_each_kind_still_runs_through_its_epoch(members):
    plan = BatchPlan(members, SIZES, seed=1, image_share=0.5)
    clips = [plan(step) for step in range(200) if plan(step).bucket.t > 1][: -(-23 // 5)]
    assert set(np.concatenate([batch.ids for batch in clips])) == set(members[CLIP])


def test_a_share_of_a_kind_that_is_missing_is_refused(members):
    with pytest.raises(SettingError, match="clips"):
        BatchPlan({IMAGE: members[IMAGE]}, SIZES, seed=0, image_share=0.5)
    with pytest.raises(SettingError, match="empty"):
        BatchPlan({}, SIZES, seed=0)


def test_a_batch_costs_about_its_budget_whatever_its_shape():
    for bucket in (IMAGE, CLIP, Grid(25, 90, 160)):
        size = batch_size(bucket, 90_000, parts=2)
        assert size % 2 == 0
        assert size == 2 or 0.5 * 90_000 < size // 2 * tokens(bucket) <= 90_000


def test_aspects_share_their_area_and_are_multiples_of_16():
    sizes = aspect_sizes(960 * 960, 13)
    assert len(sizes) == 13
    ratios = [height / width for height, width in sizes]
    assert all(a < b for a, b in pairwise(ratios))
    assert ratios[0] == pytest.approx(ASPECT_RANGE[0], rel=0.05) and ratios[-1] == pytest.approx(2.4, rel=0.05)
    for height, width in sizes:
        assert height % 16 == width % 16 == 0
        assert height * width == pytest.approx(960 * 960, rel=0.05)
    assert aspect_sizes(192 * 192, 1) == [(192, 192)]
