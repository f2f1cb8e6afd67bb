"""Recipes, overrides from a command line, and what is refused."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pytest

from seedvr2_core.errors import SettingError
from seedvr2_core.models.dit import DiTConfig
from training import ablation, apt, config, distill, lora, precompute, pretrain, vae
from training.config import OptimConfig, RunConfig, check, load_config, override, parse_command, run_main, setting

FOLDERS = ["--out", "run", "--data", "files"]


@dataclass(frozen=True, kw_only=True)
class Crops:
    size: int
    frames: int = 1


@dataclass(frozen=True, kw_only=True)
class Recipe:
    run: RunConfig
    optim: OptimConfig
    kind: Literal["image", "clip"] = "image"
    teacher: Path = Path("runs/pretrain")
    widths: tuple[int, ...] = (16, 32)
    flip: bool = True
    crops: tuple[Crops, ...] = (Crops(size=64), Crops(size=32, frames=5))
    share: float = setting(0.5, "of the samples", source="S2", least=0, most=1, frozen=True)
    other: OptimConfig | None = None
    model: DiTConfig = pretrain.NANO_DIT


@pytest.fixture
def recipe():
    return Recipe(run=RunConfig(steps=10), optim=OptimConfig(lr=1e-3, final_lr=1e-4))


def yaml_file(folder, text, name="mine.yaml"):
    path = folder / name
    path.write_text(text)
    return str(path)


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
        ("crops.1.frames=9", lambda config: config.crops[1].frames, 9),
        ("run.parallel.sp=2", lambda config: config.run.parallel.sp, 2),
        ("run.max_hours=1.5", lambda config: config.run.max_hours, 1.5),
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
def test_12_an_unknown_key_is_refused_with_the_nearest_name(recipe, assignment, near):
    with pytest.raises(SettingError, match="not a setting") as refused:
        override(recipe, [assignment])
    assert ("Did you mean" in str(refused.value)) == (near is not None)
    assert near is None or repr(near) in str(refused.value)


@pytest.mark.parametrize(
    "assignment",
    ["run.steps=many", "run.steps=2.5", "optim.lr=fast", "optim.lr=none", "optim.betas=0.9", "optim.betas=0.9,0.99,1",
     "kind=movie", "widths=8,x", "flip=perhaps", "optim=3", "run.steps=",
     "run.max_hours=soon", "crops=3"],
)  # fmt: skip
def test_12_a_value_of_the_wrong_type_is_refused_by_name(recipe, assignment):
    key, _, value = assignment.partition("=")
    with pytest.raises(SettingError, match=f"'{key}' takes .*, got '{value}'"):
        override(recipe, [assignment])


def test_a_key_that_goes_into_a_plain_value_is_refused(recipe):
    with pytest.raises(SettingError, match="too deep"):
        override(recipe, ["run.steps.more=1"])


@pytest.mark.parametrize("order", [1, -1])
def test_settings_are_held_against_each_other_when_all_are_there(order, tmp_path):
    """Each of these two is refused without the other, or says nothing of it."""
    pair = ["lora.offload_blocks=4", "run.parallel.activation_checkpoint=true"][::order]
    assert override(lora.RECIPES["nano"], pair).lora.offload_blocks == 4
    groups = ["lora: {offload_blocks: 4}", "run: {parallel: {activation_checkpoint: true}}"][::order]
    path = yaml_file(tmp_path, "\n".join(["base: nano", *groups]))
    assert load_config(path, lora.RECIPES) == override(lora.RECIPES["nano"], pair)
    with pytest.raises(SettingError, match=r"set run\.parallel\.activation_checkpoint=true"):
        override(lora.RECIPES["nano"], ["lora.offload_blocks=4"])


def test_a_group_that_is_not_there_is_made_of_its_fields(recipe):
    made = override(recipe, ["other.lr=1e-3", "other.final_lr=1e-4"])
    assert made.other == recipe.optim
    with pytest.raises(SettingError, match="'other' lacks final_lr"):
        override(recipe, ["other.lr=1e-3"])


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


def test_a_file_names_a_recipe_and_lists_what_differs(recipe, tmp_path):
    path = yaml_file(
        tmp_path,
        """
