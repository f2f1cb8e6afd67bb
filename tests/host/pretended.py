"""ComfyUI with this pack in one process, on a pretended GPU: `python -m tests.host.pretended FOLDER BASE [...]`.

Reads steps from stdin, a JSON list, and prints a JSON line for each: `["run", {input: value}]` runs a graph with nano,
`["unload"]` is the user's button, `["partly", bytes]` is ComfyUI in need of memory. What follows BASE are ComfyUI's own
arguments; with `dynamic` among them its models are moved as where comfy-aimdo works.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import json
import logging
import os
import sys
from pathlib import Path
from types import SimpleNamespace

from tests.pretend_gpu import machine  # before torch

import torch  # isort: skip

from tests.host.boot import import_torchvision

PACK = Path(__file__).parent.parent.parent
LIMIT, SEED = "opts.memory_limit", "restore.seed"


def boot(folder: str, base: str, arguments: list[str]) -> object:
    """What runs prompts; from here on ComfyUI can be imported."""
    dynamic = "dynamic" in arguments
    arguments = [argument for argument in arguments if argument != "dynamic"]
    # What ComfyUI asks of a GPU besides what the pretended one answers.
    torch.version.cuda = "12.8"
    counted = ("active_bytes.all.current", "reserved_bytes.all.current", "allocated_bytes.all.current")
    torch.cuda.memory_stats = lambda _=None: dict.fromkeys(counted, machine.device.allocated())
    torch.cuda.ipc_collect = lambda: None
    torch.cuda.get_allocator_backend = lambda: "cudaMallocAsync"
    pins = SimpleNamespace(cudaHostRegister=lambda *_: 0, cudaHostUnregister=lambda *_: 0)
    torch.cuda.cudart = lambda: pins
    import_torchvision()
    sys.path.insert(0, folder)
    sys.argv = ["main.py", "--database-url", "sqlite:///:memory:", "--base-directory", base, *arguments]
    import utils.install_util  # noqa: F401  ComfyUI's, before something else has that name

    import comfy.options  # isort: skip

    comfy.options.enable_args_parsing()
    import comfy.memory_management
    import comfy.model_patcher

    if dynamic:
        import comfy_aimdo.model_vbar

        reserved = SimpleNamespace(prioritize=lambda: None, loaded_size=lambda: 0, free_memory=lambda size: 0)
        comfy_aimdo.model_vbar.ModelVBAR = lambda size, index: reserved
        comfy_aimdo.model_vbar.vbars_analyze = lambda *_: 0
        comfy_aimdo.model_vbar.vbars_reset_watermark_limits = lambda *_: None
        comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
        comfy.memory_management.aimdo_enabled = True
    import execution
    import server

    import nodes

    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    prompts = server.PromptServer(loop)
    prompts.send_sync = lambda *_, **__: None
    assert loop.run_until_complete(nodes.load_custom_node(str(PACK)))
    return execution.PromptExecutor(prompts, execution.CacheType.CLASSIC, {"lru": 0, "ram": 0})


def graph(changes: dict[str, object]) -> dict:
    nodes = {
        "image": ("EmptyImage", {"width": 64, "height": 48, "batch_size": 5, "color": 0x806040}),
        "model": ("SVR2LoadModel", {"model": "nano", "precision": "fp32", "attention": "auto", "compile": False}),
        "opts": ("SVR2Options", {"memory_limit": 0.0, "frames_at_once": 0}),
        "restore": (
            "SVR2RestoreFrames",
            {"images": ["image", 0], "model": ["model", 0], "options": ["opts", 0], "frames_are": "video",
             "size": "scale", "size.factor": 1.0, "seed": 0, "color": "lab", "strength": 1.0},
        ),
        "save": ("PreviewImage", {"images": ["restore", 0]}),
    }  # fmt: skip
    for path, value in changes.items():
        node, name = path.split(".", 1)
        nodes[node][1][name] = value
    return {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}


class Session:
    def __init__(self, executor: object):
        self.executor, self.number, self.said = executor, 0, []
        logger = logging.getLogger()
        logger.setLevel(logging.INFO)
        logger.addHandler(SimpleNamespace(level=logging.INFO, handle=lambda record: self.said.append(record)))

    def run(self, changes: dict[str, object]) -> dict[str, object]:
        self.number += 1
        self.said.clear()
        machine.device.reset_peak()
        # Another seed each time, or what is there already would be given.
        self.executor.execute(graph({SEED: 0, **changes}), str(self.number), {}, ["save"])
        told = [message for event, message in self.executor.status_messages if event == "execution_error"]
        outputs = asyncio.run(self.executor.caches.outputs.get("restore"))
        images = outputs.outputs[0][0].cpu() if outputs else torch.empty(0)
        return {
            "error": told[0]["exception_message"] if told else None,
            "peak": machine.device.peak(),
            "plan": next((text for text in map(str, self.messages()) if "memory " in text), None),
            "frames": list(images.shape),
            "result": hashlib.sha256(images.numpy().tobytes()).hexdigest(),
        }

    def messages(self) -> list[str]:
        return [record.getMessage() for record in self.said]

    def unload(self) -> dict[str, object]:
        import comfy.model_management as management

        management.unload_all_models()
        return {"left": machine.device.allocated()}

    @torch.inference_mode()
    def partly(self, size: int) -> dict[str, object]:
        import comfy.model_management as management

        place = management.get_torch_device()
        management.free_memory(management.get_free_memory(place) + size, place)
        return {"left": machine.device.allocated()}

    @torch.inference_mode()
    def others(self, size: int) -> dict[str, object]:
        """What the pack thinks it could have, before and after ComfyUI has loaded such models of others."""
        import comfy.model_management as management

        host = next(module for name, module in sys.modules.items() if name.endswith("nodes.host"))
        before, kept = host.free_bytes([]), []
        for place in (torch.device("cpu"), management.get_torch_device()):
            module = torch.nn.Linear(size // 4, 1, bias=False)
            kept.append(host.ModelPatcher(module, load_device=place, offload_device=torch.device("cpu")))
            management.load_models_gpu(kept)
        # Its module lives on.
        kept.append(kept.pop().model)
        gc.collect()
        return {"before": before, "after": host.free_bytes([]) + size, "free": machine.TOTAL}


def main() -> None:
    folder, base, *arguments = sys.argv[1:]
    Path(base).mkdir(exist_ok=True)
    session = Session(boot(folder, base, arguments))
    for name, *details in json.load(sys.stdin):
        print(json.dumps(getattr(session, name)(*details)), flush=True)


if __name__ == "__main__":
    os.chdir(PACK)
    main()
