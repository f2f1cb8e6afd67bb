"""The batch plan: every sample once an epoch, one shape a batch, and nothing that depends on who asks."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from seedvr2_core.errors import SettingError
from seedvr2_core.video.geometry import Grid
from training.buckets import ASPECT_RANGE, BatchPlan, Deal, aspect_sizes, members_of, tokens
from training.curriculum import Phase

IMAGE, WIDE, CLIP = Grid(1, 24, 24), Grid(1, 16, 36), Grid(2, 16, 16)


@pytest.fixture
def members():
    column = np.repeat([0, 1, 2], [40, 17, 23])
    np.random.default_rng(0).shuffle(column)
    return members_of([IMAGE, WIDE, CLIP], column, np.arange(80))


# Four of the pictures of either shape, which have 144 tokens, and five clips.
DEAL = Deal(tokens=650)


@pytest.mark.parametrize("epoch", [0, 3])
def test_10_every_id_comes_up_once_in_every_epoch(members, epoch):
    plan = BatchPlan([members], DEAL, seed=1)
    first = epoch * plan.steps_in_epoch
    drawn = np.concatenate([plan(step).ids for step in range(first, first + plan.steps_in_epoch)])
    times = np.bincount(drawn)
    assert len(times) == 80 and times.min() == 1
    # 17 samples in batches of 4, and 23 in batches of 5: the last ones are filled up.
    assert times.max() == 2 and (times == 2).sum() == 3 + 2


def test_10_a_batch_comes_from_one_bucket(members):
    plan = BatchPlan([members], DEAL, seed=1)
    for step in range(40):
        batch = plan(step)
        assert set(batch.ids) <= set(members[batch.shape])
        assert len(batch.ids) == (5 if batch.shape == CLIP else 4)


def test_a_bucket_that_never_fills_a_batch_still_makes_a_whole_one():
    plan = BatchPlan([{IMAGE: np.arange(20), CLIP: np.arange(20, 22)}], Deal(tokens=1200), seed=0)
    batches = [plan(step) for step in range(plan.steps_in_epoch)]
    assert {i for batch in batches for i in batch.ids} == set(range(22))
    assert sorted(len(batch.ids) for batch in batches) == [8] * 3 + [9]


def test_the_order_is_another_in_each_epoch_for_each_seed_and_under_each_name(members):
    plan = BatchPlan([members], DEAL, seed=1)
    orders = [[plan(e * plan.steps_in_epoch + i).ids.tolist() for i in range(3)] for e in range(2)]
    assert orders[0] != orders[1]
    for other in (BatchPlan([members], DEAL, seed=2), BatchPlan([members], replace(DEAL, order="other"), seed=1)):
        assert orders[0] != [other(i).ids.tolist() for i in range(3)]


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_10_the_batch_of_a_step_is_the_same_on_any_number_of_ranks(members, world):
    whole = BatchPlan([members], DEAL, seed=1)(7).ids
    shares = []
    for rank in range(world):
        batch = BatchPlan([members], DEAL, seed=1)(7)  # every rank has a plan of its own
        shares.append(batch.ids[list(batch.slots(rank, world))])
    assert np.array_equal(np.concatenate(shares), whole)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_10_any_step_is_reached_without_the_ones_before(members):
    one_by_one = BatchPlan([members], DEAL, seed=1)
    for step in range(30):
        expected = one_by_one(step)
    batch = BatchPlan([members], DEAL, seed=1)(29)
    assert batch.shape == expected.shape and np.array_equal(batch.ids, expected.ids)


def test_10_seeking_far_ahead_costs_as_much_as_the_first_step():
    plan = BatchPlan([{IMAGE: np.arange(200_000)}], Deal(samples=64), seed=0)

    def seconds(step: int) -> float:
        start = time.perf_counter()
        plan(step)
        return time.perf_counter() - start

    first = min(seconds(epoch * plan.steps_in_epoch) for epoch in range(3))
    far = min(seconds(epoch * plan.steps_in_epoch) for epoch in range(10**9, 10**9 + 3))
    assert far < 20 * first + 0.05


def test_images_and_clips_mix_evenly_in_the_share_asked_for(members):
    plan = BatchPlan([members], replace(DEAL, image_share=0.3), seed=1)
    images = [plan(step).shape.t == 1 for step in range(100)]
    assert sum(images) == 30
    assert all(abs(sum(images[:n]) - 0.3 * n) < 1 for n in range(1, 101))


def test_with_a_share_each_kind_still_runs_through_its_epoch(members):
    plan = BatchPlan([members], replace(DEAL, image_share=0.5), seed=1)
    clips = [plan(step) for step in range(200) if plan(step).shape.t > 1][: -(-23 // 5)]
    assert set(np.concatenate([batch.ids for batch in clips])) == set(members[CLIP])


def test_kinds_take_turns_and_each_runs_through_its_epoch(members):
    kinds = [{bucket: ids} for bucket, ids in members.items()]
    plan = BatchPlan(kinds, Deal(samples=4), seed=1)
    batches = [plan(step) for step in range(3 * 10)]
    assert all(len({batch.shape for batch in batches[step : step + 3]}) == 3 for step in range(0, 30, 3))
    drawn = np.concatenate([batch.ids for batch in batches if batch.shape == IMAGE])
    assert sorted(drawn) == sorted(members[IMAGE])


LENGTHS = Phase(share=1.0, frames=(5, 9, 21))  # 2, 3 and 6 latent frames


@pytest.mark.parametrize("deal, count, sizes", [
    # A round of three batches has 12 samples, or 6 + 4 + 2.
    (Deal(samples=4, phase=LENGTHS), 5 * 12, {2: 4, 3: 4, 6: 4}),
    (Deal(tokens=8 * 12, phase=LENGTHS), 5 * 12, {2: 6, 3: 4, 6: 2}),
    (Deal(tokens=8 * 6, micros=2, phase=LENGTHS), 5 * 12, {2: 6, 3: 4, 6: 2}),
], ids=["so many samples", "so many tokens", "two micro-batches"])  # fmt: skip
def test_cut_to_several_lengths_every_sample_still_comes_up_once_and_each_length_as_often(deal, count, sizes):
    plan = BatchPlan([{Grid(6, 4, 8): np.arange(count)}], deal, seed=3)
    lengths_of_7 = set()
    for epoch in range(6):
        batches = [plan(epoch * plan.steps_in_epoch + step) for step in range(plan.steps_in_epoch)]
        assert sorted(np.concatenate([batch.ids for batch in batches])) == list(range(count))
        assert {t: [batch.shape.t for batch in batches].count(t) for t in sizes} == dict.fromkeys(sizes, 5)
        assert all(len(batch.ids) == sizes[batch.shape.t] for batch in batches)
        lengths_of_7 |= {batch.shape.t for batch in batches if 7 in batch.ids}
    assert len(lengths_of_7) > 1


@pytest.mark.parametrize("count", range(1, 30))
def test_whatever_their_number_all_samples_come_up_and_few_twice(count):
    plan = BatchPlan([{Grid(6, 4, 8): np.arange(count)}], Deal(tokens=8 * 12, phase=LENGTHS), seed=3)
    for epoch in range(3):
        drawn = [plan(epoch * plan.steps_in_epoch + step).ids for step in range(plan.steps_in_epoch)]
        assert set(np.concatenate(drawn)) == set(range(count))
        # At most what two batches are filled up with.
        assert sum(map(len, drawn)) - count < 6 + 4
    lengths = {plan(step).shape.t for step in range(3 * plan.steps_in_epoch)}
    assert lengths == {2, 3, 6}


def test_a_share_of_a_kind_that_is_missing_is_refused(members):
    with pytest.raises(SettingError, match="clips"):
        BatchPlan([{IMAGE: members[IMAGE]}], replace(DEAL, image_share=0.5), seed=0)
    with pytest.raises(SettingError, match="empty"):
        BatchPlan([{}], DEAL, seed=0)


def test_a_batch_costs_about_its_budget_whatever_its_shape():
    for bucket in (IMAGE, CLIP, Grid(25, 90, 160)):
        deal = Deal(tokens=90_000, micros=2)
        size = deal.size(bucket)
        assert deal.cuts(bucket) == {bucket.t: 2 * size}
        assert size == 1 or 0.5 * 90_000 < size * tokens(bucket) <= 90_000


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
