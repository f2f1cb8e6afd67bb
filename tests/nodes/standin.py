"""A small stand-in for ComfyUI, which records what nodes are made of and does nothing else: they load without it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
# Modules that host.py imports, and modules of ComfyUI that these are part of.
HOST_MODULES = (
    "comfy", "comfy.cli_args", "comfy.model_management", "comfy.model_patcher", "comfy.patcher_extension",
    "comfy.utils", "folder_paths", "server",
)  # fmt: skip
NAME = "pack_of_this_test"


class Recorded(SimpleNamespace):
    """What an input, an output, an option or a schema was made with."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(args=args, **kwargs)

    @property
    def name(self) -> str:
        return self.args[0]


class StandIn:
    """Has every attribute that is asked for; a call records its arguments."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return Recorded(*args, **kwargs)


@contextmanager
def loaded() -> Iterator[Callable[[str], ModuleType]]:
    """The pack, as ComfyUI loads it, and what gives its modules: `pack("nodes.models")`."""
    io = StandIn()
    io.__dict__.update(ComfyNode=type("ComfyNode", (), {}), Custom=lambda kind: StandIn())
    api = ModuleType("comfy_api.latest")
    api.__dict__.update(io=io, ui=StandIn(), Input=StandIn(), InputImpl=StandIn(), Types=StandIn())
    api.ComfyExtension = type("ComfyExtension", (), {})
    modules = {"comfy_api": ModuleType("comfy_api"), "comfy_api.latest": api}
    for name in HOST_MODULES:
        modules[name] = ModuleType(name)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, modules[name])
    modules["comfy.cli_args"].args = StandIn()
    modules["comfy.model_patcher"].ModelPatcher = StandIn()
    modules["comfy.patcher_extension"].CallbacksMP = StandIn()
    modules["server"].PromptServer = StandIn()
    modules["folder_paths"].get_filename_list = lambda key: []
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        spec = importlib.util.spec_from_file_location(
            NAME, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        assert spec is not None and spec.loader is not None
        sys.modules[NAME] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[NAME])
            yield lambda name: sys.modules[f"{NAME}.{name}"]
        finally:
            for name in [name for name in sys.modules if name.partition(".")[0] == NAME]:
                del sys.modules[name]
