"""Send every picture or video of a folder through a ComfyUI workflow, on one server or several.

    python workflows/batch.py --server http://127.0.0.1:8188 --workflow workflows/api/restore_video.json \\
        --input FOLDER --output FOLDER

The workflow is in API format (in ComfyUI: File > Export (API)). Each file is uploaded and its name put into the
workflow's loader: the one node with a widget called `image` (which takes pictures), `file` or `video` (which take
videos) or, in a workflow without such a widget, `path` (videos). Where several nodes have one, `--set` gives a value to
all that the files are not meant for. `--set NODE.INPUT=VALUE` also changes anything else, a seed or a size; NODE is an
id, a title or a node type.

A result is called like its input, several are numbered: `clip.mp4`, or `clip_00001.png` and so on. `batch.json` in the
output folder remembers what is finished, so the same command resumes where it stopped. A file, a setting or a workflow
that changed is done anew; `--again` does everything anew.

A server that goes away is waited for (`--timeout`) while the others go on; the file it had is tried again
(`--retries`). Ctrl-C stops the prompts on the servers. The exit code is 0 when every file succeeded, 1 when one failed,
2 when nothing could be started, 130 after Ctrl-C.

Needs Python 3.10, tqdm and aiohttp (`pip install aiohttp tqdm`; ComfyUI's own Python has both).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import copy
import hashlib
import json
import os
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
from tqdm import tqdm

IMAGES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"})
VIDEOS = frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".wmv", ".mpg", ".mpeg", ".ts", ".mts", ".flv"})
# Widgets that hold the name of a loader's file, and what they take. `path` is often left empty beside a loader.
UPLOADS = {"image": IMAGES, "file": VIDEOS, "video": VIDEOS}
PATHS = {"path": VIDEOS}
# Folder of the server's input folder that takes the uploads.
UPLOAD_FOLDER = "batch"
# Seconds.
CONNECT_TIMEOUT = 10.0
HEARTBEAT = 30.0
CANCEL_TIMEOUT = 5.0
LONGEST_PAUSE = 30.0
# Bytes read from a server at once.
BLOCK = 1 << 20

Graph = dict[str, dict[str, Any]]


class BatchError(Exception):
    """Nothing can be started: the command, the workflow or a folder is wrong."""


class FileFailed(Exception):
    """A file can't be done, and trying again would not help."""


class ServerLost(Exception):
    """A server is gone, or came back without the prompt it had."""


# How a server shows that it is gone. Other OSErrors are about files of this machine.
LOST = (ServerLost, aiohttp.ClientError, asyncio.TimeoutError, ConnectionError)


class Slot(NamedTuple):
    """An input of a node."""

    node: str
    input: str

    def __str__(self) -> str:
        return f"{self.node}.{self.input}"


class Workflow:
    """A graph in API format and the widget that takes a file's name.

    Args:
        graph: {node id: {"class_type": ..., "inputs": {...}}}; changed in place by the settings.
        settings: "NODE.INPUT=VALUE" each.
    """

    def __init__(self, graph: Graph, settings: Iterable[str] = ()):
        self.graph = graph
        changed = {self._change(setting) for setting in settings}
        self.loader = self._find_loader(changed)
        self.takes = (UPLOADS | PATHS)[self.loader.input]
        # Whatever file the workflow was saved with makes no difference.
        self.digest = digest(self.with_file(""))

    @staticmethod
    def read(path: Path, settings: Iterable[str]) -> Workflow:
        try:
            graph = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise BatchError(f"The workflow {path} can't be read: {error}") from error
        nodes = graph.values() if isinstance(graph, dict) else []
        if not nodes or not all(isinstance(node, dict) and "class_type" in node for node in nodes):
            raise BatchError(f"{path.name} is not in API format. Export it with ComfyUI's File > Export (API).")
        return Workflow(graph, settings)

    def with_file(self, name: str) -> Graph:
        """The graph that works on an uploaded file."""
        graph = copy.deepcopy(self.graph)
        graph[self.loader.node]["inputs"][self.loader.input] = name
        return graph

    def _change(self, setting: str) -> Slot:
        place, equals, text = setting.partition("=")
        name, dot, key = place.partition(".")
        if not (equals and dot):
            raise BatchError(f"--set needs NODE.INPUT=VALUE, got {setting!r}.")
        nodes = [id for id, node in self.graph.items() if name in (id, title(self.graph, id), node["class_type"])]
        if len(nodes) != 1:
            raise BatchError(f"--set {setting}: {len(nodes)} nodes are called {name!r}; ids are {list(self.graph)}.")
        inputs = self.graph[nodes[0]]["inputs"]
        # `size.factor` belongs to `size`, and is there only for some of its choices.
        if key.partition(".")[0] not in inputs:
            raise BatchError(
                f"--set {setting}: {title(self.graph, nodes[0])} has no input {key!r}, only {list(inputs)}."
            )
        try:
            inputs[key] = json.loads(text)
        except ValueError:
            inputs[key] = text
        return Slot(nodes[0], key)

    def _find_loader(self, changed: set[Slot]) -> Slot:
        for names in (UPLOADS, PATHS):
            slots = [Slot(node, name) for node in self.graph for name in names if self._is_widget(node, name)]
            match [slot for slot in slots if slot not in changed]:
                case [loader]:
                    return loader
                case [_, *_] as several:
                    raise BatchError(
                        f"The workflow has several loaders, {' and '.join(map(str, several))}. Give a fixed value to "
                        "all but one with --set NODE.INPUT=VALUE."
                    )
        raise BatchError("The workflow has no loader: no node has a widget called image, file, video or path.")

    def _is_widget(self, node: str, name: str) -> bool:
        # A link to another node is a list.
        return isinstance(self.graph[node]["inputs"].get(name), str)


