"""Progressive distillation: what the student is asked for, where on the path, and by whom."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from seedvr2_core.diffusion.sampler import sample
from seedvr2_core.errors import SettingError
from training.config import OptimConfig, RunConfig
from training.distill import Distillation, HalvingStage, two_steps
from training.restorer import Restorer


class Teacher(nn.Module):
    """Velocity by a formula; it remembers the times it was asked at."""

    def __init__(self, formula):
        super().__init__()
        self.formula = formula
        self.weight, self.prompt = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1, 24))
        self.times: list[float] = []
        self.dropped: list[bool] = []
        self.device = self.weight.device

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
    assert stage.backward("g", 2, 1, 0.5) == first
    assert stage.backward("g", 3, 1, 1.0)["loss"] != first["loss"] != stage.backward("g", 2, 0, 1.0)["loss"]


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
