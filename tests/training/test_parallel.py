"""Several processes: sharded, replicated, or with a sample's tokens split, they train as one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from seedvr2_core.errors import CheckpointError, SettingError
from seedvr2_core.models.dit import DiT
from tests.training.toys import OPTIM, RUN, Regression, ToyConfig, in_processes
from training import apt, distill, journal, loop, pretrain, state
from training import parallel as processes_of
from training.config import ParallelConfig, RunConfig, override
from training.loop import Session
from training.parallel import (
    Layers,
    Processes,
    UlyssesAttention,
    connect,
    gather,
    set_last_micro,
    split,
    weight_parts,
)
from training.pretrain import Latents, Pretraining, PretrainStage
from training.restorer import Restorer

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
STEPS = 4
# Of every kind, how 2 or 4 processes share the work.
KINDS = {
    2: {
        "fsdp": ParallelConfig(),
        "zero2": ParallelConfig(reshard_after_forward=False, activation_checkpoint=True),
        "sp": ParallelConfig(sp=2, activation_checkpoint=True),
    },
    4: {
        "hsdp": ParallelConfig(replicate=2),
        "hsdp_sp": ParallelConfig(replicate=2, sp=2),
    },
}


def alive(module: nn.Module) -> nn.Module:
    """Gates and the last projection start at zero and would hide what lies behind them."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    return module


def train(directory, model, latents_folder, parallel=None, session=None, batch_tokens=None, **changes):
    session = session or Session()
    run = RunConfig(steps=STEPS, micro_batches=4, ema=0.9, save_every=2, validate_every=STEPS, log_norms_every=1)
    run = replace(run, parallel=parallel or ParallelConfig(), **changes)
    config = Pretraining(model=model, run=run, optim=replace(OPTIM, lr=1e-3), batch=2, batch_tokens=batch_tokens)
    own = loop.resolved(config, session)
    stage = PretrainStage(own, Latents(latents_folder, seed=0), alive(Restorer(model)))
    return loop.run(stage, config, {"g": config.optim}, directory, session)


def train_all(root, model, latents_folder, world, init_method):
    """Every kind of one number of processes, each in its run directory; the first stops half-way."""
    for name, parallel in KINDS[world].items():
        session = Session(processes=connect(parallel, CPU, init_method))
        train(root / name, model, latents_folder, parallel, session)
    if world == 2:
        half = Session(processes=connect(ParallelConfig(), CPU, init_method), most_steps=2)
        for name in ("on_1", "on_4"):
            with pytest.raises(loop.Preempted):
                train(root / name, model, latents_folder, session=half)
    else:
        session = Session(processes=connect(ParallelConfig(), CPU, init_method))
        train(root / "on_4", model, latents_folder, session=session)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, latents_folder, tiny_dit):
    """A folder of finished runs of the same training, by kind."""
    root = tmp_path_factory.mktemp("runs")
    train(root / "single", tiny_dit, latents_folder)
    for world in KINDS:
        in_processes(world, train_all, root / f"world_{world}", root, tiny_dit, latents_folder, world)
    train(root / "on_1", tiny_dit, latents_folder)
    return root


@pytest.mark.parametrize("kind", [*KINDS[2], *KINDS[4], "on_1", "on_4"])
def test_11_trajectories_equal_those_of_a_single_process(runs, kind):
    rows = [journal.read(runs / name / "metrics.jsonl") for name in ("single", kind)]
    assert [row["step"] for row in rows[1]] == list(range(STEPS))
    for a, b in zip(*rows, strict=True):
        for name in ("loss", "grad_norm", "weight_norm", "ema_distance"):
            assert b[name] == pytest.approx(a[name], rel=1e-5, abs=1e-6), name
    a, b = (journal.read(runs / name / "validation.jsonl") for name in ("single", kind))
    for one, other in zip(a, b, strict=True):
        assert other == pytest.approx(one, rel=1e-4)


@pytest.mark.parametrize(("kind", "world"), [("single", 0), ("fsdp", 2), ("on_4", 4)])
def test_each_of_several_processes_leaves_a_heartbeat(runs, kind, world):
    beats = [json.loads(path.read_text()) for path in sorted((runs / kind / journal.HEARTBEATS).glob("*"))]
    assert len({beat["pid"] for beat in beats}) == world and all(beat["step"] == STEPS - 1 for beat in beats)