@dataclass
class Job:
    """One file to do.

    Attributes:
        path: the input.
        base: the results' name, without suffix.
        stamp: tells when the input or the workflow is another.
        tries: how often a server was lost on the way.
    """

    path: Path
    base: str
    stamp: str
    tries: int = 0


def find_jobs(folder: Path, workflow: Workflow) -> list[Job]:
    """The files of a folder that the workflow's loader takes, in order of their names."""
    if not folder.is_dir():
        raise BatchError(f"The input folder {folder} does not exist.")
    media = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGES | VIDEOS and path.is_file())
    paths = [path for path in media if path.suffix.lower() in workflow.takes]
    kind = "pictures" if workflow.takes is IMAGES else "videos"
    if not paths:
        raise BatchError(f"There are no {kind} in {folder}, and the workflow's loader {workflow.loader} takes those.")
    if left_out := [path.name for path in media if path not in paths]:
        say(f"Left out, since the loader {workflow.loader} takes {kind}: {', '.join(left_out)}")
    stems = Counter(path.stem.lower() for path in paths)
    # One of `scan.png` and `scan.jpg` must not replace the other's result.
    bases = [path.stem if stems[path.stem.lower()] == 1 else path.name for path in paths]
    return [Job(path, base, stamp(path, workflow)) for path, base in zip(paths, bases, strict=True)]


def stamp(path: Path, workflow: Workflow) -> str:
    status = path.stat()
    return digest([path.name, status.st_size, status.st_mtime_ns, workflow.digest])


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


