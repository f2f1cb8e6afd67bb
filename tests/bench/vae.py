"""Seconds and memory of the autoencoder at its true sizes, with random weights. `python -m tests.bench.vae`

Encoding and decoding as the pipeline does it: in slices, the mean of the posterior. Weights need no download.
"""
# T H W pixel frames, height, width

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from seedvr2_core.models.vae import SEEDVR2_VAE, VAEConfig, VideoVAE, posterior
from seedvr2_core.video.geometry import latent_grid
from tests.bench.measure import Baseline, Call, Case, Options, build, main, random

Shape = tuple[int, int, int]

CPU_SHAPES: tuple[Shape, ...] = ((5, 96, 96), (9, 128, 128), (1, 256, 256))
CUDA_SHAPES: tuple[Shape, ...] = ((1, 720, 1280), (5, 720, 1280), (9, 720, 1280), (25, 720, 1280))
QUICK_SHAPES: tuple[Shape, ...] = ((5, 32, 32), (1, 48, 32))
QUICK_VAE = VAEConfig(widths=(32, 32, 64, 64), blocks=1)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Source: the project's performance notes, section 2, "CPU baselines": published code and its exact re-formulation,
# random weights, true channel sizes, torch 2.13 on 2 AVX512-bf16 cores. 9x128x128 was taken as CPU seconds / 2.
BASELINES = {
    ("encode 5x96x96", "fp32"): Baseline(1.91, 1.20),
    ("decode 5x96x96", "fp32"): Baseline(5.18, 2.40),
    ("encode 5x96x96", "bf16"): Baseline(0.893, 0.572),
    ("decode 5x96x96", "bf16"): Baseline(2.06, 1.37),
    ("encode 9x128x128", "bf16"): Baseline(2.42, 1.99, "busy"),
    ("decode 9x128x128", "bf16"): Baseline(6.76, 4.01, "busy"),
    ("encode 1x256x256", "bf16"): Baseline(1.92, 0.46),
    ("decode 1x256x256", "bf16"): Baseline(4.66, 0.93),
}


def encode(config: VAEConfig, shape: Shape, dtype: torch.dtype, device: torch.device) -> Call:
    vae = build(lambda: VideoVAE(config), dtype, device)
    clip = random((1, 3, *shape), torch.float32, device).tanh().to(dtype)
    return lambda: posterior(vae.encode(clip))[0]


def decode(config: VAEConfig, shape: Shape, dtype: torch.dtype, device: torch.device) -> Call:
    vae = build(lambda: VideoVAE(config), dtype, device)
    latent = random((1, config.latent_channels, *latent_grid(*shape)), dtype, device)
    return lambda: vae.decode(latent)


def list_cases(options: Options) -> Sequence[Case]:
    config = QUICK_VAE if options.quick else SEEDVR2_VAE
    shapes = QUICK_SHAPES if options.quick else CUDA_SHAPES if options.device.type == "cuda" else CPU_SHAPES
    cases = []
    for shape in shapes:
        for make in (encode, decode):
            name = f"{make.__name__} {'x'.join(map(str, shape))}"
            cases.append(
                Case(
                    name=name,
                    contenders={label: partial(make, config, shape, dtype) for label, dtype in DTYPES.items()},
                    reference="fp32",
                    baselines={label: BASELINES[name, label] for label in DTYPES if (name, label) in BASELINES},
                )
            )
    return cases


if __name__ == "__main__":
    main("vae", list_cases)
