"""Tiny models and data, so that a training step takes milliseconds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from seedvr2_core.models.dit import DiTConfig
from training.pretrain import NANO_DIT
from training.shards import HELD_OUT, Latents


@pytest.fixture(scope="session")
def tiny_dit() -> DiTConfig:
    """nano's kind in two layers, one with text weights of its own."""
    return replace(NANO_DIT, dim=32, depth=2, heads=2, head_dim=16, text_dim=24, separate_layers=1, mlp_hidden=48)


@pytest.fixture(scope="session")
def latents_folder(tmp_path_factory) -> Path:
    """Precomputed pairs of pictures and clips; the degraded latent says much about the clean one."""
    folder = tmp_path_factory.mktemp("latents")
    draw = torch.Generator().manual_seed(0)
    for name, shape in (("image_1x32", (1, 4, 4)), ("clip_5x32", (2, 4, 4))):
        hq = 3 * torch.randn(HELD_OUT + 8, 16, *shape, generator=draw)
        lq = hq + torch.randn(hq.shape, generator=draw)
        save_file({"hq": hq, "lq": lq}, folder / f"{name}.safetensors")
    return folder


@pytest.fixture(scope="session")
def latents(latents_folder) -> Latents:
    return Latents(latents_folder, seed=0)
