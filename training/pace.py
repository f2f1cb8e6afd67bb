"""Which of several processes holds up the others.

Processes wait for each other in every layer, so a step takes all of them as long as the slowest. What tells them apart
is their own time: what each waits for its data, and computes in the forward passes of its layers, between the moment
that a layer's weights are there and its end. It is taken in some steps and compared over the control group; the rest of
a step, of which nobody knows whose it is, counts as equal.

The processes of a group that share a sample's tokens also wait for each other within a layer, and are slow together.
"""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Iterable, Sequence
from statistics import median, median_low

import torch
from torch import nn

from seedvr2_core.models.dit import Block

from .parallel import Processes

# Steps from one that is timed to the next, and how many of them make a judgement.
EVERY, WINDOW = 10, 10
# A backward pass takes twice as long as the forward pass, and is as slow.
PASSES = 3


class Pace:
    """Times this process in some steps, and says when one of all of them has been slow."""

    def __init__(self, processes: Processes, modules: Iterable[nn.Module], most: float):
        """
        Args:
            processes: of the run; a single one is never timed.
            modules: what they train, placed; the layers of transformers in them are timed.
            most: times the seconds of the process in the middle that another may take.
        """
        self.processes, self.most = processes, most
        self.timing = False
        self.began = self.seconds = 0.0
        self.marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.window: deque[list[float]] = deque(maxlen=WINDOW)
        layers = {part for module in modules for part in module.modules() if isinstance(part, Block)}
        for layer in layers if processes.world > 1 else ():
            # Within those of FSDP, which gather a layer's weights before it and free them after it.
            layer.register_forward_pre_hook(torch.compiler.disable(self._enter))
            layer.register_forward_hook(torch.compiler.disable(self._leave), prepend=True)

    def begin(self, step: int) -> None:
        self.timing, self.seconds = self.processes.world > 1 and step % EVERY == 0, 0.0
        self.marks.clear()
        self.began = time.perf_counter()

    def add(self, seconds: float) -> None:
        """What this process waited for its data."""
        self.seconds += seconds

    def end(self) -> str:
        """Compare the step; a sentence if a process has been slow over the whole window, which then begins again."""
        if not self.timing:
            return ""
        self.timing = False
        if self.marks:
            torch.cuda.synchronize(self.processes.device)
            self.seconds += PASSES * sum(start.elapsed_time(end) for start, end in self.marks) / 1000
        step = time.perf_counter() - self.began
        found = self.processes.gather((self.seconds, socket.gethostname()))
        own = [seconds for seconds, _ in found]
        self.window.append([seconds + max(0.0, step - max(own)) for seconds in own])
        rank, times = slowest(self.window)
        if len(self.window) < WINDOW or times <= self.most:
            return ""
        self.window.clear()
        return (f"Process {rank} on {found[rank][1]} has taken {times:.2f} times as long as the others, by its own "
                f"time in {WINDOW} of the last {EVERY * WINDOW} steps, and all wait for it; look at its data, its "
                "temperature, and what else runs there.")  # fmt: skip

    def _enter(self, layer: nn.Module, args: object) -> None:
        if self.timing:
            self.start = self._now()

    def _leave(self, layer: nn.Module, args: object, output: object) -> None:
        if not self.timing:
            return
        end = self._now()
        if isinstance(end, torch.cuda.Event):
            self.marks.append((self.start, end))
        else:
            self.seconds += PASSES * (end - self.start)

    def _now(self) -> float | torch.cuda.Event:
        if self.processes.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def slowest(window: Iterable[Sequence[float]]) -> tuple[int, float]:
    """The slowest process, and its time over that of the one in the middle, by the median over steps.

    Args:
        window: of every step, the seconds of each process.
    """
    # Of two processes the faster one is in the middle.
    ratios = [[seconds / median_low(step) for seconds in step] for step in window]
    times = [median(of_one) for of_one in zip(*ratios, strict=True)]
    rank = max(range(len(times)), key=times.__getitem__)
    return rank, times[rank]
