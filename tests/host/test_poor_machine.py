"""Our nodes in a real ComfyUI on a machine that lacks memory or a compiler: they manage with less, or say what is
missing."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from seedvr2_core.video.files import probe
from tests.host.clips import cut
from tests.host.server import Graph, Server, failure, files, succeeded

MIB = 1 << 20
FRAMES, SIDE = 9, 256
# The smaller plan saves about 140 MiB here.
TOO_LITTLE, FAR_TOO_LITTLE = 70 * MIB, 300 * MIB
POOR = {
    # What is given back has to leave the process, or memory would not run out a second time.
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "CXX": "/there/is/no/compiler",
}


@pytest.fixture(scope="module")
def poor(start_server) -> Server:
    return start_server(environment=POOR)


@pytest.fixture(scope="module")
def graph(poor: Server, sample, tmp_path_factory) -> Callable[..., Graph]:
    clip = cut(sample("lq/clips/museum_256x256.mp4"), tmp_path_factory.mktemp("clips") / "clip.mp4", FRAMES, SIDE)
    name = poor.upload(clip)

    def make(seed: int = 0, compile: bool = False) -> Graph:
        return {
            "model": {"class_type": "SVR2LoadModel", "inputs": {
                "model": "nano", "precision": "fp32", "attention": "auto", "compile": compile
            }},
            "restore": {"class_type": "SVR2RestoreVideo", "inputs": {
                "path": name, "size": "scale", "size.factor": 2.0, "seed": seed, "color": "lab", "strength": 1.0,
                "filename_prefix": "video/poor", "format": "mkv", "model": ["model", 0],
            }},
        }  # fmt: skip

    return make


@pytest.fixture(scope="module")
def limited(poor: Server, graph) -> Callable[[int, Graph], dict]:
    """Runs a graph with so many bytes less than it takes: `limited(missing, graph)`."""
    if not sys.platform.startswith("linux"):
        pytest.skip("only Linux can take memory from a process that runs")
    import resource

    entry = poor.run(graph(seed=1))
    assert succeeded(entry), failure(entry)
    peak = memory(poor, "VmPeak")

    def run(missing: int, nodes: Graph) -> dict:
        resource.prlimit(poor.pid, resource.RLIMIT_AS, (peak - missing, resource.RLIM_INFINITY))
        try:
            return poor.run(nodes)
        finally:
            resource.prlimit(poor.pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    return run


def memory(server: Server, entry: str) -> int:
    """Bytes of an entry of the process's status."""
    lines = Path(f"/proc/{server.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{entry}:")) * 1024


def one_sentence(entry: dict) -> str:
    """What the user is told of a run that failed."""
    told = (failure(entry) or {}).get("exception_message", "").strip()
    assert told.endswith(".") and "\n" not in told, told
    return told


def test_where_memory_runs_out_the_video_is_finished_by_a_smaller_plan(poor: Server, graph, limited):
    begun = len(poor.log())
    entry = limited(TOO_LITTLE, graph(seed=2))
    assert succeeded(entry), failure(entry)
    assert "going on with a smaller plan" in poor.log()[begun:]
    assert probe(poor.path(files(entry, "restore")[0])).frames == FRAMES


def test_where_no_plan_fits_one_sentence_says_what_to_do_and_the_next_run_works(poor: Server, graph, limited):
    told = one_sentence(limited(FAR_TOO_LITTLE, graph(seed=3)))
    assert "takes more memory than cpu has free; choose a smaller size" in told
    entry = poor.run(graph(seed=3))
    assert succeeded(entry), failure(entry)


def test_frames_that_cannot_all_be_kept_are_refused_in_one_sentence(poor: Server, tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "small.png")
    graph = {
        "load": {"class_type": "LoadImage", "inputs": {"image": poor.upload(tmp_path / "small.png")}},
        "many": {"class_type": "RepeatImageBatch", "inputs": {"image": ["load", 0], "amount": 4096}},
        "restore": {"class_type": "SVR2RestoreFrames", "inputs": {
            "images": ["many", 0], "frames_are": "video", "size": "exact", "size.width": 7680, "size.height": 4320,
            "seed": 0, "color": "lab", "strength": 1.0,
        }},
        "save": {"class_type": "PreviewImage", "inputs": {"images": ["restore", 0]}},
    }  # fmt: skip
    assert "do not fit into the memory of cpu at once" in one_sentence(poor.run(graph))


def test_without_a_compiler_one_sentence_says_so_before_anything_is_restored(poor: Server, graph):
    entry = poor.run(graph(compile=True))
    told = one_sentence(entry)
    assert failure(entry)["node_type"] == "SVR2LoadModel"
    assert "torch.compile cannot run on this machine" in told and "turn off `compile`" in told
