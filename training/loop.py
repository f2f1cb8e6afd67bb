"""The only loop: it steps, averages, logs, saves and resumes; a stage says what a step is.

Every random draw of a stage is a function of (seed, step), so the step number is all that a resumed run needs to go on
exactly where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import state
from .config import OptimConfig, RunConfig
from .ema import EMA

log = logging.getLogger(__name__)


class Stage(Protocol):
    """What the loop drives."""

    module: nn.Module  # what is trained

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """The loss of one step, differentiable, and the scalars worth logging."""

    def validate(self, module: nn.Module) -> dict[str, float]:
        """Held-out metrics of the given (averaged) weights."""


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Linear warm-up, then a cosine from lr to final_lr."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, steps - config.warmup)
    return config.final_lr + (config.lr - config.final_lr) * 0.5 * (1 + math.cos(math.pi * done))


def parameter_groups(module: nn.Module, config: OptimConfig) -> list[dict]:
    """What is trainable, grouped by the share of the learning rate it gets: see `OptimConfig.full_rate_inputs`."""
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter in module.parameters():
        if not parameter.requires_grad:
            continue
        inputs = parameter[0].numel() if parameter.ndim > 1 else 1
        rate = min(1.0, config.full_rate_inputs / inputs) if config.full_rate_inputs else 1.0
        groups.setdefault(rate, []).append(parameter)
    return [{"params": parameters, "rate": rate} for rate, parameters in groups.items()]


def run(stage: Stage, run_config: RunConfig, optim: OptimConfig, directory: Path) -> nn.Module:
    """Train to the last step and return the averaged weights. A run found in `directory` is continued.

    Writes config.json, metrics.jsonl (one object a line), validation.jsonl and checkpoint.pt.
    """
    directory.mkdir(parents=True, exist_ok=True)
    module = stage.module
    ema = EMA(module, run_config.ema)
    optimizer = torch.optim.AdamW(
        parameter_groups(module, optim), betas=optim.betas, weight_decay=optim.weight_decay, fused=True
    )
    first = 0
    if saved := state.load(directory):
        module.load_state_dict(saved["module"])
        ema.load_state_dict(saved["ema"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
        log.info("Continuing %s at step %d.", directory, first)
    config = {"run": dataclasses.asdict(run_config), "optim": dataclasses.asdict(optim)}
    (directory / "config.json").write_text(json.dumps(config, indent=1))

    with open(directory / "metrics.jsonl", "a", buffering=1) as metrics:
        for step in tqdm(range(first, run_config.steps), initial=first, total=run_config.steps, desc=directory.name):
            start = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * learning_rate(step, run_config.steps, optim)
            loss, scalars = stage.loss(step)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(module.parameters(), optim.clip)
            if torch.isfinite(norm):
                optimizer.step()
                ema.update(module)
            else:
                log.warning("Step %d has a gradient of %s; skipped.", step, norm.item())
            optimizer.zero_grad(set_to_none=True)
            row = {"step": step, "loss": loss.item(), **scalars, "grad_norm": norm.item()}
            metrics.write(json.dumps({**row, "seconds": round(time.perf_counter() - start, 4)}) + "\n")

            done = step + 1
            last = done == run_config.steps
            if last or done % run_config.save_every == 0:
                state.save(
                    directory,
                    {
                        "step": done,
                        "module": module.state_dict(),
                        "ema": ema.state_dict(),
                        "optimizer": optimizer.state_dict(),
                    },
                )
            if last or done % run_config.validate_every == 0:
                with torch.no_grad():
                    row = {"step": done, **stage.validate(ema.module)}
                with open(directory / "validation.jsonl", "a") as file:
                    file.write(json.dumps(row) + "\n")
                log.info("%s", row)
    return ema.module
