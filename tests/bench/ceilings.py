"""What a machine can do at most, and with which libraries. `python -m tests.bench.ceilings --device cuda`

Products of large matrices, a copy, and one convolution in each memory format: PyTorch has taken some versions' 3-D
convolutions off cuDNN, which shows here as a tenth of the speed, and in the names of the kernels that ran.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from seedvr2_core.models.linear import to_fp8, why_not_fp8
from tests.bench.measure import GEMM_SIDE, RESULTS, Options, Timing, environment, random, time_in_turn

PACKAGES = ("torch", "triton", "flash-attn", "flash-attn-3", "sageattention", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")
# Bytes of the tensor that is copied: far more than any cache holds.
COPIED = {"cpu": 1 << 28, "cuda": 1 << 31}
# Channels, and a slice that the decoder has at them: frames with the two before, height, width.
CONVOLUTIONS = ((128, (6, 384, 672)), (512, (6, 96, 168)))
QUICK_CONVOLUTIONS = ((16, (3, 12, 16)),)
DTYPE = torch.bfloat16


def versions() -> dict[str, str | None]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def hardware(device: torch.device) -> dict[str, object]:
    if device.type != "cuda":
        return {}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": [properties.major, properties.minor],
        "multiprocessors": properties.multi_processor_count,
        "bytes": properties.total_memory,
        "free_bytes": torch.cuda.mem_get_info(device)[0],
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def once(call: Callable[[], torch.Tensor], options: Options) -> Timing:
    def part() -> torch.Tensor:
        # A corner is a view, whatever the memory format.
        out = call()
        return out[tuple(slice(0, 4) for _ in out.shape)]

    return time_in_turn({"it": part}, options)[0]["it"]


def fp8_rate(options: Options) -> float | str:
    """TFLOP/s, or why there are none."""
    if options.device.type != "cuda":
        return "needs a CUDA device"
    side = GEMM_SIDE["cuda"]
    a, b = (torch.randn(side, side, device=options.device, dtype=DTYPE) for _ in range(2))
    if reason := why_not_fp8(b):
        return reason
    (rows, scale), (weight, weight_scale) = to_fp8(a), to_fp8(b)
    taken = once(lambda: torch._scaled_mm(rows, weight.t(), scale, weight_scale.t(), None, out_dtype=DTYPE), options)
    return 2 * side**3 / taken.busy / 1e12


def copy_rate(options: Options) -> float:
    """TB/s, reading and writing counted."""
    count = COPIED[options.device.type] // (64 if options.quick else 1)
    source = torch.empty(count, dtype=torch.uint8, device=options.device)
    target = torch.empty_like(source)
    return 2 * count / once(lambda: target.copy_(source), options).busy / 1e12


def convolution_rows(options: Options) -> list[dict]:
    """TFLOP/s of 3-D convolutions by memory format, and what ran."""
    rows = []
    for channels, shape in QUICK_CONVOLUTIONS if options.quick else CONVOLUTIONS:
        for name, memory in (("NCDHW", torch.contiguous_format), ("channels_last_3d", torch.channels_last_3d)):
            x = random((1, channels, *shape), DTYPE, options.device).to(memory_format=memory)
            weight = random((channels, channels, 3, 3, 3), DTYPE, options.device, seed=2).to(memory_format=memory)

            def call(x: torch.Tensor = x, weight: torch.Tensor = weight) -> torch.Tensor:
                return F.conv3d(x, weight, padding=(0, 1, 1))

            timing = once(call, options)
            operations = 2 * 27 * channels * call().numel()
            rows.append(
                {
                    "channels": channels,
                    "shape": shape,
                    "format": name,
                    "tflops": operations / timing.busy / 1e12,
                    "seconds": asdict(timing),
                    "kernels": kernels_of(call, options),
                }
            )
    return rows


def kernels_of(call: Callable[[], torch.Tensor], options: Options) -> list[str]:
    """Names of the kernels of a call on a GPU; where nothing can watch it, why."""
    if options.device.type != "cuda":
        return []
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            call()
            torch.cuda.synchronize()
    except (AssertionError, RuntimeError) as error:
        return [f"unseen: {error}"]
    return sorted({event.name for event in seen.events()})


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.ceilings", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--quick", action="store_true", help="a smoke run: tiny sizes, nothing is written")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    options = Options(
        device=torch.device(args.device),
        threads=args.threads,
        warmups=2,
        runs=2 if args.quick else 10,
        quick=args.quick,
    )
    start = time.perf_counter()
    report = {
        "bench": "ceilings",
        "quick": args.quick,
        "environment": environment(options),
        "versions": versions(),
        "hardware": hardware(options.device),
        "fp8_tflops": fp8_rate(options),
        "copy_tb_per_s": copy_rate(options),
        "convolutions": convolution_rows(options),
    }
    report["seconds"] = time.perf_counter() - start
    if not args.quick:
        args.out.mkdir(parents=True, exist_ok=True)
        stamp = report["environment"]["date"][:16].replace(":", "").replace("-", "")
        (args.out / f"ceilings-{args.device}-{stamp}.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
