"""To the device and back: the same numbers, and no copy where there is nowhere to go."""

from __future__ import annotations

import threading

import pytest
import torch

from seedvr2_core.video.transfers import download, upload

CPU = torch.device("cpu")
TYPES = (torch.uint8, torch.uint16, torch.float32)


def test_on_a_cpu_nothing_is_copied():
    frame = torch.rand(4, 5, 4)[..., :3]
    assert upload(frame, CPU) is frame
    (back,) = download([frame])()
    assert back is frame


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_what_crosses_to_a_gpu_and_back_is_the_same(dtype):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device = torch.device("cuda")
    frames = [(torch.rand(64, 48, 4) * 200).to(dtype)[..., :3] for _ in range(20)]
    busy = torch.rand(2048, 2048, device=device)
    arriving = []
    for frame in frames:
        there = upload(frame, device)
        for _ in range(5):
            busy = (busy @ busy).tanh()  # so that both copies have something to wait for
        arriving.append(download([there, there[:, ::2].contiguous()]))
        del there
    arrived = []
    thread = threading.Thread(target=lambda: arrived.extend(wait() for wait in arriving))
    thread.start()
    thread.join()
    for frame, (whole, half) in zip(frames, arrived, strict=True):
        assert torch.equal(whole, frame) and torch.equal(half, frame[:, ::2])
