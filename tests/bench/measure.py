"""How this project measures: contenders in turn, warmed up, median of several; memory in a process of its own.

A bench script lists its cases and calls `main`. Every run prints a table, writes one JSON file and ends with the same
as one JSON line.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from seedvr2_core.device import pick_dtype

RESULTS = Path(__file__).parent / "results"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Side of the square matrices whose product tells what this machine can do, by device.
GEMM_SIDE = {"cpu": 1024, "cuda": 8192}

Call = Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One thing to compute, and who computes it."""

    name: str
    # By name: builds weights and inputs on a device. A partial of a module's function, so that another process gets it.
    contenders: Mapping[str, Callable[[torch.device], Call]]
    reference: str  # contender whose output the others are compared with
    # Contender -> the one it wants to be faster than.
    against: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one call. `busy` is CPU time per thread, or time between CUDA events: other programs count less."""

    first: float
    median: float
    minimum: float
    maximum: float
    busy: float


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one call in a fresh process: what was held before it, and how much more at its peak."""

    held: int
    peak: int
    reserved: int | None = None  # by torch's allocator in all; on a GPU only


@dataclass(frozen=True, kw_only=True)
class Options:
    device: torch.device
    threads: int
    warmups: int
    runs: int
    quick: bool


def dtypes(options: Options) -> dict[str, torch.dtype]:
    """The types to measure: bf16 only where the device multiplies in it, as emulated it would take hours."""
    if options.quick or options.device.type != "cpu" or pick_dtype("auto", options.device) is torch.bfloat16:
        return DTYPES
    return {"fp32": torch.float32}


@torch.no_grad()
def build(make: Callable[[], nn.Module], dtype: torch.dtype, device: torch.device, seed: int = 0) -> nn.Module:
    """A module with random weights, on one device equal for every dtype up to rounding.

    Matrices keep the variance of what they multiply. Norms and scales lie around 1 and biases around 0, but none of
    them is exactly that, because a shortcut that forgets a bias must show in the result.
    """
    with torch.device("meta"):
        module = make()
    # Straight into the final type: fp32 weights that are thrown away again would count as memory in use.
    module = module.to(dtype).to_empty(device=device).requires_grad_(False).eval()
    # Where it computes: a CPU would draw a large transformer's weights for a minute.
    draw = torch.Generator(device).manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=draw, device=device)
        if parameter.ndim > 1:
            parameter.copy_(noise * parameter[0].numel() ** -0.5)
        else:
            centre = 1.0 if name.endswith(("weight", "_scale", "_gate")) else 0.0
            parameter.copy_(centre + 0.1 * noise)
    return module


def random(shape: Sequence[int], dtype: torch.dtype, device: torch.device, seed: int = 1) -> Tensor:
    """Unit Gaussian input, on one device equal for every dtype up to rounding."""
    draw = torch.Generator(device).manual_seed(seed)
    return torch.randn(tuple(shape), generator=draw, device=device).to(dtype)


def relative_l2(value: Tensor, reference: Tensor) -> float:
    """Norm of the difference over the norm of the reference; NaN if either holds one."""
    value, reference = value.double(), reference.double()
    return ((value - reference).norm() / reference.norm()).item()


def time_in_turn(calls: Mapping[str, Call], options: Options) -> tuple[dict[str, Timing], dict[str, Tensor]]:
    """Timings and outputs of all contenders, A B A B, so that what changes on the machine meets all of them."""
    walls: dict[str, list[float]] = {name: [] for name in calls}
    busies: dict[str, list[float]] = {name: [] for name in calls}
    outputs: dict[str, Tensor] = {}
    for _ in range(options.warmups + options.runs):
        for name, call in calls.items():
            wall, busy, output = _timed(call, options)
            walls[name].append(wall)
            busies[name].append(busy)
            outputs[name] = output.float().cpu()
    timings = {}
    for name in calls:
        kept = walls[name][options.warmups :]
        timings[name] = Timing(
            first=walls[name][0],
            median=statistics.median(kept),
            minimum=min(kept),
            maximum=max(kept),
            busy=statistics.median(busies[name][options.warmups :]),
        )
    return timings, outputs


def _timed(call: Call, options: Options) -> tuple[float, float, Tensor]:
    if options.device.type != "cuda":
        wall, busy = time.perf_counter(), time.process_time()
        output = call()
        return time.perf_counter() - wall, (time.process_time() - busy) / options.threads, output
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    wall = time.perf_counter()
    start.record()
    output = call()
    end.record()
    torch.cuda.synchronize()
    return time.perf_counter() - wall, start.elapsed_time(end) / 1000, output


def measure_memory(make: Callable[[torch.device], Call], options: Options) -> Memory | None:
    """Memory of a first call, on a CPU in a fresh process; None where the system does not tell."""
    if options.device.type == "cuda":
        # Torch's allocator knows what is whose, and a process takes longer to start than most of what is measured.
        return _memory(make, options)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(_memory, make, options).result()


@torch.inference_mode()
def _memory(make: Callable[[torch.device], Call], options: Options) -> Memory | None:
    torch.set_num_threads(options.threads)
    call = make(options.device)
    if options.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - held
        return Memory(held=held, peak=peak, reserved=torch.cuda.max_memory_reserved())
    # Not getrusage: its maximum is inherited from the process that started this one, and cannot be set back after
    # loading. Linux's own high-water mark can.
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    held = _resident("VmRSS")
    call()
    return Memory(held=held, peak=_resident("VmHWM") - held)


