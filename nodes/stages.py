"""The stages of a restoration as nodes of their own, for people who build their own graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing

import torch
from torch import Tensor

from ..seedvr2_core.errors import MediaError
from ..seedvr2_core.models.windows import WindowConfig
from ..seedvr2_core.pipeline import decode, encode, pixel_size, restore_latent
from ..seedvr2_core.video.color import ColorTransfer
from ..seedvr2_core.video.geometry import (
    CLIP_MULTIPLE,
    LATENT_FRAMES,
    PATCH,
    Grid,
    padded_size,
    resize,
    to_clip,
    to_frames,
)
from . import host, inputs
from .host import io
from .models import LoadedModel, LoadedVAE, Tiles, ready
from .options import Options, settings_of
from .progress import Shown

# Under this name a latent carries what its shape does not tell: the frames T, height H and width W that it was made
# of. Nodes of others pass it on or drop it.
ORIGIN = "seedvr2"


class Encode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SVR2Encode",
            display_name="SeedVR2 VAE Encode",
            category="SeedVR2/stages",
            description="Enlarges frames and encodes them: the condition that Restore Latent starts from.",
            search_aliases=["seedvr", "seedvr2", "video vae encode"],
            inputs=[
                io.Image.Input("images", tooltip="Any number and size; padding is added and taken away unseen."),
                inputs.vae(),
                inputs.frames_are(),
                inputs.size(),
                inputs.options(),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="What Restore Latent starts from.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, images: Tensor, vae: LoadedVAE, frames_are: str, size: dict, options: Options | None = None
    ) -> io.NodeOutput:
        settings = settings_of(options, target=inputs.target(size))
        height, width = settings.target.size(*images.shape[1:3])
        clips = inputs.clips(images, frames_are)
        with ready(None, vae, settings, (height, width), len(clips[0])) as (models, plan):
            latents = each(cls, "encode", clips, lambda clip, show: encode(clip[..., :3], models, settings, show, plan))
        origin = {"frames": len(clips[0]), "height": height, "width": width}
        return io.NodeOutput({"samples": host.keep(torch.stack(latents)), ORIGIN: origin})


class RestoreLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SVR2RestoreLatent",
            display_name="SeedVR2 Restore Latent",
            category="SeedVR2/stages",
            description="The transformer: one step from a degraded latent to a clean one, or many with SeedVR.",
            search_aliases=["seedvr", "seedvr2", "sampler", "one step", "adaptive window"],
            inputs=[
                io.Latent.Input("latent", tooltip="From SeedVR2 VAE Encode."),
                inputs.model(),
                inputs.seed(),
                io.Int.Input("steps", default=1, min=1, max=200, tooltip="1 for SeedVR2; the older SeedVR takes 50."),
                io.Float.Input(
                    "cfg",
                    default=1.0,
                    min=1.0,
                    max=20.0,
                    step=0.5,
                    tooltip="Guidance: 1 for SeedVR2; the older SeedVR takes 7.5.",
                ),
                io.Float.Input(
                    "condition_noise",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Noise on the degraded latent: the model trusts it less and invents more. 0 for SeedVR2, "
                    "0.1 for the older SeedVR.",
                ),
                io.DynamicCombo.Input(
                    "windows",
                    options=[
                        io.DynamicCombo.Option("as trained", []),
                        io.DynamicCombo.Option("custom", [
                            _count("train_width", 1280, 16384, "Pixels of the area that the model was trained on."),
                            _count("train_height", 720, 16384, "Pixels of the area that the model was trained on."),
                            _count("windows_t", 4, 64, "Windows along time in a clip of that area."),
                            _count("windows_h", 3, 64, "Windows along the height of that area."),
                            _count("windows_w", 3, 64, "Windows along the width of that area."),
                            _count("longest_t", 30, 1024, "Latent frames; a longer clip has more windows in time."),
                        ]),
                    ],
                    tooltip="How large the windows are in which tokens see each other. Larger frames get more windows, "
                    "not larger ones, so that the model meets the sizes it knows.",
                ),
                inputs.options(),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="The clean latent, as large.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        latent: dict,
        model: LoadedModel,
        seed: int,
        steps: int,
        cfg: float,
        condition_noise: float,
        windows: dict,
        options: Options | None = None,
    ) -> io.NodeOutput:
        settings = settings_of(
            options,
            seed=seed,
            steps=steps,
            cfg=cfg,
            condition_noise=condition_noise,
            windows=window_config(windows),
            attention=model.attention,
        )
        samples = samples_of(latent)
        with ready(model, None, settings, *pixel_size(samples[0])) as (models, plan):

            def cleaned(latent: Tensor, show: Shown) -> Tensor:
                return restore_latent(host.bring(latent), models, settings, show, plan)

            clean = each(cls, "restore", samples, cleaned)
        return io.NodeOutput({**latent, "samples": host.keep(torch.stack(clean))})


class Decode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SVR2Decode",
            display_name="SeedVR2 VAE Decode",
            category="SeedVR2/stages",
            description="Decodes a latent into as many frames as were encoded, in their size.",
            search_aliases=["seedvr", "seedvr2", "video vae decode", "tiled"],
            inputs=[
                io.Latent.Input("latent", tooltip="From SeedVR2 Restore Latent."),
                inputs.vae(),
                io.DynamicCombo.Input(
                    "tiling",
                    options=[
                        io.DynamicCombo.Option("exact", []),
                        io.DynamicCombo.Option("blended tiles", [
                            io.Int.Input("tile", default=1024, min=64, max=16384, step=8, tooltip="Pixels of a side."),
                            io.Int.Input("overlap", default=128, min=0, max=8192, step=8, tooltip="Pixels, blended."),
                        ]),
                    ],
                    tooltip="exact: whole frames, in bands where they are large, without any seam. blended tiles: as "
                    "other nodes do it; colours of tiles may differ a little.",
                ),
                inputs.options(),
            ],
            outputs=[io.Image.Output(display_name="images", tooltip="As many and as large as were encoded.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, latent: dict, vae: LoadedVAE, tiling: dict, options: Options | None = None) -> io.NodeOutput:
        settings, samples = settings_of(options), samples_of(latent)
        size, frames = pixel_size(samples[0])
        origin = origin_of(latent, size, frames)
        rows, columns, length = origin["height"], origin["width"], origin["frames"]
        images = host.empty_frames(len(samples) * length, rows, columns, 3)

        def decoded(index: int, show: Shown) -> None:
            at, end = index * length, (index + 1) * length
            with closing(decode(host.bring(samples[index]), models, settings, show, plan)) as pieces:
                for piece in pieces:
                    count = min(len(piece), end - at)
                    images[at : at + count] = piece[:count, :rows, :columns]
                    at += count
                    show.preview(images[at - 1])

        tiles = None if tiling["tiling"] == "exact" else Tiles(tiling["tile"], tiling["overlap"])
        with ready(None, vae, settings, size, frames, tiles) as (models, plan):
            each(cls, "decode", range(len(samples)), decoded)
        return io.NodeOutput(images)


class ColorFix(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SVR2ColorFix",
            display_name="SeedVR2 Color Fix",
            category="SeedVR2/stages",
            description="Gives restored frames the colours of their source, steadily in time and anew after every cut.",
            search_aliases=["seedvr", "seedvr2", "color transfer", "color match", "wavelet", "lab"],
            inputs=[
                io.Image.Input("images", tooltip="Restored frames."),
                io.Image.Input("source", tooltip="The frames they were made from, as many, of any size."),
                inputs.frames_are(),
                inputs.color(),
                inputs.strength(),
            ],
            outputs=[io.Image.Output(display_name="images", tooltip="In the colours of the source.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, images: Tensor, source: Tensor, frames_are: str, color: str, strength: float) -> io.NodeOutput:
        if len(images) != len(source):
            raise MediaError(f"There are {len(images)} images and {len(source)} sources; give as many of both.")
        progress, fixed = host.Progress(cls.hidden.unique_id), images.clone()
        transfer = ColorTransfer(color)
        for index, (image, other) in enumerate(zip(images[..., :3].split(1), source[..., :3].split(1), strict=True)):
            content = to_clip(host.bring(image.permute(0, 3, 1, 2)))
            style = to_clip(resize(host.bring(other.permute(0, 3, 1, 2)), *images.shape[1:3]))
            content = torch.lerp(style, transfer(content, style), strength)
            fixed[index, ..., :3] = to_frames(content)[0].permute(1, 2, 0)
            progress((index + 1) / len(images), f"colours: {index + 1} of {len(images)} frames")
            if frames_are == inputs.IMAGES:
                transfer = ColorTransfer(color)
        progress.finish("colours: done")
        return io.NodeOutput(fixed)


def window_config(windows: dict) -> WindowConfig | None:
    """What the input `windows` says; None: as the model was trained."""
    if windows["windows"] != "custom":
        return None
    return WindowConfig(
        splits=Grid(windows["windows_t"], windows["windows_h"], windows["windows_w"]),
        train_area=(max(1, windows["train_height"] // CLIP_MULTIPLE), max(1, windows["train_width"] // CLIP_MULTIPLE)),
        max_t=windows["longest_t"],
    )


def samples_of(latent: dict) -> Tensor:
    """Latents b 16 t h w.

    Raises:
        MediaError: it is of another kind.
    """
    samples = latent["samples"]
    if samples.dim() == 4:
        samples = samples.unsqueeze(2)
    shape = " x ".join(map(str, samples.shape))
    if samples.dim() != 5 or samples.shape[1] != 16:
        raise MediaError(f"A latent of {shape} is not of SeedVR2; expected batch x 16 x time x height x width.")
    if any(side % PATCH for side in samples.shape[-2:]):
        raise MediaError(f"A latent of {shape} has an odd height or width; crop it to even ones.")
    return samples


def origin_of(latent: dict, size: tuple[int, int], frames: int) -> dict[str, int]:
    """Frames, height and width of what was encoded, if the latent still has that size; else all that it holds."""
    origin = latent.get(ORIGIN)
    same_size = origin and padded_size(origin["height"], origin["width"]) == size
    if same_size and frames - LATENT_FRAMES < origin["frames"] <= frames:
        return origin
    return {"frames": frames, "height": size[0], "width": size[1]}


def each(node: type[io.ComfyNode], stage: str, clips: Sequence, step: Callable[..., object]) -> list:
    """Take a step with each clip, showing on the node how far it is."""
    progress, count = host.Progress(node.hidden.unique_id), len(clips)
    results = [step(clip, Shown(progress, i / count, 1 / count, [stage])) for i, clip in enumerate(clips)]
    progress.finish(f"{stage}: done")
    return results


def _count(name: str, default: int, largest: int, tooltip: str) -> io.Int.Input:
    return io.Int.Input(name, default=default, min=1, max=largest, tooltip=tooltip)
