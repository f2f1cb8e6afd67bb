"""The tiny models of the golden files, and tinier ones for what holds with any weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from einops import rearrange
from torch import Tensor

from seedvr2_core.checkpoints import Prompts
from seedvr2_core.checkpoints.export import save
from seedvr2_core.device import pick_dtype
from seedvr2_core.loading import Models
from seedvr2_core.models.dit import SEEDVR2_3B, SEEDVR2_7B, DiT, DiTConfig
from seedvr2_core.models.vae import CausalState, VAEConfig, VideoVAE
from seedvr2_core.models.windows import WindowConfig

# Where a convolution in bf16 takes 60 times as long as in fp32.
NEEDS_BF16 = pytest.mark.skipif(
    pick_dtype("auto", torch.device("cpu")) != torch.bfloat16, reason="this CPU has no instructions for bf16"
)

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

# For whole runs, where many frames pass.
RUNNABLE_DIT = DiTConfig(
    dim=64, depth=2, heads=1, head_dim=64, text_dim=64, separate_layers=1, mlp="swiglu", mlp_hidden=128,
    rope="video_text", out_norm=True, modulate_last_text=False, windows=WindowConfig(train_area=(4, 4)),
)  # fmt: skip
RUNNABLE_VAE = VAEConfig(widths=(16, 16, 32, 32), blocks=1, groups=4)


def clip(frames: int, height: int = 24, width: int = 32, channels: int = 3) -> Tensor:
    """A smooth moving pattern, T H W c in 0..1."""
    t, y, x = torch.meshgrid(torch.arange(frames), torch.arange(height), torch.arange(width), indexing="ij")
    waves = [torch.sin((x + 3 * t) / (7 + i) + i) + torch.cos((y - t) / (5 + i)) for i in range(channels)]
    return torch.stack(waves, dim=-1) / 4 + 0.5


@pytest.fixture(scope="session")
def runnable() -> Models:
    """Random models that restore a small frame in milliseconds. Shared, so leave them as they are."""
    torch.manual_seed(0)
    return Models(
        dit=DiT(RUNNABLE_DIT).requires_grad_(False).eval(),
        vae=VideoVAE(RUNNABLE_VAE).requires_grad_(False).eval(),
        prompts=Prompts(positive=torch.randn(3, 64), negative=torch.randn(4, 64)),
        label="tiny",
        device=torch.device("cpu"),
    )


class Pointwise(DiT):
    """Answers for every position alone: the clean latent is the condition plus `grain` times the noise."""

    grain = 0.0

    def forward(self, latents, texts, timesteps, **_):
        noisy, condition, _ = latents.tensor_split([latents.shape[1] // 2, -1], dim=1)
        return list((1 - self.grain) * noisy - condition)


class Lossless(VideoVAE):
    """Rearranges pixels into channels, so that decoding gives back what was encoded."""

    def encode_slice(self, clip, state, last=False):
        if not state:  # the first latent stands for one frame
            clip = torch.cat([clip[:, :, :1].expand(-1, -1, 3, -1, -1), clip], dim=2)
        latent = rearrange(clip, "b c (t z) (h p) (w q) -> b (c z p q) t h w", z=4, p=8, q=8)
        return torch.cat([latent, latent], dim=1), CausalState(begun=clip)

    def decode_slice(self, latent, state, last=False):
        clip = rearrange(latent, "b (c z p q) t h w -> b c (t z) (h p) (w q)", z=4, p=8, q=8)
        return clip if state else clip[:, :, 3:], CausalState(begun=clip)


@pytest.fixture(scope="session")
def pointwise(runnable) -> Models:
    """A transformer that does not know how long its chunk is."""
    dit = Pointwise(RUNNABLE_DIT).requires_grad_(False)
    dit.grain = 0.5
    return replace(runnable, dit=dit)


@pytest.fixture(scope="session")
def transparent(runnable) -> Models:
    """Models that change nothing: what comes out is what went in, resized."""
    vae = Lossless(replace(RUNNABLE_VAE, latent_channels=3 * 4 * 8 * 8))
    return replace(runnable, dit=Pointwise(RUNNABLE_DIT).requires_grad_(False), vae=vae)


@pytest.fixture(scope="session")
def runnable_files(runnable, tmp_path_factory) -> tuple[Path, Path]:
    """`runnable` on disk: the file of the transformer, with its prompts, and that of the autoencoder."""
    folder = tmp_path_factory.mktemp("models")
    dit, vae = folder / "dit.safetensors", folder / "vae.safetensors"
    prompts = {
        "positive_conditioning": runnable.prompts.positive,
        "negative_conditioning": runnable.prompts.negative,
    }
    save(dit, runnable.dit, runnable.dit.config, prompts, {"modelspec.title": runnable.label})
    save(vae, runnable.vae, runnable.vae.config)
    return dit, vae


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
