"""Downloads, through the real client, from a small hub on this machine."""

import errno
import hashlib
import threading
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import hf_hub_url

from seedvr2_core.checkpoints import download as module
from seedvr2_core.checkpoints.download import NAMES, download
from seedvr2_core.checkpoints.published import MODELS, PROMPTS
from seedvr2_core.errors import Cancelled, CheckpointError

WEIGHTS = bytes(range(256)) * 4000
CHUNK = 1 << 16


class Hub:
    """The few answers of the Hugging Face hub that a download needs."""

    def __init__(self):
        self.files: dict[str, bytes] = {}  # "repo/name/path" -> content
        self.served: list[tuple[str, int]] = []  # path, first byte
        self.bytes_before_failure: int | None = None
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_HEAD(self):
                self.answer(body=False)

            def do_GET(self):
                self.answer(body=True)

            def answer(self, body: bool):
                name = self.path.strip("/").replace("/resolve/main/", "/")
                content = hub.files.get(name)
                if content is None:
                    self.send_response(404)
                    self.send_header("X-Error-Code", "EntryNotFound")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                first = int(self.headers.get("Range", "bytes=0-")[6:].split("-")[0])
                self.send_response(206 if first else 200)
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
                self.send_header("X-Repo-Commit", "0" * 40)
                self.send_header("Content-Length", str(len(content) - first))
                if first:
                    self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
                self.end_headers()
                if body:
                    hub.served.append((name, first))
                    last = len(content) if hub.bytes_before_failure is None else hub.bytes_before_failure
                    self.wfile.write(content[first:last])
                    self.close_connection = last != len(content)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(module, "hf_hub_url", partial(hf_hub_url, endpoint=hub.address))
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", CHUNK)
    # The published files, each with a content of its own and the hash of that content.
    for table in ("MODELS", "PROMPTS"):
        known = {}
        for name, file in getattr(module, table).items():
            content = file.path.encode() + WEIGHTS
            sha256 = file.sha256 and hashlib.sha256(content).hexdigest()
            known[name] = replace(file, size=len(content), sha256=sha256)
            hub.files[f"{file.repo}/{file.path}"] = content
        monkeypatch.setattr(module, table, known)
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", MODELS)
def test_every_published_model_arrives_with_what_it_needs(hub, tmp_path, name):
    expected = [MODELS[name].file, *([] if name == "vae" else ["pos_emb.pt", "neg_emb.pt"])]
    paths = download(name, tmp_path)
    assert paths == [tmp_path / file for file in expected]
    assert {path.name for path in tmp_path.iterdir()} == set(expected)
    assert paths[0].read_bytes() == hub.files[f"{MODELS[name].repo}/{MODELS[name].path}"]


def test_prompts_can_be_fetched_alone(hub, tmp_path):
    assert [path.name for path in download("prompts", tmp_path / "new" / "folder")] == ["pos_emb.pt", "neg_emb.pt"]


def test_what_is_there_already_is_not_fetched_again(hub, tmp_path):
    download("3b", tmp_path)
    hub.served.clear()
    download("3b", tmp_path)
    assert hub.served == []


def test_progress_covers_each_file_to_its_end(hub, tmp_path):
    heard = []
    download("vae", tmp_path, lambda *report: heard.append(report))
    size = module.MODELS["vae"].size
    downloaded = [done for stage, done, total in heard if (stage, total) == ("download", size)]
    assert downloaded[0] == CHUNK
    assert downloaded[-1] == size
    assert downloaded == sorted(downloaded)
    assert heard[-1] == ("verify", size, size)


def test_a_cancelled_download_resumes_where_it_stopped(hub, tmp_path):
    def cancel(stage, done, total):
        if done >= 4 * CHUNK:
            raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        download("vae", tmp_path, cancel)
    hub.served.clear()
    download("vae", tmp_path)
    assert [first for _, first in hub.served] == [4 * CHUNK]
    assert set(contents(tmp_path)) == {MODELS["vae"].file}


