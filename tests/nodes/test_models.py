"""Where models lie while nodes restore, how often they are loaded, and which belong together; without a GPU.

The second copy of the package, which nodes import as ComfyUI does, is the one that is tested here.
"""

from __future__ import annotations

import gc
import shutil
import threading
import time
import weakref
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.nodes.standin import loaded

CUDA = torch.device("cuda", 0)
# Nano's blocks do not all fit beside a small clip.
LITTLE, PLENTY = 56 << 20, 16 << 30


@pytest.fixture(scope="module")
def pack() -> Iterator:
    with loaded() as modules:
        yield modules


class Host:
    """ComfyUI with a GPU: what is moved to it goes to torch's "meta", where tensors have no contents."""

    def __init__(self, patch: pytest.MonkeyPatch, pack) -> None:
        self.models, self.pack = pack("nodes.models"), pack
        self.free, self.asked, self.forget = PLENTY, [], []
        host = self.models.host
        patch.setattr(host, "device", lambda: CUDA)
        patch.setattr(host, "offload_device", lambda: torch.device("cpu"))
        patch.setattr(host, "free_bytes", lambda patchers: self.free)
        patch.setattr(host, "managed", Patcher)
        patch.setattr(host, "load", self.load)
        patch.setattr(host, "unload", lambda patcher: patcher.model.to(torch.device("cpu")))
        patch.setattr(host, "on_unload", lambda patcher, forget: self.forget.append(forget))
        patch.setattr(host, "model_files", lambda: [])
        patch.setattr(self.models, "pick_dtype", lambda *_: torch.float32)
        to = nn.Module.to

        def move(module: nn.Module, device: torch.device) -> nn.Module:
            if device.type == "cpu":
                empty = any(parameter.is_meta for parameter in module.parameters())
                return module.to_empty(device="cpu") if empty else module
            return to(module, "meta")

        patch.setattr(nn.Module, "to", move)
        patch.setattr(self.models, "lies_on", lambda dit, device: all(p.is_meta for p in dit.parameters()))

    def load(self, patchers, working_bytes: int) -> None:
        self.asked.append(([type(patcher.model).__name__ for patcher in patchers], working_bytes))
        for patcher in patchers:
            patcher.model.to(CUDA)


class Patcher(SimpleNamespace):
    def __init__(self, model: nn.Module):
        super().__init__(model=model)

    def model_size(self) -> int:
        return sum(tensor.nbytes for tensor in self.model.state_dict().values())


@pytest.fixture
def host(monkeypatch, pack) -> Iterator[Host]:
    yield Host(monkeypatch, pack)
    pack("nodes.models")._best.cache_clear()


def nano(host: Host):
    model = host.models.load_model(host.models.best_dit())
    return model, host.models.own_autoencoder(model)


def on_device(module: nn.Module) -> set[bool]:
    return {parameter.is_meta for parameter in module.parameters()}


def ready(host: Host, model, vae):
    return host.models.ready(model, vae, host.models.Settings(), (64, 64), 21)


def test_models_that_fit_are_comfyuis_to_move(host):
    model, vae = nano(host)
    with ready(host, model, vae) as (models, plan):
        assert models.device == CUDA and plan.budget == PLENTY
        assert models.vae is vae.patcher.model
        assert on_device(models.dit) == on_device(models.vae) == {True}
    ((names, working),) = host.asked
    assert names == ["DiT", "FastVAE"] and working > 0
    assert on_device(model.patcher.model) == {True}  # it stays until ComfyUI takes it away


