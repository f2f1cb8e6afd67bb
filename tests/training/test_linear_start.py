"""The linear codec written into a fresh autoencoder: it reconstructs before a single step of training."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from seedvr2_core.models.vae import VideoVAE, posterior
from training.linear_start import NARROW, principal_components, start_linear
from training.vae import NANO_VAE


def smooth(count: int, size: int, seed: int) -> torch.Tensor:
    """Pictures count 3 size size in -1..1 whose detail is wider than a block of 8 x 8."""
    coarse = torch.rand(count, 3, size // 8 + 1, size // 8 + 1, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, (size, size), mode="bicubic", align_corners=True).clamp(0, 1) * 2 - 1


def still(pictures: torch.Tensor) -> torch.Tensor:
    """Clips of four frames that do not move."""
    return pictures.unsqueeze(2).expand(-1, -1, 4, -1, -1)


def moving(count: int, size: int, seed: int) -> torch.Tensor:
    """Clips count 3 4 size size of smooth pictures that go 4 pixels to the left with every frame."""
    wide = smooth(count, size + 16, seed)
    return torch.stack([wide[..., :size, 4 * i : 4 * i + size] for i in range(1, 5)], dim=2)


def reconstruct(vae: VideoVAE, clip: torch.Tensor) -> torch.Tensor:
    return vae.decode(posterior(vae.encode(clip))[0])


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return -10 * torch.log10((a - b).square().mean() / 4).item()


def fresh() -> VideoVAE:
    torch.manual_seed(0)
    return VideoVAE(NANO_VAE).requires_grad_(False)


@pytest.fixture(scope="module")
def started():
    vae = fresh()
    start_linear(vae, still(smooth(64, 32, seed=1)))
    return vae


@pytest.fixture(scope="module")
def unseen():
    return smooth(4, 48, seed=2).unsqueeze(2)


def test_smooth_pictures_that_it_never_saw_come_back(started, unseen):
    assert psnr(reconstruct(started, unseen), unseen) > 25
    assert psnr(reconstruct(fresh(), unseen), unseen) < 12


def test_a_still_clip_comes_back_as_its_picture_does(started, unseen):
    clip = unseen.expand(-1, -1, 9, -1, -1)
    restored = reconstruct(started, clip)
    torch.testing.assert_close(restored, reconstruct(started, unseen).expand_as(restored), atol=1e-3, rtol=0)


def test_what_moves_gets_its_share_of_the_latent(started):
    both = fresh()
    start_linear(both, torch.cat([still(smooth(64, 32, seed=1)), moving(64, 32, seed=3)]))
    clip = moving(8, 48, seed=4)
    # The first frame has a latent of its own.
    clip = torch.cat([clip[:, :, :1], clip], dim=2)
    assert psnr(reconstruct(both, clip), clip) > psnr(reconstruct(started, clip), clip) + 3


def test_latents_have_unit_variance_and_a_narrow_posterior(started):
    mean, std = posterior(started.encode(smooth(64, 32, seed=1).unsqueeze(2)))
    # The first components carry the picture. What smooth pictures lack has hardly any variance to scale up.
    assert mean[:, :12].std(dim=(0, 2, 3, 4)).tolist() == pytest.approx([1.0] * 12, abs=0.1)
    assert std.log().mul(2).mean().item() == pytest.approx(NARROW, abs=0.1)


def test_every_layer_can_still_be_trained(started, unseen):
    vae = fresh()
    vae.load_state_dict(started.state_dict())
    vae.requires_grad_(True)
    (reconstruct(vae, unseen.expand(-1, -1, 5, -1, -1)) - 0.5).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in vae.parameters())
    # A residual branch ends in a convolution of zeros, which moves first and lets its gradient through to the rest.
    blocks = [module for module in vae.modules() if hasattr(module, "conv2")]
    assert all(block.conv2.weight.grad.any() for block in blocks)


def test_whitened_components_are_uncorrelated_with_unit_variance():
    draw = torch.Generator().manual_seed(0)
    mixed = torch.randn(6, 6, generator=draw), torch.randn(50, 6, 1, 8, 8, generator=draw)
    mixed = torch.einsum("jk,nkthw->njthw", *mixed)
    weight, bias = principal_components(mixed + 3.0, 4, whiten=True)
    signals = torch.einsum("sk,nkthw->snthw", weight, mixed + 3.0).flatten(1) + bias[:, None]
    torch.testing.assert_close(signals.mean(1), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(signals.cov(), torch.eye(4), atol=1e-2, rtol=0)


def test_components_come_largest_first_and_are_orthonormal():
    features = torch.randn(50, 5, 1, 4, 4) * torch.tensor([1.0, 4.0, 2.0, 0.5, 3.0]).view(5, 1, 1, 1)
    weight, _ = principal_components(features, 3)
    assert weight.abs().argmax(dim=1).tolist() == [1, 4, 2]
    torch.testing.assert_close(weight @ weight.T, torch.eye(3), atol=1e-5, rtol=0)
