"""The only loop: it accumulates, steps, averages, guards, logs, saves and resumes; a stage says what its losses are.

Every random draw is a function of (seed, step, micro-batch), so the step number is all that a resumed run
needs to go on exactly where it stopped, in however many processes.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from seedvr2_core.device import warn_of_emulation
from seedvr2_core.errors import CheckpointError, SettingError

from . import config as configs
from . import state
from .config import Command, Config, OptimConfig, RunConfig
from .ema import EMA, local
from .env import describe_environment
from .guards import Guards, Verdict
from .journal import METRICS, Journal, beat, claimed, read
from .pace import Pace
from .parallel import Processes, attempt, connect, local_device, reshard, set_last_micro
from .previews import Preview, write_previews
from .randomness import key

log = logging.getLogger(__name__)

# In what a checkpoint says besides its tensors: exit code and sentence of the guard that stopped the run after it.
STOPPED = "stopped"
# Scalars of a micro-batch that add up over a step; the mean is taken of all others.
ADD_UP = ("samples", "tokens", "data_seconds")


class Stage(Protocol):
    """What the loop drives."""

    # What is trained, in the order in which they are updated within one step: "d" before "g", or "g" alone.
    modules: Mapping[str, nn.Module]
    averaged: str  # name of the module whose average is kept

    def backward(self, name: str, step: int, micro: int, scale: float) -> dict[str, float | None]:
        """Add the gradient of `scale` times the loss of one micro-batch to module `name`.

        Args:
            name: of the module that will be updated.
            step: of the run, and of the data: where a run went back and skipped some, they are not the same, and
                this is the latter.
            micro: number of the micro-batch among those of the step in all processes, and beyond them where a module
                gets another turn; with the step it says what every random draw is.
            scale: makes the sum over micro-batches a mean.

        Returns:
            what is worth logging. "samples", "tokens" and "data_seconds" (spent waiting) add up, of all else the mean
            is taken, or of those that are not None. The names are the same in every micro-batch; where several modules
            are trained theirs differ. {}: there is no gradient, and the module stays as it is.
        """

    def validate(self, module: nn.Module) -> dict[str, float]:
        """Held-out metrics of the averaged module with the averaged weights. Runs without gradients."""

    def preview(self, module: nn.Module) -> Sequence[Preview]:
        """Fixed held-out samples restored by the averaged module; () where there is nothing to see."""


@runtime_checkable
class Restarting(Protocol):
    """A stage of which some modules start again in the middle of a run."""

    restarted: Sequence[str]  # their names

    def restarts(self, before: int, step: int) -> bool:
        """Whether they do so after step `before` and before step `step`, which follows it; both as in `backward`."""


@runtime_checkable
class Ending(Protocol):
    """A stage that may come as far as it gets before its last step."""

    looks_every: int  # steps

    def ends(self, losses: Sequence[float]) -> bool:
        """Whether a run with these losses, one a step so far, is to end here."""


@dataclass(frozen=True)
class Rollback:
    """A run that was to be stopped went back instead, and goes on with other data."""

    failed: int  # the step that was its last
    to: int  # the step that it makes again

    @property
    def skipped(self) -> int:
        """Steps whose data is not used again."""
        return self.failed + 1 - self.to


@dataclass(frozen=True)
class Session:
    """How this call goes about a run, beyond what its config says."""

    resume: str = "auto"  # the newest checkpoint in the run directory; or "none", or the path of a checkpoint
    most_steps: int | None = None  # made now, then save and stop
    allow_config_change: bool = False
    processes: Processes = field(default_factory=Processes)
    guards: Guards = field(default_factory=Guards)


def open_session(command: Command, config: Any) -> Session:
    """Set this process up for a stage, and join the others that torchrun started.

    Args:
        command: the stage's command line.
        config: of the stage; `run` and `guard` are read.

    Raises:
        SettingError: there is no such device, or another number of processes than `run.parallel` says.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(command.threads)
    # Numbers below 1e-38 appear in dying channels and are a hundred times slower on a CPU.
    torch.set_flush_denormal(True)
    # What a layer returns is a view, and nobody changes it in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    if config.run.deterministic:
        # Without it cuBLAS is refused.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.allow_tf32 = False
    device = local_device(command.device)
    # Some containers switch it on, and the penalties of training.apt are differences of nearly equal numbers.
    torch.backends.cuda.matmul.allow_tf32 = False
    if config.run.parallel.precision != "fp32":
        warn_of_emulation(torch.bfloat16, device, "add run.parallel.precision=fp32")
    return Session(
        resume=command.resume,
        most_steps=command.most_steps,
        allow_config_change=command.allow_config_change,
        processes=connect(config.run.parallel, device),
        guards=Guards(config.guard),
    )


