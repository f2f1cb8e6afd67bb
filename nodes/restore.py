"""SeedVR2 Restore Frames and Restore Video: one node for everyone."""

from __future__ import annotations

from contextlib import closing

import torch
from torch import Tensor

from ..seedvr2_core.errors import MediaError
from ..seedvr2_core.pipeline import stream
from ..seedvr2_core.settings import Settings
from ..seedvr2_core.video.files import probe, video_suffix
from ..seedvr2_core.whole_files import check_file, restore_file
from . import host, inputs
from .host import Input, InputImpl, io
from .models import LoadedModel, LoadedVAE, ModelSocket, VAESocket, best, ready
from .options import Options, settings_of
from .progress import Shown, counted, of_download

# Containers that hold what others do: sound, subtitles and 10 bits.
FORMATS = ("as the source", "mp4", "mkv", "mov", "webm")


class RestoreFrames(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SVR2RestoreFrames",
            display_name="SeedVR2 Restore Frames",
            category="SeedVR2",
            description="Restores and enlarges images or the frames of a video. As many come out as go in.",
            search_aliases=["seedvr", "seedvr2", "upscale", "video upscale", "enhance", "denoise", "deblur"],
            inputs=[
                io.Image.Input("images", tooltip="Any number and size. An alpha channel is enlarged along."),
                inputs.frames_are(),
                *_common_inputs(),
                io.Mask.Input("mask", optional=True, tooltip="Enlarged along, with edges that follow the result."),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="As many as went in, in the chosen size."),
                io.Mask.Output(display_name="mask", tooltip="The enlarged mask or alpha channel; empty without one."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        images: Tensor,
        frames_are: str,
        size: dict,
        seed: int,
        color: str,
        strength: float,
        model: LoadedModel | None = None,
        vae: LoadedVAE | None = None,
        options: Options | None = None,
        mask: Tensor | None = None,
    ) -> io.NodeOutput:
        frames = with_alpha(images, mask)
        model, vae = best(model, vae, of_download(cls))
        settings = settings_of(
            options, target=inputs.target(size), seed=seed, color=color, strength=strength, attention=model.attention
        )
        clips = inputs.clips(frames, frames_are)
        progress = host.Progress(cls.hidden.unique_id)
        rows, columns = settings.target.size(*frames.shape[1:3])
        restored = host.empty_frames(len(frames), rows, columns, frames.shape[-1])
        at = 0
        with ready(model, vae, settings, (rows, columns), len(clips[0])) as (models, plan):
            for clip in clips:
                show = Shown(progress, at / len(frames), len(clip) / len(frames))
                # Closed at once, also when a preview tells that the user has stopped: models are moved after that.
                with closing(stream(clip, models, settings, (rows, columns), len(clip), show, plan)) as pieces:
                    for piece in pieces:
                        restored[at : at + len(piece)] = piece
                        at += len(piece)
                        show.preview(piece[-1])
        progress.finish(f"{counted(len(frames))}, {columns} x {rows}")
        # Where all is opaque, the mask is a single value that looks as large.
        transparent = frames.shape[-1] == 4
        mask = 1 - restored[..., 3] if transparent else restored.new_zeros(1).expand(restored.shape[:3])
        return io.NodeOutput(restored[..., : images.shape[-1]].contiguous(), mask)


class RestoreVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SVR2RestoreVideo",
            display_name="SeedVR2 Restore Video",
            category="SeedVR2",
            description="Restores and enlarges a video from file to file, of any length, at constant memory. Sound, "
            "subtitles, timestamps and colour tags are kept. The file is saved in the output folder.",
            search_aliases=["seedvr", "seedvr2", "upscale video", "long video", "video file", "enhance video"],
            inputs=[
                io.Video.Input("video", optional=True, tooltip="From Load Video or any other node."),
                io.String.Input(
                    "path",
                    default="",
                    tooltip="Instead of a video: a file of any size on the machine of ComfyUI, or a folder of numbered "
                    "images. Without a folder in front it is looked for in ComfyUI's input folder.",
                ),
                *_common_inputs(),
                io.String.Input("filename_prefix", default="video/SeedVR2", tooltip="Name in the output folder."),
                io.Combo.Input(
                    "format",
                    options=list(FORMATS),
                    default=FORMATS[0],
                    advanced=True,
                    tooltip="The kind of file. as the source: mkv where that kind can only be read. mkv takes every "
                    "kind of sound and subtitles.",
                ),
            ],
            outputs=[
                io.Video.Output(display_name="video", tooltip="The file that was saved."),
                io.String.Output(display_name="path", tooltip="Where it was saved."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        path: str,
        size: dict,
        seed: int,
        color: str,
        strength: float,
        filename_prefix: str,
        format: str,
        video: Input.Video | None = None,
        model: LoadedModel | None = None,
        vae: LoadedVAE | None = None,
        options: Options | None = None,
    ) -> io.NodeOutput:
        with host.source_file(video, path) as source:
            info = probe(source)
            if info.kind == "image":
                raise MediaError(
                    f"{source.name} is a picture, not a video; restore it with Load Image and SeedVR2 Restore Frames."
                )
            target = inputs.target(size)
            rows, columns = target.size(info.height, info.width)
            suffix = video_suffix(info) if format == FORMATS[0] else f".{format}"
            saved = host.output_file(filename_prefix, suffix, columns, rows)
            check_file(source, saved.path, Settings(target=target))
            # Only then: models may have to be fetched.
            model, vae = best(model, vae, of_download(cls))
            settings = settings_of(
                options, target=target, seed=seed, color=color, strength=strength, attention=model.attention
            )
            progress = host.Progress(cls.hidden.unique_id)
            show = Shown(progress)
            with ready(model, vae, settings, (rows, columns), info.frames) as (models, plan):
                report = restore_file(source, saved.path, models, settings, show, on_frame=show.preview, plan=plan)
            # A kind of file that cannot be written has become another.
            kind = "" if suffix in (source.suffix.lower(), f".{format}") else f", as {suffix}"
            progress.finish(f"{counted(report.frames)}, {columns} x {rows}{kind}")
        return io.NodeOutput(InputImpl.VideoFromFile(str(saved.path)), str(saved.path), ui=saved.preview)

    @classmethod
    def fingerprint_inputs(cls, path: str, **others: object) -> object:
        return host.file_stamp(path)


def _common_inputs() -> list[io.Input]:
    return [
        inputs.size(),
        inputs.seed(),
        inputs.color(),
        inputs.strength(),
        ModelSocket.Input(
            "model", optional=True, tooltip="Without one, the best on this machine is loaded."
        ),
        VAESocket.Input("vae", optional=True, tooltip="Without one, the one that belongs to the model."),
        inputs.options(),
    ]


def with_alpha(images: Tensor, mask: Tensor | None) -> Tensor:
    """Frames with a mask as their alpha channel, opaque where the mask is 0.

    Raises:
        MediaError: images or mask are of a kind or number that cannot be restored together.
    """
    if images.shape[-1] not in (3, 4):
        raise MediaError(f"Images with {images.shape[-1]} channels cannot be restored; give them 3, or 4 with alpha.")
    # Whatever its size: Load Image and others give a small one where nothing is masked.
    if mask is None or not mask.any():
        return images
    mask = mask.to(images)
    if mask.shape[1:] != images.shape[1:3] or len(mask) not in (1, len(images)):
        raise MediaError(
            f"The mask is {len(mask)} x {mask.shape[2]} x {mask.shape[1]}, the images are {len(images)} x "
            f"{images.shape[2]} x {images.shape[1]}; give one mask of their size for all of them, or as many as images."
        )
    return torch.cat([images[..., :3], (1 - mask).expand(images.shape[:3])[..., None]], dim=-1)
