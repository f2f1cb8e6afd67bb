"""Where tests find the golden numbers and the sample media."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent
# The full set lies beside the checkout; the few files that matter most are copied into tests/golden.
SHARED = Path(os.environ.get("SEEDVR2_SHARED", HERE.parent.parent / "shared"))

# Without a GPU, Triton's kernels run in its interpreter; torch may import Triton long before a test does.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _alike():
    torch.manual_seed(0)
    # Tensors are tiny here: more threads, as a command of an earlier test may have asked for, only wait for each other.
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def golden():
    """Load a golden case by name: golden("vae/modules") -> (tensors, meta)."""

    def load(name: str) -> tuple[dict[str, torch.Tensor], dict]:
        for root in (HERE / "golden", SHARED / "golden"):
            if (root / f"{name}.json").exists():
                tensors = root / f"{name}.safetensors"
                return load_file(tensors) if tensors.exists() else {}, json.loads((root / f"{name}.json").read_text())
        pytest.skip(f"golden file {name} is neither in tests/golden nor beside the checkout ({SHARED / 'golden'})")

    return load


@pytest.fixture(scope="session")
def sample():
    """Path of a sample clip or photo beside the checkout: sample("lq/clips/NAME.mp4")."""

    def find(name: str) -> Path:
        path = SHARED / "data" / name
        if not path.exists():
            pytest.skip(f"sample media {name} is not beside the checkout ({SHARED / 'data'})")
        return path

    return find
