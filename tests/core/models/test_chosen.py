"""Both models on kernels, in Triton's interpreter where there is no GPU: the published numbers, and what happens to a
kernel that fails."""

import copy
import logging

import pytest
import torch
from torch.utils._pytree import tree_leaves

from seedvr2_core.attention import windows
from seedvr2_core.kernels import causal_conv3d, choice, group_norm
from seedvr2_core.kernels import frame_attention as frames
from seedvr2_core.kernels.causal_conv3d import Tile
from seedvr2_core.models import dit
from seedvr2_core.models.vae import CausalState, VAEConfig, VideoVAE, attend_to_frame, posterior
from seedvr2_core.models.vae_fast import FastOptions, FastVAE
from tests.core.kernels.forced import Forced
from tests.core.kernels.ground import NEEDS_CUDA, find_ground
from tests.core.models.plain_dit import PlainDiT
from tests.core.models.test_dit import flatten, inputs

# The interpreter takes a millisecond for a step, however large: so few tiles, and as large as the tiny models.
CONVOLUTIONS = (
    Tile(loads="descriptors", rows=8, columns=8, channels=32, depth=16, warps=4, stages=2),
    Tile(loads="pointers", rows=8, columns=8, channels=32, depth=32, warps=4, stages=2),
)
WINDOWS = (windows.Tile(queries=256, keys=256, warps=4, stages=2),)
FRAMES = (frames.Tile(queries=16, keys=16, warps=4, stages=1),)


@pytest.fixture
def ground():
    return find_ground()


@pytest.fixture
def small(ground, monkeypatch):
    """Small tiles, where kernels are interpreted."""
    if ground.device.type == "cuda":
        pytest.skip("runs in the interpreter; kernels on a GPU have tests of their own")

    def tiles(capability, c_in, c_out):
        return [tile for tile in CONVOLUTIONS if tile.loads == "pointers" or c_in % tile.depth == 0]

    monkeypatch.setattr(causal_conv3d, "tiles", lambda *sizes: [] if sizes[1] < 32 else tiles(*sizes))
    monkeypatch.setattr(windows, "tiles", lambda d: WINDOWS)
    monkeypatch.setattr(frames, "tiles", lambda capability, channels: FRAMES)


def relative(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def operations(choices):
    return {operation for operation, name in choices.used if name != choice.LIBRARY}


# The autoencoder


@pytest.fixture(scope="module")
def narrow() -> VideoVAE:
    """Biases as large as anything else, so that none can be forgotten, and shortcuts with and without a convolution."""
    torch.manual_seed(0)
    vae = VideoVAE(VAEConfig(widths=(16, 16, 32, 32), blocks=1, groups=4)).requires_grad_(False)
    for parameter in vae.parameters():
        if parameter.ndim == 1:
            parameter.normal_(0.5, 0.5)
    return vae


ALL = {"causal_conv3d", "norm_silu", "apply_norm_silu", "frame_attention"}


@pytest.mark.parametrize("wanted", ["pointers", pytest.param("descriptors", marks=pytest.mark.slow)])
def test_an_autoencoder_on_kernels_computes_what_the_plain_one_does(narrow, small, wanted):
    choices, clip = Forced(wanted), torch.rand(1, 3, 5, 8, 8) * 2 - 1
    fast = FastVAE(narrow, FastOptions(winograd_from=None, choices=choices))
    moments = narrow.encode(clip)
    assert relative(fast.encode(clip), moments) < 1e-5
    latent = posterior(moments)[0]
    assert relative(fast.decode(latent), narrow.decode(latent)) < 1e-5
    assert operations(choices) == ALL
    assert any(name.startswith(wanted) for _, name in choices.used)


def test_an_autoencoder_on_kernels_meets_the_published_numbers(golden, tiny_vae, small):
    """With the library's convolutions, to be quick; kernels finish them."""
    tensors, _ = golden("vae/tiny_a_decode")
    choices = Forced("epilogue")
    fast = FastVAE(tiny_vae("tiny_a"), FastOptions(winograd_from=None, choices=choices))
    torch.testing.assert_close(fast.decode(tensors["l3_2x1/z"]), tensors["l3_2x1/sample"], atol=3e-5, rtol=0)
    assert operations(choices) == ALL


def test_shared_products_and_bands_may_be_chosen_from_as_well(narrow, small):
    latent = torch.randn(1, 16, 2, 2, 1)
    fast = FastVAE(narrow, FastOptions(winograd_from=16, winograd_rows_from=32, band=40, choices=Forced("epilogue")))
    assert relative(fast.decode(latent), narrow.decode(latent)) < 1e-5


def test_a_state_on_kernels_holds_no_more_than_that_of_the_library(narrow, small):
    clip, held = torch.randn(1, 3, 5, 8, 8), []
    for choices in (None, Forced("pointers")):
        fast = FastVAE(narrow, FastOptions(winograd_from=None, choices=choices))
        _, state = fast.encode_slice(clip, CausalState())
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in tree_leaves(dict(state))}
        held.append((len(state), sum(storage.nbytes() for storage in storages.values())))
    assert held[0] == held[1]


