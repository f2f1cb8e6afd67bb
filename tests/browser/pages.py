"""ComfyUI's page, as tests see and use it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.host.server import Graph, Server

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage
    from playwright.sync_api import Page as BrowserPage

# Pixels of the window, and milliseconds: machines that run these tests may be slow.
WINDOW = {"width": 1920, "height": 1080}
START_TIMEOUT = 300_000.0
RUN_TIMEOUT = 300.0
# For pictures and videos of nodes to appear, in milliseconds.
SETTLE = 2_500.0
# Room for the bars of the page and what they say, in pixels: left, top, right, bottom.
BARS = (80, 170, 30, 30)
# Pixels of the graph: how wide a socket is; and in how many steps a curve is followed.
SOCKET = 20
CURVE = 200
# What the host itself can't find in a fresh folder.
HOST_MISSES = ("/userdata", "/user.css", "/favicon.ico")
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False, "Comfy.Graph.CanvasInfo": False}

READY = "() => window.app?.graph && Object.keys(LiteGraph.registered_node_types).length > 50"
LOAD = "([graph, name]) => app.loadGraphData(graph, true, true, name)"
PROMPT = "async () => JSON.stringify((await app.graphToPrompt()).output)"
MISSING = "() => app.graph.nodes.map(node => node.type).filter(type => !(type in LiteGraph.registered_node_types))"
# A node's bounding box has its title in it.
NODES = """() => app.graph.nodes.map(node => { const box = new Float64Array(4); node.measure?.(box);
  return {name: `${node.id} ${node.title}`, box: Array.from(node.getBounding())} })"""
GROUPS = """() => app.graph.groups.map(group => ({name: group.title,
  box: [group.pos[0], group.pos[1], group.size[0], group.size[1]]}))"""
LINKS = """() => [...app.graph.links.values()].map(link => {
  const from = app.graph.getNodeById(link.origin_id), to = app.graph.getNodeById(link.target_id);
  return {name: `${from.title} > ${to.title}`,
    ends: [...from.getConnectionPos(false, link.origin_slot), ...to.getConnectionPos(true, link.target_slot)]} })"""
PLAYERS = """() => app.graph.nodes.filter(node => node.type === 'SVR2RestoreVideo')
  .map(node => node.imgs?.length ? 'picture' : node.videoContainer?.querySelector('video')?.videoWidth || null)"""
SHOW = """([x, y, width, height, left, top, right, bottom]) => { const ds = app.canvas.ds;
  ds.scale = Math.min(1, (innerWidth - left - right) / width, (innerHeight - top - bottom) / height);
  ds.offset = [left / ds.scale - x, top / ds.scale - y]; app.graph.setDirtyCanvas(true, true);
  const canvas = app.canvas.canvas.getBoundingClientRect(); return [canvas.x, canvas.y, ds.scale] }"""


@dataclass(frozen=True)
class Box:
    """A rectangle of the graph, with the name of what fills it."""

    name: str
    x: float
    y: float
    width: float
    height: float

    def overlaps(self, other: Box) -> bool:
        return (
            self.x < other.x + other.width
            and other.x < self.x + self.width
            and self.y < other.y + other.height
            and other.y < self.y + self.height
        )

    def contains(self, other: Box) -> bool:
        return (
            self.x <= other.x
            and self.y <= other.y
            and other.x + other.width <= self.x + self.width
            and other.y + other.height <= self.y + self.height
        )


@dataclass(frozen=True)
class Link:
    """A line from an output to an input, drawn as LiteGraph does: a curve that leaves and arrives level."""

    name: str
    x: float
    y: float
    to_x: float
    to_y: float

    def passes_behind(self, box: Box) -> bool:
        """Whether a piece of it, longer than a socket is wide, lies inside the box."""
        inside = [point for point in self.points() if Box("", *point, 0, 0).overlaps(box)]
        return bool(inside) and math.dist(inside[0], inside[-1]) > SOCKET

    def points(self) -> Iterator[tuple[float, float]]:
        bend = math.dist((self.x, self.y), (self.to_x, self.to_y)) / 4
        for step in range(CURVE + 1):
            t = step / CURVE
            shares = (1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3
            across, down = (self.x, self.x + bend, self.to_x - bend, self.to_x), (self.y, self.y, self.to_y, self.to_y)
            yield _sum(shares, across), _sum(shares, down)


def _sum(shares: Sequence[float], values: Sequence[float]) -> float:
    return sum(share * value for share, value in zip(shares, values, strict=True))


@dataclass
class Page:
    """One tab with ComfyUI in it."""

    browser: BrowserPage
    site: Server
    errors: list[str] = field(default_factory=list)

    def start(self) -> None:
        """Open the page and wait until it can be used; what it says from then on is remembered."""
        self.browser.goto(self.site.url, wait_until="commit", timeout=START_TIMEOUT)
        self.browser.wait_for_function(READY, timeout=START_TIMEOUT)
        self.browser.wait_for_timeout(SETTLE)
        self.browser.on("console", self._console)
        self.browser.on("pageerror", lambda error: self.errors.append(str(error)))

    def load(self, workflow: Path) -> None:
        self.browser.evaluate(LOAD, [json.loads(workflow.read_text("utf-8")), workflow.stem])
        self.browser.wait_for_timeout(SETTLE)

    def missing_nodes(self) -> list[str]:
        return self.browser.evaluate(MISSING)

    def prompt(self) -> Graph:
        """The graph as the page would queue it."""
        return json.loads(self.browser.evaluate(PROMPT))

    def nodes(self) -> list[Box]:
        return [Box(entry["name"], *entry["box"]) for entry in self.browser.evaluate(NODES)]

    def groups(self) -> list[Box]:
        return [Box(entry["name"], *entry["box"]) for entry in self.browser.evaluate(GROUPS)]

    def links(self) -> list[Link]:
        return [Link(entry["name"], *entry["ends"]) for entry in self.browser.evaluate(LINKS)]

    def run(self) -> dict[str, Any]:
        """Click Run, wait for the end and return the history's entry."""
        before = set(self._history())
        self.browser.get_by_test_id("queue-button").click()
        deadline = time.monotonic() + RUN_TIMEOUT
        while not (new := set(self._history()) - before):
            if time.monotonic() > deadline:
                raise TimeoutError(f"the run did not end in {RUN_TIMEOUT:.0f} s")
            self.browser.wait_for_timeout(500)
        self.browser.wait_for_timeout(SETTLE)
        return self._history()[new.pop()]

    def players(self) -> list[int | str | None]:
        """Width of the video that each Restore Video node shows."""
        return self.browser.evaluate(PLAYERS)

    def screenshot(self, path: Path) -> None:
        """A picture of the whole graph and of nothing else."""
        boxes = self.groups()
        x, y = min(box.x for box in boxes), min(box.y for box in boxes)
        width = max(box.x + box.width for box in boxes) - x
        height = max(box.y + box.height for box in boxes) - y
        left, top, scale = self.browser.evaluate(SHOW, [x, y, width, height, *BARS])
        self.browser.wait_for_timeout(SETTLE)
        margin = 8
        clip = {"x": left + BARS[0] - margin, "y": top + BARS[1] - margin}
        clip |= {"width": width * scale + 2 * margin, "height": height * scale + 2 * margin}
        self.browser.screenshot(path=path, clip=clip)

    def close(self) -> None:
        self.browser.close()

    def _history(self) -> dict[str, Any]:
        return json.loads(self.site.get("/history"))

    def _console(self, message: ConsoleMessage) -> None:
        url = message.location.get("url", "")
        if message.type == "error" and not any(miss in url for miss in HOST_MISSES):
            self.errors.append(f"{message.text} ({url})")


@dataclass(frozen=True)
class Pages:
    """A browser that shows one host."""

    browser: Browser
    site: Server

    def open(self, locale: str = "en") -> Page:
        self.site.post("/api/settings", SETTINGS | {"Comfy.Locale": locale})
        page = Page(self.browser.new_page(viewport=WINDOW), self.site)
        page.start()
        return page
