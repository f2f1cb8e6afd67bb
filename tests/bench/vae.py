"""Seconds and memory of the autoencoder at its true sizes, with random weights. `python -m tests.bench.vae`

Encoding and decoding as the pipeline does it: in slices, the mean of the posterior. Weights need no download.
"""
# T H W pixel frames, height, width

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product

import torch
from torch import Tensor

from seedvr2_core.kernels import choices_for
from seedvr2_core.loading import fast_options
from seedvr2_core.models.vae import SEEDVR2_VAE, CausalState, VAEConfig, VideoVAE, posterior
from seedvr2_core.models.vae_fast import FastOptions, FastVAE
from seedvr2_core.video.geometry import latent_grid
from tests.bench.measure import DTYPES, Call, Case, Options, build, dtypes, main, random

Shape = tuple[int, int, int]

CPU_SHAPES: tuple[Shape, ...] = ((5, 96, 96), (9, 128, 128), (1, 256, 256))
CUDA_SHAPES: tuple[Shape, ...] = ((1, 720, 1280), (5, 720, 1280), (9, 720, 1280), (25, 720, 1280))
QUICK_SHAPES: tuple[Shape, ...] = ((5, 32, 32), (1, 48, 32))
QUICK_VAE = VAEConfig(widths=(32, 32, 64, 64), blocks=1)



def plain(config: VAEConfig, dtype: torch.dtype, device: torch.device) -> VideoVAE:
    return build(lambda: VideoVAE(config), dtype, device)


def fast(config: VAEConfig, dtype: torch.dtype, device: torch.device) -> FastVAE:
    """Convolutions share products, on a GPU too."""
    return FastVAE(plain(config, dtype, device), replace(fast_options(device), winograd_from=FastOptions.winograd_from))


def direct(config: VAEConfig, dtype: torch.dtype, device: torch.device) -> FastVAE:
    """Convolutions share no products."""
    return FastVAE(plain(config, dtype, device), replace(fast_options(device), winograd_from=None))


def chosen(config: VAEConfig, dtype: torch.dtype, device: torch.device) -> FastVAE:
    """The same, with our kernels where they are faster."""
    options = replace(fast_options(device), winograd_from=None, choices=choices_for(device))
    return FastVAE(plain(config, dtype, device), options)


MAKERS = {"plain": plain, "fast": fast, "direct": direct, "chosen": chosen}


def encode(maker: str, config: VAEConfig, shape: Shape, dtype: torch.dtype, device: torch.device) -> Call:
    vae = MAKERS[maker](config, dtype, device)
    clip = random((1, 3, *shape), torch.float32, device).tanh().to(dtype)
    return decided(maker, lambda: posterior(run(vae.encode_slice, clip, 4, maker == "plain"))[0])


def decode(maker: str, config: VAEConfig, shape: Shape, dtype: torch.dtype, device: torch.device) -> Call:
    vae = MAKERS[maker](config, dtype, device)
    latent = random((1, config.latent_channels, *latent_grid(*shape)), dtype, device)
    return decided(maker, lambda: run(vae.decode_slice, latent, 1, maker == "plain"))


@torch.inference_mode()
def decided(maker: str, call: Call) -> Call:
    """The call, once kernels have been chosen: trying them takes time and memory that no later call does."""
    if maker == "chosen":
        call()
    return call


def run(step: Callable, x: Tensor, length: int, literal: bool) -> Tensor:
    """Slice by slice; `literal`: the state is always kept, so that the plain one takes no shortcut for a picture."""
    state, out = CausalState(), []
    parts = [x[:, :, : 1 + length], *x[:, :, 1 + length :].split(length, dim=2)]
    parts = [part for part in parts if part.shape[2]]
    for part in parts:
        y, state = step(part, state, last=part is parts[-1] and not literal)
        out.append(y)
    return torch.cat(out, dim=2)


def list_cases(options: Options) -> Sequence[Case]:
    config = QUICK_VAE if options.quick else SEEDVR2_VAE
    shapes = QUICK_SHAPES if options.quick else CUDA_SHAPES if options.device.type == "cuda" else CPU_SHAPES
    names = [*product(("plain", "fast"), dtypes(options))]
    if options.device.type == "cuda":
        names = [("plain", "fp32"), ("plain", "bf16"), ("fast", "bf16"), ("direct", "bf16"), ("chosen", "bf16")]
    cases = []
    for shape in shapes:
        for make in (encode, decode):
            name = f"{make.__name__} {'x'.join(map(str, shape))}"
            contenders = {
                f"{maker} {label}": partial(make, maker, config, shape, DTYPES[label]) for maker, label in names
            }
            against = {f"{maker} {label}": f"plain {label}" for maker, label in names if maker != "plain"}
            cases.append(Case(name=name, contenders=contenders, reference="plain fp32", against=against))
    return cases


if __name__ == "__main__":
    main("vae", list_cases)