def test_where_nothing_can_be_chosen_the_library_computes(golden, tiny_vae):
    tensors, _ = golden("vae/tiny_a_decode")
    fast = FastVAE(tiny_vae("tiny_a"), FastOptions(choices=choice.Choices()))
    torch.testing.assert_close(fast.decode(tensors["l3_2x1/z"]), tensors["l3_2x1/sample"], atol=2e-5, rtol=0)


# The transformer


def test_a_transformer_on_kernels_meets_the_published_numbers(golden, tiny_dit, small):
    tensors, meta = golden("dit/case_image_odd")
    choices = Forced()
    with torch.no_grad():
        out = flatten(tiny_dit("3b")(*inputs(tensors), choices=choices))
    torch.testing.assert_close(out, tensors["out_3b"], atol=meta["tolerance"]["max_abs"], rtol=0)
    assert operations(choices) == {"windows", "norm_modulate", "gate_residual"}


@pytest.mark.parametrize("name", ["3b", "7b"])
def test_a_batch_on_kernels_is_what_is_written_down_plainly(tiny_dit, small, name):
    model, twin = tiny_dit(name), PlainDiT(tiny_dit(name).config)
    twin.load_state_dict(model.state_dict())
    grids = ((3, 4, 6), (1, 5, 4))
    latents = [torch.randn(33, t, 2 * h, 2 * w) for t, h, w in grids]
    call = latents, [torch.randn(5, 40), torch.randn(2, 40)], torch.tensor([1.0, 0.5])
    with torch.no_grad():
        for out, expected in zip(model(*call, choices=Forced()), twin(*call), strict=True):
            assert relative(out, expected) < 1e-5


def test_an_attention_asked_for_by_name_is_not_replaced(tiny_dit, small):
    choices = Forced()
    with torch.no_grad():
        call = torch.randn(1, 33, 1, 4, 4), torch.randn(1, 3, 40), torch.ones(1)
        tiny_dit("3b")(*call, attention="sdpa", choices=choices)
    assert operations(choices) == {"norm_modulate", "gate_residual"}


def test_kernels_take_no_part_in_training(tiny_dit, small):
    model, choices = copy.deepcopy(tiny_dit("3b")).requires_grad_(True), Forced()
    model(torch.randn(1, 33, 1, 4, 4), torch.randn(1, 3, 40), torch.ones(1), choices=choices)[0].sum().backward()
    assert not choices.used


# Kernels that fail


@pytest.fixture
def broken(small, monkeypatch):
    """Kernels that do not compile, run out of what they need, or find no compiler."""
    from triton.runtime.errors import OutOfResources

    def fail(error):
        def call(*args, **kwargs):
            raise error

        return call

    monkeypatch.setattr(causal_conv3d, "causal_conv3d", fail(OutOfResources(196640, 101376, "shared memory")))
    monkeypatch.setattr(causal_conv3d, "causal_conv3d_with_statistics", fail(RuntimeError("PassManager::run failed")))
    monkeypatch.setattr(group_norm, "group_statistics", fail(FileNotFoundError("no C compiler")))
    monkeypatch.setattr(group_norm, "apply_norm_silu", fail(FileNotFoundError("no C compiler")))
    monkeypatch.setattr(frames, "attend", fail(ImportError("no TensorDescriptor")))
    monkeypatch.setattr(windows, "attend", fail(RuntimeError("PassManager::run failed")))
    monkeypatch.setattr(dit, "norm_modulate", fail(TypeError("unexpected argument")))
    monkeypatch.setattr(dit, "gate_residual", fail(TypeError("unexpected argument")))


