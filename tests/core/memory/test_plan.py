"""The plan: it fits, it shrinks with the budget, and its predictions come true."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest
import torch

from seedvr2_core.checkpoints import load_dit
from seedvr2_core.checkpoints.folders import NANO_DIT, NANO_VAE
from seedvr2_core.errors import SettingError
from seedvr2_core.loading import load_models
from seedvr2_core.memory.plan import (
    CHUNKS,
    GIB,
    USABLE,
    MemoryPlan,
    Planner,
    _passes,
    describe,
    make_plan,
    parse_bytes,
    step_down,
)
from seedvr2_core.memory.stages import Work, reach, try_restore, weights_of
from seedvr2_core.models.dit import SEEDVR2_3B, SEEDVR2_7B, DiT
from seedvr2_core.models.linear import FP8, Linear
from seedvr2_core.models.tiling import TiledVAE
from seedvr2_core.models.vae import SEEDVR2_VAE, CausalState, VideoVAE
from seedvr2_core.models.vae_fast import FastOptions, FastVAE
from seedvr2_core.planning import plan_clip
from seedvr2_core.settings import Settings
from tests.bench.memory import DIT, VAE, Clip, apart, restoration
from tests.core.conftest import NEEDS_BF16, RUNNABLE_VAE

SIZES = {"720p": (720, 1280), "1080p": (1080, 1920), "4k": (2160, 3840)}
DITS = {"3b": SEEDVR2_3B, "7b": SEEDVR2_7B}


@cache
def published(name: str) -> tuple[DiT, FastVAE]:
    """The published models without contents, in bf16."""
    with torch.device("meta"):
        dit, vae = DiT(DITS[name]).bfloat16(), VideoVAE(SEEDVR2_VAE).bfloat16()
    return dit.requires_grad_(False), FastVAE(vae.requires_grad_(False), FastOptions(winograd_from=None, device="cuda"))


def work(name: str = "3b", size: str = "720p", frames: int | None = 25, device: str = "cuda", **more) -> Work:
    dit, vae = published(name)
    height, width = SIZES[size]
    return Work(dit=dit, vae=vae, device=device, height=height, width=width, frames=frames, **more)


@cache
def planner(name: str, size: str, frames: int | None) -> Planner:
    return Planner(work(name, size, frames))


def plan(name: str, size: str, gib: int, frames: int | None = 25) -> MemoryPlan | None:
    try:
        return planner(name, size, frames).fit(gib * GIB)
    except SettingError:
        return None


# --- budgets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [25, None])
def test_a_plan_fits_and_a_smaller_budget_never_gives_a_larger_one(frames):
    peaks = []
    for gib in (8, 12, 16, 24, 80):
        if chosen := plan("3b", "720p", gib, frames):
            assert chosen.peak <= USABLE * chosen.budget
            peaks.append(chosen.peak)
    assert peaks == sorted(peaks) and peaks


def test_published_models_fit_the_cards_that_people_have():
    assert plan("3b", "720p", 8).streamed > 0
    for name in DITS:
        large = plan(name, "720p", 80)
        assert (large.state, large.streamed, large.rows, large.portions) == ("device", 0, None, (2, None))
        assert large.chunk == 7
    assert plan("3b", "1080p", 80).state == "device"


def test_what_no_plan_can_hold_is_told_in_one_sentence():
    with pytest.raises(SettingError, match=r"^Restoring at 1280 x 720 takes .* of which 2.0 GiB may be used; choose "):
        planner("3b", "720p", 25).fit(2 * GIB)


def test_what_a_size_takes_that_is_not_tried_is_what_a_trial_tells():
    huge = Planner(replace(work("3b", frames=5), height=2880, width=5120))
    tried = huge.plan(0, *huge.placements()[-1], [min(CHUNKS)])
    assert huge.expected(CHUNKS) == pytest.approx(tried.peak, rel=0.05)


def test_an_absurd_size_is_refused_soon():
    huge = Planner(replace(work("3b", frames=None), height=60000, width=60000))
    start = time.perf_counter()
    with pytest.raises(SettingError, match=r"takes \d+\.\d GiB of memory or more"):
        huge.fit(80 * GIB)
    assert time.perf_counter() - start < 20


def test_a_chunk_that_was_chosen_is_respected():
    assert make_plan(work(chunk=6), 80 * GIB).chunk == 6


def test_a_picture_keeps_no_state():
    picture, clip = plan("3b", "720p", 80, 1), plan("3b", "720p", 80)
    assert picture.chunk == 1 and picture.decode < clip.decode


def test_on_a_cpu_nothing_is_carried_to_the_host():
    chosen = make_plan(work(device="cpu"), 20 * GIB)
    assert (chosen.state, chosen.streamed) == ("device", 0)


def test_a_plan_says_what_it_chose():
    line = describe(plan("3b", "720p", 8))
    assert "in host memory" in line and "of 32 blocks streamed" in line and "GiB of 8.0 GiB (weights" in line
    assert "\n" not in line


def test_a_stage_alone_says_nothing_of_the_others():
    alone = replace(small("cpu", 9).work, dit=None)
    line = describe(make_plan(alone, 20 * GIB), ["decode"])
    assert ", decode " in line and ", encode " not in line and ", restore " not in line
    tiled = replace(alone, vae=TiledVAE(alone.vae, 64, 16))
    assert describe(make_plan(tiled, 20 * GIB), ["decode"]).startswith("memory ")


def small(device: str, frames: int | None) -> Planner:
    """Of models so small that every way can be tried."""
    with torch.device("meta"):
        dit, vae = DiT(DIT).bfloat16().requires_grad_(False), VideoVAE(VAE).bfloat16().requires_grad_(False)
    fast = FastVAE(vae, FastOptions(winograd_from=None, device=device))
    return Planner(Work(dit=dit, vae=fast, device=device, height=96, width=144, frames=frames))


@pytest.mark.parametrize("frames", [1, 9, 40, None])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_first_of_all_ways_that_fits_is_found(device, frames):
    planner = small(device, frames)
    work, weights = planner.work, planner.weights
    passes = list(_passes(work, CHUNKS))

    def by_trying_all(room: float) -> tuple | None:
        for state, streamed in planner.placements():
            left = room - weights.on_device(streamed)
            first = planner.portions[0]
            fitting = [way for way in passes if planner.restore(*way, first, state) <= left]
            chunk, rows = fitting[0] if fitting else passes[-1]
            for portions in planner.portions:
                stages = [
                    planner.encode(chunk, portions, state),
                    planner.restore(chunk, rows, portions, state),
                    planner.decode(chunk, portions, state),
                ]
                if max(stages) <= left:
                    return chunk, rows, portions, state, streamed
        return None

    def found(budget: int) -> tuple | None:
        try:
            plan = planner.fit(budget)
        except SettingError:
            return None
        return plan.chunk, plan.rows, plan.portions, plan.state, plan.streamed

    largest = planner.fit(1 << 40).peak
    budgets = [int(largest * share) for share in (1.2, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)]
    ways = [found(budget) for budget in budgets]
    assert ways == [by_trying_all(USABLE * budget) for budget in budgets]
    assert len(set(ways)) > 1 and ways[-1] is None


# --- stepping down ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["encode", "restore", "decode"])
def test_a_step_down_takes_less_where_memory_ran_out(stage):
    first = plan("3b", "720p", 80)
    second = step_down(first, stage, 80 * GIB)
    assert second.weights + getattr(second, stage) < first.weights + getattr(first, stage)
    assert second.peak <= USABLE * (first.weights + getattr(first, stage))


def test_a_step_down_goes_by_what_was_there():
    second = step_down(plan("3b", "720p", 80), "decode", 10 * GIB)
    assert second.peak <= USABLE * 10 * GIB


def test_below_the_smallest_there_is_none():
    smallest = step_down(plan("3b", "720p", 80), "decode", 1)
    assert step_down(smallest, "decode", 1) is None


# --- amounts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [("8G", 8 << 30), ("6.5GiB", 13 << 29), ("800MB", 800 * 10**6), (" 1 k ", 1 << 10), ("2T", 2 << 40)],
)
def test_amounts_are_understood(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "8", "-8G", "0G", "0.0M", "G", "8X", "8GG", "nanG", "1e9G", "8 G B"])
def test_what_is_no_amount_is_refused(text):
    with pytest.raises(SettingError, match="is no amount of memory; write a number above zero and a unit"):
        parse_bytes(text)


# --- looking back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["encode", "decode"])
def test_what_lies_further_back_than_the_reach_has_no_influence(kind):
    torch.manual_seed(0)
    vae = FastVAE(VideoVAE(RUNNABLE_VAE).double().requires_grad_(False))
    step = vae.encode_slice if kind == "encode" else vae.decode_slice
    back = reach(RUNNABLE_VAE)[kind == "decode"]
    shape = (1, 3, 4, 16, 16) if kind == "encode" else (1, 16, 1, 2, 2)
    slices = [torch.randn(shape, dtype=torch.float64) for _ in range(back + 8)]

    def last_of(slices: list[torch.Tensor]) -> torch.Tensor:
        state = CausalState()
        # The clip begins with the last frame of the first slice.
        for x in [slices[0][:, :, -1:], *slices[1:]]:
            out, state = step(x, state)
        return out

    whole = last_of(slices)
    torch.testing.assert_close(last_of(slices[-back - 2 :]), whole, atol=1e-12, rtol=1e-12)
    assert not torch.allclose(last_of(slices[-back // 2 :]), whole, atol=1e-12, rtol=1e-12)


# --- time ------------------------------------------------------------------------------------------------------------


def seconds(call: object) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


@pytest.mark.parametrize(("frames", "chunk", "at_once"), [(17, 3, False), (21, 3, True), (21, 5, False), (25, 5, True)])
def test_states_lie_side_by_side_only_where_something_is_decoded_before_all_is_encoded(frames, chunk, at_once):
    tried = planner("3b", "720p", frames)
    both = [kept(tried.portions[0], "device") for kept in (tried.encoder, tried.decoder)]
    assert tried.states(chunk, tried.portions[0], "device") == (sum(both) if at_once else max(both))


def test_planning_takes_no_time_to_speak_of():
    models = load_models(NANO_DIT, NANO_VAE, torch.device("cpu"), torch.float32)
    # Twice what it takes: other programs slow this one down even in its own time.
    assert min(seconds(lambda: plan_clip(models, Settings(), (480, 640), 33)) for _ in range(3)) < 0.8
    assert min(seconds(lambda: make_plan(work("3b", "1080p"), 80 * GIB)) for _ in range(2)) < 2


# --- predictions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "clip",
    [
        Clip(1, 256, 384),
        pytest.param(Clip(5, 160, 192, "bfloat16"), marks=NEEDS_BF16),
        # In passes: both halves of the autoencoder keep something at a time.
        Clip(17, 96, 128, chunk=9),
    ],
    ids=lambda clip: clip.name,
)
def test_a_prediction_is_within_a_tenth_of_what_is_measured(clip):
    """Resident memory of a fresh process, above what it held before."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux, which tells the peak of a process")
    predicted, measured = apart(partial(restoration, clip))
    assert predicted == pytest.approx(measured, rel=0.1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("clip", [Clip(1, 512, 768, "bfloat16"), Clip(17, 512, 768, "bfloat16")], ids=lambda c: c.name)
def test_a_prediction_is_within_a_tenth_of_what_is_measured_on_a_gpu(clip):
    predicted, measured = restoration(clip, device="cuda")
    assert predicted == pytest.approx(measured, rel=0.1)


def test_all_weights_are_counted_those_that_are_packed_as_well():
    models = load_models(NANO_DIT, NANO_VAE, torch.device("cpu"), torch.bfloat16)
    weights = weights_of(Work(vae=models.vae, dit=models.dit, device="cpu", height=64, width=64, frames=1))
    transformer = sum(p.numel() for p in load_dit(NANO_DIT).parameters()) * 2
    # The autoencoder's are merged and shared out, so there are more of them than in the file.
    assert transformer + 5_000_000 < sum(weights.blocks) + weights.others < transformer + 30_000_000


@cache
def published_in_fp8() -> DiT:
    with torch.device("meta"):
        dit = DiT(SEEDVR2_3B).bfloat16().requires_grad_(False)
    for layer in dit.modules():
        # `pack` would refuse: without contents a model is on no device that multiplies in fp8.
        if isinstance(layer, Linear):
            layer.pack(FP8)
    return dit


def test_a_plan_counts_fp8_weights_at_the_bytes_that_they_have():
    plain, packed = work(), replace(work(), dit=published_in_fp8())
    before, after = weights_of(plain), weights_of(packed)
    layers = [layer for layer in packed.dit.modules() if isinstance(layer, Linear)]
    # A byte a weight, and a scale in fp32 for every row; each lost one.
    lost = sum(layer.out_features * (layer.in_features - 4) for layer in layers)
    assert sum(before.blocks) - sum(after.blocks) == lost > 0.49 * sum(before.blocks)
    assert before.others == after.others
    # So a card that holds bf16 in parts only holds all of this.
    assert not after.streamable and make_plan(packed, 12 * GIB).weights < make_plan(plain, 80 * GIB).weights


def test_a_pass_in_fp8_unpacks_no_weight_on_a_gpu():
    dit, _ = published("3b")
    plain, packed = (replace(work(), vae=None, dit=dit) for dit in (dit, published_in_fp8()))
    # Beside a product lie the rows of every token in fp8, and their scales.
    rows = 7 * 45 * 80 * (SEEDVR2_3B.mlp_hidden + 4)
    assert try_restore(packed, 7, None) <= try_restore(plain, 7, None) + rows