def resolved(config: Config, session: Session) -> Config:
    """A stage's config with what the number of processes says about it, as the stage is to read it.

    The run is recorded by the config as it was before: it may go on in another number of processes.
    """
    micro_batches = session.processes.total_micros(config.run.micro_batches)
    return replace(config, run=replace(config.run, micro_batches=micro_batches))


class Preempted(SystemExit):
    """The run was asked to stop, has saved its state, and will go on from there. Exit code 0."""

    def __init__(self) -> None:
        super().__init__(0)


class Stopped(SystemExit):
    """A guard stopped the run; there is no point in going on as it is. Exit code 3 or 4, see `training.guards`."""

    def __init__(self, code: int, sentence: str = ""):
        super().__init__(code)
        self.sentence = sentence


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Linear warm-up, then constant, then over the last share `decay` of the steps a cosine from lr to final_lr."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    start = max(config.warmup, round(steps * (1 - config.decay)))
    done = max(0, step - start) / max(1, steps - start)
    return config.final_lr + (config.lr - config.final_lr) * 0.5 * (1 + math.cos(math.pi * done))


def parameter_groups(module: nn.Module, config: OptimConfig) -> list[dict]:
    """What is trainable, grouped by the share of the learning rate it gets: see `OptimConfig.full_rate_inputs`."""
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter in module.parameters():
        if not parameter.requires_grad:
            continue
        inputs = math.prod(parameter.shape[1:])
        rate = min(1.0, config.full_rate_inputs / inputs) if config.full_rate_inputs else 1.0
        groups.setdefault(rate, []).append(parameter)
    return [{"params": parameters, "rate": rate} for rate, parameters in groups.items()]


