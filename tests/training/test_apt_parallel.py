"""Adversarial post-training in two processes: both networks' gradients are those of one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from seedvr2_core.video.geometry import Grid
from tests.training.toys import in_processes
from training.apt import AdversarialStage, DiscConfig, LossConfig, PostTraining
from training.config import OptimConfig, ParallelConfig, RunConfig
from training.curriculum import Phase
from training.parallel import Processes, connect, set_last_micro
from training.pretrain import NANO_DIT
from training.randomness import torch_rng
from training.restorer import Restorer
from training.shards import InMemory, Latents

# An odd number of tokens, so that two processes hold unequal parts.
LATENT = Grid(1, 6, 6)
MODEL = replace(NANO_DIT, dim=32, depth=3, heads=2, head_dim=16, text_dim=24, separate_layers=1, mlp_hidden=48)
OPTIM = OptimConfig(lr=1e-3, final_lr=1e-3)


def noise() -> Latents:
    """Latents of noise and of noisier noise."""
    real = torch.randn(40, 16, *LATENT, generator=torch_rng(0, "noise"))
    return Latents(InMemory([{"hq": real, "lq": real + 0.5 * real.flip(0)}], scale=1.0), seed=0)


def make(backward: str, folder: Path) -> AdversarialStage:
    config = PostTraining(
        model=MODEL, run=RunConfig(steps=4, micro_batches=2), g=OPTIM, d=OPTIM,
        pretrained=str(folder), distilled=str(folder),
        loss=LossConfig(w_1=1.0, w_F=1.0), disc=DiscConfig(backward=backward),
        curriculum=(Phase(share=1.0, frames=(1,)),), batch=3,
    )  # fmt: skip
    torch.manual_seed(0)
    stage = AdversarialStage(config, noise(), Restorer(MODEL), Restorer(MODEL))
    for module in stage.modules.values():
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.1)
    return stage


def gradients(stage: AdversarialStage, processes: Processes) -> dict[str, torch.Tensor]:
    """Gradients of both networks, by name, whole, after one step's micro-batches."""
    for module in stage.modules.values():
        processes.place(module)
    micros, found = processes.micros(2), {}
    for name, module in stage.modules.items():
        for micro in micros:
            set_last_micro(module, micro == micros[-1])
            stage.backward(name, 0, micro, 1 / len(micros))
        for key, parameter in module.named_parameters():
            if parameter.grad is not None:
                gradient = parameter.grad
                found[f"{name}.{key}"] = gradient.full_tensor() if processes.world > 1 else gradient
    return found


def work(parallel: ParallelConfig, backward: str, folder: Path, init_method: str) -> dict[str, torch.Tensor]:
    return gradients(make(backward, folder), connect(parallel, torch.device("cpu"), init_method))


@pytest.mark.parametrize("parallel, backward", [
    (ParallelConfig(), "joint"),
    (ParallelConfig(sp=2), "joint"),
    (ParallelConfig(sp=2), "replay"),
], ids=["sharded", "tokens split", "tokens split, replayed"])  # fmt: skip
def test_two_processes_find_the_gradients_of_one(tmp_path, parallel, backward):
    expected = gradients(make(backward, tmp_path), Processes())
    assert {name[0] for name in expected} == {"d", "g"}
    for found in in_processes(2, work, tmp_path, parallel, backward, tmp_path):
        assert expected.keys() <= found.keys()
        for name, gradient in found.items():
            # FSDP gives what has no gradient one of zeros.
            target = expected.get(name, torch.zeros_like(gradient))
            differs = (gradient - target).abs().max() / target.abs().max().clamp_min(1e-3)
            assert differs < 1e-3, f"{name} differs by {differs:.1e}"
