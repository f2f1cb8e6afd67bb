"""Finding checkpoints on disk by what they are, not by what they are called."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from seedvr2_core.checkpoints import checkpoint, folders, gguf_file
from seedvr2_core.checkpoints.folders import (
    NANO_DIT,
    NANO_VAE,
    autoencoder_of,
    default_directory,
    find_models,
    search_directories,
)
from seedvr2_core.models.dit import DiT


@pytest.fixture
def ranked(monkeypatch, dit, vae):
    """A better and a worse transformer than `dit`, as the 7B and the 3B are: (better, worse) state dicts."""
    better, worse = replace(dit.config, depth=4), replace(dit.config, depth=2)
    monkeypatch.setattr(folders, "QUALITY", (better, worse, vae.config))
    return DiT(better).state_dict(), DiT(worse).state_dict()


def test_the_best_model_comes_first(write, tmp_path, ranked, dit, vae):
    better, worse = ranked
    write("models/a_unpublished.safetensors", dit.state_dict())
    write("models/b_worse.pth", worse)
    write("models/sub/y_better_sharp.safetensors", better)
    write("models/sub/x_better.safetensors", better)
    write("models/seedvr_ema_7b.pth", better)
    write("models/0_fp8.safetensors", {name: t.to(torch.float8_e4m3fn) for name, t in better.items()})
    write("models/0_int8.safetensors", {**better, "txt_in.comfy_quant": torch.zeros(9, dtype=torch.uint8)})
    write("models/vae.safetensors", vae.state_dict())
    found = [info.path.name for info in find_models([tmp_path]) if info.parts[0].kind == "dit"]
    assert found == [
        "x_better.safetensors",
        "y_better_sharp.safetensors",
        "0_fp8.safetensors",
        "b_worse.pth",
        "a_unpublished.safetensors",
        "seedvr_ema_7b.pth",
        "0_int8.safetensors",
    ]


def test_other_and_damaged_files_are_passed_over(write, tmp_path, dit):
    write("lora.safetensors", {"a.lora_A.weight": torch.zeros(2, 2)})
    write("pos_emb.pt", torch.zeros(58, 5120))
    (tmp_path / "broken.safetensors").write_bytes(b"12345678{nonsense")
    (tmp_path / "empty.pth").touch()
    (tmp_path / "notes.txt").write_text("not weights")
    (tmp_path / "folder.safetensors").mkdir()
    mine = write("mine.safetensors", dit.state_dict())
    assert [info.path for info in find_models([tmp_path])] == [mine]


def test_a_file_reached_twice_is_listed_once(write, tmp_path, dit):
    write("models/mine.safetensors", dit.state_dict())
    assert len(find_models([tmp_path, tmp_path / "models", tmp_path / "missing"])) == 1


def test_downloads_go_into_comfyui_where_there_is_one():
    assert default_directory({}) == Path.home() / ".cache" / "seedvr2"
    assert default_directory({"COMFYUI_PATH": "/comfy"}) == Path("/comfy/models/SEEDVR2")


def test_every_folder_of_comfyui_is_searched_once():
    assert search_directories({}) == [Path.home() / ".cache" / "seedvr2"]
    assert search_directories({"COMFYUI_PATH": "/comfy"}) == [
        Path("/comfy/models/SEEDVR2"),
        Path.home() / ".cache" / "seedvr2",
        Path("/comfy/models/diffusion_models"),
        Path("/comfy/models/vae"),
    ]


def test_one_as_large_as_nano_gets_nanos_autoencoder_wherever_the_published_one_lies(write, tmp_path, monkeypatch, vae):
    mine = tmp_path / "models" / "mine.safetensors"
    mine.parent.mkdir()
    shutil.copy(NANO_DIT, mine)
    monkeypatch.setattr(folders, "SEEDVR2_VAE", vae.config)
    beside = write("models/published_vae.safetensors", vae.state_dict())
    assert autoencoder_of(mine, [beside]) == autoencoder_of(NANO_DIT, [beside]) == NANO_VAE
    own = shutil.copy(NANO_VAE, mine.parent / "own_vae.safetensors")
    assert autoencoder_of(mine, [beside]) == own


def test_others_get_the_autoencoder_beside_them_or_the_published_one(write, tmp_path, monkeypatch, dit, vae):
    mine = write("mine/dit.safetensors", dit.state_dict())
    assert autoencoder_of(mine, [NANO_VAE]) is None
    monkeypatch.setattr(folders, "SEEDVR2_VAE", vae.config)
    published = write("elsewhere/vae.safetensors", vae.state_dict())
    assert autoencoder_of(mine, [NANO_VAE, published]) == published
    beside = write("mine/vae.safetensors", vae.state_dict())
    assert autoencoder_of(mine, [published]) == beside


def test_a_model_of_ours_that_cannot_be_loaded_is_told_once(write, tmp_path, caplog, dit, monkeypatch):
    monkeypatch.setattr(gguf_file, "INSTALLED", False)
    unread = replace(gguf_file.GGUF, why_not="is a GGUF file")
    monkeypatch.setattr(checkpoint, "FORMATS", (unread, *checkpoint.FORMATS[1:]))
    write("int8.safetensors", {**dit.state_dict(), "txt_in.comfy_quant": torch.zeros(9, dtype=torch.uint8)})
    (tmp_path / "seedvr2_ema_7b-Q4_K_M.gguf").write_bytes(b"GGUF\x03\0\0\0" + bytes(64))
    (tmp_path / "flux.gguf").write_bytes(b"GGUF\x03\0\0\0" + bytes(64))
    with caplog.at_level("INFO"):
        for _ in range(2):
            find_models([tmp_path])
    told = sorted(record.message.partition(" ")[0] for record in caplog.records if record.levelname == "INFO")
    assert told == ["int8.safetensors", "seedvr2_ema_7b-Q4_K_M.gguf"]
