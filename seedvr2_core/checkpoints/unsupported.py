"""Formats that are known by sight but cannot be read yet, so that the refusal can say what the file is."""

from __future__ import annotations

from pathlib import Path

from .format import Format
from .plain import is_safetensors, safetensors_header

# Names of the tensors that accompany quantised weights: ComfyUI's own formats, and its older scaled fp8.
SCALES = (".comfy_quant", ".weight_scale", ".weight_scale_2", ".scale_weight", "scaled_fp8")
# What a large matrix is never stored in unless it is quantised.
NARROW = ("f6", "f4", "int8", "uint8")


def is_quantised(path: Path) -> bool:
    if not is_safetensors(path):
        return False
    return any(
        name.endswith(SCALES) or (len(info.shape) == 2 and info.dtype.startswith(NARROW))
        for name, info in safetensors_header(path).tensors.items()
    )


QUANTISED = Format(
    name="quantised",
    recognise=is_quantised,
    header=safetensors_header,
    why_not="holds quantised weights (scaled fp8, int8 or fp4), which are not supported yet",
)