@pytest.mark.parametrize("kind", [*KINDS[2], *KINDS[4], "on_1", "on_4"])
def test_11_weights_equal_those_of_a_single_process(runs, kind):
    for prefix in ("ema", "g"):
        expected = state.load_averaged(runs / "single", prefix)
        for name, value in state.load_averaged(runs / kind, prefix).items():
            torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-5)
    assert state.load_averaged(runs / kind / f"ema/step_{STEPS:06d}.safetensors").keys() == expected.keys()


def test_a_checkpoint_says_how_many_processes_wrote_it(runs):
    worlds = {}
    for name in ("on_1", "on_4"):
        for path in state.complete(runs / name / "checkpoints"):
            worlds[name, path.name] = json.loads((path / "meta.json").read_text())["world"]
    assert set(worlds.values()) == {1, 2, 4}


# Tokens.


def outputs_and_gradients(dit, samples, layers, sp):
    """Velocities, and the gradients of a loss that every process computes."""
    latents, texts, times = samples
    velocities = dit(latents, texts, times, blocks=layers.of(dit))
    sum(v.square().sum() for v in velocities).backward()
    gradients = {name: p.grad.clone() for name, p in dit.named_parameters() if p.grad is not None}
    if sp > 1:
        for gradient in gradients.values():
            dist.all_reduce(gradient)
            gradient /= sp
    return [v.detach() for v in velocities], gradients


def draw_samples(config, shapes, lengths):
    draw = torch.Generator().manual_seed(1)
    latents = [torch.randn(33, *shape, generator=draw) for shape in shapes]
    texts = [torch.randn(length, config.text_dim, generator=draw) for length in lengths]
    return latents, texts, torch.rand(len(shapes), generator=draw)


BATCHES = {
    "odd tokens": ([(1, 6, 6)], [5]),
    "equal samples": ([(3, 6, 6), (3, 6, 6)], [3, 3]),
    "different samples": ([(1, 6, 6), (2, 4, 10), (3, 2, 2)], [4, 1, 2]),
}


def run_split(config, init_method):
    processes = connect(ParallelConfig(sp=2), CPU, init_method)
    results = {}
    for name, (shapes, lengths) in BATCHES.items():
        dit = alive(DiT(config))
        for block in dit.blocks:
            block.attn = UlyssesAttention(block.attn, processes.tokens)
        results[name] = outputs_and_gradients(dit, draw_samples(config, shapes, lengths), Layers(processes.tokens), 2)
    x = torch.arange(5.0, requires_grad=True)
    whole = gather(split(x, processes.tokens), processes.tokens)
    (whole * torch.arange(6.0) * (processes.rank + 1)).sum().backward()
    results["gather"] = (whole.detach(), x.grad)
    return results


@pytest.fixture(scope="module")
def split_results(tmp_path_factory, tiny_dit):
    return in_processes(2, run_split, tmp_path_factory.mktemp("split"), tiny_dit)


