"""Guards against made-up traces: each fault is found and named, and a healthy run hears nothing."""

from __future__ import annotations

import json
import math
import random

import pytest

from training.guards import DIVERGED, NON_FINITE, GuardConfig, Guards

# As measured in a small run that went well.
HEALTHY = {
    "d_loss": 0.70, "d_adv": 0.68, "gap": 0.05, "accuracy": 0.53, "ar1": 1e-5, "ar2": 1e-5, "penalty_ratio": 0.03,
    "g_loss": 1.2, "d_grad_norm": 0.3, "g_grad_norm": 0.4,
    "std_ratio_min": 0.9, "std_ratio_max": 1.1, "high_frequency_ratio": 1.0,
}  # fmt: skip


def trace(guards, steps, start=0, **changes):
    """Feed a noisy trace with the given values changed; returns the verdicts that are not "go"."""
    draw = random.Random(start)
    found = []
    for step in range(start, start + steps):
        scalars = {name: value * draw.gauss(1, 0.05) for name, value in (HEALTHY | changes).items()}
        if (verdict := guards.check(step, scalars)).action != "go":
            found.append((step, verdict))
    return found


def test_14_a_healthy_run_hears_nothing():
    assert trace(Guards(GuardConfig(on_spike="alert")), 1500) == []


def test_14_nan_skips_its_step_and_too_many_stop_the_run():
    guards = Guards()
    verdicts = [guards.check(step, HEALTHY | {"g_loss": math.nan}) for step in range(6)]
    assert [verdict.action for verdict in verdicts] == ["skip"] * 5 + ["stop"]
    assert "g_loss is not finite" in verdicts[0].sentence and verdicts[5].exit_code == NON_FINITE


def test_14_an_infinite_norm_counts_and_old_ones_are_forgotten():
    guards = Guards()
    verdicts = [guards.check(100 * i, HEALTHY | {"d_grad_norm": math.inf}) for i in range(20)]
    assert {verdict.action for verdict in verdicts} == {"skip"}


@pytest.mark.parametrize("on_spike", ["skip", "alert"])
@pytest.mark.parametrize("name, value", [("g_loss", 9.0), ("d_grad_norm", 30.0)])
def test_14_a_spike_is_found_once_it_is_known_what_is_usual(on_spike, name, value):
    guards = Guards(GuardConfig(on_spike=on_spike))
    assert guards.check(0, HEALTHY | {name: value}).action == "go"
    assert trace(guards, 200, start=1) == []
    verdict = guards.check(201, HEALTHY | {name: value})
    assert verdict.action == on_spike and name in verdict.sentence
    assert trace(guards, 200, start=202) == []


@pytest.mark.parametrize("changes", [
    {"d_adv": 0.1}, {"gap": 3.0}, {"accuracy": 0.999}
], ids=["loss", "gap", "accuracy"])  # fmt: skip
def test_14_a_discriminator_that_wins_is_reported_after_a_hundred_steps(changes):
    guards = Guards(GuardConfig(on_spike="alert"))
    if "accuracy" in changes:
        found = [(step, guards.check(step, HEALTHY | changes)) for step in range(150)]
        found = [(step, verdict) for step, verdict in found if verdict.action != "go"]
    else:
        found = trace(guards, 150, **changes)
    assert [step for step, _ in found] == [99]
    assert found[0][1].action == "alert" and "winning" in found[0][1].sentence


def test_14_a_win_that_does_not_last_is_not_reported():
    guards = Guards(GuardConfig(on_spike="alert"))
    trace(guards, 300)
    # A single step is far out; its running mean is not.
    for start in range(300, 900, 100):
        assert guards.check(start, HEALTHY | {"gap": 4.0, "accuracy": 1.0, "d_adv": 0.02}).action == "go"
        assert trace(guards, 99, start + 1) == []


def test_14_a_discriminator_that_loses_is_reported():
    found = trace(Guards(), 150, d_adv=0.85, d_loss=0.85, gap=-0.3)
    assert [step for step, _ in found] == [99] and "losing" in found[0][1].sentence
    found = trace(Guards(), 600, accuracy=0.35)
    assert [step for step, _ in found] == [499] and "losing" in found[0][1].sentence


