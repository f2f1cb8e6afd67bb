"""Tiny models and files made of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from seedvr2_core.models.dit import DiT, DiTConfig
from seedvr2_core.models.vae import VAEConfig, VideoVAE

DIT_3B_KIND = DiTConfig(
    dim=24, depth=3, heads=2, head_dim=12, text_dim=16, separate_layers=1, mlp="swiglu", mlp_hidden=32,
    rope="video_text", out_norm=True, modulate_last_text=False,
)  # fmt: skip
DIT_7B_KIND = DiTConfig(
    dim=32, depth=2, heads=1, head_dim=32, text_dim=16, separate_layers=2, mlp="gelu", mlp_hidden=48,
    rope="video", out_norm=False, modulate_last_text=True,
)  # fmt: skip


@pytest.fixture(scope="session")
def dit() -> DiT:
    torch.manual_seed(0)
    return DiT(DIT_3B_KIND)


@pytest.fixture(scope="session", params=[DIT_3B_KIND, DIT_7B_KIND], ids=["3b kind", "7b kind"])
def either_dit(request) -> DiT:
    torch.manual_seed(0)
    return DiT(request.param)


@pytest.fixture(scope="session")
def vae() -> VideoVAE:
    torch.manual_seed(0)
    return VideoVAE(VAEConfig(widths=(32, 32, 64), blocks=1, latent_channels=4))


@pytest.fixture
def write(tmp_path):
    """Write tensors to a file whose extension chooses the format: write("name.pth", tensors, metadata) -> Path."""

    def to_file(name: str, tensors: dict[str, Tensor] | Tensor, metadata: dict[str, str] | None = None) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            save_file({key: value.contiguous().clone() for key, value in tensors.items()}, path, metadata=metadata)
        else:
            torch.save(tensors, path)
        return path

    return to_file
