"""The host starts, runs what it is given, and says what is wrong with what it can't run."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from tests.host.server import Graph, Server, failure, files, succeeded


def scaled(image: str, width: int = 32, height: int = 24) -> Graph:
    """A picture in, a smaller one out, by the host's own nodes."""
    size = {"width": width, "height": height, "upscale_method": "area", "crop": "disabled"}
    return {
        "load": {"class_type": "LoadImage", "inputs": {"image": image}},
        "scale": {"class_type": "ImageScale", "inputs": {"image": ["load", 0], **size}},
        "save": {"class_type": "SaveImage", "inputs": {"images": ["scale", 0], "filename_prefix": "boot"}},
    }


def test_the_pack_is_loaded_and_every_node_is_ours(server: Server):
    nodes = server.pack_nodes()
    assert nodes
    assert all(name.startswith("SVR2") for name in nodes)


def test_it_runs_a_graph_of_stock_nodes(server: Server, sample):
    name = server.upload(sample("lq/images/wolf_gray_236x236.jpg"))
    messages = []
    entry = server.run(scaled(name), on_message=messages.append)
    assert succeeded(entry)
    (file,) = files(entry, "save")
    assert Image.open(io.BytesIO(server.view(file))).size == (32, 24)
    assert server.path(file).exists()
    assert {"execution_start", "executing", "executed"} <= {m["type"] for m in messages if isinstance(m, dict)}


def test_a_wrong_value_is_refused_before_it_runs(server: Server, sample):
    name = server.upload(sample("lq/images/wolf_gray_236x236.jpg"))
    errors = server.node_errors(scaled(name, width=-1))
    assert errors["scale"]["errors"][0]["type"] == "value_smaller_than_min"


def test_a_broken_file_fails_in_its_node(server: Server, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture")
    entry = server.run(scaled(server.upload(broken)))
    assert not succeeded(entry)
    assert failure(entry)["node_type"] == "LoadImage"


@pytest.mark.parametrize("kind", ["input", "temp"])
def test_an_upload_lands_in_its_folder(server: Server, tmp_path, kind):
    path = tmp_path / "note.txt"
    path.write_text("hello")
    name = server.upload(path, kind, name=f"{kind}.txt")
    assert server.view({"filename": name, "subfolder": "", "type": kind}) == b"hello"


def test_a_killed_server_starts_again_at_the_same_address(start_server):
    server = start_server(pack=None)
    url = server.url
    server.kill()
    assert not server.answers()
    server.restart()
    assert server.answers() and server.url == url
