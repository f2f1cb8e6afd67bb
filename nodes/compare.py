"""SeedVR2 Compare: before and after in one picture."""

from __future__ import annotations

import torch
from torch import Tensor

from ..seedvr2_core.errors import MediaError
from ..seedvr2_core.video.geometry import resize
from .host import io

# Pixels between two pictures.
GAP = 4


class Compare(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SVR2Compare",
            display_name="SeedVR2 Compare",
            category="SeedVR2",
            description="Shows frames before and after, side by side or split, and how one row of pixels changes in "
            "time: flicker and jumps show as a comb or a step.",
            search_aliases=["seedvr", "before after", "side by side", "split image", "temporal profile", "flicker"],
            inputs=[
                io.Image.Input("before", tooltip="The source; enlarged to the size of `after`."),
                io.Image.Input("after", tooltip="The result, with as many frames."),
                io.DynamicCombo.Input(
                    "layout",
                    options=[
                        io.DynamicCombo.Option("side by side", []),
                        io.DynamicCombo.Option("split", [_share("position", "Where the line between both lies.")]),
                        io.DynamicCombo.Option("temporal profile", [_share("row", "The row, from the top.")]),
                    ],
                    tooltip="side by side: two pictures. split: one, the left part before, the right part after. "
                    "temporal profile: one row of every frame, frame below frame, before and after.",
                ),
            ],
            outputs=[io.Image.Output(display_name="images", tooltip="One for every frame; one for all as a profile.")],
        )

    @classmethod
    def execute(cls, before: Tensor, after: Tensor, layout: dict) -> io.NodeOutput:
        if len(before) != len(after):
            raise MediaError(f"There are {len(before)} frames before and {len(after)} after; compare equally many.")
        before, after = before[..., :3], after[..., :3]
        match layout["layout"]:
            case "split":
                return io.NodeOutput(split(before, after, layout["position"]))
            case "temporal profile":
                rows = (profile(frames, layout["row"]) for frames in (_as(before, after), after))
                return io.NodeOutput(beside(*rows))
        return io.NodeOutput(beside(_as(before, after), after))


def _share(name: str, tooltip: str) -> io.Float.Input:
    return io.Float.Input(name, default=0.5, min=0.0, max=1.0, step=0.01, tooltip=tooltip)


def _as(frames: Tensor, model: Tensor) -> Tensor:
    """Frames T H W 3 in the size of others."""
    return resize(frames.permute(0, 3, 1, 2), *model.shape[1:3]).permute(0, 2, 3, 1).clamp(0, 1)


def beside(left: Tensor, right: Tensor) -> Tensor:
    """Both T H W 3, with a white line between them."""
    line = left.new_ones(len(left), left.shape[1], GAP, 3)
    return torch.cat([left, line, right], dim=2)


def split(before: Tensor, after: Tensor, position: float) -> Tensor:
    """T H W 3: before left of the line, after right of it."""
    column = round(position * after.shape[2])
    joined = after.clone()
    joined[:, :, :column] = _as(before, after)[:, :, :column]
    joined[:, :, max(0, column - GAP // 2) : column + GAP // 2] = 1
    return joined


def profile(frames: Tensor, row: float) -> Tensor:
    """One row of every frame as a picture about as high as a frame, 1 H W 3."""
    lines = frames[:, min(int(row * frames.shape[1]), frames.shape[1] - 1)]
    return lines.repeat_interleave(max(1, frames.shape[1] // len(frames)), dim=0)[None]