class Results:
    """The output folder: every file in it is whole, and `batch.json` says what they were made from."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.manifest = folder / "batch.json"
        # {input's name: {"stamp": ..., "outputs": [...]}}
        self.finished: dict[str, dict[str, Any]] = {}
        if self.manifest.exists():
            try:
                self.finished = json.loads(self.manifest.read_text("utf-8"))["files"]
            except (ValueError, KeyError) as error:
                raise BatchError(f"{self.manifest} is damaged. Delete it to do every file again.") from error

    def has(self, job: Job) -> bool:
        known = self.finished.get(job.path.name)
        if known is None or known["stamp"] != job.stamp:
            return False
        return all((self.folder / name).exists() for name in known["outputs"])

    async def save(self, job: Job, server: Server, files: list[dict[str, str]]) -> list[str]:
        """Download what a prompt left, and only then give it its names."""
        names = self._names(job, files)
        parts = [self.folder / f".{name}.part" for name in names]
        try:
            for file, part in zip(files, parts, strict=True):
                await server.download(file, part)
            for part, name in zip(parts, names, strict=True):
                os.replace(part, self.folder / name)
        finally:
            for part in parts:
                part.unlink(missing_ok=True)
        self.finished[job.path.name] = {"stamp": job.stamp, "outputs": names}
        draft = self.manifest.with_name(".batch.json.part")
        draft.write_text(json.dumps({"files": self.finished}, indent=1), "utf-8")
        os.replace(draft, self.manifest)
        return names

    def _names(self, job: Job, files: list[dict[str, str]]) -> list[str]:
        suffixes = [Path(file["filename"]).suffix for file in files]
        if len(files) == 1:
            names = [job.base + suffixes[0]]
        else:
            names = [f"{job.base}_{index:05}{suffix}" for index, suffix in enumerate(suffixes, 1)]
        others = {name: other for other, known in self.finished.items() for name in known["outputs"]}
        for name in names:
            if others.get(name, job.path.name) != job.path.name:
                raise FileFailed(f"its result {name} would replace that of {others[name]}; rename one of them")
        return names


class Server:
    """One ComfyUI. Its methods raise one of LOST when it is gone."""

    def __init__(self, url: str, session: aiohttp.ClientSession):
        self.url = url.rstrip("/") if "://" in url else f"http://{url.rstrip('/')}"
        self.name = self.url.partition("://")[2]
        self.session = session
        self.client = uuid.uuid4().hex

    async def wait_until_up(self, timeout: float) -> None:
        """Return once it answers.

        Raises:
            ServerLost: it did not within `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        tries = 0
        while True:
            try:
                await self._get("/queue")
                return
            except LOST as error:
                if time.monotonic() > deadline:
                    raise ServerLost(f"{self.name} did not answer for {timeout:.0f} s: {describe(error)}") from error
                if tries == 0:
                    say(f"Waiting for {self.name}")
            tries += 1
            await asyncio.sleep(pause(tries))

    async def upload(self, job: Job) -> str:
        """Stream a file to the server; the name there is the same at every try, and fit for every system."""
        size, limit = job.path.stat().st_size, (await self._get("/features")).get("max_upload_size")
        if limit and size > limit:
            raise FileFailed(
                f"it has {size >> 20} MB and {self.name} takes {int(limit) >> 20} at most; start that ComfyUI with "
                f"--max-upload-size {(size >> 20) + 1}"
            )
        name = job.stamp + job.path.suffix.lower()
        with job.path.open("rb") as content:
            form = aiohttp.FormData({"subfolder": UPLOAD_FOLDER, "overwrite": "true"})
            form.add_field("image", content, filename=name, content_type="application/octet-stream")
            async with self.session.post(f"{self.url}/upload/image", data=form) as answer:
                answer.raise_for_status()
        return f"{UPLOAD_FOLDER}/{name}"

    async def queue(self, graph: Graph, prompt_id: str) -> str:
        """Queue a graph under an id of our choice, and return the id that it got."""
        body = {"prompt": graph, "client_id": self.client, "prompt_id": prompt_id}
        async with self.session.post(f"{self.url}/prompt", json=body) as answer:
            if answer.status != 400:
                answer.raise_for_status()
            said = await answer.json()
        # Errors beside HTTP 200 mean that only a part of the graph would run.
        if answer.status == 400 or said["node_errors"]:
            raise FileFailed(refusal(said, graph))
        return said["prompt_id"]

    async def follow(self, prompt_id: str, on_event: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Wait for the end of a prompt and return its history."""
        address = f"{self.url}/ws?clientId={self.client}"
        while True:
            async with self.session.ws_connect(address, heartbeat=HEARTBEAT, max_msg_size=0) as socket:
                # Asked for in this order, a prompt that ends meanwhile is found in one of the two.
                waiting = await self._waiting()
                if ended := (await self._get(f"/history/{prompt_id}")).get(prompt_id):
                    return ended
                if prompt_id not in waiting:
                    raise ServerLost(f"{self.name} was restarted")
                async for message in socket:
                    if message.type is not aiohttp.WSMsgType.TEXT:
                        continue
                    event = message.json()
                    # Other nodes may send what they like.
                    if not isinstance(event["data"], dict) or event["data"].get("prompt_id") != prompt_id:
                        continue
                    on_event(event)
                    if event["type"] == "executing" and event["data"]["node"] is None:
                        break
            # Ended, or the connection broke: ask again, and find out that the server is gone if it is.
            await asyncio.sleep(0.05)

    async def cancel(self, prompt_id: str) -> None:
        """Take a prompt off the queue, or stop it; a server that is gone has stopped."""
        for path, body in {"/queue": {"delete": [prompt_id]}, "/interrupt": {"prompt_id": prompt_id}}.items():
            with contextlib.suppress(*LOST):
                await asyncio.wait_for(self.session.post(self.url + path, json=body), CANCEL_TIMEOUT)

    async def download(self, file: dict[str, str], path: Path) -> None:
        query = {key: file[key] for key in ("filename", "subfolder", "type")}
        async with self.session.get(f"{self.url}/view", params=query) as answer:
            answer.raise_for_status()
            with path.open("wb") as content:
                async for block in answer.content.iter_chunked(BLOCK):
                    content.write(block)

    async def _waiting(self) -> set[str]:
        """Ids of the prompts that run or will."""
        queue = await self._get("/queue")
        return {item[1] for item in queue["queue_running"] + queue["queue_pending"]}

    async def _get(self, path: str) -> dict[str, Any]:
        async with self.session.get(self.url + path) as answer:
            answer.raise_for_status()
            return await answer.json()


class Batch:
    """Files shared out among servers, each of which has one at a time.

    Args:
        workflow: what to do with a file.
        jobs: the files.
        results: where they go.
        retries: how often a file may lose its server.
        timeout: seconds that a server may be silent.
    """

    def __init__(self, workflow: Workflow, jobs: list[Job], results: Results, retries: int, timeout: float):
        self.workflow = workflow
        self.results = results
        self.retries = retries
        self.timeout = timeout
        # {input's name: why}
        self.failures: dict[str, str] = {}
        self._bar = tqdm(total=len(jobs), unit="file", desc="all", disable=None)
        self._jobs: asyncio.Queue[Job] = asyncio.Queue()
        for job in jobs:
            self._jobs.put_nowait(job)

    async def run(self, urls: list[str]) -> None:
        """Do every file; `failures` then has those that could not be done."""
        limits = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT, sock_read=self.timeout)
        async with aiohttp.ClientSession(timeout=limits) as session:
            workers = [asyncio.create_task(self._work(Server(url, session), row)) for row, url in enumerate(urls, 1)]
            every_worker = asyncio.gather(*workers, return_exceptions=True)
            every_file = asyncio.create_task(self._jobs.join())
            try:
                # Workers end of themselves only when their servers stay away.
                await asyncio.wait([every_file, every_worker], return_when=asyncio.FIRST_COMPLETED)
                while not self._jobs.empty():
                    self._fail(self._jobs.get_nowait(), "no server was left to do it")
            finally:
                for task in (*workers, every_file):
                    task.cancel()
                outcomes = await every_worker
                self._bar.close()
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome

    async def _work(self, server: Server, row: int) -> None:
        """Take file after file, until the server is gone for too long."""
        layout = "{percentage:3.0f}%|{bar:20}| {desc}"
        with tqdm(total=1, position=row, leave=False, bar_format=layout, disable=None) as bar:
            while True:
                bar.set_description_str(f"{server.name}: waiting")
                try:
                    await server.wait_until_up(self.timeout)
                except ServerLost as error:
                    say(str(error))
                    return
                job = await self._jobs.get()
                try:
                    names = await self._do(job, server, bar)
                    say(f"{job.path.name} -> {', '.join(names[:3])}{' ...' * (len(names) > 3)}")
                    self._bar.update()
                except FileFailed as error:
                    self._fail(job, str(error))
                except LOST as error:
                    await self._try_again(job, describe(error))
                except OSError as error:
                    self._fail(job, describe(error))
                finally:
                    self._jobs.task_done()

    async def _do(self, job: Job, server: Server, bar: tqdm) -> list[str]:
        bar.set_description_str(f"{server.name}: {job.path.name}, uploading")
        uploaded = await server.upload(job)
        prompt_id = str(uuid.uuid4())
        try:
            prompt_id = await server.queue(self.workflow.with_file(uploaded), prompt_id)
            entry = await server.follow(prompt_id, lambda event: self._show(event, server, job, bar))
        except (asyncio.CancelledError, FileFailed, *LOST):
            # Also where only the connection broke: the file will be tried again.
            await server.cancel(prompt_id)
            raise
        if reason := problem(entry, self.workflow.graph):
            # The user knows the file by its own name.
            raise FileFailed(reason.replace(Path(uploaded).name, job.path.name))
        files = saved_files(entry)
        if not files:
            raise FileFailed("the workflow saved nothing; it needs a node that saves, such as Save Image or Save Video")
        return await self.results.save(job, server, files)

    def _show(self, event: dict[str, Any], server: Server, job: Job, bar: tqdm) -> None:
        """Show which node is at work, and how much of it is done."""
        data = event["data"]
        if event["type"] in ("executing", "progress") and data["node"] is not None:
            bar.n = data["value"] / data["max"] if event["type"] == "progress" and data["max"] else 0
            bar.set_description_str(f"{server.name}: {job.path.name}, {title(self.workflow.graph, data['node'])}")

    async def _try_again(self, job: Job, reason: str) -> None:
        job.tries += 1
        if job.tries > self.retries:
            self._fail(job, f"given up after {job.tries} tries: {reason}")
            return
        say(f"{job.path.name} will be tried again ({job.tries} of {self.retries}): {reason}")
        self._jobs.put_nowait(job)
        # Meanwhile another server may take it.
        await asyncio.sleep(pause(job.tries))

    def _fail(self, job: Job, reason: str) -> None:
        self.failures[job.path.name] = reason
        say(f"{job.path.name} failed")
        self._bar.update()


def title(graph: Graph, node: str) -> str:
    """What the user calls a node. Those that a node made while it ran are not in the graph."""
    known = graph.get(node, {})
    return known.get("_meta", {}).get("title") or known.get("class_type") or f"node {node}"


def refusal(answer: dict[str, Any], graph: Graph) -> str:
    """Why the server did not accept a graph."""
    reasons = [
        f"{title(graph, node)} (node {node}): {error['message']}: {error['details']}"
        for node, found in dict(answer["node_errors"] or {}).items()
        for error in found["errors"]
    ]
    return "the workflow was refused: " + ("; ".join(reasons) or answer["error"]["message"])


def problem(entry: dict[str, Any], graph: Graph) -> str | None:
    """Why a prompt has failed, if it has; only the first line of what a node may have to say."""
    for kind, data in entry["status"]["messages"]:
        if kind == "execution_error":
            said = (data["exception_message"].strip() or data["exception_type"]).splitlines()[0]
            return f"{title(graph, data['node_id'])} (node {data['node_id']}): {said}"
        if kind == "execution_interrupted":
            return "it was interrupted on the server"
    return None


def saved_files(entry: dict[str, Any]) -> list[dict[str, str]]:
    """What a prompt has put into the output folder; previews lie elsewhere."""
    outputs = [values for output in entry["outputs"].values() for values in output.values() if isinstance(values, list)]
    return [item for values in outputs for item in values if isinstance(item, dict) and item.get("type") == "output"]


def describe(error: BaseException) -> str:
    return str(error) or type(error).__name__


def pause(tries: int) -> float:
    """Seconds before the next try: 1, 2, 4 and so on."""
    return min(2.0 ** (tries - 1), LONGEST_PAUSE)


def say(line: str) -> None:
    """Print above the progress bars."""
    tqdm.write(line)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", action="append", metavar="URL", help="a ComfyUI; may be given several times")
    parser.add_argument("--workflow", type=Path, required=True, metavar="FILE", help="a workflow in API format")
    parser.add_argument("--input", type=Path, required=True, metavar="FOLDER", help="pictures or videos")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="takes the results")
    parser.add_argument("--set", action="append", default=[], metavar="NODE.INPUT=VALUE", help="change the workflow")
    parser.add_argument("--again", action="store_true", help="also do what is finished")
    parser.add_argument("--retries", type=int, default=3, help="of a file whose server went away (%(default)s)")
    parser.add_argument("--timeout", type=float, default=300, help="seconds to wait for a silent server (%(default)s)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        workflow = Workflow.read(options.workflow, options.set)
        jobs = find_jobs(options.input, workflow)
        if options.output.resolve() == options.input.resolve():
            raise BatchError("The output folder must be another than the input folder, or results replace inputs.")
        results = Results(options.output)
    except (BatchError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    waiting = [job for job in jobs if options.again or not results.has(job)]
    if len(waiting) < len(jobs):
        say(f"{len(jobs) - len(waiting)} of {len(jobs)} files were finished before")
    batch = Batch(workflow, waiting, results, options.retries, options.timeout)
    try:
        asyncio.run(batch.run(list(dict.fromkeys(options.server or ["http://127.0.0.1:8188"]))))
    except KeyboardInterrupt:
        print("Stopped. The same command goes on from here.", file=sys.stderr)
        return 130
    if batch.failures:
        print(f"{len(batch.failures)} of {len(jobs)} files failed:", file=sys.stderr)
        for name, reason in sorted(batch.failures.items()):
            print(f"  {name}: {reason}", file=sys.stderr)
    return 1 if batch.failures else 0


if __name__ == "__main__":
    sys.exit(main())
