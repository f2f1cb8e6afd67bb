"""Every node is explained: a help page in English and Chinese, and Chinese names and tooltips, none of them stale."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.nodes.standin import ROOT, Recorded, loaded

DOCS = ROOT / "nodes" / "web" / "docs"
LOCALES = ROOT / "locales"
# A sentence that Chinese is written in holds at least one of these.
CHINESE = re.compile("[\u4e00-\u9fff]")
# What vue-i18n, which the page is translated with, takes for its own syntax.
SYNTAX = re.compile(r"[{}@|$]")


@pytest.fixture(scope="module")
def schemas() -> dict[str, Recorded]:
    """The nodes' schemas by their ids."""
    with loaded() as pack:
        made = [node.define_schema() for node in pack("nodes").NODES]
    return {schema.node_id: schema for schema in made}


def choices(entry: Recorded) -> list[Recorded]:
    """The options of a dynamic choice, each with the inputs it brings along; of anything else none."""
    return [option for option in getattr(entry, "options", []) if isinstance(option, Recorded)]


def keys(schema: Recorded) -> dict[str, Recorded | None]:
    """Every input of a node as translations name it; an input inside a choice is `choice_input`."""
    found: dict[str, Recorded | None] = {}
    for entry in schema.inputs:
        found[entry.name] = entry
        if getattr(entry, "control_after_generate", None):
            # The page adds a widget that the schema doesn't name.
            found["control_after_generate"] = None
        for option in choices(entry):
            found |= {f"{entry.name}_{inner.name}": inner for inner in option.args[1]}
    return found


def locale(name: str) -> dict[str, Any]:
    return json.loads((LOCALES / name / "nodeDefs.json").read_text("utf-8"))


def texts(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for inner in value.values() for text in texts(inner)]
    return [value]


def test_every_node_input_and_output_has_its_chinese_name(schemas):
    chinese = locale("zh")
    assert set(chinese) == set(schemas)
    for node, schema in schemas.items():
        assert set(chinese[node]) == {"display_name", "description", "inputs", "outputs"}
        assert set(chinese[node]["inputs"]) == set(keys(schema)), node
        assert set(chinese[node]["outputs"]) == {str(i) for i in range(len(schema.outputs))}, node
        assert CHINESE.search(chinese[node]["display_name"]) and CHINESE.search(chinese[node]["description"]), node


def test_every_input_and_output_has_a_tooltip_in_english_and_chinese(schemas):
    chinese = locale("zh")
    for node, schema in schemas.items():
        for key, entry in keys(schema).items():
            if entry is None:
                # The page explains what it adds.
                continue
            assert entry.tooltip, f"{node}.{key}"
            assert CHINESE.search(chinese[node]["inputs"][key].get("tooltip", "")), f"{node}.{key}"
        for index, entry in enumerate(schema.outputs):
            assert entry.tooltip, f"{node}, output {index}"
            assert CHINESE.search(chinese[node]["outputs"][str(index)].get("tooltip", "")), f"{node}, output {index}"


def test_what_several_nodes_ask_is_explained_in_the_same_words(schemas):
    # Within one language; a node may need or do without a model.
    for name in ("frames_are", "size", "seed", "color", "strength", "precision", "options"):
        entries = [entry for schema in schemas.values() for entry in schema.inputs if entry.name == name]
        assert len(entries) > 1 and len({entry.tooltip for entry in entries}) == 1, name
        chinese = [node["inputs"][name]["tooltip"] for node in locale("zh").values() if name in node["inputs"]]
        assert len(set(chinese)) == 1, name


def test_a_path_stands_first_among_the_widgets_beside_the_video_it_stands_for(schemas):
    assert [entry.name for entry in schemas["SVR2RestoreVideo"].inputs][:3] == ["video", "path", "size"]


def test_a_chinese_tooltip_names_every_choice_that_the_english_one_explains(schemas):
    chinese = locale("zh")
    for node, schema in schemas.items():
        for entry in schema.inputs:
            explained = {str(option) for option in named(entry) if f"{option}:" in getattr(entry, "tooltip", "")}
            tooltip = chinese[node]["inputs"][entry.name].get("tooltip", "")
            assert all(option in tooltip for option in explained), f"{node}.{entry.name}"


def test_english_names_belong_to_inputs_that_exist(schemas):
    for node, entry in locale("en").items():
        assert set(entry["inputs"]) <= set(keys(schemas[node])), node


@pytest.mark.parametrize("name", ["en", "zh"])
def test_no_translation_holds_what_the_page_would_take_for_its_syntax(name):
    assert not [text for text in texts(locale(name)) if SYNTAX.search(text)]


@pytest.mark.parametrize("page", ["{}.md", "{}/zh.md"])
def test_every_node_has_a_help_page_that_lists_its_inputs(schemas, page):
    for node, schema in schemas.items():
        lines = (DOCS / page.format(node)).read_text("utf-8").splitlines()
        assert [name for line in lines for name in listed(line, "- ")] == ordered(schema, lines), node
        explained = {name for line in lines for name in listed(line, "  - ")}
        dynamic = {option.name for entry in schema.inputs for option in choices(entry)}
        every = {option for entry in schema.inputs for option in named(entry)}
        assert dynamic <= explained <= every, node


def test_no_help_page_is_left_of_a_node_that_is_gone(schemas):
    assert {path.stem for path in DOCS.glob("*.md")} == set(schemas)
    assert {path.parent.name for path in DOCS.glob("*/*.md")} == set(schemas)


def named(entry: Recorded) -> set[str]:
    """What can be chosen at an input."""
    return {option.name if isinstance(option, Recorded) else option for option in getattr(entry, "options", [])}


def listed(line: str, bullet: str) -> list[str]:
    """The names that a line of a list is about: "- `a`, `b`: ..." is about a and b."""
    head = re.match(re.escape(bullet) + r"(`[^:：]+`[^:：]*)[:：]", line)
    return re.findall(r"`([^`]+)`", head[1]) if head else []


def ordered(schema: Recorded, lines: list[str]) -> list[str]:
    """A node's inputs in the order of its help page."""
    names = [entry.name for entry in schema.inputs]
    position = {name: i for i, line in enumerate(lines) for name in listed(line, "- ")}
    missing = set(names) - set(position)
    assert not missing, f"{schema.node_id} lacks {missing}"
    return sorted(names, key=position.__getitem__)
