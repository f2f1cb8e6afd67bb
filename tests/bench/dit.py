"""Seconds and memory of transformer layers at their true sizes, with random weights. `python -m tests.bench.dit`

Four layers instead of 32, in the same proportion: one whose text has weights of its own, three that share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from seedvr2_core.models.dit import SEEDVR2_3B, DiT, DiTConfig, make_layout
from seedvr2_core.video.geometry import PATCH, Grid
from tests.bench.measure import Call, Case, Options, build, main, random

LAYERS = replace(SEEDVR2_3B, depth=4, separate_layers=1)
QUICK_LAYERS = replace(LAYERS, dim=64, heads=2, head_dim=32, mlp_hidden=96, text_dim=48)
# 1728 tokens, the shape of the CPU protocol.
CPU_GRIDS = (Grid(3, 24, 24),)
# 720p: an image, and 25 frames.
CUDA_GRIDS = (Grid(1, 45, 80), Grid(7, 45, 80))
QUICK_GRIDS = (Grid(1, 4, 6),)
# Tokens of the published positive prompt.
TEXT_TOKENS = 58
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def restore(config: DiTConfig, grid: Grid, dtype: torch.dtype, device: torch.device) -> Call:
    """One step of the sampler, at time 1; the window layout is made once, as for a clip."""
    dit = build(lambda: DiT(config), dtype, device)
    latent = random((1, config.in_channels, grid.t, PATCH * grid.h, PATCH * grid.w), dtype, device)
    text = random((TEXT_TOKENS, config.text_dim), dtype, device, seed=2)
    layout = make_layout([grid], [TEXT_TOKENS], config, device)
    time = torch.ones(1, device=device)
    return lambda: torch.stack(dit(latent, [text], time, layout=layout))


def list_cases(options: Options) -> Sequence[Case]:
    config = QUICK_LAYERS if options.quick else LAYERS
    grids = QUICK_GRIDS if options.quick else CUDA_GRIDS if options.device.type == "cuda" else CPU_GRIDS
    return [
        Case(
            name=f"{config.depth} layers {math.prod(grid)} tokens",
            contenders={label: partial(restore, config, grid, dtype) for label, dtype in DTYPES.items()},
            reference="fp32",
        )
        for grid in grids
    ]


if __name__ == "__main__":
    main("dit", list_cases)
