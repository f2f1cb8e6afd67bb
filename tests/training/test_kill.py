"""kill -9 at any moment of any stage, then the same command again: the end is that of a run nobody touched."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from seedvr2_core.models.vae import VAEConfig, VideoVAE
from tests.training.toys import PRELOAD
from training import config as configs
from training import journal, pretrain, shards, state, vae
from training.parallel import Processes
from training.procedural import still
from training.restorer import Restorer

STAGES = ("vae", "precompute", "pretrain", "distill", "apt", "lora")
# Rows of the log that say how long something took.
TIMING = ("seconds", "samples_per_second", "tokens_per_second", "data_seconds")
TINY_VAE = VAEConfig(widths=(8, 8, 8, 8), blocks=1, groups=2, scale=1.0)
RUN = ["run.steps=6", "run.save_every=2", "run.validate_every=3", "run.log_norms_every=2", "run.ema=0.9"]
# Six steps teach nobody to follow a condition, and that alert would be given again after a kill.
RUN += ["guard.condition_effect=0"]
# Of precompute: five samples in three shards.
FEW = {"crops": [{"kind": "image", "count": 5, "size": 32}], "degradation": "nano", "shard_samples": 2, "workers": 0}


@dataclass(frozen=True)
class Moment:
    """When a process is killed: in step `row`, counted from 0 over all runs of a command, or as it opens a file."""

    row: int | None = None
    opens: str = "-"  # pattern of its path

    def __str__(self) -> str:
        return f"step {self.row}" if self.row is not None else self.opens.strip("*/").replace("*", "")


# In the middle of what checkpoint 4 consists of; with all of it written and not yet called complete; in a step.
HALF, ALMOST, STEP = Moment(opens="*/step_000004/*.distcp"), Moment(opens="*/step_000004/.meta.json*"), Moment(row=5)
MOMENTS = {
    "vae": [STEP],
    "precompute": [Moment(opens="*000001.*.part"), Moment(opens="*000001.json.*"), Moment(opens="*.part/hq.npy")],
    "pretrain": [STEP, HALF, ALMOST, Moment(opens="*/step_000006/.meta.json*")],
    # Inside the first halving; between the two; at the first checkpoint of the second.
    "distill": [STEP, Moment(opens="*/01/.config.yaml*"), Moment(opens="*/01/checkpoints/step_000002/*.distcp")],
    "apt": [STEP, HALF],
    "lora": [STEP, Moment(opens="*/adapter_config.json")],
}


def execute(stage: str, argv: list[str], moment: Moment) -> None:
    """`python -m training.STAGE ARGV` in this process, which kills itself at the moment."""
    rows, write = [], journal.Journal.metrics

    def count(self, row):
        if len(rows) == moment.row:
            os.kill(os.getpid(), signal.SIGKILL)
        rows.append(row)
        write(self, row)

    def watch(event, arguments):
        if event == "open" and fnmatch(str(arguments[0]), moment.opens):
            os.kill(os.getpid(), signal.SIGKILL)

    journal.Journal.metrics = count
    sys.addaudithook(watch)
    sys.argv = [stage, *argv, "--threads", "1", "--device", "cpu"]
    sys.exit(importlib.import_module(f"training.{stage}").main())


def run(stage: str, argv: list[str], moment: Moment | None = None) -> None:
    """The command in a process of its own. A server that has torch loaded forks it: a fraction of a second."""
    context = get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD, *(f"training.{name}" for name in STAGES)])
    process = context.Process(target=execute, args=(stage, argv, moment or Moment()), daemon=True)
    process.start()
    process.join(120)
    assert process.exitcode == (0 if moment is None else -signal.SIGKILL)


@pytest.fixture(scope="module")
def start(tmp_path_factory, tiny_dit) -> Path:
    """A folder with a photograph, and with the runs that stages begin from."""
    folder = tmp_path_factory.mktemp("start")
    for name, side in (("train/images/photo.png", 96), ("eval/images/photo.png", 256)):
        (folder / name).parent.mkdir(parents=True)
        Image.fromarray(still(0, 0, side)).save(folder / name)
    recipes = {"vae": vae.NANO, "pretrain": pretrain.RECIPES["nano"]}
    torch.manual_seed(0)
    for name, model, module in (("vae", TINY_VAE, VideoVAE(TINY_VAE)), ("pretrain", tiny_dit, Restorer(tiny_dit))):
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.1)
        state.save_averaged(folder / name, 1, module.state_dict(), Processes())
        text = configs.to_yaml(replace(recipes[name], model=model))
        state.write_whole(folder / name / configs.CONFIG_FILE, text)
    few = {"base": "nano", "vae": str(folder / "vae"), **FEW, "data": {"stills": 1, "still_size": 64}}
    (folder / "few.yaml").write_text(configs.yaml.safe_dump(few))
    return folder


@pytest.fixture(scope="module")
def commands(start, latents_folder, tiny_dit) -> dict[str, list[str]]:
    """The arguments of every stage, less the run directory."""
    dit = [f"model.{name}={getattr(tiny_dit, name)}" for name in
           ("dim", "depth", "heads", "head_dim", "text_dim", "separate_layers", "mlp_hidden")]  # fmt: skip
    nano, before = ["--config", "nano", *RUN], str(start / "pretrain")
    on_latents = [*nano, "batch=2", *dit, "--data", str(latents_folder)]
    return {
        "vae": [*nano, "run.parallel.precision=fp32", "--data", str(start), f"init={start / 'vae'}",
                "model.widths=8,8,8,8", "model.groups=2", "data.stills=1", "data.still_size=96", "data.max_reduction=1",
                *(f"crops.{i}.{name}={value}" for i in range(3)
                  for name, value in {"batch": 1, "size": 32, "frames": (5, 1, 5)[i]}.items())],
        "precompute": ["--config", str(start / "few.yaml"), "--data", str(start)],
        "pretrain": on_latents,
        "distill": [*on_latents, f"teacher={before}", "steps=4"],
        "apt": [*on_latents, f"pretrained={before}", f"distilled={before}"],
        "lora": [*on_latents, f"init={before}", "lora.rank=2"],
    }  # fmt: skip


@pytest.fixture(scope="module")
def untouched(commands, tmp_path_factory):
    """The directory of a run of a stage that nobody touched."""
    done = {}

    def of(stage: str) -> Path:
        if stage not in done:
            done[stage] = tmp_path_factory.mktemp(f"untouched_{stage}") / "run"
            run(stage, [*commands[stage], "--out", str(done[stage])])
        return done[stage]

    return of


def logs(directory: Path) -> dict[str, list[dict]]:
    """Every log of every run in a directory, without times."""
    return {
        str(path.relative_to(directory)): [{k: v for k, v in row.items() if k not in TIMING}
                                           for row in journal.read(path)]
        for path in sorted(directory.rglob("*.jsonl"))
    }  # fmt: skip


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor that is left of every run in a directory: of the last checkpoint, and averages kept for good."""
    found = {}
    for folder in sorted(directory.rglob(state.FOLDER)):
        last = state.complete(folder)[-1]
        kept = {name: torch.empty(size) for name, size in state.stored(last).items() if not name.startswith("rng/")}
        state.Checkpoints(folder.parent).load(last, kept)
        found |= {f"{last.relative_to(directory)}/{name}": tensor for name, tensor in kept.items()}
    for path in sorted(directory.rglob("*.safetensors")):
        found |= {f"{path.relative_to(directory)}/{name}": tensor for name, tensor in state.load_file(path).items()}
    return found


