"""A machine with a GPU, for want of one: `python -m tests.pretend_gpu pytest -m gpu tests/core/test_gpu.py`

What runs as cuda:0 is computed by the CPU, but tensors of the two may not meet, and everything that lies on the device
is counted. So this finds what was left on the wrong device, and how much memory is alive at most. It says nothing of
speed, of streams that race, of a library's own memory, or of kernels.

Importing this replaces parts of torch for good; do so before anything imports torch. Needs a C++ compiler and ninja.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

# Bytes of the device. https://www.nvidia.com/en-us/data-center/h100/
TOTAL = int(os.environ.get("PRETEND_GPU_BYTES", 80 << 30))
SOURCE = Path(__file__).parent / "device.cpp"
BUILD = """
import sys
from torch.utils.cpp_extension import load
load("pretend_gpu", [sys.argv[1]], extra_cflags=["-O1", "-w"], build_directory=sys.argv[2], is_python_module=False)
"""


def load_device() -> ModuleType:
    """Build the device, and load it between torch's libraries and torch, which asks only once what there is."""
    if "torch" in sys.modules:
        raise RuntimeError("torch is there already; import tests.pretend_gpu.machine before it")
    torch = Path(importlib.util.find_spec("torch").origin).parent
    build = Path(tempfile.gettempdir()) / f"pretend_gpu_{os.getuid()}_{(torch / 'version.py').stat().st_mtime_ns}"
    built = build / "pretend_gpu.so"
    if not built.exists() or built.stat().st_mtime < SOURCE.stat().st_mtime:
        build.mkdir(exist_ok=True)
        subprocess.run([sys.executable, "-c", BUILD, SOURCE, build], check=True, stdout=subprocess.DEVNULL)
    for name in ("libc10.so", "libtorch_cpu.so", "libtorch.so", "libtorch_python.so"):
        ctypes.CDLL(str(torch / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(built), mode=ctypes.RTLD_GLOBAL)
    import torch

    spec = importlib.util.spec_from_file_location("pretend_gpu", built)
    device = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(device)
    return device


device = load_device()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import Tensor  # noqa: E402


class Event:
    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False):
        self.enable_timing, self.seconds = enable_timing, None

    def record(self, stream: Stream | None = None) -> None:
        self.seconds = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        if not (self.enable_timing and end.enable_timing):
            raise RuntimeError("an event without enable_timing has no time")
        return 1e3 * (end.seconds - self.seconds)

    def wait(self, stream: Stream | None = None) -> None: ...
    def synchronize(self) -> None: ...


class Stream:
    def __init__(self, device: object = None, priority: int = 0):
        self.device = torch.device("cuda", 0)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def wait_stream(self, stream: Stream) -> None: ...
    def wait_event(self, event: Event) -> None: ...
    def synchronize(self) -> None: ...


class Nothing(contextlib.nullcontext):
    """Torch asks of some things whether they are a `torch.cuda.device`."""

    def __init__(self, *_: object):
        super().__init__()


# What torch.cuda says of the device.
STREAM = Stream()
PROPERTIES = SimpleNamespace(name="Pretend GPU", total_memory=TOTAL, major=9, minor=0, multi_processor_count=132)
ANSWERS = {
    "is_available": True,
    "is_initialized": True,
    "device_count": 1,
    "current_device": 0,
    "get_device_capability": (9, 0),
    "get_device_name": PROPERTIES.name,
    "get_device_properties": PROPERTIES,
    "is_bf16_supported": True,
    "is_current_stream_capturing": False,
    "current_stream": STREAM,
    "default_stream": STREAM,
    **dict.fromkeys(["_lazy_init", "set_device", "empty_cache", "synchronize", "manual_seed", "manual_seed_all"]),
}
for name, answer in ANSWERS.items():
    setattr(torch.cuda, name, lambda *_, answer=answer: answer)
torch.cuda.memory_allocated = torch.cuda.memory_reserved = lambda _=None: device.allocated()
torch.cuda.max_memory_allocated = torch.cuda.max_memory_reserved = lambda _=None: device.peak()
torch.cuda.reset_peak_memory_stats = lambda _=None: device.reset_peak()
torch.cuda.mem_get_info = lambda _=None: (TOTAL - device.allocated(), TOTAL)
torch.cuda.get_rng_state, torch.cuda.set_rng_state = lambda _=None: torch.get_rng_state(), lambda state, _=None: None
torch.cuda.Stream, torch.cuda.Event = Stream, Event
torch.backends.cuda.is_flash_attention_available = lambda: True
torch.cuda.stream = torch.cuda.device = torch.cuda.device_of = Nothing

