"""A real ComfyUI in a process of its own, with only this pack in it, and the calls that tests make of it.

Only ComfyUI's websocket needs more than the standard library, so that this file can be read where no host is installed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import mimetypes
import os
import random
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

ROOT = Path(__file__).parent.parent.parent
BOOT = Path(__file__).parent / "boot.py"
# Below those that systems hand out to outgoing connections, so that a killed server's port stays free.
PORTS = range(20000, 32000)
# Seconds. A start takes 6-14 on two cores that nobody else uses, and minutes on crowded ones.
START_TIMEOUT = 400.0
RUN_TIMEOUT = 300.0
POLL = 0.1

# An API-format graph: {node id: {"class_type": ..., "inputs": {...}}}.
Graph = dict[str, dict[str, Any]]
# {"filename": ..., "subfolder": ..., "type": "output" | "temp" | "input"}
File = dict[str, str]


class Rejected(Exception):
    """The host answered a prompt with HTTP 400.

    Attributes:
        error: what is wrong with the whole graph.
        node_errors: what is wrong with its nodes, {node id: {"class_type": ..., "errors": [...]}}.
    """

    def __init__(self, answer: dict[str, Any]):
        self.error: dict[str, Any] = answer["error"]
        self.node_errors: dict[str, Any] = answer["node_errors"]
        super().__init__(json.dumps(answer))


class Server:
    """One ComfyUI process on a free port of this machine; a context that kills it at its end.

    Args:
        comfyui: ComfyUI's own folder.
        base: an empty folder for its models, inputs and outputs.
        pack: the checkout of a node pack to load in place; None for a bare host.
        arguments: more arguments for ComfyUI's main.py.
        environment: more variables for its process.
    """

    def __init__(
        self,
        comfyui: Path,
        base: Path,
        *,
        pack: Path | None = ROOT,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] = MappingProxyType({}),
    ):
        self.comfyui = comfyui
        self.base = base
        self.pack = pack
        self.arguments = tuple(arguments)
        self.environment = dict(environment)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_file = base / "server.log"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    # The process

    def start(self, timeout: float = START_TIMEOUT) -> None:
        """Start it and wait until it answers.

        Raises:
            RuntimeError: it ended before it answered, was too slow, or could not import the pack; with its log.
        """
        (self.base / "custom_nodes").mkdir(parents=True, exist_ok=True)
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                self._command(),
                cwd=self.base,
                env=_environment() | self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + timeout
        while not self.answers():
            if self._process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended with exit code {self._process.returncode}:\n{self.log()}")
            if time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"ComfyUI does not answer after {timeout:.0f} s:\n{self.log()}")
            time.sleep(POLL)
        if reason := self.import_failure():
            self.kill()
            raise RuntimeError(f"ComfyUI could not import {self.pack}:\n{reason}")

    def kill(self) -> None:
        """End it at once, as a crash would; it can be started again, on the same port."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def restart(self) -> None:
        self.kill()
        self.start()

    @property
    def pid(self) -> int:
        """Of the running process; for those who measure its memory."""
        assert self._process is not None, "the server is not running"
        return self._process.pid

    def answers(self) -> bool:
        try:
            self.get("/queue")
        except OSError:
            return False
        return True

    def log(self) -> str:
        """Everything it wrote since it was first started."""
        return self.log_file.read_text("utf-8", errors="replace")

    def import_failure(self) -> str | None:
        """What the log says about a pack that was not loaded."""
        lines = self.log().splitlines()
        for number, line in enumerate(lines):
            if str(self.pack) in line and ("IMPORT FAILED" in line or "Cannot import" in line):
                return "\n".join(lines[max(0, number - 30) : number + 1])
        return None

    def _command(self) -> list[str]:
        command = [sys.executable, str(BOOT), str(self.comfyui), "--cpu", "--listen", "127.0.0.1"]
        command += ["--port", str(self.port), "--base-directory", str(self.base), "--disable-auto-launch"]
        command += ["--database-url", "sqlite:///:memory:", "--disable-api-nodes", "--disable-all-custom-nodes"]
        if self.pack is not None:
            paths = self.base / "extra_model_paths.yaml"
            # JSON is YAML.
            paths.write_text(json.dumps({"tests": {"custom_nodes": str(self.pack.parent)}}))
            command += ["--extra-model-paths-config", str(paths), "--whitelist-custom-nodes", self.pack.name]
        return [*command, *self.arguments]

    # What can be asked

    def get(self, path: str, **query: str) -> bytes:
        return self._open(urllib.request.Request(f"{self.url}{path}?{urllib.parse.urlencode(query)}"))

    def post(self, path: str, body: Any) -> bytes:
        """Send what JSON can hold."""
        headers = {"Content-Type": "application/json"}
        return self._open(urllib.request.Request(self.url + path, json.dumps(body).encode(), headers))

    def object_info(self) -> dict[str, Any]:
        """Every node's schema by its id."""
        return json.loads(self.get("/object_info"))

    def pack_nodes(self) -> dict[str, Any]:
        """The schemas of the pack's own nodes."""
        assert self.pack is not None, "a bare host has no pack"
        module = f"custom_nodes.{self.pack.name}"
        return {name: info for name, info in self.object_info().items() if info["python_module"] == module}

    def upload(self, path: Path, kind: str = "input", *, name: str = "") -> str:
        """Send a file of any sort.

        Args:
            path: the file.
            kind: "input", "output" or "temp", the folder that takes it.
            name: what to call it there; empty for its own name.

        Returns:
            the name for a loader's widget; another than asked for where that is taken by other content.
        """
        boundary = uuid.uuid4().hex
        media = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        body = (
            (
                f'--{boundary}\r\nContent-Disposition: form-data; name="type"\r\n\r\n{kind}\r\n'
                f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{name or path.name}"\r\n'
                f"Content-Type: {media}\r\n\r\n"
            ).encode()
            + path.read_bytes()
            + f"\r\n--{boundary}--\r\n".encode()
        )
        headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
        return json.loads(self._open(urllib.request.Request(f"{self.url}/upload/image", body, headers)))["name"]

    def queue(self, graph: Graph, client_id: str = "") -> str:
        """Queue a graph and return its prompt id at once.

        Raises:
            Rejected: the graph is not valid.
        """
        try:
            return json.loads(self.post("/prompt", {"prompt": graph, "client_id": client_id}))["prompt_id"]
        except urllib.error.HTTPError as error:
            if error.code != 400:
                raise
            raise Rejected(json.loads(error.read())) from None

    def node_errors(self, graph: Graph) -> dict[str, Any]:
        """What the host has to say against a graph's nodes; it must have something."""
        try:
            prompt_id = self.queue(graph)
        except Rejected as rejected:
            return rejected.node_errors
        raise AssertionError(f"the graph was accepted as {prompt_id}")

    def run(
        self,
        graph: Graph,
        *,
        on_message: Callable[[dict[str, Any] | bytes], None] | None = None,
        timeout: float = RUN_TIMEOUT,
    ) -> dict[str, Any]:
        """Queue a graph and follow it to its end, good or bad.

        Args:
            graph: what to run.
            on_message: gets each websocket message: JSON ones as {"type": ..., "data": ...}, previews as bytes.
            timeout: seconds.

        Returns:
            the history's entry: "outputs" and "status"; see `files`, `succeeded` and `failure`.

        Raises:
            Rejected: the graph is not valid.
            TimeoutError: it took too long.
        """
        prompt_id = asyncio.run(asyncio.wait_for(self._follow(graph, on_message), timeout))
        entry = self.history(prompt_id)
        assert entry is not None, "the host forgot a prompt that it has just ended"
        return entry

    def wait(self, prompt_id: str, timeout: float = RUN_TIMEOUT) -> dict[str, Any]:
        """The history's entry of a queued prompt, once it has ended."""
        deadline = time.monotonic() + timeout
        while (entry := self.history(prompt_id)) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"prompt {prompt_id} did not end in {timeout:.0f} s")
            time.sleep(POLL)
        return entry

    def history(self, prompt_id: str) -> dict[str, Any] | None:
        """The history's entry of a prompt that has ended, else None."""
        return json.loads(self.get(f"/history/{prompt_id}")).get(prompt_id)

    def interrupt(self, prompt_id: str) -> None:
        """Ask the host to stop a prompt that is running."""
        self.post("/interrupt", {"prompt_id": prompt_id})

    def view(self, file: File) -> bytes:
        """Content of a file named by a node's output."""
        return self.get("/view", **{key: file[key] for key in ("filename", "subfolder", "type")})

    def path(self, file: File) -> Path:
        """The same file on this machine's disk."""
        return self.base / file["type"] / file["subfolder"] / file["filename"]

    def _open(self, request: urllib.request.Request) -> bytes:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()

    async def _follow(self, graph: Graph, on_message: Callable[[dict[str, Any] | bytes], None] | None) -> str:
        # Comes with ComfyUI; tests without a host must be able to import this file.
        import aiohttp

        client = uuid.uuid4().hex
        address = f"{self.url}/ws?clientId={client}"
        async with aiohttp.ClientSession() as session, session.ws_connect(address, max_msg_size=0) as ws:
            await ws.send_json({"type": "feature_flags", "data": {"supports_preview_metadata": True}})
            prompt_id = self.queue(graph, client)
            async for received in ws:
                if received.type not in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY):
                    break
                message = received.data if received.type == aiohttp.WSMsgType.BINARY else received.json()
                if on_message is not None:
                    on_message(message)
                # Only then is the history complete.
                if isinstance(message, dict) and message["type"] == "executing":
                    data = message["data"]
                    if data["node"] is None and data["prompt_id"] == prompt_id:
                        return prompt_id
        raise ConnectionError(f"the host went away while it ran {prompt_id}")


def files(entry: dict[str, Any], node: str | None = None) -> list[File]:
    """The files that a run left, of one node or of all."""
    outputs = [output for name, output in entry["outputs"].items() if node in (None, name)]
    items = [item for output in outputs for values in output.values() if isinstance(values, list) for item in values]
    return [item for item in items if isinstance(item, dict) and "filename" in item]


def succeeded(entry: dict[str, Any]) -> bool:
    return entry["status"]["status_str"] == "success"


def failure(entry: dict[str, Any]) -> dict[str, Any] | None:
    """What stopped a run: "node_id", "node_type", "exception_type", "exception_message"; None if nothing did.

    An interrupted run has no exception.
    """
    messages = dict(entry["status"]["messages"])
    return messages.get("execution_error") or messages.get("execution_interrupted")


def free_port() -> int:
    # Not seeded: two sessions on one machine must not try the same ones.
    for port in random.SystemRandom().sample(PORTS, 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("none of 100 ports is free")


def _environment() -> dict[str, str]:
    """This process's, less what the tests set for themselves; offline and with one thread."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return environment | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
