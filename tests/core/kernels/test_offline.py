"""Kernels compile for GPUs that are not there, and use what those GPUs are good at."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Half a minute for each GPU.
pytestmark = pytest.mark.slow

# Shared memory that one block may have, in bytes, by compute capability.
SHARED = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10}
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Everything, for a compute capability. In processes of their own, where Triton does not interpret."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs the package triton")
    # What runs tests beside this one would compile the same.
    cache = tmp_path_factory.getbasetemp().parent / "triton"
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}

    @functools.cache
    def compile_for(capability: int) -> list[dict]:
        command = [sys.executable, "-m", "tests.core.kernels.offline", str(capability)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return compile_for


def of(compiled, capability, kernel):
    found = [entry for entry in compiled(capability) if entry["kernel"] == kernel]
    assert found
    return found


# The small Ampere gets what the large one does, in smaller tiles.
@pytest.mark.parametrize("capability", [80, 86, 90])
def test_every_kernel_compiles_and_fits_shared_memory(compiled, capability):
    mine = compiled(capability)
    expected = {"statistics_kernel", "apply_kernel", "norm_modulate_kernel", "gate_residual_kernel", "pointer_kernel",
                "key_kernel", "window_kernel", "frame_kernel"}  # fmt: skip
    assert {entry["kernel"] for entry in mine} == expected | ({"descriptor_kernel"} if capability == 90 else set())
    assert [entry for entry in mine if entry["shared"] > SHARED[capability]] == []


def test_hopper_multiplies_with_its_own_instructions_and_copies_boxes(compiled):
    for entry in of(compiled, 90, "descriptor_kernel"):
        assert entry["uses"] == ["wgmma.mma_async", "cp.async.bulk.tensor"]
    for kernel in ("pointer_kernel", "window_kernel"):
        assert all(entry["uses"] == ["wgmma.mma_async", "cp.async.cg"] for entry in of(compiled, 90, kernel))


def test_ampere_loads_ahead_and_multiplies_with_tensor_cores(compiled):
    for kernel in ("pointer_kernel", "window_kernel"):
        assert all(entry["uses"] == ["cp.async.cg", "mma.sync"] for entry in of(compiled, 80, kernel))
