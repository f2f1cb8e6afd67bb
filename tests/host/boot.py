"""Run ComfyUI's main.py: `python boot.py FOLDER [ComfyUI's arguments]`.

Test machines may pair a torchvision built for CUDA with a torch for the CPU. Such a torchvision fails to import for two
operators that nothing here calls; with their schemas defined it imports.
"""

from __future__ import annotations

import importlib
import os
import runpy
import sys

import torch

OPERATORS = ("torchvision::nms", "torchvision::qnms")
SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def import_torchvision() -> None:
    """Import torchvision, with a second try that knows the two operators."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        for operator in OPERATORS:
            torch.library.define(operator, SCHEMA)
        importlib.import_module("torchvision")


if __name__ == "__main__":
    folder = sys.argv[1]
    import_torchvision()
    # As if main.py itself had been called, from its own folder.
    sys.path[0] = folder
    sys.argv = [os.path.join(folder, "main.py"), *sys.argv[2:]]
    runpy.run_path(sys.argv[0], run_name="__main__")
