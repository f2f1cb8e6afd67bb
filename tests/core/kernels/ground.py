"""Where the kernels of these tests run: compiled where there is a GPU, else as numpy in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from torch import Tensor

# Triton reads this once, when it is imported; importing torch's variable-length attention is enough for that. Which is
# why it stands in tests/conftest.py too.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@dataclass(frozen=True)
class Ground:
    """A device, and how close to its fp32 reference a kernel comes there, as relative L2."""

    device: torch.device
    dtype: torch.dtype
    tolerance: float

    def half(self) -> Ground:
        """The same in fp16, which the interpreter multiplies rightly; it does not bf16."""
        return Ground(self.device, torch.float16, 2e-3)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device).to(self.dtype)

    def assert_close(self, got: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
        assert got.shape == expected.shape
        error = torch.linalg.vector_norm(got.double() - expected.double()) / torch.linalg.vector_norm(expected.double())
        # Not "error > tolerance": NaN must fail.
        assert error <= (tolerance or self.tolerance), f"relative L2 is {error:.1e}"


def find_ground() -> Ground:
    """Skips the test where kernels can neither be compiled nor interpreted."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs the package triton")
    if torch.cuda.is_available():
        if torch.cuda.get_device_capability() < (8, 0):
            pytest.skip("needs compute capability 8.0 or later")
        return Ground(torch.device("cuda"), torch.bfloat16, 1e-2)
    import triton.language as tl
    from triton.runtime import interpreter

    if not isinstance(tl.sum, interpreter.InterpretedFunction):
        pytest.skip("Triton was imported before TRITON_INTERPRET=1 was set; set it in the environment")
    _let_loops_run(interpreter)
    return Ground(torch.device("cpu"), torch.float32, 1e-5)


def _let_loops_run(interpreter: ModuleType) -> None:
    """Triton 3.6 keeps scalars in arrays of one element, which NumPy since 2.4 does not take for the end of a range."""
    patch = interpreter._patch_lang_tensor
    if patch.__name__ == "patch_and_index":
        return

    def patch_and_index(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_and_index
