"""Inputs that several nodes share: what a size, a seed or a colour method is said with, in one place."""

from __future__ import annotations

from torch import Tensor

from ..seedvr2_core.settings import Settings
from ..seedvr2_core.video.color import COLOR_METHODS
from ..seedvr2_core.video.geometry import MAX_SIDE, Target
from .files import AUTO
from .host import io
from .models import PRECISIONS, ModelSocket, VAESocket
from .options import OptionsSocket

VIDEO, IMAGES = "video", "independent images"


def frames_are() -> io.Combo.Input:
    return io.Combo.Input(
        "frames_are",
        options=[VIDEO, IMAGES],
        default=VIDEO,
        tooltip="video: frames of one clip, treated together so that nothing flickers. independent images: pictures "
        "that have nothing to do with each other.",
    )


def clips(images: Tensor, frames_are: str) -> list[Tensor]:
    """Images T H W c in clips that are treated together, as the input `frames_are` says."""
    return [images] if frames_are == VIDEO else list(images.split(1))


def size() -> io.DynamicCombo.Input:
    def pixels(name: str, default: int) -> io.Int.Input:
        return io.Int.Input(name, default=default, min=16, max=MAX_SIDE, tooltip="Pixels.")

    return io.DynamicCombo.Input(
        "size",
        options=[
            io.DynamicCombo.Option("scale", [
                io.Float.Input("factor", default=2.0, min=0.1, max=16.0, step=0.1, tooltip="Of both sides.")
            ]),
            io.DynamicCombo.Option("short side", [pixels("pixels", 1080)]),
            io.DynamicCombo.Option("long side", [pixels("pixels", 1920)]),
            io.DynamicCombo.Option("megapixels", [
                io.Float.Input("millions", default=2.0, min=0.01, max=256.0, step=0.1, tooltip="Pixels of a frame.")
            ]),
            io.DynamicCombo.Option("exact", [pixels("width", 1920), pixels("height", 1080)]),
            io.DynamicCombo.Option("same", []),
        ],
        tooltip="How large the result is. Any number is possible, nothing is cropped. same: restore without enlarging.",
    )


def target(size: dict) -> Target:
    """What the input `size` says."""
    match size["size"]:
        case "short side":
            return Target.short_side(size["pixels"])
        case "long side":
            return Target.long_side(size["pixels"])
        case "megapixels":
            return Target.megapixels(size["millions"])
        case "exact":
            return Target.exact(size["height"], size["width"])
        case "same":
            return Target.same()
    return Target.scale(size["factor"])


def seed() -> io.Int.Input:
    return io.Int.Input(
        "seed",
        default=0,
        min=0,
        max=(1 << 64) - 1,
        control_after_generate=io.ControlAfterGenerate.fixed,
        tooltip="Same seed, same result, whatever else is in the batch.",
    )


def color(name: str = "color") -> io.Combo.Input:
    return io.Combo.Input(
        name,
        options=[Settings.color, *(name for name in COLOR_METHODS if name != Settings.color)],
        default=Settings.color,
        tooltip="How the colours follow the source. lab: nearest to them, with the contrast that was restored. "
        "wavelet: coarse colours of the source, as published. adain: its mean and spread. hsv: its saturation, hue by "
        "hue. wavelet_adaptive: wavelet, and hsv where that is too colourful. none: as the model paints.",
    )


def strength() -> io.Float.Input:
    return io.Float.Input(
        "strength",
        default=1.0,
        min=0.0,
        max=1.0,
        step=0.05,
        display_mode=io.NumberDisplay.slider,
        tooltip="1: what the model restores. Less mixes in the enlarged source: more faithful, less crisp.",
    )


def precision() -> io.Combo.Input:
    return io.Combo.Input(
        "precision",
        options=list(PRECISIONS),
        default=AUTO,
        advanced=True,
        tooltip="What it computes in. auto: bf16 where the hardware is fast in it, else fp32. In fp16 the transformer "
        "may overflow to black frames.",
    )


def model() -> ModelSocket.Input:
    return ModelSocket.Input("model", tooltip="From Load SeedVR2 Model.")


def vae() -> VAESocket.Input:
    return VAESocket.Input("vae", tooltip="From Load SeedVR2 VAE.")


def options() -> OptionsSocket.Input:
    return OptionsSocket.Input("options", optional=True, tooltip="From SeedVR2 Memory & Speed.")
