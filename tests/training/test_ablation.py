"""The comparison of the arms: that they differ in what they say, and what the judge makes of made-up results."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from training import ablation, pico
from training.ablation import ARMS, TITLES, Results, judge, paired_bootstrap, table

PICTURES = 40
# Means much as they came out in a run that went well: PSNR, GMSD, LSD, SWD.
GOOD = {
    "bicubic": (15.34, 0.273, 25.2, 12.5),
    "stage1_1": (15.30, 0.298, 8.77, 4.85),
    "stage1_16": (13.32, 0.333, 2.50, 2.35),
    "distilled": (13.18, 0.335, 2.53, 2.18),
    "ns_r1": (12.87, 0.334, 2.59, 2.18),
    "rp_r1_r2": (12.48, 0.340, 2.65, 2.14),
    "l1": (14.52, 0.310, 4.15, 2.96),
    "l1_fm": (14.73, 0.305, 4.81, 3.06),
    "progressive": (14.74, 0.305, 4.44, 2.98),
    "final": (13.87, 0.320, 3.05, 2.42),
}


def results(**changes):
    """Made-up results of two seeds around the means above."""
    draw = np.random.default_rng(0)
    means = GOOD | changes
    rows = [
        {
            row: {
                metric: (value * (1 + 0.01 * draw.standard_normal(PICTURES))).tolist()
                for metric, value in zip(ablation.RISES, means[row], strict=True)
            }
            for row in TITLES
        }
        for _ in range(2)
    ]
    names = [arm.name for arm in ARMS]
    early = {"progressive": 4.90, "l1_fm": 5.78}
    points = {
        name: [
            {"step": step, "psnr": 14.0, "gmsd": 0.3, "lsd": early.get(name, 5.0), "swd": 3.0} for step in (5, 25, 50)
        ]
        for name in names
    }
    losses = {name: [{"d_adv": math.log(2), "gap": 0.05}] * 50 for name in names}
    return Results(rows, [points] * 2, [losses] * 2, [{name: [] for name in names}] * 2)


def verdicts(found):
    return {gate.name.partition(" ")[0] + str(index): gate.verdict for index, gate in enumerate(judge(found))}


def test_a_run_that_went_well_passes_every_gate():
    assert "fails" not in verdicts(results()).values()


@pytest.mark.parametrize("changes, gate", [
    ({"l1": (14.5, 0.31, 20.0, 2.9)}, "every0"),
    ({"distilled": (12.5, 0.34, 2.5, 2.2)}, "one1"),
    ({"final": (13.0, 0.32, 3.0, 2.4)}, "the2"),
    ({"rp_r1_r2": (12.5, 0.34, 2.7, 2.6)}, "(a)3"),
    ({"l1": (12.6, 0.33, 4.1, 2.9)}, "(b)4"),
    ({"l1_fm": (14.0, 0.33, 4.8, 3.0)}, "(c)5"),
    ({"progressive": (14.0, 0.33, 4.4, 2.9)}, "(d)7"),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_each_gate_fails_where_it_should_and_alone(changes, gate):
    found = verdicts(results(**changes))
    assert found[gate] == "fails"


def test_a_head_start_that_does_not_show_an_unfair_game_and_an_alert_fail():
    late = results()
    for seed in late.curves:
        seed["progressive"][0]["lsd"] = 5.8
    assert verdicts(late)["(d)6"] == "fails"
    lost = results()
    for seed in lost.losses:
        seed["rp_r1_r2"] = [{"d_adv": 0.3, "gap": 2.0}] * 50
    assert verdicts(lost)["(a)3"] == "fails"
    loud = results()
    loud.alerts[0]["l1"] = ["The discriminator has been winning."]
    assert verdicts(loud)["no8"] == "fails"


def test_the_bootstrap_pairs_pictures():
    # Pictures differ much more than rows do; paired, a small difference is still certain.
    draw = np.random.default_rng(1)
    pictures = 10 * draw.standard_normal(200)
    b = [pictures + 0.1 * draw.standard_normal(200) for _ in range(3)]
    a = [row + 0.05 for row in b]
    found = paired_bootstrap(a, [row + 0.01 * draw.standard_normal(200) for row in b])
    assert found.better("psnr") and found.worse("lsd") and found.mean == pytest.approx(0.05, abs=0.01)
    noise = paired_bootstrap(draw.standard_normal((1, 200)), draw.standard_normal((1, 200)))
    assert not noise.better("psnr") and not noise.worse("psnr") and noise.low < noise.mean < noise.high


def test_arms_are_those_of_the_table_one_change_at_a_time():
    ns, rp, l1, fm, progressive, final = (arm.loss for arm in ARMS)
    assert (ns.adv, ns.r1, ns.r2, ns.w_1, ns.w_F) == ("ns", 100.0, 0.0, 0.0, 0.0)
    assert (rp.adv, rp.r1, rp.r2, rp.w_1, rp.w_F) == ("rp", 1000.0, 1000.0, 0.0, 0.0)
    assert l1 == replace(rp, w_1=1.0) and fm == replace(l1, w_F=1.0) and progressive == fm
    assert final == replace(fm, w_1=0.1, w_F=0.1)
    assert [arm.init for arm in ARMS] == ["pretrain"] * 4 + ["distilled"] * 2


def test_the_table_has_a_row_for_everything():
    lines = table(results()).splitlines()
    assert len(lines) == 2 + len(TITLES) and len({line.count("|") for line in lines}) == 1
    assert "15.34" in lines[2] and "1.00" in lines[-1]


def test_the_table_says_from_which_step_an_arm_is_sharp():
    found = results()  # 16 steps have an LSD of about 2.5, which may be 1.5 times as high
    for seed in found.curves:
        for point, lsd in zip(seed["l1"], (5.0, 3.0, 2.8), strict=True):
            point["lsd"] = lsd
    assert found.sharp_from("l1") == 25 and found.sharp_from("ns_r1") is None
    lines = {line.split(" | ")[0]: line for line in table(found).splitlines()}
    assert lines["| ... + L1"].endswith("| 25 |") and lines["| NS + R1"].endswith("| never |")
    assert lines["| bicubic"].endswith("|  |")


def test_everything_runs_is_kept_and_is_reported(tmp_path, monkeypatch):
    dit = replace(pico.PICO_DIT, dim=8, depth=2, heads=1, head_dim=8, text_dim=8, mlp_hidden=8)
    whole = ablation.RECIPES["pico"]
    config = replace(
        whole,
        pretrain=replace(whole.pretrain, model=dit, batch=2, run=replace(whole.pretrain.run, steps=2)),
        distill=replace(whole.distill, model=dit, batch=2, steps=2, run=replace(whole.distill.run, steps=1)),
        apt=replace(whole.apt, model=dit, batch=2, run=replace(whole.apt.run, steps=2, validate_every=1)),
        pictures=2,
        held_out=1,
    )
    rows = ablation.run_seed(config, 0, tmp_path, tmp_path / "data")
    assert list(rows) == list(TITLES) and all(len(marks["lsd"]) == 4 for marks in rows.values())
    text = ablation.report(config, ablation.collect([rows], tmp_path), tmp_path)
    assert (tmp_path / "ablation.md").read_text() == text and "feature matching" in text
    assert len(json.loads((tmp_path / "ablation.json").read_text())["gates"]) == 9

    # Finished work is not done again.
    monkeypatch.setattr(ablation, "post_train", lambda *_: pytest.fail("trained again"))
    (tmp_path / "seed_0" / "l1.json").unlink()
    with pytest.raises(pytest.fail.Exception):
        ablation.run_seed(config, 0, tmp_path, tmp_path / "data")
    monkeypatch.undo()
    torch.manual_seed(7)
    assert ablation.run_seed(config, 0, tmp_path, tmp_path / "data") == rows
