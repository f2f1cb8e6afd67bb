"""SeedVR2 Memory & Speed: choices that hardly anybody needs, as one node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..seedvr2_core.errors import SettingError
from ..seedvr2_core.settings import SHORTEST_CHUNK, Settings
from .host import io

GIB = 1 << 30
MOST_FRAMES = 1025


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a user may decide about the use of a machine; None is automatic."""

    memory_limit: int | None = None  # bytes
    chunk: int | None = None  # frames in one pass of the transformer


OptionsSocket = io.Custom("SVR2_OPTIONS")


def settings_of(options: Options | None, **choices: Any) -> Settings:
    """What a restoration shall be like, within the bounds of these options."""
    options = options or Options()
    return Settings(chunk=options.chunk, memory_limit=options.memory_limit, **choices)


class MemoryAndSpeed(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SVR2Options",
            display_name="SeedVR2 Memory & Speed",
            category="SeedVR2",
            description="Bounds what a restoration may take. Without this node all is chosen by the free memory.",
            search_aliases=["seedvr", "low vram", "memory limit", "block swap", "chunk", "batch size"],
            inputs=[
                io.Float.Input(
                    "memory_limit",
                    default=0.0,
                    min=0.0,
                    max=1024.0,
                    step=0.5,
                    tooltip="GiB that models and frames at work may take together. 0: what is free.",
                ),
                io.Int.Input(
                    "frames_at_once",
                    default=0,
                    min=0,
                    max=MOST_FRAMES,
                    tooltip="Frames that the transformer sees together; 9 or more, and more look steadier. It changes "
                    "the picture. 0: as many as fit, up to 125. Nothing jumps between such chunks, they are blended.",
                ),
            ],
            outputs=[OptionsSocket.Output(display_name="options", tooltip="For every node that restores.")],
        )

    @classmethod
    def validate_inputs(cls, frames_at_once: int | None = None) -> bool | str:
        # ComfyUI checks no range of an input that is checked here; None comes from another node and is not known yet.
        return frames_at_once is None or _why_not(frames_at_once) or True

    @classmethod
    def execute(cls, memory_limit: float, frames_at_once: int) -> io.NodeOutput:
        if reason := _why_not(frames_at_once):
            raise SettingError(reason)
        return io.NodeOutput(Options(memory_limit=int(memory_limit * GIB) or None, chunk=frames_at_once or None))


def _why_not(frames_at_once: int) -> str:
    """Why the transformer cannot see so many frames together, as one sentence; empty if it can."""
    if frames_at_once == 0 or SHORTEST_CHUNK <= frames_at_once <= MOST_FRAMES:
        return ""
    return f"frames_at_once is {frames_at_once}; use {SHORTEST_CHUNK} to {MOST_FRAMES}, or 0 for as many as fit."
