"""A page in Chinese shows our nodes in Chinese, and finds their help."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.browser.pages import Page, Pages
from tests.host.server import ROOT

CHINESE = json.loads((ROOT / "locales" / "zh" / "nodeDefs.json").read_text("utf-8"))
LABELS = """type => { const node = LiteGraph.createNode(type);
  const sockets = [...node.inputs.filter(input => !input.widget), ...node.outputs];
  return {title: node.title, sockets: sockets.map(socket => socket.label ?? socket.localized_name),
    widgets: Object.fromEntries(node.widgets?.map(widget => [widget.name, widget.label]) ?? [])} }"""
FETCH = """async path => { const answer = await fetch(path);
  return answer.ok && !answer.headers.get('content-type').includes('html') ? await answer.text() : null }"""


@pytest.fixture(scope="module")
def page(pages: Pages) -> Iterator[Page]:
    page = pages.open("zh")
    yield page
    page.close()


@pytest.mark.parametrize("node", CHINESE)
def test_titles_and_labels_are_chinese(page: Page, node: str):
    expected = CHINESE[node]
    shown = page.browser.evaluate(LABELS, node)
    assert shown["title"] == expected["display_name"]
    names = {entry["name"] for kind in ("inputs", "outputs") for entry in expected[kind].values()}
    assert set(shown["sockets"]) <= names
    for widget, label in shown["widgets"].items():
        key = widget.replace(".", "_")
        # The page names and translates the one below the seed by itself.
        if key in expected["inputs"] and key != "control_after_generate":
            assert label == expected["inputs"][key]["name"]


@pytest.mark.parametrize("node", CHINESE)
@pytest.mark.parametrize("name", ["{}.md", "{}/zh.md"])
def test_help_is_where_the_page_looks_for_it(page: Page, node: str, name: str):
    # The address that the page makes of the module's name.
    module = page.site.pack_nodes()[node]["python_module"].split(".")[1]
    text = page.browser.evaluate(FETCH, f"/extensions/{module}/docs/{name.format(node)}")
    assert text == (ROOT / "nodes" / "web" / "docs" / name.format(node)).read_text("utf-8")
