"""Saving: the inverse of loading, whole or not at all."""

from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from seedvr2_core.checkpoints import inspect, load_dit, load_prompts, load_vae, save
from seedvr2_core.errors import CheckpointError
from seedvr2_core.models.dit import DiT
from seedvr2_core.models.vae import VideoVAE
from seedvr2_core.models.windows import WindowConfig
from seedvr2_core.video.geometry import Grid


def test_a_saved_dit_loads_with_the_config_and_prompts_it_had(tmp_path, dit):
    config = replace(dit.config, windows=WindowConfig(splits=Grid(2, 2, 2), max_t=8))
    model = DiT(config)
    prompt = torch.randn(5, 16).bfloat16()
    path = tmp_path / "new folder" / "nano.safetensors"
    save(path, model, config, {"positive_conditioning": prompt}, {"modelspec.title": "SeedVR2 nano"})
    info = inspect(path)
    assert (info.label, info.config, info.prompts) == ("SeedVR2 nano", config, ("positive",))
    loaded = load_dit(path, torch.float32)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=0, atol=0)
    torch.testing.assert_close(load_prompts(path).positive, prompt)


def test_a_saved_vae_loads_with_the_groups_and_scale_it_had(tmp_path, vae):
    config = replace(vae.config, groups=16, scale=0.5)
    save(tmp_path / "vae.safetensors", VideoVAE(config), config)
    assert load_vae(tmp_path / "vae.safetensors").config == config


def test_weights_are_saved_in_the_type_they_have(tmp_path, vae):
    save(tmp_path / "vae.safetensors", VideoVAE(vae.config).half(), vae.config)
    with safe_open(tmp_path / "vae.safetensors", "pt") as file:
        assert file.get_tensor("encoder.conv_in.weight").dtype == torch.float16


def test_a_failed_save_leaves_the_old_file_and_no_debris(tmp_path, monkeypatch, vae):
    path = tmp_path / "vae.safetensors"
    path.write_bytes(b"old")

    def full_disk(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("seedvr2_core.checkpoints.export.save_file", full_disk)
    with pytest.raises(CheckpointError, match="cannot be written"):
        save(path, vae, vae.config)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("vae.safetensors", b"old")]
