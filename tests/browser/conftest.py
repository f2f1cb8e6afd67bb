"""A ComfyUI whose page can be opened, and a Chromium to open it with."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.browser.pages import Pages
from tests.host.clips import cut
from tests.host.conftest import comfyui as comfyui
from tests.host.server import ROOT, Server

# Pixels of the picture's sides and frames of the video: each is restored several times.
SIDE = 192
FRAMES = 5


@pytest.fixture(scope="session")
def site(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The host, with the picture and the video that the workflows name in its input folder."""
    base = tmp_path_factory.mktemp("site")
    (base / "input").mkdir()
    with Image.open(comfyui / "input" / "example.png") as example:
        example.resize((SIDE, SIDE)).save(base / "input" / "example.png")
    cut(ROOT / "tests" / "media" / "stream.mp4", base / "input" / "video.mp4", FRAMES)
    with Server(comfyui, base) as running:
        yield running


@pytest.fixture(scope="session")
def pages(site: Server) -> Iterator[Pages]:
    """Opens the host's page in a browser."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = os.environ.get("CHROMIUM_PATH") or shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("there is no chromium; CHROMIUM_PATH may name one")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield Pages(browser, site)
        browser.close()


@pytest.fixture(scope="session")
def screenshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where pictures of graphs go: a temporary folder, or the one that SEEDVR2_SCREENSHOTS names."""
    named = os.environ.get("SEEDVR2_SCREENSHOTS")
    folder = Path(named) if named else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
