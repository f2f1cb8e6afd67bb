"""A ComfyUI for the tests that need one: the folder that COMFYUI_PATH names."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.host.server import Server

StartServer = Callable[..., Server]


@pytest.fixture(scope="session")
def comfyui() -> Path:
    """ComfyUI's own folder."""
    folder = os.environ.get("COMFYUI_PATH")
    if not folder:
        pytest.skip("set COMFYUI_PATH to the folder of a ComfyUI, and run these tests with its Python")
    if not (Path(folder) / "main.py").exists():
        pytest.fail(f"COMFYUI_PATH names {folder}, in which there is no main.py")
    return Path(folder)


@pytest.fixture(scope="session")
def server(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The host that all tests share; leave it idle and alive."""
    with Server(comfyui, tmp_path_factory.mktemp("host")) as running:
        yield running


@pytest.fixture(scope="module")
def start_server(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartServer]:
    """Start more hosts, `start_server(pack=None, arguments=["--cache-none"])`; they end with the test file."""
    with ExitStack() as stack:

        def start(**options: Any) -> Server:
            return stack.enter_context(Server(comfyui, tmp_path_factory.mktemp("host"), **options))

        yield start