def test_a_penalty_that_dominates_or_vanishes_is_reported():
    found = trace(Guards(), 600, penalty_ratio=8.0)
    assert [step for step, _ in found] == [499] and "fp32" in found[0][1].sentence
    found = trace(Guards(), 150, ar1=0.0)
    assert [step for step, _ in found] == [99] and "ar1" in found[0][1].sentence


def test_plates_are_reported_and_kept_out_of_the_average_until_they_end():
    guards = Guards()
    found = trace(guards, 150, std_ratio_min=0.2)
    assert [step for step, _ in found] == [99] and "0.20" in found[0][1].sentence
    assert guards.check(150, HEALTHY | {"std_ratio_min": 0.2}).hold_average
    trace(guards, 400, start=151)
    assert not guards.check(551, HEALTHY).hold_average


def test_oversharpening_is_reported():
    found = trace(Guards(), 150, high_frequency_ratio=2.0)
    assert [step for step, _ in found] == [99] and "over-sharpened" in found[0][1].sentence


def test_a_state_that_goes_on_is_reported_again_and_again():
    assert [step for step, _ in trace(Guards(), 350, gap=3.0)] == [99, 199, 299]


def test_scalars_of_other_stages_are_welcome():
    guards = Guards()
    assert all(guards.check(step, {"loss": 1.0, "grad_norm": 0.5, "frames": 5}).action == "go" for step in range(200))
    assert guards.check(200, {"loss": 4.0, "grad_norm": 0.5, "frames": 5}).action == "skip"


def test_of_several_findings_the_gravest_counts_and_all_are_told():
    guards = Guards(GuardConfig(on_spike="skip"))
    trace(guards, 99, gap=3.0)
    verdict = guards.check(99, HEALTHY | {"gap": 3.0, "g_loss": 50.0})
    assert verdict.action == "skip" and "winning" in verdict.sentence and "g_loss" in verdict.sentence


def test_a_resumed_run_judges_as_one_that_was_never_stopped():
    whole, first = Guards(), Guards()
    everything = [*trace(whole, 60, gap=3.0), *trace(whole, 60, start=60, gap=3.0)]
    before = trace(first, 60, gap=3.0)
    resumed = Guards()
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [*before, *trace(resumed, 60, start=60, gap=3.0)] == everything
    assert len(everything) == 1
    assert resumed.state_dict() == whole.state_dict()


def test_validation_that_stays_worse_than_its_best_stops_the_run():
    guards = Guards()
    values = [1.0, 0.9, 0.95, 1.3, 1.3, 1.3, 1.0, 1.3, 1.2, 1.4, 1.3, math.nan]
    actions = [guards.check_validation(step, value) for step, value in enumerate(values)]
    assert [verdict.action for verdict in actions] == ["go"] * 11 + ["stop"]
    assert actions[-1].exit_code == DIVERGED and "0.9" in actions[-1].sentence


def test_a_model_that_ignores_its_condition_is_reported_and_a_validation_that_did_not_look_is_not():
    guards = Guards()
    results = [{"condition_effect": effect} for effect in (0.01, 0.06, math.nan)] + [{"lq": 1.0}]
    assert [guards.check_results(found).action for found in results] == ["alert", "go", "go", "go"]
    assert "ignores its condition" in guards.check_results(results[0]).sentence


def test_more_turns_are_given_from_a_win_until_it_is_caught_up_with_and_only_where_wanted():
    for wanted in (0, 2):
        guards = Guards(GuardConfig(on_spike="alert", extra_turns=wanted))
        trace(guards, 99, accuracy=1.0, gap=3.0)
        assert guards.extra_turns == 0
        trace(guards, 1, start=99, accuracy=1.0, gap=3.0)
        assert guards.extra_turns == wanted
        resumed = Guards(guards.config)
        resumed.load_state_dict(json.loads(json.dumps(guards.state_dict())))
        assert resumed.extra_turns == wanted
        # The gap closes first; it is the share of pairs told apart that counts.
        trace(guards, 20, start=100, accuracy=0.95, gap=0.1)
        assert guards.extra_turns == wanted
        trace(guards, 60, start=120, accuracy=0.6, gap=0.1)
        assert guards.extra_turns == 0


def test_the_memory_of_an_older_run_is_taken_up():
    guards = Guards()
    saved = guards.state_dict()
    del saved["outplayed"]
    guards.load_state_dict(saved)
    assert guards.extra_turns == 0
