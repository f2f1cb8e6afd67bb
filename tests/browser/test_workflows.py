"""Every workflow in the page of a real ComfyUI: it opens, is tidy, is what its API twin says, and runs at a click."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser.pages import Page, Pages
from tests.host.server import ROOT, Graph, failure, succeeded

PREFIX = """text => { const node = app.graph.nodes.find(node => node.type === "SVR2RestoreVideo");
  node.widgets.find(widget => widget.name === "filename_prefix").value = text }"""
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))


@pytest.fixture(scope="module", params=WORKFLOWS, ids=lambda path: path.stem)
def workflow(request) -> Path:
    return request.param


@pytest.fixture(scope="module")
def page(pages: Pages, workflow: Path) -> Iterator[Page]:
    """A page that has the workflow open."""
    page = pages.open()
    page.load(workflow)
    yield page
    page.close()


def assert_tidy(page: Page) -> None:
    """No node covers another or a link, and each lies in a group."""
    nodes, groups = page.nodes(), page.groups()
    assert not [(link.name, node.name) for link in page.links() for node in nodes if link.passes_behind(node)]
    assert not [(a.name, b.name) for a, b in itertools.combinations(nodes, 2) if a.overlaps(b)]
    assert not [node for node in nodes if not any(group.contains(node) for group in groups)]
    assert not [(a.name, b.name) for a, b in itertools.combinations(groups, 2) if a.overlaps(b)]


def known_inputs(graph: Graph, schemas: dict) -> Graph:
    """A graph less what only the page knows of, such as the preview of a video."""

    def known(node: dict, name: str) -> bool:
        # An input inside a choice is called `choice.input`.
        return any(name.split(".")[0] in inputs for inputs in schemas[node["class_type"]]["input"].values())

    return {
        key: node | {"inputs": {name: value for name, value in node["inputs"].items() if known(node, name)}}
        for key, node in graph.items()
    }


def test_it_opens_without_missing_nodes_or_errors(page: Page):
    assert not page.missing_nodes()
    assert not page.errors


def test_it_is_tidy(page: Page):
    assert_tidy(page)


def test_its_api_twin_is_the_same_graph(page: Page, workflow: Path):
    twin = json.loads((workflow.parent / "api" / workflow.name).read_text("utf-8"))
    assert known_inputs(page.prompt(), page.site.object_info()) == twin


def test_it_runs_at_a_click_and_stays_tidy(page: Page, workflow: Path, screenshots: Path):
    entry = page.run()
    assert succeeded(entry), failure(entry)
    assert all(isinstance(width, int) for width in page.players())
    page.screenshot(screenshots / f"graph_{workflow.stem}.png")
    assert_tidy(page)
    assert not page.errors


def test_a_date_in_the_prefix_is_replaced_as_in_the_pages_own_nodes(pages: Pages):
    page = pages.open()
    page.load(ROOT / "workflows" / "restore_video.json")
    page.browser.evaluate(PREFIX, "video/%date:yyyy%/%width%")
    (node,) = [node for node in page.prompt().values() if node["class_type"] == "SVR2RestoreVideo"]
    assert re.fullmatch(r"video/20\d\d/%width%", node["inputs"]["filename_prefix"])
    page.close()


def test_every_workflow_has_a_twin_and_a_thumbnail():
    names = {path.stem for path in WORKFLOWS}
    assert names == {path.stem for path in (ROOT / "workflows" / "api").glob("*.json")}
    assert names == {path.stem for path in (ROOT / "workflows").glob("*.jpg")}
