"""The pack in ComfyUI's hands on a GPU, for want of one pretended: whatever ComfyUI does with models, graphs run on,
take what their plan says, and give the same result."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent
# Less than nano takes, in GiB: blocks are streamed.
LITTLE = {"opts.memory_limit": 0.05}
# What a plan cannot know to the byte: the CPU's libraries do not lie on the device.
CLOSE = 0.05

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real one"),
    pytest.mark.skipif(not (shutil.which("c++") and shutil.which("ninja")), reason="needs a C++ compiler and ninja"),
]


def played(comfyui: Path, base: Path, arguments: str, steps: list) -> list[dict]:
    """What every step reports."""
    command = [sys.executable, "-m", "tests.host.pretended", comfyui, base, *arguments.split()]
    room = {**os.environ, "PRETEND_GPU_BYTES": str(2 << 30)}
    run = subprocess.run(command, cwd=ROOT, input=json.dumps(steps), capture_output=True, text=True, env=room)
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]


def planned(report: dict) -> int:
    """Bytes that the plan of a run foresaw."""
    return int(report["plan"].partition("memory ")[2].partition(" MiB")[0]) << 20


@pytest.mark.parametrize("arguments", ["", "dynamic", "--novram", "--gpu-only"])
def test_graphs_run_on_whatever_comfyui_does_with_the_models(comfyui, tmp_path, arguments):
    first, again, _, back, streamed, other, *_, last = played(comfyui, tmp_path / "base", arguments, [
        ["run", {}],
        ["run", {"restore.seed": 1}],
        ["unload"],
        ["run", {}],
        ["run", LITTLE],
        ["run", {**LITTLE, "restore.seed": 1}],
        ["partly", 8 << 20],
        ["unload"],
        ["run", {}],
    ])  # fmt: skip
    runs = [first, again, back, streamed, other, last]
    assert [run["error"] for run in runs] == [None] * 6
    assert [run["frames"] for run in runs] == [[5, 48, 64, 3]] * 6
    assert len({run["result"] for run in (first, back, streamed, last)}) == 1
    assert again["result"] == other["result"] != first["result"]
    for run in (again, back, last):  # with the first, models were loaded
        assert abs(run["peak"] / planned(run) - 1) < CLOSE
    for run in (streamed, other):
        assert "blocks streamed" in run["plan"]
        if arguments != "--gpu-only":  # there the whole transformer waits on the device
            assert run["peak"] <= LITTLE["opts.memory_limit"] * 2**30
            assert abs(run["peak"] / planned(run) - 1) < CLOSE


def test_models_of_others_and_of_nobody_count_as_what_they_are(comfyui, tmp_path):
    """On the CPU, on the device, and left behind by a node that is gone."""
    (found,) = played(comfyui, tmp_path / "base", "", [["others", 64 << 20]])
    assert found["after"] == found["before"] == found["free"]
