"""Everything there is to measure on a GPU, in steps of less than ten minutes. `python -m tests.bench.gpu --out DIR`

Every step is a run of its own: one of the other benches, or the tests that need a GPU; what matters most comes first.
What a step printed and found is kept in the folder as STEP.txt and STEP.json, so a second call goes on with the steps
that are missing, and then with those that failed; `--step NAME` runs only that one. All of it, and which kernels were
chosen, is put together in all.json. Where a machine is lent for some minutes at a time, `--minutes` ends a call in
time. `--quick --device cpu` shows on any machine that nothing here is
broken.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests.bench.measure import RESULTS

ROOT = Path(__file__).parents[2]
# Seconds that a step may take; a little less than what machines are lent for at a time.
LIMIT = 570
# With less left than this no step is begun.
TOO_SHORT = 30
# Seconds that one of the tests may take, so that one that hangs is named.
LONGEST_TEST = 120
# Characters of what a step printed that are put together with the others'.
TOLD = 6000
BRIEFLY = ("--warmups", "1", "--runs", "3")


@dataclass(frozen=True)
class Step:
    """`python -m MODULE ARGUMENTS`, with a device added, and --quick or --out."""

    name: str
    module: str
    arguments: tuple[str, ...] = ()
    needs_gpu: bool = False
    is_bench: bool = True

    def command(self, device: str, quick: bool, out: Path) -> list[str]:
        command = [sys.executable, "-m", self.module, *self.arguments]
        if not self.is_bench:
            return command
        return [*command, "--device", device, *(["--quick"] if quick else ["--out", str(out)])]


def tests(name: str, *paths: str) -> Step:
    """The tests in these parts of tests/core that need a GPU."""
    where = (f"tests/core/{path}" for path in paths)
    options = ("-v", "--tb=short", "--durations=8", "-p", "no:cacheprovider", "-o", f"timeout={LONGEST_TEST}")
    return Step(name, "pytest", ("-m", "gpu", *where, *options), needs_gpu=True, is_bench=False)


STEPS = (
    Step("ceilings", "tests.bench.ceilings"),
    # Apart, because a kernel that breaks the GPU's state takes all tests of its process with it. File by file, because
    # others may need packages that a lent machine does not have.
    tests("tests_library", "attention/test_attention.py", "checkpoints/test_load.py", "memory/test_plan.py",
          "memory/test_streaming.py", "models/test_linear.py", "video/test_transfers.py"),
    tests("tests_models", "test_gpu.py"),
    tests("tests_kernels", "kernels", "attention/test_triton_windows.py", "models/test_chosen.py"),
    Step("720p_25", "tests.bench.pipeline", ("720p_25", "--library")),
    # Without a GPU all cases are as small as the first.
    *(
        Step(case, "tests.bench.pipeline", (case, "--library"), needs_gpu=True)
        for case in ("paper_100", "1080p_25", "image_4k")
    ),
    Step("paper_100_7b", "tests.bench.pipeline", ("paper_100", "--model", "7b"), needs_gpu=True),
    Step("dit", "tests.bench.dit", BRIEFLY),
    Step("fp8", "tests.bench.fp8"),
    # The sweep over convolutions: NCDHW, channels-last and our own kernel.
    *(
        Step(f"conv_{channels}", "tests.bench.kernels", (*BRIEFLY, "--cases", f"conv {channels}->"), needs_gpu=True)
        for channels in (128, 256, 512)
    ),
    Step("norms", "tests.bench.kernels", (*BRIEFLY, "--cases", "norm", "modulate"), needs_gpu=True),
    Step("attention", "tests.bench.kernels", (*BRIEFLY, "--cases", "windows", "frame"), needs_gpu=True),
    Step("vae_image", "tests.bench.vae", (*BRIEFLY, "--cases", " 1x")),
    Step("vae_5", "tests.bench.vae", (*BRIEFLY, "--cases", " 5x")),
    Step("vae_9", "tests.bench.vae", (*BRIEFLY, "--cases", " 9x"), needs_gpu=True),
    Step("memory", "tests.bench.memory"),
    Step("vae_25", "tests.bench.vae", (*BRIEFLY, "--cases", " 25x"), needs_gpu=True),
)  # fmt: skip


def run(step: Step, device: str, quick: bool, out: Path, limit: float = LIMIT) -> bool:
    """Run a step for so many seconds at most and keep what came of it; whether it succeeded."""
    command = step.command(device, quick, out)
    # Benches are modules of this checkout, wherever this was started from; kernels are to be compiled.
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    variables = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "XDG_CACHE_HOME": str(out / "cache")}
    if device == "cuda":
        variables["TRITON_INTERPRET"] = "0"
    start = time.perf_counter()
    text = out / f"{step.name}.txt"
    with text.open("w") as log:
        # With a session of its own, so that processes that it starts end with it and leave the GPU to the next.
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | variables, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    seconds = time.perf_counter() - start
    result = {
        "step": step.name,
        "command": ["python", *command[1:]],
        "quick": quick,
        "device": device,
        "code": code,  # None: it took too long
        "seconds": round(seconds, 1),
        "report": last_report(text.read_text()) if step.is_bench else None,
    }
    (out / f"{step.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    state = "done" if code == 0 else f"took longer than {limit:.0f} s" if code is None else f"FAILED with code {code}"
    print(f"{step.name}: {state}, {seconds:.0f} s", flush=True)
    return code == 0


def put_together(out: Path) -> None:
    """One file of all that is known so far."""
    kernels = out / "cache" / "seedvr2" / "kernels.json"
    steps = [json.loads(file.read_text()) for step in STEPS if (file := out / f"{step.name}.json").exists()]
    for step in steps:
        step["printed"] = (out / f"{step['step']}.txt").read_text()[-TOLD:]
    found = {"steps": steps, "kernels": json.loads(kernels.read_text()) if kernels.exists() else None}
    (out / "all.json").write_text(json.dumps(found, indent=1) + "\n")


def last_report(text: str) -> dict | None:
    """The JSON line that a bench ends with."""
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            try:
                return json.loads(line)
            except ValueError:
                return None
    return None


def before(step: Step, out: Path, quick: bool, device: str) -> Literal["done", "failed", "missing"]:
    """What became of a step in an earlier call; one that took too long is missing."""
    try:
        kept = json.loads((out / f"{step.name}.json").read_text())
    except (OSError, ValueError):
        return "missing"
    if kept["code"] is None or (kept["quick"], kept["device"]) != (quick, device):
        return "missing"
    return "failed" if kept["code"] else "done"


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is to be run; 0 if all of it succeeded."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu", help="folder for what comes of it")
    parser.add_argument("--step", nargs="+", choices=[step.name for step in STEPS], help="only these, done or not")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin and cut steps so as to end by then")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    args = parser.parse_args(argv)
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    end = time.perf_counter() + 60 * args.minutes
    states = {step: before(step, out, args.quick, args.device) for step in STEPS}
    ok = True
    for step in sorted(STEPS, key=lambda step: states[step] == "failed"):
        left = end - time.perf_counter()
        if args.step and step.name not in args.step:
            continue
        if step.needs_gpu and args.device != "cuda":
            print(f"{step.name}: left out, it needs a GPU", flush=True)
        elif not args.step and states[step] == "done":
            print(f"{step.name}: done before", flush=True)
        elif left < TOO_SHORT:
            print(f"{step.name}: left for another call", flush=True)
            ok = False
        else:
            ok = run(step, args.device, args.quick, out, min(LIMIT, left)) and ok
            put_together(out)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