def contents(directory: Path) -> dict[str, bytes]:
    """Every file of a data set; what is hidden was left by the killed."""
    files = [path.relative_to(directory) for path in directory.rglob("*") if path.is_file()]
    shown = [path for path in files if path.parts[0] != "sources" and not any(p.startswith(".") for p in path.parts)]
    return {str(path): (directory / path).read_bytes() for path in shown}


@pytest.mark.parametrize(("stage", "moment"), [
    pytest.param(stage, moment, id=f"{stage}, {moment}") for stage in STAGES for moment in MOMENTS[stage]
])  # fmt: skip
def test_a_killed_stage_ends_as_one_that_was_left_alone(stage, moment, commands, untouched, tmp_path):
    whole, killed = untouched(stage), tmp_path / "run"
    command = [*commands[stage], "--out", str(killed)]
    run(stage, command, moment)
    run(stage, command)
    if stage == "precompute":
        assert shards.ShardReader(killed).read(4)[0].any()
        assert contents(killed) == contents(whole)
        return
    expected = tensors(whole)
    found = tensors(killed)
    assert found.keys() == expected.keys() and any("optim/" in name for name in found)
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    assert logs(killed) == logs(whole)
    assert all(rows for name, rows in logs(whole).items() if not name.endswith(journal.ALERTS))
