"""Strict loading: the module has exactly what the file has, in the type asked for."""

import re

import pytest
import torch

from seedvr2_core.checkpoints import inspect, load_dit, load_vae
from seedvr2_core.errors import CheckpointError


def same(module, weights, dtype):
    state = module.state_dict()
    assert set(state) == set(weights)
    for name, tensor in weights.items():
        expected = tensor.float() if "rope" in name else tensor.to(dtype)
        torch.testing.assert_close(state[name], expected, rtol=0, atol=0)


@pytest.mark.parametrize("extension", ["safetensors", "pth"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_dit_comes_back_as_it_was_written(write, either_dit, extension, dtype):
    loaded = load_dit(write(f"model.{extension}", either_dit.state_dict()), dtype)
    assert loaded.config == either_dit.config
    assert not loaded.training
    same(loaded, either_dit.state_dict(), dtype)


@pytest.mark.parametrize("extension", ["safetensors", "pth"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_vae_comes_back_as_it_was_written(write, vae, extension, dtype):
    loaded = load_vae(write(f"model.{extension}", vae.state_dict()), dtype)
    assert loaded.config == vae.config
    same(loaded, vae.state_dict(), dtype)


def test_nothing_is_left_without_memory(write, dit, vae):
    for module in (load_dit(write("dit.pth", dit.state_dict())), load_vae(write("vae.pth", vae.state_dict()))):
        assert not any(tensor.is_meta for tensor in [*module.parameters(), *module.buffers()])


def test_a_model_survives_moves_whatever_the_mode(write, dit):
    """A host loads in inference mode, and takes models off a device outside it."""
    with torch.inference_mode():
        loaded = load_dit(write("model.safetensors", dit.state_dict()), torch.float32)
    loaded.double()
    with torch.inference_mode():
        loaded.txt_in(torch.zeros(1, dit.config.text_dim, dtype=torch.float64))


def test_stored_frequencies_are_ignored_and_computed_afresh(write, either_dit):
    exact = either_dit.state_dict()
    coarse = {name: tensor * 2 if "rope" in name else tensor for name, tensor in exact.items()}
    same(load_dit(write("coarse.safetensors", coarse), torch.float32), exact, torch.float32)
    absent = {name: tensor for name, tensor in exact.items() if "rope" not in name}
    same(load_dit(write("absent.safetensors", absent), torch.float32), exact, torch.float32)


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "module.", "_orig_mod.", "ema.", "generator."])
def test_a_dit_loads_from_under_a_prefix(write, dit, prefix):
    path = write("model.safetensors", {prefix + name: tensor for name, tensor in dit.state_dict().items()})
    same(load_dit(path, torch.float32), dit.state_dict(), torch.float32)


@pytest.mark.parametrize("prefix", ["vae.", "first_stage_model."])
def test_both_models_load_from_a_combined_file(write, dit, vae, prefix):
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in dit.state_dict().items()}
    tensors |= {prefix + name: tensor for name, tensor in vae.state_dict().items()}
    path = write("combined.safetensors", tensors | {"cond_stage_model.weight": torch.zeros(2)})
    same(load_dit(path, torch.float32), dit.state_dict(), torch.float32)
    same(load_vae(path, torch.float32), vae.state_dict(), torch.float32)


def test_a_vae_with_old_attention_names_and_shapes_loads(write, vae):
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, tensor in vae.state_dict().items():
        if new := next((new for new in old_names if f".attentions.0.{new}." in name), None):
            name = name.replace(new, old_names[new])
            tensor = tensor[..., None, None] if tensor.ndim == 2 else tensor
        old[name] = tensor
    assert any("proj_attn" in name for name in old)
    same(load_vae(write("old.pth", old), torch.float32), vae.state_dict(), torch.float32)


def test_missing_tensors_are_named_up_to_three(write, dit):
    weights = {name: tensor for name, tensor in dit.state_dict().items() if ".ada.vid." not in name}
    with pytest.raises(CheckpointError) as caught:
        load_dit(write("model.safetensors", weights))
    assert len(re.findall(r"\.ada\.vid\.", str(caught.value))) == 3
    assert "and 3 more" in str(caught.value)


def test_tensors_left_over_are_named(write, dit):
    with pytest.raises(CheckpointError, match=r"unexpected blocks\.0\.extra\.weight;"):
        load_dit(write("model.safetensors", {**dit.state_dict(), "blocks.0.extra.weight": torch.zeros(2)}))


def test_shapes_that_do_not_fit_are_named(write, dit):
    weights = {**dit.state_dict(), "blocks.1.mlp.all.proj_in.weight": torch.zeros(33, 24)}
    with pytest.raises(CheckpointError, match=r"blocks\.1\.mlp\.all\.proj_in\.weight \[33, 24\] instead of \[32, 24\]"):
        load_dit(write("model.safetensors", weights))


def test_a_transposed_matrix_does_not_fit(write, dit):
    weights = dict(dit.state_dict())
    weights["blocks.1.mlp.all.proj_out.weight"] = weights["blocks.1.mlp.all.proj_out.weight"].T
    with pytest.raises(CheckpointError, match="instead of"):
        load_dit(write("model.safetensors", weights))


def test_the_wrong_model_is_refused_with_what_it_is(write, dit, vae):
    with pytest.raises(CheckpointError, match=r"holds SeedVR2-style DiT.*expected the SeedVR2 VAE"):
        load_vae(write("dit.safetensors", dit.state_dict()))
    with pytest.raises(CheckpointError, match=r"holds SeedVR2-style VAE.*expected a SeedVR2 DiT"):
        load_dit(write("vae.safetensors", vae.state_dict()))
    with pytest.raises(CheckpointError, match=r"lora\.safetensors looks like a LoRA, expected a SeedVR2 DiT"):
        load_dit(write("lora.safetensors", {"blocks.0.lora_A.weight": torch.zeros(2, 2)}))


@pytest.mark.parametrize("kind", ["3b", "7b"])
def test_the_golden_transformers_load(golden, write, kind):
    weights, meta = golden(f"dit/weights_tiny_{kind}")
    path = write("model.safetensors", weights)
    config, published = inspect(path).config, meta["config"]
    assert (config.dim, config.heads, config.head_dim) == (published["dim"], published["heads"], published["head_dim"])
    assert (config.depth, config.text_dim) == (published["num_layers"], published["txt_in_dim"])
    loaded = load_dit(path, torch.float32)
    frequencies = {name: tensor for name, tensor in weights.items() if "rope" in name}
    same(loaded, {**weights, **{name: loaded.state_dict()[name] for name in frequencies}}, torch.float32)
    for name, stored in frequencies.items():
        torch.testing.assert_close(loaded.state_dict()[name], stored)


@pytest.mark.parametrize("name", ["tiny_a", "tiny_b"])
def test_the_golden_autoencoders_load(golden, write, name):
    encoder, meta = golden(f"vae/{name}_encoder_weights")
    decoder, _ = golden(f"vae/{name}_decoder_weights")
    loaded = load_vae(write("vae.safetensors", encoder | decoder), torch.float32)
    assert loaded.config.widths == tuple(meta["config"]["block_out_channels"])
    assert loaded.config.blocks == meta["config"]["layers_per_block"]
    same(loaded, encoder | decoder, torch.float32)


@pytest.mark.gpu
def test_a_model_loads_straight_onto_the_gpu(write, dit):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    loaded = load_dit(write("model.safetensors", dit.state_dict()), torch.bfloat16, "cuda")
    assert {tensor.device.type for tensor in [*loaded.parameters(), *loaded.buffers()]} == {"cuda"}