def test_a_broken_connection_resumes_where_it_stopped(hub, tmp_path, monkeypatch):
    hub.bytes_before_failure = 4 * CHUNK
    # The client tries again by itself for a while.
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(CheckpointError, match="it will resume"):
        download("vae", tmp_path)
    assert not (tmp_path / MODELS["vae"].file).exists()
    hub.bytes_before_failure = None
    hub.served.clear()
    download("vae", tmp_path)
    assert [first for _, first in hub.served] == [4 * CHUNK]
    assert set(contents(tmp_path)) == {MODELS["vae"].file}


def test_a_partial_file_longer_than_the_whole_is_begun_anew(hub, tmp_path):
    (tmp_path / f".{MODELS['vae'].file}.partial").write_bytes(b"x" * 2 * len(WEIGHTS))
    assert download("vae", tmp_path)[0].read_bytes().endswith(WEIGHTS)


def test_a_download_with_the_wrong_hash_is_removed_and_both_hashes_are_named(hub, tmp_path):
    file = module.MODELS["vae"]
    hub.files[f"{file.repo}/{file.path}"] = b"something else"
    found = hashlib.sha256(b"something else").hexdigest()
    with pytest.raises(CheckpointError, match=rf"SHA-256 is {found}, expected {file.sha256}; the download was removed"):
        download("vae", tmp_path)
    assert contents(tmp_path) == {}


def test_a_file_of_the_user_under_the_same_name_is_kept(hub, tmp_path):
    mine = tmp_path / MODELS["vae"].file
    mine.write_bytes(b"mine")
    with pytest.raises(CheckpointError, match=r"is not the file published by .* move it away"):
        download("vae", tmp_path)
    assert contents(tmp_path) == {mine.name: b"mine"}
    assert hub.served == []


def test_a_file_without_a_published_hash_is_accepted_with_a_warning(hub, tmp_path, caplog):
    download("seedvr-3b", tmp_path)
    assert "seedvr_ema_3b.pth cannot be checked" in caplog.text


def test_a_damaged_transfer_is_noticed_even_without_a_published_hash(hub, tmp_path):
    (tmp_path / ".seedvr_ema_3b.pth.partial").write_bytes(b"another file's beginning")
    with pytest.raises(CheckpointError, match="the download was removed; try again"):
        download("seedvr-3b", tmp_path)
    assert contents(tmp_path) == {}


def test_a_file_that_is_gone_is_one_sentence(hub, tmp_path):
    hub.files.clear()
    with pytest.raises(CheckpointError, match=r"could not be downloaded from Comfy-Org/SeedVR2: there is no vae/.*\.$"):
        download("vae", tmp_path)


def test_a_hub_out_of_reach_is_one_sentence(hub, tmp_path):
    hub.server.shutdown()
    hub.server.server_close()
    with pytest.raises(CheckpointError, match=r"check the connection and try again, it will resume\.$"):
        download("vae", tmp_path)


def test_a_full_disk_is_one_sentence(hub, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "http_get", full)
    with pytest.raises(CheckpointError, match="is full; make room and try again"):
        download("vae", tmp_path)


def test_too_little_space_is_noticed_before_the_download(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(CheckpointError, match=r"seedvr2_ema_vae_fp16\.safetensors needs 0\.0 GB more in"):
        download("vae", tmp_path)
    assert hub.served == []


def test_a_folder_that_cannot_be_made_is_one_sentence(hub, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be written; choose another folder"):
        download("vae", tmp_path / "file" / "models")


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(CheckpointError, match="'9b'; choose one of 3b, 7b, 7b-sharp, vae"):
        download("9b")


def test_published_files_have_distinct_names_and_hashes():
    files = [*MODELS.values(), *PROMPTS.values()]
    assert len({file.file for file in files}) == len(files)
    hashes = [file.sha256 for file in files if file.sha256]
    assert len(set(hashes)) == len(hashes)
    assert all(len(bytes.fromhex(sha256)) == 32 for sha256 in hashes)
    assert set(NAMES) == {*MODELS, "prompts"}
