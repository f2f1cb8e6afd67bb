"""Recipes, overrides from a command line, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from seedvr2_core.errors import SettingError
from training.config import OptimConfig, RunConfig, override, parse_command

FOLDERS = ["--out", "run", "--data", "files"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    run: RunConfig
    optim: OptimConfig
    kind: Literal["image", "clip"] = "image"
    teacher: Path = Path("runs/pretrain")
    widths: tuple[int, ...] = (16, 32)
    flip: bool = True


@pytest.fixture
def recipe():
    return Recipe(run=RunConfig(steps=10), optim=OptimConfig(lr=1e-3, final_lr=1e-4))


@pytest.mark.parametrize(
    ("assignment", "read", "value"),
    [
        ("optim.lr=5e-4", lambda config: config.optim.lr, 5e-4),
        ("run.steps=7", lambda config: config.run.steps, 7),
        ("optim.betas=0.8,0.95", lambda config: config.optim.betas, (0.8, 0.95)),
        ("optim.full_rate_inputs=50", lambda config: config.optim.full_rate_inputs, 50),
        ("optim.full_rate_inputs=none", lambda config: config.optim.full_rate_inputs, None),
        ("kind=clip", lambda config: config.kind, "clip"),
        ("teacher=elsewhere", lambda config: config.teacher, Path("elsewhere")),
        ("widths=8,16,32", lambda config: config.widths, (8, 16, 32)),
        ("flip=False", lambda config: config.flip, False),
    ],
)
def test_a_field_takes_the_value_in_its_own_type(recipe, assignment, read, value):
    changed = read(override(recipe, [assignment]))
    assert changed == value
    assert type(changed) is type(value)


def test_other_fields_and_the_recipe_itself_stay_as_they_were(recipe):
    changed = override(recipe, ["optim.lr=5e-4", "run.seed=3"])
    assert (changed.optim.final_lr, changed.run.steps, changed.widths) == (1e-4, 10, (16, 32))
    assert (recipe.optim.lr, recipe.run.seed) == (1e-3, 0)


def test_the_last_of_two_equal_keys_counts(recipe):
    assert override(recipe, ["run.steps=3", "run.steps=4"]).run.steps == 4


@pytest.mark.parametrize(
    ("assignment", "near"), [("optim.learning_rate=1", None), ("optim.warmpu=1", "warmup"), ("optin.lr=1", "optim")]
)
def test_an_unknown_key_is_refused_with_the_nearest_name(recipe, assignment, near):
    with pytest.raises(SettingError, match="not a setting") as refused:
        override(recipe, [assignment])
    assert ("Did you mean" in str(refused.value)) == (near is not None)
    assert near is None or repr(near) in str(refused.value)


@pytest.mark.parametrize(
    "assignment",
    ["run.steps=many", "run.steps=2.5", "optim.lr=fast", "optim.lr=none", "optim.betas=0.9", "optim.betas=0.9,0.99,1",
     "kind=movie", "widths=8,x", "flip=perhaps", "optim=3", "run.steps="],
)  # fmt: skip
def test_a_value_of_the_wrong_type_is_refused_by_name(recipe, assignment):
    key, _, value = assignment.partition("=")
    with pytest.raises(SettingError, match=f"'{key}' takes .*, got '{value}'"):
        override(recipe, [assignment])


def test_a_key_that_goes_into_a_plain_value_is_refused(recipe):
    with pytest.raises(SettingError, match="too deep"):
        override(recipe, ["run.steps.more=1"])


def test_an_argument_without_a_value_is_refused(recipe):
    with pytest.raises(SettingError, match="KEY=VALUE"):
        override(recipe, ["run.steps"])


def test_a_command_line_names_a_recipe_and_changes_it(recipe):
    argv = [*FOLDERS, "--config", "tiny", "--threads", "1", "run.steps=3"]
    command = parse_command("stage", {"tiny": recipe}, argv)
    assert (command.config.run.steps, command.out, command.data, command.threads) == (3, Path("run"), Path("files"), 1)


@pytest.mark.parametrize("words", ["--config other", "--config tiny run.stepz=3"])
def test_a_wrong_command_line_exits_with_one_sentence(recipe, words, capsys):
    with pytest.raises(SystemExit) as left:
        parse_command("stage", {"tiny": recipe}, [*FOLDERS, *words.split()])
    assert left.value.code == 2
    assert "error:" in capsys.readouterr().err
