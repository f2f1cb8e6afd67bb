"""Seconds and memory of transformer layers at their true sizes, with random weights. `python -m tests.bench.dit`

Four layers instead of 32, in the same proportion: one whose text has weights of its own, three that share. The plain
formulation of the tests runs beside the model that users get, with the same weights and inputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from seedvr2_core.kernels import choices_for
from seedvr2_core.models.dit import SEEDVR2_3B, DiT, DiTConfig, make_layout
from seedvr2_core.models.linear import pack
from seedvr2_core.video.geometry import PATCH, Grid
from tests.bench.measure import Call, Case, Options, build, dtypes, main, random
from tests.core.models.plain_dit import PlainDiT, plain_layouts

LAYERS = replace(SEEDVR2_3B, depth=4, separate_layers=1)
QUICK_LAYERS = replace(LAYERS, dim=64, heads=2, head_dim=32, mlp_hidden=96, text_dim=48)
# 1728 tokens, the shape of the CPU protocol.
CPU_GRIDS = (Grid(3, 24, 24),)
# 720p: an image, and 25 frames.
CUDA_GRIDS = (Grid(1, 45, 80), Grid(7, 45, 80))
QUICK_GRIDS = (Grid(1, 4, 6),)
# Tokens of the published positive prompt.
TEXT_TOKENS = 58


def restore(config: DiTConfig, grid: Grid, dtype: torch.dtype, packing: str, device: torch.device) -> Call:
    """One step of the sampler, at time 1; the window layout is made once, as for a clip."""
    dit = pack(build(lambda: DiT(config), dtype, device), packing)
    layout = make_layout([grid], [TEXT_TOKENS], config, device)
    inputs = make_inputs(config, grid, dtype, device)
    return lambda: torch.stack(dit(*inputs, layout=layout))


@torch.inference_mode()
def restore_by_choice(config: DiTConfig, grid: Grid, dtype: torch.dtype, packing: str, device: torch.device) -> Call:
    """The same, with our kernels where they are faster."""
    dit = pack(build(lambda: DiT(config), dtype, device), packing)
    layout = make_layout([grid], [TEXT_TOKENS], config, device)
    inputs, choices = make_inputs(config, grid, dtype, device), choices_for(device)

    def call() -> Tensor:
        return torch.stack(dit(*inputs, layout=layout, choices=choices))

    # Trying kernels takes time and memory that no later call does.
    call()
    return call


def restore_plainly(config: DiTConfig, grid: Grid, dtype: torch.dtype, device: torch.device) -> Call:
    dit = build(lambda: PlainDiT(config), dtype, device)
    inputs = make_inputs(config, grid, dtype, device)
    layouts = plain_layouts(*inputs[:2], config)
    return lambda: torch.stack(dit(*inputs, layouts=layouts))


def make_inputs(config: DiTConfig, grid: Grid, dtype: torch.dtype, device: torch.device) -> tuple:
    latent = random((1, config.in_channels, grid.t, PATCH * grid.h, PATCH * grid.w), dtype, device)
    text = random((TEXT_TOKENS, config.text_dim), dtype, device, seed=2)
    return latent, [text], torch.ones(1, device=device)


def list_cases(options: Options) -> Sequence[Case]:
    config = QUICK_LAYERS if options.quick else LAYERS
    grids = QUICK_GRIDS if options.quick else CUDA_GRIDS if options.device.type == "cuda" else CPU_GRIDS
    cases = []
    for grid in grids:
        contenders, against = {}, {}
        for label, dtype in dtypes(options).items():
            contenders[f"plain {label}"] = partial(restore_plainly, config, grid, dtype)
            contenders[f"fast {label}"] = partial(restore, config, grid, dtype, "auto")
            against[f"fast {label}"] = f"plain {label}"
        if "plain bf16" in contenders:
            contenders["fp8"] = partial(restore, config, grid, torch.bfloat16, "fp8")
            against["fp8"] = "plain bf16"
        if options.device.type == "cuda":
            contenders["chosen bf16"] = partial(restore_by_choice, config, grid, torch.bfloat16, "auto")
            contenders["chosen fp8"] = partial(restore_by_choice, config, grid, torch.bfloat16, "fp8")
            against |= {"chosen bf16": "plain bf16", "chosen fp8": "plain bf16"}
        name = f"{config.depth} layers {math.prod(grid)} tokens"
        cases.append(Case(name=name, contenders=contenders, reference="plain fp32", against=against))
    return cases


if __name__ == "__main__":
    main("dit", list_cases)
