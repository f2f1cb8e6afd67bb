"""Load SeedVR2 Model and Load SeedVR2 VAE: what is on this machine, what can be fetched, and nano."""

from __future__ import annotations

from ..seedvr2_core.attention import ATTENTION_NAMES
from ..seedvr2_core.device import pick_dtype
from . import host, inputs
from .files import AUTO, DITS, NANO, PUBLISHED_VAE, find_dit, find_vae, local_names, stamp
from .host import io
from .models import ModelSocket, VAESocket, load_autoencoder, load_model
from .progress import of_download


class LoadModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SVR2LoadModel",
            display_name="Load SeedVR2 Model",
            category="SeedVR2",
            description="The transformer that restores. Published ones are fetched when they are first used.",
            search_aliases=["seedvr", "seedvr2", "video upscale model", "restore model", "load dit"],
            inputs=[
                io.Combo.Input(
                    "model",
                    options=[AUTO, NANO, *DITS, *local_names("dit")],
                    default=AUTO,
                    tooltip="auto: the best one on this machine, else nano. nano: a small demonstration that comes "
                    "with the nodes. 3b and 7b (6.8 and 16.5 GB) are fetched when they are missing; 7b-sharp invents "
                    "more detail; seedvr-3b and seedvr-7b are the older ones, which take many steps. Your own files "
                    "follow.",
                ),
                inputs.precision(),
                io.Combo.Input(
                    "attention",
                    options=list(ATTENTION_NAMES),
                    default=AUTO,
                    advanced=True,
                    tooltip="auto: the fastest that can run here. No extra package is needed.",
                ),
                io.Boolean.Input(
                    "compile",
                    default=False,
                    advanced=True,
                    tooltip="Compile the transformer with torch.compile: minutes of work for the first clip of a "
                    "size. It gains nothing on a CPU; what it gains on a GPU has not been measured yet.",
                ),
            ],
            outputs=[ModelSocket.Output(display_name="model", tooltip="For the nodes that restore.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: str, precision: str, attention: str, compile: bool) -> io.NodeOutput:
        path = find_dit(model, of_download(cls))
        return io.NodeOutput(load_model(path, precision, attention, compile))

    @classmethod
    def fingerprint_inputs(cls, model: str, **others: object) -> object:
        return stamp("dit", model)


class LoadVAE(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SVR2LoadVAE",
            display_name="Load SeedVR2 VAE",
            category="SeedVR2",
            description="The autoencoder between frames and latents. Needed only for the separate stages: restoring "
            "frames or videos finds the one that belongs to the model by itself.",
            search_aliases=["seedvr", "seedvr2", "video vae", "autoencoder"],
            inputs=[
                io.Combo.Input(
                    "vae",
                    options=[AUTO, NANO, PUBLISHED_VAE, *local_names("vae")],
                    default=AUTO,
                    tooltip="auto: the one that belongs to the model that auto chooses. vae: the published one of 3b "
                    "and 7b (0.5 GB), fetched when it is missing. nano: the one of the demonstration model.",
                ),
                inputs.precision(),
            ],
            outputs=[VAESocket.Output(display_name="vae", tooltip="For the nodes that encode, decode or restore.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, vae: str, precision: str) -> io.NodeOutput:
        dtype = pick_dtype(precision, host.device())
        return io.NodeOutput(load_autoencoder(find_vae(vae, of_download(cls)), dtype))

    @classmethod
    def fingerprint_inputs(cls, vae: str, **others: object) -> object:
        return stamp("vae", vae)
