"""What is chosen for hardware that is not here."""

import io
import logging
from types import SimpleNamespace

import pytest
import torch

from seedvr2_core import device, loading
from seedvr2_core.device import pick_dtype

CPU = torch.device("cpu")
# The second GPU of this machine is a T4.
CAPABILITIES = {None: (9, 0), 0: (9, 0), 1: (7, 5)}


@pytest.fixture
def gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: CAPABILITIES[device.index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    # It emulates, and speaks of the current device.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)


@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_a_gpu_that_multiplies_bf16_computes_in_it(gpus, caplog, name):
    with caplog.at_level(logging.INFO):
        assert pick_dtype("auto", torch.device(name)) == torch.bfloat16
    assert not caplog.records


def test_a_gpu_that_would_emulate_bf16_computes_in_fp32_and_says_so(gpus, caplog):
    with caplog.at_level(logging.INFO):
        assert pick_dtype("auto", torch.device("cuda:1")) == torch.float32
    assert [record.message for record in caplog.records] == [
        "GPU 1 has no bf16, so it computes in fp32, which takes twice the memory"
    ]


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [
        ("gfx942:sramecc+:xnack-", torch.bfloat16),  # MI300
        ("gfx90a", torch.bfloat16),
        ("gfx906", torch.float32),
        ("gfx1030", torch.float32),  # RDNA 2
        ("gfx1100", torch.bfloat16),
        ("gfx1201", torch.bfloat16),
    ],
)
def test_a_gpu_of_amd_is_known_by_its_architecture(gpus, monkeypatch, architecture, dtype):
    monkeypatch.setattr(torch.version, "hip", "7.2")
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName=architecture)
    )
    assert pick_dtype("auto", torch.device("cuda:0")) == dtype


def test_a_type_asked_for_by_name_is_used_wherever_it_is(gpus):
    assert pick_dtype("bf16", torch.device("cuda:1")) == torch.bfloat16


@pytest.mark.parametrize(("flags", "warned"), [("fma avx2", True), ("avx512f avx512_bf16", False)])
def test_a_type_that_a_cpu_emulates_is_used_with_a_warning(monkeypatch, caplog, flags, warned):
    monkeypatch.setattr(device, "open", lambda _: io.StringIO(f"flags : {flags}\n"), raising=False)
    assert pick_dtype("bf16", CPU) == torch.bfloat16
    assert [record.levelname for record in caplog.records] == ["WARNING"] * warned
    assert pick_dtype("auto", CPU) == (torch.float32 if warned else torch.bfloat16)


def test_a_limit_holds_while_models_are_loaded(monkeypatch):
    monkeypatch.setattr(loading, "free_bytes", lambda _: 80)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 30)
    gpu = torch.device("cuda")
    assert [loading.room(gpu, limit) for limit in (None, 50, 200)] == [80, 20, 80]
