"""Formats known by sight: named, refused, and what to use instead."""

import pytest
import torch

from seedvr2_core.checkpoints import inspect, load_dit, load_vae
from seedvr2_core.errors import CheckpointError


def test_a_gguf_file_is_named_and_refused(tmp_path):
    path = tmp_path / "seedvr2_ema_7b-Q4_K_M.gguf"
    path.write_bytes(b"GGUF\x03\0\0\0" + bytes(64))
    info = inspect(path)
    assert (info.format, info.kind) == ("gguf", "other")
    with pytest.raises(CheckpointError, match=r"is a GGUF file, a format that is not supported yet; use the fp16 file"):
        load_dit(path)


def test_plain_fp8_is_named_and_refused(write, dit):
    path = write("fp8.safetensors", {name: t.to(torch.float8_e4m3fn) for name, t in dit.state_dict().items()})
    info = inspect(path)
    assert (info.format, info.kind, info.dtype) == ("quantised", "dit", "float8_e4m3fn")
    with pytest.raises(CheckpointError, match=r"quantised weights .* not supported yet; .*seedvr2_3b_fp16"):
        load_dit(path)


def test_comfyui_quantisation_is_known_by_its_companions(write, dit):
    weights = {
        **dit.state_dict(),
        "blocks.0.attn.proj_qkv.vid.weight": torch.zeros(72, 12, dtype=torch.uint8),
        "blocks.0.attn.proj_qkv.vid.weight_scale": torch.zeros(72, 1),
        "blocks.0.attn.proj_qkv.vid.comfy_quant": torch.zeros(19, dtype=torch.uint8),
    }
    path = write("nvfp4.safetensors", weights)
    assert inspect(path).why_not
    with pytest.raises(CheckpointError, match="not supported yet"):
        load_dit(path)


def test_the_file_to_use_instead_is_of_the_same_model(write, vae):
    path = write("vae_fp8.safetensors", {name: t.to(torch.float8_e4m3fn) for name, t in vae.state_dict().items()})
    with pytest.raises(CheckpointError, match=r"quantised .* such as seedvr2_ema_vae_fp16\.safetensors"):
        load_vae(path)


def test_integers_in_a_pickle_are_refused_by_name(write, dit):
    weights = {**dit.state_dict(), "txt_in.weight": torch.zeros(24, 16, dtype=torch.int8)}
    with pytest.raises(CheckpointError, match=r"stores as integers or in 8 bits txt_in\.weight"):
        load_dit(write("int8.pth", weights))
