"""What is committed: no traces of the machine it was written on, nothing too large, and metadata that agrees."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Put together, so that this file does not name them.
FOREIGN_PATHS = [f"/{folder}/".encode() for folder in ("work", "root")]
MAX_BYTES = 16 << 20


@pytest.fixture(scope="module")
def committed() -> list[Path]:
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a git checkout, or no git to ask")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True)
    if listed.returncode:
        pytest.skip(listed.stderr.decode().strip())
    paths = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    # A file deleted and not yet committed is listed too.
    return [path for path in paths if path.is_file()]


@pytest.fixture(scope="module")
def project() -> dict:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read TOML")
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def test_no_file_names_a_path_of_one_machine(committed):
    found = [path.name for path in committed if any(foreign in path.read_bytes() for foreign in FOREIGN_PATHS)]
    assert not found


def test_every_file_is_small_enough_to_clone(committed):
    assert not [path.name for path in committed if path.stat().st_size >= MAX_BYTES]


def test_comfyui_installs_the_dependencies_of_the_package_but_not_torch(project):
    lines = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    required = {line for line in lines if line and not line.startswith("#")}
    declared = {line for line in project["project"]["dependencies"] if not line.startswith("torch")}
    assert required == declared


def test_every_package_is_installed(project):
    roots = ("seedvr2_core", "training")
    folders = {init.parent for root in roots for init in (ROOT / root).rglob("__init__.py")}
    assert {".".join(folder.relative_to(ROOT).parts) for folder in folders} == set(
        project["tool"]["setuptools"]["packages"]
    )