def _resident(name: str) -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[name].split()[0]) * 1024


@torch.inference_mode()
def measure(case: Case, options: Options) -> list[dict]:
    """One row for each contender of a case; of one that fails, or gives what is no number, the row has an "error" and
    no figures."""
    memory, errors = {}, {}
    # Before anything large is built here, so that the processes do not compete for memory.
    for name, make in case.contenders.items():
        try:
            memory[name] = measure_memory(make, options)
        except Exception as error:  # whatever it is, the others shall be measured
            errors[name] = f"{type(error).__name__}: {error}"
            print(f"{case.name} {name} failed: {errors[name]}", file=sys.stderr, flush=True)
    calls = {name: case.contenders[name](options.device) for name in memory}
    timings, outputs = time_in_turn(calls, options)
    rows = []
    for name, output in outputs.items():
        if not output.isfinite().all():
            errors[name] = "gave NaN or infinity"
            continue
        other = case.against.get(name)
        compared = name != case.reference and case.reference in outputs
        rows.append(
            {
                "case": case.name,
                "contender": name,
                "seconds": asdict(timings[name]),
                "memory": asdict(memory[name]) if memory[name] else None,
                "relative_l2": relative_l2(output, outputs[case.reference]) if compared else None,
                "against": other,
                "speedup": timings[other].median / timings[name].median if other in timings else None,
            }
        )
    return rows + [{"case": case.name, "contender": name, "error": error} for name, error in errors.items()]


def table(rows: Sequence[dict]) -> str:
    """Rows for reading; "-" where there is no figure."""
    head = ("case", "contender", "median s", "min..max", "busy s", "first s", "peak MB", "rel. L2", "speed-up")
    lines = [head]
    for row in rows:
        if "error" in row:
            continue
        seconds, memory = row["seconds"], row["memory"]
        lines.append(
            (
                row["case"],
                row["contender"],
                f"{seconds['median']:.3f}",
                f"{seconds['minimum']:.3f}..{seconds['maximum']:.3f}",
                f"{seconds['busy']:.3f}",
                f"{seconds['first']:.3f}",
                _number(memory and memory["peak"] / 1e6, ".0f"),
                _number(row["relative_l2"], ".1e"),
                _number(row["speedup"], ".2f"),
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    padded = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(line.rstrip() for line in padded)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


@torch.inference_mode()
def gemm_rate(dtype: torch.dtype, device: torch.device) -> float:
    """TFLOP/s of a large square product: how fast this machine is, to compare runs on different ones by."""
    side = GEMM_SIDE.get(device.type, GEMM_SIDE["cpu"])
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / min(seconds) / 1e12


def environment(options: Options) -> dict:
    """Versions and hardware of a run."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _output("git", "describe", "--always", "--dirty"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],  # more than a run's own threads: others were computing
        "threads": options.threads,
        "gpu": torch.cuda.get_device_name() if options.device.type == "cuda" else None,
        "cudnn": torch.backends.cudnn.version() if options.device.type == "cuda" else None,
        # In fp32: of matrix products, and of convolutions.
        "tf32": [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32],
        "gemm_tflops": {
            str(dtype).removeprefix("torch."): round(gemm_rate(dtype, options.device), 3)
            for dtype in (torch.float32, torch.bfloat16)
        },
    }


def _output(*command: str) -> str | None:
    try:
        answer = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def main(name: str, list_cases: Callable[[Options], Sequence[Case]]) -> None:
    """Parse the command line of the bench `name`, run its cases and report.

    Args:
        list_cases: the cases for these options; `quick` asks for tiny ones that only show that everything runs.
    """
    parser = argparse.ArgumentParser(prog=f"python -m tests.bench.{name}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--runs", type=int, default=5, help="timed calls of each contender")
    parser.add_argument("--warmups", type=int, default=2, help="calls before those")
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="only the cases whose name contains one of these")
    parser.add_argument("--quick", action="store_true", help="a smoke run: tiny sizes, nothing is written")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON file")
    args = parser.parse_args()
    options = Options(
        device=torch.device(args.device),
        threads=args.threads,
        warmups=args.warmups,
        runs=args.runs,
        quick=args.quick,
    )
    torch.set_num_threads(options.threads)
    cases = [case for case in list_cases(options) if not args.cases or any(part in case.name for part in args.cases)]
    if not cases:
        parser.error(f"no case is called {' or '.join(args.cases)}")
    report = {"bench": name, "quick": options.quick, "environment": environment(options), "rows": []}
    for case in cases:
        rows = measure(case, options)
        report["rows"] += rows
        # At once: what comes later may fail or take too long.
        print(table(rows), file=sys.stderr, flush=True)
    print(table(report["rows"]))
    if not options.quick:
        args.out.mkdir(parents=True, exist_ok=True)
        stamp = report["environment"]["date"][:16].replace(":", "").replace("-", "")
        (args.out / f"{name}-{options.device.type}-{stamp}.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))
    if any("error" in row for row in report["rows"]):
        sys.exit(1)
