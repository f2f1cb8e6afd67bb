"""Weights in fewer bits: what is read, what is named and refused, and what to use instead."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from seedvr2_core.checkpoints import checkpoint, gguf_file, inspect, load_dit, load_vae
from seedvr2_core.checkpoints.folders import find_models
from seedvr2_core.errors import CheckpointError
from seedvr2_core.models.dit import DiT, DiTConfig

gguf = pytest.importorskip("gguf")

# --- GGUF


def write_gguf(path: Path, dit: DiT, kind: str = "Q8_0", prefix: str = "") -> dict[str, torch.Tensor]:
    """A file as those of this family are: matrices of blocks in blocks of numbers, the rest in fp16; what is in it."""
    writer, held = gguf.GGUFWriter(path, "seedvr"), {}
    for name, tensor in dit.state_dict().items():
        values, type_ = tensor.numpy(), gguf.GGMLQuantizationType.F16
        if name.startswith("blocks.") and values.ndim == 2 and values.shape[1] % 32 == 0:
            type_ = gguf.GGMLQuantizationType[kind]
        stored = gguf.quantize(values, type_)
        held[name] = torch.from_numpy(gguf.dequantize(stored, type_)).reshape(tensor.shape)
        if name == "txt_in.weight":
            # As it is done to what cannot be cut into blocks as it is.
            stored = stored.reshape(-1)
            writer.add_array(f"comfy.gguf.orig_shape.{prefix}{name}", list(tensor.shape))
        writer.add_tensor(f"{prefix}{name}", stored, raw_dtype=type_ if stored.dtype == np.uint8 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


@pytest.fixture(scope="module")
def wide() -> DiT:
    """Its matrices can be cut into blocks of 32."""
    torch.manual_seed(0)
    return DiT(DiTConfig(
        dim=64, depth=2, heads=2, head_dim=32, text_dim=32, separate_layers=1, mlp="swiglu", mlp_hidden=96,
        rope="video_text", out_norm=True, modulate_last_text=False,
    ))  # fmt: skip


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize(("kind", "error"), [("F16", 1e-3), ("Q8_0", 0.01), ("Q4_0", 0.12)])
def test_a_gguf_file_is_read_as_floats(tmp_path, wide, caplog, kind, error, prefix):
    path = tmp_path / "model.gguf"
    held = write_gguf(path, wide, kind, prefix)
    info = inspect(path)
    assert (info.format, info.kind, info.config, info.prefix, info.why_not) == ("gguf", "dit", wide.config, prefix, "")
    assert info.dtype == ("float16" if kind == "F16" else kind.lower())
    assert info.parameters == sum(t.numel() for name, t in wide.state_dict().items() if "freqs" not in name)
    with caplog.at_level("INFO"):
        loaded = load_dit(path, torch.float32)
    assert ("larger files of the same model restore better" in caplog.text) == (kind != "F16")
    for name, tensor in loaded.state_dict().items():
        plain = wide.state_dict()[name]
        if "freqs" in name:
            assert torch.equal(tensor, plain)  # computed, not read
            continue
        assert torch.equal(tensor, held[name])
        assert (tensor - plain).norm() <= error * plain.norm()
    assert load_dit(path, torch.bfloat16).txt_in.weight.dtype == torch.bfloat16


def test_a_damaged_gguf_file_is_one_sentence(tmp_path, wide):
    path = tmp_path / "model.gguf"
    write_gguf(path, wide)
    whole = path.read_bytes()
    for length in (20, 200, len(whole) // 2, len(whole) - 1000):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"model\.gguf is damaged or incomplete"):
            load_dit(path)
    # A count of tensors that no file has room for.
    path.write_bytes(whole[:8] + b"\xff" * 8 + whole[16:])
    with pytest.raises(CheckpointError, match=r"model\.gguf is damaged or incomplete"):
        inspect(path)


def test_without_its_package_a_gguf_file_is_named_and_refused(tmp_path, wide, monkeypatch):
    why_not = "is a GGUF file, for which the package gguf is needed (pip install gguf)"
    monkeypatch.setattr(gguf_file, "INSTALLED", False)
    others = [each for each in checkpoint.FORMATS if each is not gguf_file.GGUF]
    monkeypatch.setattr(checkpoint, "FORMATS", (replace(gguf_file.GGUF, why_not=why_not), *others))
    path = tmp_path / "seedvr2_ema_7b-Q4_K_M.gguf"
    write_gguf(path, wide)
    assert (inspect(path).format, inspect(path).kind) == ("gguf", "other")
    with pytest.raises(CheckpointError, match=r"the package gguf is needed \(pip install gguf\); use the fp16 file"):
        load_dit(path)


# --- fp8


def test_plain_fp8_is_cast_and_frequencies_are_computed(write, dit, caplog):
    weights = {name: t.to(torch.float8_e4m3fn) for name, t in dit.state_dict().items()}
    path = write("fp8.safetensors", weights)
    info = inspect(path)
    assert (info.format, info.kind, info.dtype, info.why_not) == ("safetensors", "dit", "float8_e4m3fn", "")
    with caplog.at_level("INFO"):
        loaded = load_dit(path, torch.float32).state_dict()
    assert "fp8.safetensors holds weights in float8_e4m3fn: larger files of the same model restore" in caplog.text
    for name, tensor in loaded.items():
        assert torch.equal(tensor, dit.state_dict()[name] if "freqs" in name else weights[name].float())


def test_a_mixed_file_and_an_autoencoder_in_fp8_load(write, dit, vae):
    mixed = {n: t.to(torch.float16 if n.startswith("blocks.1.") else torch.float8_e4m3fn)
             for n, t in dit.state_dict().items()}  # fmt: skip
    loaded = load_dit(write("mixed.safetensors", mixed), torch.float32).state_dict()
    name = "blocks.1.mlp.all.proj_in.weight"
    assert torch.equal(loaded[name], mixed[name].float())
    small = {name: t.to(torch.float8_e4m3fn) for name, t in vae.state_dict().items()}
    assert torch.equal(load_vae(write("vae.pth", small), torch.float32).decoder.conv_in.bias,
                       small["decoder.conv_in.bias"].float())  # fmt: skip


def test_a_file_of_full_precision_comes_before_a_coarse_one_of_its_model(write, dit, tmp_path):
    write("a_fp8.safetensors", {name: t.to(torch.float8_e4m3fn) for name, t in dit.state_dict().items()})
    write("b.safetensors", dit.state_dict())
    assert [info.path.name for info in find_models([tmp_path])] == ["b.safetensors", "a_fp8.safetensors"]


# --- what is refused


def test_comfyui_quantisation_is_known_by_its_companions(write, dit):
    weights = {
        **dit.state_dict(),
        "blocks.0.attn.proj_qkv.vid.weight": torch.zeros(72, 12, dtype=torch.uint8),
        "blocks.0.attn.proj_qkv.vid.weight_scale": torch.zeros(72, 1),
        "blocks.0.attn.proj_qkv.vid.comfy_quant": torch.zeros(19, dtype=torch.uint8),
    }
    path = write("nvfp4.safetensors", weights)
    assert inspect(path).why_not
    with pytest.raises(CheckpointError, match=r"quantised weights .* not supported yet; .*seedvr2_3b_fp16"):
        load_dit(path)


def test_scaled_fp8_is_known_by_its_scales(write, vae):
    weights = {name: t.to(torch.float8_e4m3fn) for name, t in vae.state_dict().items()}
    path = write("vae_fp8.safetensors", {**weights, "decoder.conv_in.scale_weight": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"quantised .* such as seedvr2_ema_vae_fp16\.safetensors"):
        load_vae(path)


def test_integers_in_a_pickle_are_refused_by_name(write, dit):
    weights = {**dit.state_dict(), "txt_in.weight": torch.zeros(24, 16, dtype=torch.int8)}
    with pytest.raises(CheckpointError, match=r"stores as integers txt_in\.weight"):
        load_dit(write("int8.pth", weights))
