"""The tiny models of the golden files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch

from seedvr2_core.models.dit import SEEDVR2_3B, SEEDVR2_7B, DiT
from seedvr2_core.models.vae import VAEConfig, VideoVAE

TINY_DITS = {
    "3b": replace(
        SEEDVR2_3B, dim=60, heads=3, head_dim=20, depth=4, separate_layers=2, text_dim=40, mlp_hidden=256
    ),
    "7b": replace(
        SEEDVR2_7B, dim=64, heads=2, head_dim=32, depth=4, separate_layers=4, text_dim=40, mlp_hidden=256
    ),
}
TINY_VAES = {
    "tiny_a": VAEConfig(widths=(32, 32, 64, 64), blocks=1),
    "tiny_b": VAEConfig(widths=(32, 64, 32, 64), blocks=2),
}


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    # Tensors are tiny here: more threads would only wait for each other.
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_dit(golden) -> Callable[[str], DiT]:
    """A transformer with the golden weights: tiny_dit("3b"). Shared, so leave it as it is."""

    @cache
    def build(name: str) -> DiT:
        weights, _ = golden(f"dit/weights_tiny_{name}")
        model = DiT(TINY_DITS[name])
        model.load_state_dict(weights)
        return model.requires_grad_(False)

    return build


@pytest.fixture(scope="session")
def tiny_vae(golden) -> Callable[[str], VideoVAE]:
    """An autoencoder with the golden weights: tiny_vae("tiny_a"). Shared, so leave it as it is."""

    @cache
    def build(name: str) -> VideoVAE:
        weights = golden(f"vae/{name}_encoder_weights")[0] | golden(f"vae/{name}_decoder_weights")[0]
        model = VideoVAE(TINY_VAES[name])
        model.load_state_dict({key: weight.float() for key, weight in weights.items()})
        return model.requires_grad_(False)

    return build


@pytest.fixture(scope="session")
def random_vae() -> VideoVAE:
    """An autoencoder for what holds with any weights, so that a lone clone tests it too."""
    torch.manual_seed(0)
    return VideoVAE(TINY_VAES["tiny_a"]).requires_grad_(False)