def test_an_autoencoder_whose_kernels_fail_says_so_once_and_goes_on(golden, tiny_vae, broken, caplog):
    tensors, _ = golden("vae/tiny_a_decode")
    choices = Forced("pointers")
    fast = FastVAE(tiny_vae("tiny_a"), FastOptions(winograd_from=None, choices=choices))
    with caplog.at_level(logging.WARNING):
        torch.testing.assert_close(fast.decode(tensors["l3_2x1/z"]), tensors["l3_2x1/sample"], atol=3e-5, rtol=0)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == len(set(lines)) == 5
    told = "frame_attention: kernel '16x16, 1 stages' is left out: it failed (no TensorDescriptor)"
    assert any(told in line for line in lines)


def test_a_transformer_whose_kernels_fail_says_so_once_and_goes_on(golden, tiny_dit, broken, caplog):
    tensors, meta = golden("dit/case_image_odd")
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        out = flatten(tiny_dit("3b")(*inputs(tensors), choices=Forced()))
    torch.testing.assert_close(out, tensors["out_3b"], atol=meta["tolerance"]["max_abs"], rtol=0)
    assert len(caplog.records) == 3


# On a GPU


@pytest.mark.gpu
@NEEDS_CUDA
@pytest.mark.parametrize("wanted", ["pointers", "descriptors", "epilogue", "kernel"])
def test_an_autoencoder_on_kernels_is_as_close_as_the_plain_one_on_a_gpu(random_vae, wanted):
    plain = copy.deepcopy(random_vae).to("cuda")
    latent = torch.randn(1, 16, 3, 6, 10, device="cuda")
    expected = plain.decode(latent)
    plain = plain.bfloat16()
    choices = Forced(wanted, torch.cuda.get_device_capability())
    fast = FastVAE(plain, FastOptions(winograd_from=None, choices=choices))
    off = relative(fast.decode(latent.bfloat16()).float(), expected)
    assert off < 1.3 * relative(plain.decode(latent.bfloat16()).float(), expected)
    # Nothing fell back.
    assert not choices._told


@pytest.mark.gpu
@NEEDS_CUDA
@pytest.mark.parametrize("name", ["3b", "7b"])
def test_a_transformer_on_kernels_is_as_close_as_the_plain_one_on_a_gpu(tiny_dit, name):
    model = copy.deepcopy(tiny_dit(name)).to("cuda")
    call = [x.to("cuda") for x in (torch.randn(1, 33, 3, 12, 20), torch.randn(1, 7, 40), torch.ones(1))]
    choices = Forced()
    with torch.no_grad():
        expected = model(*call)[0]
        model, call = model.bfloat16(), (call[0].bfloat16(), call[1].bfloat16(), call[2])
        off = relative(model(*call, choices=choices)[0].float(), expected)
        assert off < 1.3 * relative(model(*call)[0].float(), expected)
    assert operations(choices) == {"windows", "norm_modulate", "gate_residual"}
    assert not choices._told


@pytest.mark.gpu
@NEEDS_CUDA
def test_what_is_measured_on_a_gpu_gives_the_numbers_of_the_library(random_vae, tmp_path):
    plain = copy.deepcopy(random_vae).to("cuda", torch.bfloat16)
    latent = torch.randn(1, 16, 3, 6, 10, device="cuda", dtype=torch.bfloat16)
    choices = choice.Choices(tmp_path / "kernels.json")
    expected = FastVAE(plain, FastOptions(winograd_from=None)).decode(latent)
    out = FastVAE(plain, FastOptions(winograd_from=None, choices=choices)).decode(latent)
    assert relative(out.float(), expected.float()) < 3e-2
    assert choices.path.exists()


@pytest.mark.gpu
@NEEDS_CUDA
def test_torch_attends_to_a_large_frame_without_its_scores_on_a_gpu():
    q, k, v = torch.randn(3, 1, 30000, 512, device="cuda", dtype=torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    attend_to_frame(q, k, v)
    # Scores in bf16 would be 1.8 GB.
    assert torch.cuda.max_memory_allocated() - held < 0.4e9
