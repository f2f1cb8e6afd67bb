"""What is chosen for hardware that is not here."""

import logging

import pytest
import torch

from seedvr2_core.device import pick_dtype

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


def test_a_type_asked_for_by_name_is_used_wherever_it_is(gpus):
    assert pick_dtype("bf16", torch.device("cuda:1")) == torch.bfloat16