@pytest.mark.parametrize("whole_before", [False, True])
def test_of_a_streamed_transformer_all_but_the_blocks_lies_on_the_device_and_goes_back(host, whole_before):
    model, vae = nano(host)
    if whole_before:
        with ready(host, model, vae):
            pass
    host.free, host.asked = LITTLE, []
    with ready(host, model, vae) as (models, _):
        assert models.device == CUDA and models.dtype == torch.float32
        around = [part for name, part in models.dit.named_children() if name != "blocks"]
        assert [on_device(part) for part in around] == [{True}] * len(around)
        assert on_device(models.dit.blocks) == {False}
        assert on_device(vae.patcher.model) == {True}
    assert on_device(model.patcher.model) == {False}
    # The blocks that are on the device are work, for which ComfyUI makes room.
    ((names, working),) = host.asked
    assert names == ["FastVAE"]
    assert working + vae.patcher.model_size() <= LITTLE


def test_a_streamed_transformer_alone_finds_room_and_goes_back_after_an_error(host):
    model, _ = nano(host)
    host.free = 24 << 20
    with pytest.raises(KeyError), ready(host, model, None) as (models, _):
        assert on_device(models.dit.txt_in) == {True} and on_device(models.dit.blocks) == {False}
        raise KeyError
    assert on_device(model.patcher.model) == {False}
    ((names, working),) = host.asked
    assert not names and 0 < working <= host.free


def test_blocks_that_took_turns_after_memory_ran_out_come_back_as_a_whole(host):
    model, vae = nano(host)
    with ready(host, model, vae) as (models, _):
        models.dit.blocks[0].to_empty(device="cpu")
    assert on_device(model.patcher.model) == {False}


@pytest.fixture
def counted(host, monkeypatch) -> list[str]:
    """What was read from disk."""
    read: list[str] = []
    for name in ("load_dit", "load_vae"):
        load = getattr(host.models, name)
        monkeypatch.setattr(host.models, name, lambda *args, name=name, load=load: read.append(name) or load(*args))
    return read


def test_models_that_nobody_gave_are_loaded_once_until_comfyui_wants_the_memory(host, counted):
    first = host.models.best(None, None)
    assert host.models.best(None, None) == first
    assert counted == ["load_dit", "load_vae"]
    held = weakref.ref(first[0])
    del first
    for forget in host.forget:
        forget()
        assert held() is not None  # ComfyUI is at work on its list of models
    gc.collect()
    assert held() is None
    host.models.best(None, None)
    assert counted == ["load_dit", "load_vae"] * 2


def test_an_autoencoder_is_loaded_once_for_the_model_it_belongs_to(host, counted):
    model = host.models.load_model(host.models.best_dit())
    for _ in range(3):
        host.models.best(model, None)
    assert counted == ["load_dit", "load_vae"]


def test_an_exported_nano_gets_nanos_autoencoder_and_not_the_published_one(host, monkeypatch, tmp_path):
    files = host.pack("nodes.files")
    mine = tmp_path / "mine.safetensors"
    shutil.copy(files.NANO_DIT, mine)
    monkeypatch.setattr(host.models.host, "model_files", lambda: [(mine.name, mine)])
    monkeypatch.setattr(files, "download", lambda *_: pytest.fail("nothing has to be fetched"))
    assert files.vae_of(mine) == files.NANO_VAE


def test_a_silent_download_is_shown_and_can_be_stopped(pack):
    progress, seen, stopped = pack("nodes.progress"), [], threading.Event()

    def download(note) -> None:
        note("download", 1, 9)
        try:
            for _ in range(100):
                time.sleep(0.05)
                if len(seen) >= 3:
                    note("download", 2, 9)
        except pack("seedvr2_core.errors").Cancelled:
            stopped.set()

    def show(*at: object) -> None:
        seen.append(at)
        if len(seen) == 3:
            raise KeyboardInterrupt

    progress.LOOK_EVERY = 0.02
    with pytest.raises(KeyboardInterrupt):
        progress.in_background(download, show)
    assert seen[-1] == ("download", 1, 9) and stopped.is_set()


def test_what_a_download_gives_or_raises_arrives(pack):
    progress = pack("nodes.progress")
    assert progress.in_background(lambda note: "file", lambda *_: None) == "file"
    with pytest.raises(ValueError, match="no connection"):
        progress.in_background(lambda note: (_ for _ in ()).throw(ValueError("no connection")).send(None), print)
