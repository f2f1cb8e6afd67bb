"""SeedVR2 Memory & Speed: choices that hardly anybody needs, as one node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..seedvr2_core.pipeline import Settings
from .host import io

GIB = 1 << 30


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
                    max=1025,
                    tooltip="Frames that the transformer sees together; 9 or more, and more look steadier. It changes "
                    "the picture. 0: as many as fit, up to 125. Nothing jumps between such chunks, they are blended.",
                ),
            ],
            outputs=[OptionsSocket.Output(display_name="options", tooltip="For every node that restores.")],
        )

    @classmethod
    def execute(cls, memory_limit: float, frames_at_once: int) -> io.NodeOutput:
        return io.NodeOutput(Options(memory_limit=int(memory_limit * GIB) or None, chunk=frames_at_once or None))