@pytest.mark.parametrize("name", BATCHES)
def test_two_processes_with_half_the_tokens_each_give_what_one_gives(split_results, tiny_dit, name):
    shapes, lengths = BATCHES[name]
    expected, gradients = outputs_and_gradients(
        alive(DiT(tiny_dit)), draw_samples(tiny_dit, shapes, lengths), Layers(), 1
    )
    for result in split_results:
        outputs, found = result[name]
        for a, b in zip(outputs, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        assert found.keys() == gradients.keys()
        for key, gradient in gradients.items():
            torch.testing.assert_close(found[key], gradient, atol=1e-5 * gradient.abs().max().item(), rtol=1e-4)


def test_gathered_gradients_add_up_and_padding_gets_none(split_results):
    for rank, result in enumerate(split_results):
        whole, gradient = result["gather"]
        assert whole.tolist() == [0, 1, 2, 3, 4, 0]
        # 1 x and 2 x the position, summed, where this process holds it.
        own = [0.0, 3.0, 6.0, 0, 0] if rank == 0 else [0, 0, 0, 9.0, 12.0]
        assert gradient.tolist() == own


def test_heads_that_cannot_be_split_are_refused_with_those_that_fit(tiny_dit):
    class Five:
        def size(self):
            return 5

    with pytest.raises(SettingError, match=r"2 attention heads cannot be split over parallel.sp=5.*choose one of 2"):
        UlyssesAttention(DiT(tiny_dit).blocks[0].attn, Five())


# Micro-batches, signals, precision.


def test_micro_batches_keep_their_numbers_whoever_computes_them():
    for world, sp in ((1, 1), (2, 1), (4, 2), (8, 2)):
        seen = [
            list(Processes(rank=rank, world=world, config=ParallelConfig(sp=sp)).micros(8)) for rank in range(world)
        ]
        assert [micro for part in seen[::sp] for micro in part] == list(range(8))
        # The processes of one group work on the same.
        assert all(seen[rank] == seen[rank - rank % sp] for rank in range(world))
    with pytest.raises(SettingError, match="3 micro-batches cannot be dealt to 2"):
        Processes(world=2).micros(3)
    alone, third = Processes(), Processes(rank=5, world=8, config=ParallelConfig(sp=2))
    assert (alone.total_micros(None), alone.micros(None)) == (1, range(1))
    assert (third.total_micros(None), third.micros(None)) == (4, range(2, 3))


@pytest.mark.parametrize("stage", [pretrain, distill, apt], ids=lambda stage: stage.__name__)
@pytest.mark.parametrize(("world", "changes"), [(8, ["sp=4"]), (72, ["replicate=9", "sp=4"])], ids=str)
def test_the_commands_of_the_guide_give_every_group_one_micro_batch(stage, world, changes):
    for name, recipe in stage.RECIPES.items():
        if name == "nano" or recipe.model.heads % 4:
            continue
        config = override(recipe, [f"run.parallel.{change}" for change in changes])
        weights = weight_parts(config.run.parallel, world)
        assert weights * config.run.parallel.replicate == world
        for rank in (0, world - 1):
            session = Session(processes=Processes(rank=rank, world=world, config=config.run.parallel))
            own = loop.resolved(config, session)
            assert own.run.micro_batches == world // 4
            assert list(session.processes.micros(own.run.micro_batches)) == [rank // 4]


def train_half(root, model, latents_folder, init_method):
    session = Session(processes=connect(ParallelConfig(), CPU, init_method), most_steps=2)
    with pytest.raises(loop.Preempted):
        train(root / "grown", model, latents_folder, session=session, batch_tokens=16, micro_batches=None)


def test_a_batch_grows_with_the_processes_and_a_run_may_go_on_in_others(tmp_path, tiny_dit, latents_folder):
    in_processes(2, train_half, tmp_path / "meeting", tmp_path, tiny_dit, latents_folder)
    train(tmp_path / "fixed", tiny_dit, latents_folder, batch_tokens=16, micro_batches=2)
    grown, fixed = (journal.read(tmp_path / name / "metrics.jsonl") for name in ("grown", "fixed"))
    assert [row["loss"] for row in grown] == pytest.approx([row["loss"] for row in fixed[:2]], rel=1e-5)
    train(tmp_path / "grown", tiny_dit, latents_folder, batch_tokens=16, micro_batches=None)
    grown = journal.read(tmp_path / "grown/metrics.jsonl")
    assert [row["step"] for row in grown] == list(range(STEPS))
    assert "micro_batches: null" in (tmp_path / "grown/config.yaml").read_text()


def test_processes_that_do_not_multiply_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SettingError, match="3 processes cannot be replicate 2 x shard 1 x sp 1"):
        connect(ParallelConfig(replicate=2), CPU)


def run_signalled(root, init_method):
    processes = connect(ParallelConfig(), CPU, init_method)
    run = RunConfig(steps=6, micro_batches=2, ema=0.9, save_every=100, validate_every=100)
    config = ToyConfig(run=run, optim=OPTIM)
    # Only the second process is asked.
    stage = Regression(signal_at=2 if processes.rank else None)
    with pytest.raises(loop.Preempted) as left:
        loop.run(stage, config, {"g": OPTIM}, root / "run", Session(processes=processes))
    return left.value.code, stage.calls


def test_sigterm_to_one_process_makes_all_save_after_the_same_step(tmp_path):
    results = in_processes(2, run_signalled, tmp_path / "meeting", tmp_path)
    assert [code for code, _ in results] == [0, 0]
    assert [calls[-1] for _, calls in results] == [("g", 2, 0), ("g", 2, 1)]
    (path,) = state.complete(tmp_path / "run/checkpoints")
    assert json.loads((path / "meta.json").read_text())["step"] == 3


def save_and_fail_in_one(root, init_method):
    """What a checkpoint that cannot be written in the second process alone does to both."""
    processes = connect(ParallelConfig(), CPU, init_method)
    checkpoints, tensors = state.Checkpoints(root, processes), {"a": torch.ones(3)}
    checkpoints.save(1, tensors)
    written = state.dcp.save

    def fail(*args, **kwargs):
        written(*args, **kwargs)
        if not processes.first:
            raise OSError("no memory left there")

    state.dcp.save = fail
    with pytest.raises(CheckpointError, match="no memory left there"):
        checkpoints.save(2, tensors)
    state.dcp.save = written
    checkpoints.save(3, tensors)
    return [path.name for path in state.complete(checkpoints.directory)]


def test_a_checkpoint_that_fails_in_one_process_fails_in_all_and_the_next_is_whole(tmp_path):
    kept = in_processes(2, save_and_fail_in_one, tmp_path / "meeting", tmp_path)
    assert kept == [["step_000001", "step_000003"]] * 2


def gradients_after_one_of_two(init_method):
    """Whether every gradient is a shard when a step is half-way through."""
    processes = connect(ParallelConfig(), CPU, init_method)
    module = processes.place(nn.Linear(8, 4))
    set_last_micro(module, False)
    module(torch.ones(2, 8)).sum().backward()
    return [isinstance(parameter.grad, DTensor) for parameter in module.parameters()]


def test_gradients_that_add_up_are_shards_too(tmp_path):
    """Whole, those of a 7B are 31 GB in each process."""
    assert in_processes(2, gradients_after_one_of_two, tmp_path) == [[True, True]] * 2


TRIED = {"auto": "cuda:3", "cuda": "cuda:3", "cuda:1": "cuda:1", "cpu": "cpu"}


@pytest.mark.parametrize(("name", "tried"), TRIED.items())
def test_no_process_touches_the_gpu_of_another(monkeypatch, name, tried):
    touched, current = [], []
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append(str(device)))
    monkeypatch.setattr(processes_of, "pick_device", lambda name: touched.append(name) or torch.device(name))
    assert str(processes_of.local_device(name)) == tried
    assert touched == [tried] and current == [tried] * (name != "cpu")


