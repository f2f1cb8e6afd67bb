"""What ComfyUI's registry reads is valid in form."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def project() -> dict:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def test_name_version_and_publisher_have_the_form_that_the_registry_wants(project):
    # docs.comfy.org, "pyproject.toml": the name is no longer than 100 characters and does not start with a digit.
    assert re.fullmatch(r"[a-z][a-z0-9._-]{0,99}", project["project"]["name"])
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["project"]["version"])
    assert re.fullmatch(r"[a-z0-9][a-z0-9-]*", project["tool"]["comfy"]["PublisherId"])
    assert re.fullmatch(r">=\d+\.\d+\.\d+", project["tool"]["comfy"]["requires-comfyui"])


def test_addresses_are_complete_and_the_icon_is_in_the_repository(project):
    repository = urlsplit(project["project"]["urls"]["Repository"])
    icon = urlsplit(project["tool"]["comfy"]["Icon"])
    assert repository.scheme == icon.scheme == "https" and repository.netloc and icon.netloc
    owner_and_name = repository.path.strip("/")
    assert icon.path.startswith(f"/{owner_and_name}/")
    # /owner/name/branch/path
    assert ROOT.joinpath(*icon.path.strip("/").split("/")[3:]).exists()
