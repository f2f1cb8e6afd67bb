"""On what a run ran: versions, commit and hardware, for env.json."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

from .parallel import Processes

PACKAGES = ("torch", "numpy", "safetensors", "einops", "av", "pillow", "triton", "flash-attn")


def describe_environment(processes: Processes) -> str:
    """The environment as JSON."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return json.dumps(
        {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "packages": {name: version for name in PACKAGES if (version := _version(name))},
            "cuda": torch.version.cuda,
            "gpus": gpus,
            "processes": processes.world,
            "device": str(processes.device),
            "threads": torch.get_num_threads(),
            "commit": _commit(),
            "command": sys.argv,
        },
        indent=1,
    )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of this checkout, with "+" where files differ from it; None outside one."""
    try:
        git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--abbrev=12"]
        return subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