base: tiny
optim: {lr: 2e-4, betas: [0, 0.99]}
crops: [{size: 128}]
teacher: elsewhere
other: {lr: 1, final_lr: 0.5}
model: {windows: {splits: [2, 3, 3]}}
""",
    )
    changed = load_config(path, {"tiny": recipe})
    # Written without a dot, a number is text to YAML; whole numbers are not floats to Adam.
    assert (changed.optim.lr, changed.optim.betas) == (2e-4, (0.0, 0.99))
    assert type(changed.optim.betas[0]) is float
    assert (changed.crops, changed.teacher) == ((Crops(size=128),), Path("elsewhere"))
    assert changed.other == OptimConfig(lr=1.0, final_lr=0.5)
    assert changed.model == replace(recipe.model, windows=replace(recipe.model.windows, splits=(2, 3, 3)))
    assert changed.run == recipe.run


def test_a_file_may_build_on_a_file_and_the_command_line_has_the_last_word(recipe, tmp_path):
    yaml_file(tmp_path, "base: tiny\nrun: {steps: 20, seed: 4}", "first.yaml")
    second = yaml_file(tmp_path, "base: first.yaml\nrun: {steps: 30}")
    command = parse_command("stage", {"tiny": recipe}, [*FOLDERS, "--config", second, "run.ema=0.5"])
    run = command.config.run
    assert (run.seed, run.steps, run.ema) == (4, 30, 0.5)


def test_a_file_names_the_recipe_of_adapters_and_the_model_they_are_for(tmp_path):
    changed = load_config(yaml_file(tmp_path, "base: 7b_lora_24gb\ninit: runs/mine\nlora: {rank: 8}"), lora.RECIPES)
    assert (changed.init, changed.lora.rank, changed.lora.base) == ("runs/mine", 8, "fp8")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("run: {steps: 3}", "names no recipe"),
        ("base: tinny\n", "tinny"),
        ("base: mine.yaml", "its own base"),
        ("base: [tiny", "cannot be read as YAML"),
        ("base: tiny\noptim: {warmpu: 3}", "'optim.warmpu' is not a setting.*Did you mean 'warmup'"),
        ("base: tiny\ncrops: [{sise: 3}]", "'crops.0.sise' is not a setting.*Did you mean 'size'"),
        ("base: tiny\ncrops: [{frames: 5}]", "'crops.0' lacks size"),
        ("base: tiny\nrun: {steps: 2.5}", "'run.steps' takes int, got '2.5'"),
        ("base: tiny\nrun: {steps: true}", "'run.steps' takes int, got 'True'"),
        ("base: tiny\nflip: 1", "'flip' takes bool, got '1'"),
    ],
)
def test_a_wrong_file_is_refused_in_words(recipe, tmp_path, text, words):
    with pytest.raises(SettingError, match=words):
        load_config(yaml_file(tmp_path, text), {"tiny": recipe})


def test_a_recipe_that_does_not_exist_is_refused_with_the_nearest(recipe):
    with pytest.raises(SettingError, match=r"no recipe 'tinny'.*Did you mean 'tiny'"):
        load_config("tinny", {"tiny": recipe})


@pytest.mark.parametrize(
    "assignment", ["share=1.5", "run.steps=0", "optim.betas=0.9,1.1", "run.parallel.sp=0", "optim.lr=-1"]
)
def test_a_number_out_of_range_is_refused_before_anything_is_built(recipe, assignment):
    key = assignment.partition("=")[0]
    with pytest.raises(SettingError, match=f"'{key}' is .*; it lies between"):
        check(override(recipe, [assignment]))


def test_a_saved_config_says_what_has_changed_and_its_hash_whether(recipe, tmp_path):
    (tmp_path / config.CONFIG_FILE).write_text(config.to_yaml(recipe))
    saved = config.load_saved(tmp_path)
    assert config.differences(saved, recipe) == {}
    changed = override(recipe, ["optim.lr=1", "crops.1.frames=9", "teacher=x"])
    assert config.differences(saved, changed) == {
        "optim.lr": (1e-3, 1.0), "crops.1.frames": (5, 9), "teacher": ("runs/pretrain", "x"),
    }  # fmt: skip
    assert config.config_hash(recipe) == config.config_hash(replace(recipe)) != config.config_hash(changed)


@pytest.mark.parametrize(
    ("assignment", "frozen"),
    [
        ("run.seed=1", True),
        ("share=0.1", True),
        ("model.depth=3", True),
        ("optim.lr=1", False),
        ("run.steps=99", False),
    ],
)
def test_12_model_seed_and_data_are_kept_when_a_run_is_resumed(recipe, assignment, frozen):
    changed = override(recipe, [assignment])
    changes = config.differences(config.plain(recipe), changed)
    if not frozen:
        return config.refuse_frozen(changes, changed)
    with pytest.raises(SettingError, match=assignment.partition("=")[0]):
        config.refuse_frozen(changes, changed)


def test_help_lists_every_setting_with_its_value_meaning_and_source(recipe, capsys):
    with pytest.raises(SystemExit) as left:
        parse_command("stage", {"tiny": recipe}, ["--help"])
    assert left.value.code == 0
    lines = {line.split("=")[0].strip(): line for line in capsys.readouterr().out.splitlines() if "=" in line}
    assert "1000.0" not in lines["optim.lr"] and "0.001" in lines["optim.lr"]
    assert lines["share"].endswith("of the samples (0..1) [S2]")
    assert {"run.parallel.sp", "crops.1.frames", "model.windows.max_t", "run.max_hours"} <= lines.keys()


@pytest.mark.parametrize("stage", [ablation, apt, distill, lora, precompute, pretrain, vae], ids=lambda s: s.__name__)
def test_help_says_what_every_setting_means(stage):
    for recipe in stage.RECIPES.values():
        # Two spaces, key=value, at least one more, and the meaning.
        without = [line for line in config.describe(recipe) if not re.search(r"[^=\s]=.*\S\s+\w*[a-z]{2}", line)]
        assert without == []


def test_options_stand_anywhere_among_the_overrides(recipe):
    argv = [
        "--config",
        "tiny",
        "run.steps=3",
        *FOLDERS,
        "--steps",
        "2",
        "run.seed=1",
        "--resume",
        "none",
        "--device",
        "cpu",
    ]
    command = parse_command("stage", {"tiny": recipe}, argv)
    assert (command.most_steps, command.resume, command.device) == (2, "none", "cpu")
    assert (command.config.run.steps, command.config.run.seed) == (3, 1)


@pytest.mark.parametrize("stage", [vae, pretrain, distill, apt, lora], ids=lambda stage: stage.__name__)
def test_every_recipe_of_every_stage_is_in_range_and_survives_its_file(stage, tmp_path):
    for name, recipe in stage.RECIPES.items():
        check(recipe)
        path = yaml_file(tmp_path, f"base: {name}\n" + config.to_yaml(recipe))
        assert load_config(path, stage.RECIPES) == recipe


def test_a_setting_that_a_saved_config_does_not_know_had_its_default():
    @dataclass(frozen=True, kw_only=True)
    class Model:
        width: int = 8
        added: int | None = None

    @dataclass(frozen=True, kw_only=True)
    class Experiment:
        run: RunConfig
        model: Model
        kind: str = setting("old", frozen=True)
        crops: tuple[Crops, ...] = (Crops(size=64), Crops(size=32))

    def experiment(**changes):
        return Experiment(**{"run": RunConfig(steps=3), "model": Model(), "crops": (Crops(size=8),)} | changes)

    saved = config.plain(experiment())
    del saved["model"]["added"], saved["kind"], saved["run"]["tensorboard"]
    assert config.differences(saved, experiment()) == {}
    changed = config.differences(saved, experiment(model=Model(added=2), kind="new"))
    assert changed == {"model.added": (None, 2), "kind": ("old", "new")}
    with pytest.raises(SettingError, match=r"model\.added was None and is 2"):
        config.refuse_frozen(changed, experiment())


def test_what_a_command_refuses_is_one_sentence_and_exit_code_1(capsys):
    def refuse():
        raise SettingError("There is no such thing.")

    with pytest.raises(SystemExit) as stopped:
        run_main(refuse)
    assert stopped.value.code == 1
    assert capsys.readouterr().err.rstrip().endswith(": There is no such thing.")
