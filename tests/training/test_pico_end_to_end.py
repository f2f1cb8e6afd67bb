"""Every stage at pico's size, from drawn pictures to a one-step model. Minutes on two cores."""

from __future__ import annotations

import pytest

from training import ablation
from training.config import override
from training.pico import PicoLatents, mean_marks
from training.pretrain import load_run

pytestmark = pytest.mark.slow

SHORT = ["pretrain.run.steps=1500", "distill.run.steps=100", "apt.run.steps=150", "pictures=256", "held_out=16"]


def test_all_stages_of_pico_make_a_one_step_model_that_looks_more_real_than_bicubic(tmp_path):
    config = override(ablation.RECIPES["pico"], SHORT)
    latents = PicoLatents(tmp_path / "data", 0, config.pictures, config.held_out)
    pretrained = ablation.pretrain(config.pretrain, 0, tmp_path / "pretrain", latents)
    distilled = ablation.distill(config.distill, 0, tmp_path, latents)
    (arm,) = (arm for arm in ablation.ARMS if arm.name == "final")
    final = ablation.post_train(ablation.of_arm(config.apt, arm, 0, pretrained, distilled), tmp_path / "apt", latents)
    exam = latents.exam
    many, once = (exam.restore(load_run(run, config.pretrain.model), steps)
                  for run, steps in ((pretrained, 16), (distilled, 1)))  # fmt: skip
    results = {"bicubic": exam.given, "many": many, "once": once, "final": exam.restore(final, 1)}
    marks = {name: mean_marks(exam.marks(frames)) for name, frames in results.items()}
    assert marks["final"]["lsd"] < 0.6 * marks["bicubic"]["lsd"], marks
    assert marks["final"]["swd"] < 0.8 * marks["bicubic"]["swd"], marks
    # One step does about what 16 do.
    assert marks["once"]["lsd"] < 1.25 * marks["many"]["lsd"], marks
    assert marks["once"]["psnr"] > marks["many"]["psnr"] - 0.5, marks
