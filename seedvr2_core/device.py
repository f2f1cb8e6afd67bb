"""What this machine offers: the only file of the engine that looks."""

from __future__ import annotations

import logging
from typing import Literal

import torch

from .errors import SettingError

log = logging.getLogger(__name__)

DtypeName = Literal["auto", "fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Compute capability of the first GPUs whose tensor cores multiply bf16.
AMPERE = (8, 0)
# Architectures of AMD as they are named, read as hexadecimal numbers: the first for computing centres and the first for
# desktops that multiply bf16. All numbers of the former are below all of the latter.
CDNA, BEFORE_RDNA, RDNA3 = 0x908, 0x1000, 0x1100
# Assumed where the system does not say how much memory is free, in bytes.
UNKNOWN_FREE = 4 << 30


def pick_device(name: str = "auto") -> torch.device:
    """The device of this name; "auto" is the first of cuda, mps and cpu that is there.

    Raises:
        SettingError: there is no such device, or it is not available here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise SettingError(f"Device {name!r} cannot be used here ({reason}); try 'cpu' or 'auto'.") from error
    return device


def pick_dtype(name: DtypeName, device: torch.device) -> torch.dtype:
    """The type to compute in; "auto" is bf16 where the hardware multiplies in it, else fp32.

    fp16 is never chosen: activations of the transformer overflow in it.
    """
    if name != "auto":
        warn_of_emulation(DTYPES[name], device)
        return DTYPES[name]
    fast = _gpu_has_bf16(device) if device.type == "cuda" else device.type == "cpu" and _cpu_has_bf16()
    return torch.bfloat16 if fast else torch.float32


def warn_of_emulation(dtype: torch.dtype, device: torch.device, remedy: str = "choose fp32") -> None:
    """Say so, and what to do, if this type will be far slower than fp32 on a CPU."""
    if device.type == "cpu" and dtype.itemsize < 4 and not (dtype == torch.bfloat16 and _cpu_has_bf16()):
        log.warning(
            "This CPU has no instructions for %s, and takes 4 to 60 times as long in it; %s",
            str(dtype).removeprefix("torch."),
            remedy,
        )


def _gpu_has_bf16(device: torch.device) -> bool:
    """What torch says counts emulation, which is slower than fp32, and is about the current device only."""
    if torch.version.hip:
        architecture = torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
        number = int(architecture.removeprefix("gfx"), 16)
        fast = CDNA <= number < BEFORE_RDNA or number >= RDNA3
    else:
        fast = torch.cuda.get_device_capability(device) >= AMPERE
    if fast:
        return True
    log.info(
        "%s has no bf16, so it computes in fp32, which takes twice the memory", torch.cuda.get_device_name(device)
    )
    return False


def _cpu_has_bf16() -> bool:
    """Elsewhere bf16 is emulated on a CPU, and slower than fp32."""
    try:
        with open("/proc/cpuinfo") as file:
            flags = next((line for line in file if line.startswith("flags")), "").split()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device, in bytes; a guess where the system does not say."""
    if device.type == "cuda":
        # What torch keeps for later is free as well.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return UNKNOWN_FREE


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out; on a CPU, and in CUDA's own libraries, only the message tells."""
    # The last is what torch says where no way of cuDNN to convolve has found room to work in.
    says = ("can't allocate memory", "out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED", "unable to find an engine")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(part in str(error) for part in says)
