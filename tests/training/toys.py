"""A stage small enough to train in microseconds, and processes to train it in."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import nn

from training.config import OptimConfig, RunConfig
from training.randomness import torch_rng

PRELOAD = [
    "torch._dynamo", "torch.distributed.tensor", "torch.distributed.checkpoint", "training.loop", "tests.training.toys",
]  # fmt: skip


class Interrupted(BaseException):
    """What ends a process from outside."""


@dataclass(frozen=True, kw_only=True)
class ToyConfig:
    """Of a run of `Regression`."""

    run: RunConfig
    optim: OptimConfig
    model: int = 8  # hidden width


RUN = RunConfig(steps=6, ema=0.9, save_every=3, validate_every=3, async_save=False)
OPTIM = OptimConfig(lr=1e-2, final_lr=1e-3, warmup=2)


class Regression:
    """Fit a small network to random numbers drawn from step and micro-batch."""

    averaged = "g"

    def __init__(
        self,
        stop_at: int | None = None,
        infinite_at: int | None = None,
        signal_at: int | None = None,
        batch: int = 16,
        names: tuple[str, ...] = ("g",),
    ):
        torch.manual_seed(0)
        self.modules = {name: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)) for name in names}
        self.stop_at, self.infinite_at, self.signal_at, self.batch = stop_at, infinite_at, signal_at, batch
        self.calls: list[tuple[str, int, int]] = []

    def backward(self, name, step, micro, scale):
        if step == self.stop_at:
            raise Interrupted
        if step == self.signal_at:
            os.kill(os.getpid(), signal.SIGTERM)
        self.calls.append((name, step, micro))
        x = torch.randn(self.batch, 4, generator=torch_rng(0, f"regression/{name}", step, micro))
        loss = (self.modules[name](x) - x.sum(1, keepdim=True)).square().mean()
        if step == self.infinite_at:
            loss = loss * math.inf
        (scale * loss).backward()
        prefix = "" if len(self.modules) == 1 else f"{name}_"
        return {f"{prefix}loss": loss.item(), "samples": self.batch}

    def validate(self, module):
        return {"weight": sum(p.square().sum().item() for p in module.parameters())}

    def preview(self, module):
        return ()


def untimed(row: dict[str, float]) -> dict[str, float]:
    """What a stage logs, without what is never twice the same."""
    return {name: value for name, value in row.items() if name != "data_seconds"}


def in_processes(world: int, work: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """What `work(*args)` returns in each of `world` processes that can `training.parallel.connect` to each other.

    A server that has torch loaded forks them, so that this takes a fraction of a second.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    folder.mkdir(parents=True, exist_ok=True)
    processes = [context.Process(target=_work, args=(rank, world, work, folder, args)) for rank in range(world)]
    for process in processes:
        process.start()
    codes = _wait(processes)
    assert codes == [0] * world, f"of {world} processes the exit codes are {codes}"
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _wait(processes: list[BaseProcess], seconds: float = 300) -> list[int | None]:
    """Exit codes; as soon as one process fails the others, which may be waiting for it, are killed."""
    end, running = time.monotonic() + seconds, list(processes)
    while running and time.monotonic() < end:
        wait([process.sentinel for process in running], timeout=1)
        if any(process.exitcode for process in running):
            break
        running = [process for process in running if process.exitcode is None]
    for process in running:
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def _work(rank: int, world: int, work: Callable[..., Any], folder: Path, args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    result = work(*args, init_method=f"file://{folder}/meeting-{world}")
    torch.save(result, folder / f"{rank}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
