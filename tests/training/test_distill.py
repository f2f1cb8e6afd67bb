"""Progressive distillation: what the student is asked for, where on the path, and by whom."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from seedvr2_core.diffusion.sampler import sample
from seedvr2_core.errors import SettingError
from tests.training.toys import untimed
from training import distill, journal, loop
from training.config import OptimConfig, RunConfig
from training.distill import Distillation, HalvingStage, errors_by_time, two_steps, ways_on
from training.pretrain import Pretraining, PretrainStage
from training.restorer import Restorer
from training.state import write_whole


class Teacher(nn.Module):
    """Velocity by a formula; it remembers the times it was asked at."""

    def __init__(self, formula):
        super().__init__()
        self.formula = formula
        self.weight, self.prompt = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1, 24))
        self.times: list[float] = []
        self.dropped: list[bool] = []
        self.device = self.weight.device

    def for_training(self):
        return self.train().requires_grad_(True)

    def velocity(self, x, condition, u, dropped=None, texts=None):
        self.times += u.tolist()
        self.dropped.append(dropped is not None)
        return self.formula(x, condition, u.view(-1, 1, 1, 1, 1)) + self.weight


def curved(x, condition, u):
    return torch.tanh(x) * u + 0.3 * condition


@pytest.fixture
def config(tiny_dit):
    return Distillation(
        model=tiny_dit,
        run=RunConfig(steps=4),
        optim=OptimConfig(lr=1e-3, final_lr=1e-4),
        teacher=Path("unused"),
        batch=32,
    )


@pytest.fixture
def point():
    x, condition = torch.randn(2, 3, 16, 2, 4, 4).unbind()
    return x, condition, torch.tensor([1.0, 0.5, 0.25])


def test_3_the_target_of_a_constant_teacher_is_its_velocity(point):
    constant = torch.randn(3, 16, 2, 4, 4)
    target = two_steps(Teacher(lambda x, condition, u: constant), *point, delta=0.125)
    torch.testing.assert_close(target, constant)


def test_3_two_steps_of_the_teacher_are_one_step_with_the_target(point):
    x, condition, u = point
    teacher, delta = Teacher(curved), 0.125
    middle = x - delta * teacher.velocity(x, condition, u)
    end = middle - delta * teacher.velocity(middle, condition, u - delta)
    torch.testing.assert_close(x - 2 * delta * two_steps(teacher, x, condition, u, delta), end)


def test_a_perfect_student_samples_in_half_the_steps_what_its_teacher_does():
    noise, condition = torch.randn(2, 1, 16, 1, 4, 4).unbind()
    teacher = Teacher(curved)

    def taught(x, u):
        return teacher.velocity(x, condition, torch.tensor([u]))

    def student(x, u):
        return two_steps(teacher, x, condition, torch.tensor([u]), delta=1 / 8)

    torch.testing.assert_close(sample(student, noise, steps=4), sample(taught, noise, steps=8))


@pytest.mark.parametrize("steps", [2, 8])
def test_students_are_taught_where_they_will_be_sampled(config, latents, steps):
    stage = HalvingStage(config, latents, Teacher(curved), steps)
    stage.backward("g", 0, 0, 1.0)
    asked = stage.teacher.times
    # The student samples at the first of each pair of times, the teacher half a step later at the second.
    assert {round(u * steps, 4) for u in asked[: config.batch]} == set(range(2, steps + 1, 2))
    assert {round(u * steps, 4) for u in asked[config.batch :]} == set(range(1, steps, 2))


def test_the_student_starts_as_its_teacher_and_alone_learns(config, latents):
    torch.manual_seed(0)
    teacher = Restorer(config.model)
    for parameter in teacher.parameters():
        nn.init.normal_(parameter, std=0.1)
    before = [parameter.clone() for parameter in teacher.parameters()]
    stage = HalvingStage(config, latents, teacher, steps=4)
    student = stage.modules["g"]
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), before, strict=True))

    stage.backward("g", 0, 0, 1.0)
    torch.optim.SGD(student.parameters(), lr=1.0).step()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), before, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(student.parameters(), before, strict=True))


def test_nothing_is_left_to_learn_from_a_straight_teacher(config, latents):
    straight = Teacher(lambda x, condition, u: condition.new_ones(condition.shape))
    assert HalvingStage(config, latents, straight, steps=8).backward("g", 0, 0, 1.0)["loss"] < 1e-10


def test_the_loss_of_a_micro_batch_depends_on_its_number_alone(config, latents):
    stage = HalvingStage(config, latents, Teacher(curved), steps=8)
    first = stage.backward("g", 2, 1, 1.0)
    torch.manual_seed(99)
    assert untimed(stage.backward("g", 2, 1, 0.5)) == untimed(first)
    assert stage.backward("g", 3, 1, 1.0)["loss"] != first["loss"] != stage.backward("g", 2, 0, 1.0)["loss"]


def test_errors_are_told_apart_by_time_and_those_of_no_sample_left_out(config, latents, tmp_path):
    errors, u = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0.25, 1.0, 1.0])
    assert errors_by_time(errors, u, 4) == {"at_0.25": 1.0, "at_0.5": None, "at_0.75": None, "at_1": 4.0}
    few = replace(config, batch=1, run=RunConfig(steps=6, micro_batches=2, validate_every=6))
    stage = HalvingStage(few, latents, Restorer(config.model), steps=8)
    loop.run(stage, few, {"g": few.optim}, tmp_path)
    rows = journal.read(tmp_path / "metrics.jsonl")
    logged = [[row[name] for name in row if name.startswith("at_")] for row in rows]
    assert {len(found) for found in logged} == {1, 2}
    for row, found in zip(rows, logged, strict=True):
        # Of two micro-batches of one sample each.
        assert row["to_teacher"] == pytest.approx(sum(found) / len(found))


def test_a_halving_ends_where_its_loss_hardly_falls(config, latents):
    def ends(*means, plateau=0.005, missing=0):
        stage = HalvingStage(replace(config, plateau=plateau), latents, Teacher(curved), steps=8)
        losses = [mean + noise for mean in means for noise in (0.3, -0.3) * (distill.PLATEAU_STEPS // 2)]
        return stage.ends(losses[missing:])

    assert ends(1.0, 0.996) and ends(2.0, 1.0, 0.999) and ends(1.0, 1.1)
    assert not ends(1.0, 0.99) and not ends(1.0, 1.0, 0.99)
    assert not ends(1.0) and not ends(1.0, 1.0, missing=1) and not ends(1.0, 1.0, plateau=None)


def test_guidance_is_distilled_into_the_first_student_alone(config, latents):
    guided = replace(config, steps=4, cfg=7.5)
    for steps, passes in ((4, [False, True, False, True]), (2, [False, False])):
        teacher = Teacher(curved)
        stage = HalvingStage(guided, latents, teacher, steps)
        stage.backward("g", 0, 0, 1.0)
        assert teacher.dropped == passes


def test_a_student_of_other_sizes_learns_from_its_teacher(config, latents, tiny_dit):
    torch.manual_seed(0)
    teacher, student = Restorer(replace(tiny_dit, dim=48, heads=3)), Restorer(tiny_dit)
    nn.init.normal_(teacher.dit.vid_out.proj.weight)
    stage = HalvingStage(config, latents, teacher, 4, student)
    stage.backward("g", 0, 0, 1.0)
    assert stage.modules["g"] is student
    assert student.dit.vid_out.proj.weight.grad.any()


def test_steps_that_cannot_be_halved_to_one_are_refused(config):
    with pytest.raises(SettingError, match="power of two"):
        replace(config, steps=12)


# From the first halving to the last, and on after a stop.


def checkpoint(folder, step, ended=False):
    """What is complete in a run directory, without its tensors."""
    path = folder / f"checkpoints/step_{step:06d}"
    path.mkdir(parents=True)
    write_whole(path / "meta.json", json.dumps({"step": step, "ended": ended}))
    return path


def test_a_checkpoint_to_go_on_from_is_that_of_its_own_halving(tmp_path):
    folders = [tmp_path / name for name in ("04", "02", "01")]
    assert ways_on("auto", folders, 4) == ["auto"] * 3
    assert ways_on("none", folders, 4) == ["none"] * 3
    checkpoint(folders[0], 4)
    inside, elsewhere = str(checkpoint(folders[1], 2)), str(checkpoint(tmp_path / "elsewhere", 2))
    assert ways_on(inside, folders, 4) == ["auto", inside, "auto"]
    # One from elsewhere begins what is not finished.
    assert ways_on(elsewhere, folders, 4) == ["auto", elsewhere, "auto"]
    # This one has come as far as it gets.
    checkpoint(folders[1], 3, ended=True)
    assert ways_on(elsewhere, folders, 4) == ["auto", "auto", elsewhere]
    checkpoint(folders[2], 4)
    with pytest.raises(SettingError, match="All halvings are finished"):
        ways_on(elsewhere, folders, 4)


def test_to_begin_at_no_checkpoint_is_refused_before_the_first_halving(tmp_path):
    folders = [tmp_path / name for name in ("04", "02", "01")]
    checkpoint(folders[1], 2)
    with pytest.raises(SettingError, match=r"02 holds a checkpoint of step 2, and --resume none.*--out"):
        ways_on("none", folders, 4)


@pytest.fixture
def run_stage(config, latents, latents_folder, tmp_path, monkeypatch):
    """Run `python -m training.distill --out FOLDER` with more arguments, from 8 steps to 1; what was logged where."""
    teacher, run = Restorer(config.model), RunConfig(steps=1, save_every=1, validate_every=1)
    trained = Pretraining(model=config.model, run=run, optim=config.optim, batch=1)
    loop.run(PretrainStage(trained, latents, teacher), trained, {"g": trained.optim}, tmp_path / "teacher")
    run = RunConfig(steps=4, save_every=2, validate_every=4, async_save=False)
    tiny = replace(config, run=run, teacher=tmp_path / "teacher", steps=8, batch=2)
    monkeypatch.setitem(distill.RECIPES, "tiny", tiny)

    def run_stage(out, *arguments):
        command = ["distill", "--config", "tiny", "--data", latents_folder, "--out", out, "--device", "cpu"]
        monkeypatch.setattr("sys.argv", [str(word) for word in (*command, "--threads", "1", *arguments)])
        distill.main()
        rows = {name: journal.read(out / name / "metrics.jsonl") for name in ("04", "02", "01")}
        return {name: [row["step"] for row in found] for name, found in rows.items()}

    return run_stage


def test_only_the_halving_of_a_checkpoint_goes_on_from_it(run_stage, tmp_path):
    with pytest.raises(loop.Preempted):
        run_stage(tmp_path / "run", "--steps", "2")
    left = tmp_path / "run/04/checkpoints/step_000002"
    whole = [0, 1, 2, 3]
    assert run_stage(tmp_path / "other", "--resume", left) == {"04": [2, 3], "02": whole, "01": whole}
    assert run_stage(tmp_path / "run", "--resume", left) == {"04": whole, "02": whole, "01": whole}