def test_11_torchrun_restarts_a_run_whose_process_died_and_it_ends_as_if_nothing_had_been(tmp_path):
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1", "-m"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *command, "tests.training.elastic", str(tmp_path / "run")],
        capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    config = ToyConfig(run=replace(RUN, micro_batches=2), optim=OPTIM)
    loop.run(Regression(), config, {"g": OPTIM}, tmp_path / "single")
    expected = state.load_averaged(tmp_path / "single")
    for name, value in state.load_averaged(tmp_path / "run").items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-5)
    assert [row["step"] for row in journal.read(tmp_path / "run/metrics.jsonl")] == list(range(6))


def test_one_process_computes_in_bf16_with_masters_in_fp32(tmp_path, tiny_dit, latents_folder):
    ((rows, kinds),) = in_processes(1, run_bf16, tmp_path / "meeting", tmp_path, tiny_dit, latents_folder)
    train(tmp_path / "single", tiny_dit, latents_folder)
    exact = journal.read(tmp_path / "single/metrics.jsonl")
    assert kinds == {torch.float32}
    for a, b in zip(exact, rows, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=2e-2)
        assert b["loss"] != a["loss"]


def run_bf16(root: Path, model, latents_folder, init_method):
    parallel = ParallelConfig(precision="bf16", activation_checkpoint=True)
    module = train(
        root / "run", model, latents_folder, parallel, Session(processes=connect(parallel, CPU, init_method))
    )
    return journal.read(root / "run/metrics.jsonl"), {p.dtype for p in module.parameters()}
