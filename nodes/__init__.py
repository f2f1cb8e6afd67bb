"""The nodes, and how ComfyUI gets them."""

from __future__ import annotations

from . import host
from .compare import Compare
from .host import ComfyExtension, io
from .load import LoadModel, LoadVAE
from .options import MemoryAndSpeed
from .restore import RestoreFrames, RestoreVideo
from .stages import ColorFix, Decode, Encode, RestoreLatent

# As menus show them.
NODES = (
    RestoreFrames, RestoreVideo, LoadModel, LoadVAE, Encode, RestoreLatent, Decode, ColorFix, MemoryAndSpeed, Compare
)  # fmt: skip
# Help pages, below the root of the pack.
WEB_DIRECTORY = "./nodes/web"


class SeedVR2Extension(ComfyExtension):
    async def on_load(self) -> None:
        host.register_folders()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return list(NODES)


async def comfy_entrypoint() -> SeedVR2Extension:
    return SeedVR2Extension()