# Pinned memory is memory. A storage keeps its size, and is copied as the tensor of its bytes.
Tensor.pin_memory, Tensor.is_pinned = lambda self, _=None: self.clone(), lambda self, _=None: False
resize = torch.UntypedStorage.resize_


def as_bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


torch.UntypedStorage.resize_ = lambda self, size: self if self.device.type == "cuda" else resize(self, size)
torch.UntypedStorage.clone = lambda self: as_bytes(self).clone().untyped_storage()
torch.UntypedStorage.to = lambda self, *, device, non_blocking=False: as_bytes(self).to(device).untyped_storage()

# Collectives of a single process.


def create_group(common: object, options: object) -> object:
    from torch.testing._internal.distributed.fake_pg import FakeProcessGroup

    make = getattr(FakeProcessGroup, "_create_internal", FakeProcessGroup)
    return make(common.group_rank, common.group_size, FakeProcessGroup.Options())


init_process_group = dist.init_process_group
dist.Backend.register_backend("pretend", create_group, extended_api=True, devices=["cuda"])
dist.init_process_group = lambda backend="", *args, **kwargs: init_process_group(
    backend.replace("nccl", "pretend"), *args, **kwargs
)

# Operations that a CPU does not have. Below the derivatives, so these are written out.
#   l sequences' tokens   h heads   d width of a head


def sequences(q: Tensor, k: Tensor, begins: Tensor, begins_k: Tensor, scale: float | None):
    """Every sequence's place among queries and keys, and its weights h l l."""
    if q.dtype not in (torch.float16, torch.bfloat16) or q.shape[-1] % 8 or q.shape[-1] > 256:
        raise RuntimeError(f"flash attention takes half precision and heads of 8n <= 256, not {q.dtype}, {q.shape[-1]}")
    if not begins.dtype == begins_k.dtype == torch.int32:
        raise RuntimeError(f"flash attention takes int32 for where sequences begin, not {begins.dtype}")
    starts, starts_k = begins.tolist(), begins_k.tolist()
    for a, b, c, e in zip(starts, starts[1:], starts_k, starts_k[1:], strict=False):
        scores = torch.einsum("lhd,khd->hlk", q[a:b].float(), k[c:e].float()) * (scale or q.shape[-1] ** -0.5)
        yield slice(a, b), slice(c, e), scores


def packed_attention(q, k, v, begins, begins_k, most, most_k, dropout, causal, debug, *, scale=None, **_):
    out, normaliser = torch.empty_like(q), q.new_empty(q.shape[1], len(q), dtype=torch.float32)
    for own, keys, scores in sequences(q, k, begins, begins_k, scale):
        out[own] = torch.einsum("hlk,khd->lhd", scores.softmax(-1), v[keys].float()).to(q.dtype)
        normaliser[:, own] = scores.logsumexp(-1)
    return out, normaliser, begins.new_zeros(2), q.new_empty(0), q.new_empty(0)


def packed_attention_backward(g, q, k, v, out, normaliser, begins, begins_k, *_, scale=None, **__):
    gradients = [torch.empty_like(x) for x in (q, k, v)]
    for own, keys, scores in sequences(q, k, begins, begins_k, scale):
        weights, given = scores.softmax(-1), g[own].float()
        to_weights = torch.einsum("lhd,khd->hlk", given, v[keys].float())
        to_scores = weights * (to_weights - (to_weights * weights).sum(-1, keepdim=True))
        to_scores = to_scores * (scale or q.shape[-1] ** -0.5)
        parts = (torch.einsum("hlk,khd->lhd", to_scores, k[keys].float()),
                 torch.einsum("hlk,lhd->khd", to_scores, q[own].float()),
                 torch.einsum("hlk,lhd->khd", weights, given))  # fmt: skip
        for gradient, place, part in zip(gradients, (own, keys, keys), parts, strict=True):
            gradient[place] = part.to(q.dtype)
    return tuple(gradients)


def rms_norm_backward(g, x, shape, inverse, weight, mask):
    last = tuple(range(-len(shape), 0))
    normal = x.float() * inverse.float()
    to_normal = g.float() if weight is None else g.float() * weight.float()
    to_x = inverse.float() * (to_normal - normal * (to_normal * normal).mean(last, keepdim=True))
    to_weight = None if weight is None else (g.float() * normal).flatten(0, -len(shape) - 1).sum(0).to(weight.dtype)
    return to_x.to(x.dtype), to_weight


library = torch.library.Library("aten", "IMPL")
library.impl("_flash_attention_forward", packed_attention, "CUDA")
library.impl("_flash_attention_backward", packed_attention_backward, "CUDA")
library.impl("_fused_rms_norm_backward", rms_norm_backward, "CUDA")
