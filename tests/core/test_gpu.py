"""What a GPU computes is what a CPU computes: both models against the published numbers, and whole restorations."""

import copy
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from seedvr2_core import Cancelled, Settings, Target, load_models, pick, restore
from seedvr2_core.checkpoints.export import save
from seedvr2_core.loading import fast_options
from seedvr2_core.models.dit import DiT
from seedvr2_core.models.linear import FP8
from seedvr2_core.models.vae import SEEDVR2_VAE, VideoVAE, posterior
from seedvr2_core.models.vae_fast import FastVAE
from tests.core.conftest import RUNNABLE_DIT, clip
from tests.core.models.test_dit import CASES, flatten, inputs, relative

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def fp32_is_fp32() -> Iterator[None]:
    """Convolutions round to 10 bits otherwise."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def fast(vae: VideoVAE, dtype: torch.dtype = torch.float32) -> FastVAE:
    return FastVAE(copy.deepcopy(vae).to(CUDA, dtype), fast_options(CUDA))


@pytest.mark.parametrize("name", ["tiny_a", "tiny_b"])
@pytest.mark.parametrize(("way", "x", "y"), [("encode", "x", "moments"), ("decode", "z", "sample")])
def test_the_autoencoder_matches_the_published_numbers(golden, tiny_vae, name, way, x, y):
    tensors, meta = golden(f"vae/{name}_{way}")
    vae, half = fast(tiny_vae(name)), fast(tiny_vae(name), torch.bfloat16)
    for case in meta["cases"]:
        source, expected = tensors[f"{case}/{x}"].to(CUDA), tensors[f"{case}/{y}"]
        assert relative(getattr(vae, way)(source).cpu(), expected) < 1e-4, case
        assert relative(getattr(half, way)(source.bfloat16()).float().cpu(), expected) < 5e-2, case


@pytest.mark.parametrize("name", ["3b", "7b"])
@pytest.mark.parametrize("case", CASES)
def test_the_transformer_matches_the_published_numbers(golden, tiny_dit, case, name):
    tensors, _ = golden(f"dit/case_{case}")
    latents, texts, times = inputs({key: x.to(CUDA) for key, x in tensors.items()})
    model, expected = copy.deepcopy(tiny_dit(name)).to(CUDA), tensors[f"out_{name}"]
    assert relative(flatten(model(latents, texts, times)).cpu(), expected) < 1e-4
    latents, texts = ([x.bfloat16() for x in pieces] for pieces in (latents, texts))
    assert relative(flatten(model.bfloat16()(latents, texts, times)).float().cpu(), expected) < 2e-2


@pytest.mark.parametrize("frames", [1, 9])
def test_frames_whose_norm_is_taken_in_parts_agree_with_a_cpu(random_vae, frames):
    frames = clip(frames, 136, 160).permute(3, 0, 1, 2)[None] * 2 - 1
    vae = fast(random_vae)
    moments = random_vae.encode(frames)
    assert relative(vae.encode(frames.to(CUDA)).cpu(), moments) < 1e-4
    latent = posterior(moments)[0]
    expected = random_vae.decode(latent)
    for block, band in ((2, None), (1, None), (1, 17 * 160)):
        vae.take(block, band)
        assert relative(vae.decode(latent.to(CUDA)).cpu(), expected) < 1e-4


def test_the_published_autoencoder_decodes_large_frames():
    """Four of them have more than 2 ** 31 values in a layer."""
    with CUDA:
        vae = VideoVAE(SEEDVR2_VAE).bfloat16().requires_grad_(False)
    latent = torch.randn(1, 16, 2, 180, 320, device=CUDA, dtype=torch.bfloat16)
    video = FastVAE(vae, fast_options(CUDA)).decode(latent)
    assert video.shape == (1, 3, 5, 1440, 2560)
    assert video.isfinite().all()


@pytest.mark.parametrize("frames", [1, 21])
def test_a_restoration_is_the_same_as_on_a_cpu_and_every_time(frames):
    source, settings = clip(frames, 64, 96), Settings(target=Target.exact(128, 192), chunk=9)
    expected = restore(source, load_models(*pick("nano"), torch.device("cpu"), torch.float32), settings)
    out = restore(source, load_models(*pick("nano"), CUDA, torch.float32), settings)
    assert relative(out, expected) < 2e-3
    half = load_models(*pick("nano"), CUDA, torch.bfloat16)
    first = restore(source, half, settings)
    assert relative(first, expected) < 3e-2
    assert torch.equal(restore(source, half, settings), first)


def test_a_file_whose_restoration_was_interrupted_is_the_same_as_a_whole_one(tmp_path, monkeypatch):
    """The place to go on from is written down by another thread while the GPU computes."""
    pytest.importorskip("av")
    from seedvr2_core import journal, restore_file
    from tests.core.test_resuming import frames_of, images, stopping

    monkeypatch.setattr(journal, "SAVE_EVERY", 0.0)
    models = load_models(*pick("nano"), CUDA, torch.bfloat16)
    settings, source = Settings(target=Target.exact(48, 64), chunk=17), images(tmp_path / "in")
    restore_file(source, tmp_path / "whole", models, settings)
    with pytest.raises(Cancelled):
        restore_file(source, tmp_path / "out", models, settings, on_frame=stopping(15))
    assert restore_file(source, tmp_path / "out", models, settings).resumed > 0
    assert (frames_of(tmp_path / "out") - frames_of(tmp_path / "whole")).abs().max() < 2 / 255


def test_fp8_never_has_a_whole_plain_transformer_on_the_device(tmp_path):
    if reason := FP8.why_not(torch.empty(16, 16, device=CUDA, dtype=torch.bfloat16)):
        pytest.skip(reason)
    dit = DiT(replace(RUNNABLE_DIT, dim=768, heads=12, depth=8, mlp_hidden=3072))
    plain = 2 * sum(weight.numel() for weight in dit.parameters())
    path, (_, vae) = tmp_path / "dit.safetensors", pick("nano")
    save(path, dit.bfloat16(), dit.config, {"positive_conditioning": torch.randn(3, 64)})
    # A library takes memory with its first product, and keeps it.
    torch.ones(64, 64, device=CUDA) @ torch.ones(64, 64, device=CUDA)
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    models = load_models(path, vae, CUDA, torch.bfloat16, "fp8")
    taken, most = torch.cuda.memory_allocated() - held, torch.cuda.max_memory_allocated() - held
    assert taken < 0.7 * plain
    assert most - taken < 0.3 * plain
    assert restore(clip(5, 32, 48), models, Settings(target=Target.exact(64, 96))).isfinite().all()
