"""nodes -> seedvr2_core <- training, and the rooms of the core: who may import whom, read off the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE = "seedvr2_core"
PACKAGES = (CORE, "nodes", "training")
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]

# What a room of the core may use of the others. A room is a folder or a file; everyone may use `errors`.
ROOMS = {
    "errors": set(),
    "device": set(),
    "progress": set(),
    "video": set(),
    "kernels": {"device"},
    "attention": {"device", "kernels"},
    "diffusion": {"video.geometry"},
    "models": {"attention", "kernels", "video.geometry"},
    "checkpoints": {"models", "video.geometry"},
    "memory": {"models", "video.chunks", "video.geometry"},
}
# These stand above every room, and each on those before it.
TOP = ("settings", "loading", "planning", "life", "journal", "pipeline", "whole_files", "__init__", "__main__")
MEDIA_LIBRARIES = {"PIL", "av"}
KERNEL_LIBRARIES = {"flash_attn", "flash_attn_interface", "sageattention", "triton", "xformers"}


def dotted(path: Path) -> list[str]:
    """The module name of a file, its package's `__init__` included."""
    return list(path.relative_to(ROOT).with_suffix("").parts)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Every import of a file, wherever it stands: (dots in front, absolute module name)."""
    here = dotted(path)
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level] if node.level else []
            module = [*base, *(node.module.split(".") if node.module else [])]
            # `from . import windows` names modules; `from .windows import Span` does not, and does no harm here.
            yield from ((node.level, ".".join([*module, alias.name])) for alias in node.names)


def libraries(path: Path) -> set[str]:
    return {name.split(".")[0] for dots, name in imports(path) if dots == 0}


def identity(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("package", [CORE, "training"])
def test_there_is_something_to_check(package):
    assert any(dotted(path)[0] == package for path in FILES)


@pytest.mark.parametrize("path", FILES, ids=identity)
def test_packages_depend_on_the_core_and_never_on_each_other(path):
    package = dotted(path)[0]
    used = {name.split(".")[0] for _, name in imports(path)}
    assert not used & (set(PACKAGES) - {package, CORE})
    if package == CORE:
        assert not used & {"comfy", "comfy_api", "folder_paths", "server", "execution"}


@pytest.mark.parametrize("path", [path for path in FILES if dotted(path)[0] != "training"], ids=identity)
def test_the_plugin_imports_itself_relatively(path):
    # ComfyUI loads the folder under a name of its own.
    assert not libraries(path) & set(PACKAGES)


@pytest.mark.parametrize("path", [path for path in FILES if dotted(path)[0] == CORE], ids=identity)
def test_a_room_uses_only_the_rooms_below_it(path):
    room = dotted(path)[1]
    assert room in ROOMS or room in TOP, f"{room} is a new room; say in ROOMS what it builds on"
    below = {*ROOMS, *TOP[: TOP.index(room)]} if room in TOP else {"errors", room} | ROOMS[room]
    allowed = {f"{CORE}.{name}" for name in below}
    used = {name for _, name in imports(path) if name.startswith(f"{CORE}.")}
    foreign = {name for name in used if not any(f"{name}.".startswith(f"{prefix}.") for prefix in allowed)}
    assert not foreign


@pytest.mark.parametrize("path", FILES, ids=identity)
def test_libraries_stay_in_their_rooms(path):
    package, *rest = dotted(path)
    # ComfyUI takes previews as pictures of Pillow.
    if package != "training" and [package, *rest][:2] not in ([CORE, "video"], ["nodes", "host"]):
        assert not libraries(path) & MEDIA_LIBRARIES
    if [package, *rest][:2] not in ([CORE, "attention"], [CORE, "kernels"]):
        assert not libraries(path) & KERNEL_LIBRARIES
    if [package, *rest] != ["nodes", "host"]:
        assert "comfy" not in libraries(path)


@pytest.mark.parametrize("path", FILES, ids=identity)
def test_nothing_catches_whatever_may_come(path):
    handlers = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.ExceptHandler)]
    caught = [ast.walk(handler.type) if handler.type else [ast.Name("BaseException")] for handler in handlers]
    names = {node.id for nodes in caught for node in nodes if isinstance(node, ast.Name)}
    assert not names & {"Exception", "BaseException"}


def test_frames_are_restored_and_all_is_measured_without_pyav():
    """As on machines that are lent for measuring."""
    from tests.bench.gpu import STEPS

    paths = [ROOT / path for step in STEPS if not step.is_bench for path in step.arguments if path.startswith("tests/")]
    files = [file for path in paths for file in ([path] if path.suffix else path.glob("test_*.py"))]
    benches = {step.module for step in STEPS if step.is_bench}
    names = [CORE, "tests.bench.gpu", *sorted(benches), *(".".join(dotted(file)) for file in files)]
    code = "import sys; sys.modules.update(dict.fromkeys(['av', 'gguf', 'torchao']))"
    code += f"; from importlib import import_module; print(len([import_module(name) for name in {names}]))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout == f"{len(names)}\n", run.stderr
    assert len(names) > 15
