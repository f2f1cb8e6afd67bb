"""Compile every kernel as it is launched, for GPUs that need not be there. `python -m tests.core.kernels.offline 80 90`

Prints one JSON list: of every compiled kernel its GPU, name, shared memory in bytes and some of its instructions. The
launching code runs as it is, on tensors without data; only the launch itself is left out.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from seedvr2_core.attention import windows
from seedvr2_core.kernels import causal_conv3d, frame_attention, group_norm, modulate

INSTRUCTIONS = ("wgmma.mma_async", "cp.async.bulk.tensor", "cp.async.cg", "mma.sync")
launch = JITFunction.run


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    x = torch.empty(shape, dtype=dtype, device="meta")
    return x.to(memory_format=torch.channels_last_3d) if x.ndim == 5 else x


def norms() -> None:
    # Triton compiles anew where a size is 1; and the autoencoder hands over single frames, without anything to add.
    for x in (empty(1, 128, 6, 720, 1280)[:, :, 2:], empty(1, 512, 1, 90, 160)):
        row = empty(x.shape[1])
        group_norm.add_residual(x, x, 32, row)
        group_norm.apply_norm_silu(x, group_norm.group_statistics(x, 32), row, row, 1e-6)


def modulations() -> None:
    x, row = empty(25200, 2560), empty(1, 2560, dtype=torch.float32)
    modulate.norm_modulate(x, row, row, 1e-5)
    modulate.gate_residual(x, x, row)


def convolutions(capability: int) -> None:
    for c_in, c_out, taps, t in ((128, 128, 3, 4), (512, 256, 1, 1), (128, 3, 3, 1)):
        x, weight = empty(1, c_in, t + taps - 1, 90, 160), empty(c_out, c_in, taps, 3, 3)
        residual = empty(1, c_out, t, 90, 160)
        for tile in causal_conv3d.tiles(divmod(capability, 10), c_in, c_out):
            if c_out % 32 == 0:
                causal_conv3d.causal_conv3d_with_statistics(x, weight, tile, 32, empty(c_out), residual)
            else:
                causal_conv3d.causal_conv3d(x, weight, tile, empty(c_out))


def attention() -> None:
    def stream(tokens: int) -> windows.StreamCall:
        q, k, v = empty(tokens, 3, 20, 128).unbind(1)
        return windows.StreamCall(q=q, k=k, v=v, norm_q=empty(128), norm_k=empty(128))

    turns = empty(870 + 58, 63, dtype=torch.float32)
    made = windows.window_map(empty(870, dtype=torch.int64), [[810, 60]], [58], "meta")
    call = windows.WindowCall(vid=stream(870), txt=stream(58), cos=turns, sin=turns, eps=1e-5, windows=made)
    for tile in windows.TILES:
        windows.attend(call, tile)
    # As in the last layer.
    windows.attend(replace(call, txt=replace(call.txt, q=None)), windows.TILES[0])


def frames(capability: int) -> None:
    q, k, v = empty(3, 2, 14400, 512).unbind()
    for tile in frame_attention.tiles(divmod(capability, 10), 512):
        frame_attention.attend(q, k, v, tile)


def main() -> None:
    made = []

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        ptx = kernel.asm["ptx"]
        made.append(
            {
                "capability": capability,
                "kernel": self.__name__,
                "shared": kernel.metadata.shared,
                "uses": [name for name in INSTRUCTIONS if name in ptx],
            }
        )
        return kernel

    JITFunction.run = compile_only
    for capability in map(int, sys.argv[1:]):
        gpu = SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", capability, 32),  # noqa: B023, used in this round alone
            get_current_device=lambda: capability,  # noqa: B023
            get_current_stream=lambda device: 0,
        )
        driver.set_active(gpu)
        norms()
        modulations()
        convolutions(capability)
        attention()
        frames(capability)
    print(json.dumps(made))


if __name__ == "__main__":
    main()