def make_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimiser of what is trainable in a module.

    Raises:
        SettingError: it is torchao's, which is not installed, or the module is sharded.
    """
    groups = parameter_groups(module, config)
    if config.kind == "rmsprop":
        return torch.optim.RMSprop(groups, lr=config.lr, alpha=config.betas[1], weight_decay=config.weight_decay)
    if config.kind == "adamw8bit":
        try:
            from .low_bit import RoundingAdamW
        except ModuleNotFoundError as error:
            raise SettingError(f"kind=adamw8bit needs the library torchao ({error}); pip install torchao") from error
        if any(isinstance(parameter, DTensor) for parameter in module.parameters()):
            # torchao 0.18 fails on them (pytorch/ao, issue 3314), and a shard's state would depend on its size (4912).
            raise SettingError("kind=adamw8bit is for weights that one process has as a whole, and these are sharded; "
                               "run one process, in fp32 or pure_bf16, or set kind=adamw.")
        return RoundingAdamW(groups, config.lr, config.betas, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True)


def run(
    stage: Stage, config: Any, optims: Mapping[str, OptimConfig], directory: Path, session: Session | None = None
) -> nn.Module:
    """Train to the last step and return the averaged module with its averaged weights.

    Writes config.yaml, env.json, metrics.jsonl, validation.jsonl, alerts.jsonl, previews/, checkpoints/ and ema/.

    Args:
        stage: its modules are moved to the device and sharded here.
        config: of the stage, before `resolved`; `config.run` is for the loop, the rest is only recorded.
        optims: of every module of the stage.
        directory: of the run; what is found there is continued, unless the session says otherwise.
        session: how this call goes about it.

    Raises:
        SettingError: a run found in `directory` was begun with another model, seed or data; or it has come further than
            where the session is to begin; or another call is writing it.
        CheckpointError: the last checkpoint could not be saved, or the one to resume from does not fit.
        Preempted: stopped by SIGTERM, SIGUSR1, run.max_hours or `most_steps`, and saved.
        Stopped: by a guard.
    """
    session = session or Session()
    with claimed(directory, session.processes):
        return Trainer(stage, config, optims, directory, session).run()


class Trainer:
    """One call of the loop: what `run` holds while it runs."""

    def __init__(self, stage: Stage, config: Any, optims: Mapping[str, OptimConfig], directory: Path, session: Session):
        self.stage, self.directory, self.session = stage, directory, session
        self.config: RunConfig = resolved(config, session).run
        self.optims, self.processes = optims, session.processes
        self.micros = self.processes.micros(self.config.micro_batches)
        for module in stage.modules.values():
            self.processes.place(module)
        self.module = stage.modules[stage.averaged]
        self.ema = EMA(self.module, self.config.ema, self.config.ema_every, self.config.ema_device)
        self.optimizers = {name: make_optimizer(module, optims[name]) for name, module in stage.modules.items()}
        self.pace = Pace(self.processes, stage.modules.values(), session.guards.config.slow)
        self.checkpoints = state.Checkpoints(
            directory, self.processes, keep=self.config.keep, asynchronous=self.config.async_save
        )
        restarted = stage.restarted if isinstance(stage, Restarting) else ()
        self.starts = {name: [own.cpu().clone() for own in weights(stage.modules[name])] for name in restarted}
        self.rollbacks: list[Rollback] = []
        self.ended = False  # before the last step, by the stage
        self.alarmed = False  # a guard wants to see what is restored now
        self.hash = configs.config_hash(config)
        self.first = self._begin(config)

    def run(self) -> nn.Module:
        config, started = self.config, time.monotonic()
        last = config.steps
        if self.session.most_steps is not None:
            last = min(last, self.first + self.session.most_steps)
        writes = self.directory if self.processes.first else None
        progress = tqdm(
            initial=self.first, total=config.steps, desc=self.directory.name, disable=not self.processes.first
        )
        step = self.first
        with Journal(writes, step, config.tensorboard) as self.journal, asked_to_stop() as asked, progress:
            while step < last and not self.ended:
                try:
                    row = self._step(step)
                    done = step + 1
                    progress.set_postfix({name: f"{value:.4g}" for name, value in row.items() if name.endswith("loss")})
                    progress.update(done - progress.n)
                    hours = (time.monotonic() - started) / 3600
                    over = asked.is_set or (config.max_hours is not None and hours >= config.max_hours)
                    # Any process may have been asked; all of them stop after the same step.
                    self.ended = self._ends(done)
                    over = max(self.processes.mean([float(over)])) > 0 or done == last or self.ended
                    self._after(done, over)
                except Stopped as stopped:
                    step = self._roll_back(step, stopped)
                    continue
                if over and done < config.steps and not self.ended:
                    log.info("Stopped after step %d; the same command goes on from there.", done)
                    raise Preempted
                step = done
        self.ema.copy_to(self.module)
        reshard(self.module)
        return self.module

    # One step.

    def _step(self, step: int) -> dict[str, float]:
        start = time.perf_counter()
        row: dict[str, float] = {"step": step}
        added: dict[str, float] = {}
        if self.processes.world > 1:
            beat(self.directory, self.processes.rank, step)
        self.pace.begin(step)
        if self.starts and step > 0 and self.stage.restarts(self._place(step - 1), self._place(step)):
            self._restart(step)
        for name, module in self.stage.modules.items():
            turns = 1 + (self.session.guards.extra_turns if name == self.stage.averaged else 0)
            for turn in range(turns):
                scalars = self._update(name, module, step, turn)
                added |= {unit: added.get(unit, 0) + scalars[unit] for unit in ADD_UP if unit in scalars}
                row |= scalars | added
            if turns > 1:
                row[f"{name}_turns"] = turns
        if slow := self.pace.end():
            self.journal.alert(step, slow)
        seconds = time.perf_counter() - start
        row["seconds"] = round(seconds, 4)
        for unit in ("samples", "tokens"):
            if unit in row:
                row[f"{unit}_per_second"] = round(row.pop(unit) / seconds, 2)
        if "data_seconds" in row:
            # Of one process, as are the seconds of a step.
            row["data_seconds"] = round(row["data_seconds"] * len(self.micros) / self.config.micro_batches, 4)
        if (step + 1) % self.config.log_norms_every == 0:
            row |= self._norms()
        if self.processes.device.type == "cuda":
            row["peak_gib"] = round(torch.cuda.max_memory_allocated(self.processes.device) / 2**30, 3)
        self.journal.metrics(row)
        return row

    def _place(self, step: int) -> int:
        """The step of the data that a step of the run uses."""
        return step + sum(back.skipped for back in self.rollbacks if step >= back.to)

    @torch.no_grad()
    def _restart(self, step: int) -> None:
        """Give modules the weights that they had before the run, and optimisers that have seen nothing."""
        for name, start in self.starts.items():
            torch._foreach_copy_(weights(self.stage.modules[name]), start)
            self.optimizers[name].state.clear()
            reshard(self.stage.modules[name])
            log.info("At step %d %r starts again.", step, name)

    def _update(self, name: str, module: nn.Module, step: int, turn: int) -> dict[str, float]:
        """One update of one module: all its micro-batches, and a step of its optimiser."""
        optimizer, optim = self.optimizers[name], self.optims[name]
        slower = self.session.guards.config.rollback.lr_factor ** len(self.rollbacks)
        rate = slower * learning_rate(step, self.config.steps, optim)
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * rate
        # Another module's update may have left gradients here.
        optimizer.zero_grad(set_to_none=True)
        rows = []
        for micro in self.micros:
            set_last_micro(module, micro == self.micros[-1])
            number = micro + turn * self.config.micro_batches
            rows.append(self.stage.backward(name, self._place(step), number, 1 / len(self.micros)))
        if not any(rows):
            return {}
        self.pace.add(sum(row.get("data_seconds") or 0 for row in rows))
        norm = gradient_norm(module)
        scalars = self._means(rows)
        prefix = f"{name}_" if len(self.optims) > 1 else ""
        scalars |= {f"{prefix}grad_norm": norm.item(), f"{prefix}lr": rate}
        verdict = self.session.guards.check(step, scalars)
        self._obey(step, verdict, scalars)
        self.alarmed = self.alarmed or verdict.preview
        if verdict.action != "skip":
            if optim.clip and norm > optim.clip:
                scale_gradients(module, optim.clip / (norm + 1e-6))
            # For rounding at random; the same in all processes, so that copies of the weights stay the same.
            torch.manual_seed(key(self.config.seed, f"rounding/{name}", step, turn))
            optimizer.step()
            reshard(module)
            if name == self.stage.averaged and not verdict.hold_average:
                self.ema.update(module)
        optimizer.zero_grad(set_to_none=True)
        return scalars

    def _obey(self, step: int, verdict: Verdict, scalars: Mapping[str, float]) -> None:
        if verdict.action != "go":
            self.journal.alert(step, verdict.sentence, scalars)
        if verdict.action == "stop":
            raise Stopped(verdict.exit_code, verdict.sentence)

    def _roll_back(self, step: int, stopped: Stopped) -> int:
        """Go back to the last complete checkpoint of this run instead of stopping in this step; the step it is at.

        Raises:
            Stopped: there is no checkpoint, or the run has gone back too often.
        """
        guards = self.session.guards
        self._settle(step, wait=True)
        path = self.checkpoints.last
        if path is None or len(self.rollbacks) >= guards.config.rollback.max:
            log.error("Stopped at step %d. %s", step, stopped.sentence)
            if path is not None:
                # torchrun knows no failure that it would not repeat.
                self.checkpoints.amend(path, {STOPPED: [stopped.code, stopped.sentence]})
            raise stopped
        before = self.rollbacks
        back = Rollback(step, self._load(path))
        self.rollbacks = [*before, back]
        guards.forgive()
        # So that a run which is killed now knows of it, too.
        self.checkpoints.amend(path, {"guards": guards.state_dict(), **self._history()})
        self.journal.alert(
            step,
            f"Back to step {back.to} instead of stopping, for the {len(self.rollbacks)}th time: the data of "
            f"{back.skipped} steps is skipped, and the learning rate is {guards.config.rollback.lr_factor:g} times "
            "what it was.",
            {"failed": back.failed, "to": back.to},
        )
        self.journal.rewind(back.to)
        return back.to

    def _history(self) -> dict[str, Any]:
        return {"rollbacks": [[back.failed, back.to] for back in self.rollbacks]}

    def _means(self, rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Scalars of a step from those of its micro-batches in all processes."""
        names = list(rows[0])
        found = [[row[name] for row in rows if row[name] is not None] for name in names]
        both = self.processes.mean([*map(sum, found), *map(len, found)])
        sums_and_counts = zip(names, both[: len(names)], both[len(names) :], strict=True)
        means = {name: total / count for name, total, count in sums_and_counts if count}
        return {name: mean * (self.config.micro_batches if name in ADD_UP else 1) for name, mean in means.items()}

    def _norms(self) -> dict[str, float]:
        squares = [
            sum(local(p.detach()).float().square().sum() for p in self.module.parameters()),
            self.ema.distance(self.module),
        ]
        sharded = isinstance(next(self.module.parameters()), DTensor)
        copies = self.processes.config.replicate if sharded else self.processes.world
        sums = [value * self.processes.world / copies for value in self.processes.mean([s.item() for s in squares])]
        return {"weight_norm": math.sqrt(sums[0]), "ema_distance": math.sqrt(sums[1])}

    # Between steps.

    def _ends(self, done: int) -> bool:
        """Whether the stage ends the run after `done` steps, the same for all processes."""
        if not isinstance(self.stage, Ending) or done % self.stage.looks_every:
            return False
        rows = read(self.directory / METRICS) if self.processes.first else []
        ends = self.processes.agree(self.stage.ends([row["loss"] for row in rows]))
        if ends:
            log.info("Ended after step %d: the loss does not get lower.", done)
        return ends

    def _after(self, done: int, over: bool) -> None:
        """Show, validate and save what is due after `done` steps; `over`: there will be no other in this call.

        A checkpoint comes last: a run that is killed before it is whole does all of this again, and one that is killed
        after it has lost nothing.
        """
        config, last = self.config, done == self.config.steps or self.ended
        validates = last or done % config.validate_every == 0
        regular = config.preview_every is not None and (last or done % config.preview_every == 0)
        shows, self.alarmed = regular or self.alarmed, False
        if validates or shows:
            self._look(done, validates, shows)
        if last or done % config.keep_averaged_every == 0:
            try:
                state.save_averaged(self.directory, done, self.ema.state(self.module), self.processes)
            except CheckpointError as error:
                self.journal.alert(done, str(error))
        if over or done % config.save_every == 0:
            self._save(done, wait=over)
        else:
            self._settle(done)

    @torch.no_grad()
    def _look(self, done: int, validates: bool, shows: bool) -> None:
        reshard(self.module)
        raw = self.stage.preview(self.module) if shows else ()
        reshard(self.module)
        with self.ema.shown_by(self.module):
            results = self.stage.validate(self.module) if validates else {}
            shown = self.stage.preview(self.module) if shows else ()
            reshard(self.module)
        if shown and self.processes.first:
            try:
                write_previews(self.directory / "previews" / f"step_{done:06d}", shown, raw)
            except OSError as error:
                self.journal.alert(done, f"The previews could not be saved ({error}).")
            detail = {each.name: each.detail for each in shown}
            self._obey(done, self.session.guards.check_previews(detail), detail)
        if results:
            self.journal.validation({"step": done, **results})
            self._obey(done, self.session.guards.check_results(results), results)
            if judge := self.config.judge:
                value = -results[judge[1:]] if judge.startswith("-") else results[judge]
                self._obey(done, self.session.guards.check_validation(done, value), results)

    def _save(self, done: int, wait: bool) -> None:
        """A checkpoint that cannot be saved is tried again next time; only the last one has to succeed."""
        meta = {
            "config_hash": self.hash,
            "ema_updates": self.ema.updates,
            "preempted": wait and done < self.config.steps and not self.ended,
            "ended": self.ended,
            "guards": self.session.guards.state_dict(),
            **self._history(),
        }
        # Settled apart: that the one before failed is no reason to leave this one out.
        self._settle(done, wait=True)
        try:
            self.checkpoints.save(done, self._tensors(), meta)
            if wait:
                self.checkpoints.settle(wait=True)
        except CheckpointError as error:
            self.journal.alert(done, str(error))
            if wait:
                raise

    def _settle(self, done: int, wait: bool = False) -> None:
        try:
            self.checkpoints.settle(wait)
        except CheckpointError as error:
            self.journal.alert(done, str(error))

    # The state of a run.

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"ema/{name}": value for name, value in self.ema.state(self.module).items()}
        for name, module in self.stage.modules.items():
            tensors |= {f"{name}/{key}": value for key, value in module.state_dict().items()}
            tensors |= state.optimizer_tensors(name, module, self.optimizers[name])
        return tensors | state.generators(self.processes.rank)

    def _begin(self, config: Any) -> int:
        """Take up the checkpoint that the session asks for; the number of steps that have been made."""
        directory, session = self.directory, self.session
        newest = self.checkpoints.newest()
        path = {"auto": newest, "none": None}.get(session.resume, Path(session.resume))
        there, first = (0 if at is None else state.read_meta(at)["step"] for at in (newest, path))
        if there > first:
            raise SettingError(
                f"{directory} holds a checkpoint of step {there}, and this run would begin at step {first} beside it: "
                f"the call after this one would go on from the wrong one. Choose another --out, or move it away first."
            )
        before = configs.load_saved(directory) if path else None
        if before is not None and (changes := configs.differences(before, config)):
            for key, (old, new) in changes.items():
                log.info("%s was %s and is %s from now on.", key, old, new)
            if not session.allow_config_change:
                configs.refuse_frozen(changes, config)
        self.processes.agree(None)
        if self.processes.first:
            directory.mkdir(parents=True, exist_ok=True)
            state.write_whole(directory / configs.CONFIG_FILE, configs.to_yaml(config))
            state.write_whole(directory / "env.json", describe_environment(self.processes))
        return 0 if path is None else self._load(path)

    def _load(self, path: Path) -> int:
        names = state.stored(path)
        for name, module in self.stage.modules.items():
            reshard(module)
            self.optimizers[name].state.clear()
            state.prepare_optimizer(name, module, self.optimizers[name], names)
        tensors = {name: value for name, value in self._tensors().items() if not name.startswith("rng/")}
        meta = self.checkpoints.load(path, tensors)
        state.restore_generators(path, self.processes.rank)
        self.ema.updates = meta["ema_updates"]
        self.session.guards.load_state_dict(meta["guards"])
        if STOPPED in meta and attempt():
            log.error("Not begun anew: it was stopped. %s", meta[STOPPED][1])
            raise Stopped(*meta[STOPPED])
        # Checkpoints of older runs do not know of these.
        self.rollbacks = [Rollback(*back) for back in meta.get("rollbacks", ())]
        self.ended = meta.get("ended", False)
        log.info("Continuing %s at step %d.", self.directory, meta["step"])
        return meta["step"]


def weights(module: nn.Module) -> list[Tensor]:
    """What this process holds of a module's parameters."""
    return [local(parameter.detach()) for parameter in module.parameters()]


def gradient_norm(module: nn.Module) -> Tensor:
    """L2 norm of all gradients, over all processes."""
    norm = nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def scale_gradients(module: nn.Module, factor: Tensor) -> None:
    gradients = [local(p.grad) for p in module.parameters() if p.grad is not None]
    torch._foreach_mul_(gradients, factor.to(gradients[0].device))


@dataclass
class Flag:
    is_set: bool = False


@contextmanager
def asked_to_stop() -> Iterator[Flag]:
    """A flag that SIGTERM and SIGUSR1 set while the context lasts: finish the step, save, and stop."""
    flag = Flag()

    def set_flag(number: int, frame: FrameType | None) -> None:
        flag.is_set = True

    # Windows has no SIGUSR1.
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]
    before = {number: signal.signal(number, set_flag) for number in numbers}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
