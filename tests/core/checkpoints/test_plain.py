"""Reading files, and refusing those that are damaged, hostile or not weights at all."""

import os
import pickle
import random
import struct
import zipfile

import pytest
import torch

from seedvr2_core.checkpoints import inspect, load_dit
from seedvr2_core.checkpoints.plain import tensors_of
from seedvr2_core.errors import CheckpointError


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def refusal(path) -> str:
    """The one sentence with which a file is refused."""
    with pytest.raises(CheckpointError) as caught:
        inspect(path)
    sentence = str(caught.value)
    assert path.name in sentence
    assert "\n" not in sentence and sentence.endswith(".")
    return sentence


@pytest.mark.parametrize("extension", ["safetensors", "pth", "pt", "ckpt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_plain_file_is_listed(write, dit, extension, dtype):
    weights = {name: tensor.to(dtype) for name, tensor in dit.state_dict().items()}
    path = write(f"model.{extension}", weights)
    info = inspect(path)
    assert info.kind == "dit"
    assert info.format == ("safetensors" if extension == "safetensors" else "pickle")
    assert info.dtype == str(dtype).removeprefix("torch.")
    assert info.tensors == len(weights)
    assert info.parameters == sum(p.numel() for p in dit.parameters())
    assert info.size == path.stat().st_size
    assert not info.why_not


def test_content_and_not_the_extension_decides(write, dit):
    path = write("model.pth", dit.state_dict())
    assert inspect(path.rename(path.with_suffix(".safetensors"))).format == "pickle"
    path = write("model.safetensors", dit.state_dict())
    assert inspect(path.rename(path.with_suffix(".pth"))).format == "safetensors"


def test_a_file_of_an_old_torch_is_read(tmp_path, dit):
    torch.save(dit.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert inspect(tmp_path / "old.pth").kind == "dit"
    load_dit(tmp_path / "old.pth")


def test_nested_dicts_become_dotted_names(write, dit):
    path = write("training.pth", {"step": 3, "ema": {"model": dit.state_dict()}, "lr": [0.1]})
    assert inspect(path).prefix == "ema.model."


def test_a_dict_that_contains_itself_is_walked_once():
    outer = {"a": torch.zeros(1)}
    outer["self"] = outer
    assert list(tensors_of(outer)) == ["a"]


def test_dicts_nested_without_end_do_not_exhaust_the_stack():
    innermost = nested = {}
    for _ in range(20_000):
        innermost["x"] = innermost = {}
    assert tensors_of(nested) == {}


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.zeros(2), "b": RunsCode()}, "evil.pth", _use_new_zipfile_serialization=zipped)
    assert f"asks for {os.name}.mkdir, which could run code" in refusal(tmp_path / "evil.pth")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("protocol", range(6))
def test_a_bare_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(RunsCode(), protocol=protocol))
    refusal(tmp_path / "evil.pth")
    assert not (tmp_path / "executed").exists()


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "empty.safetensors").touch()
    assert "is empty" in refusal(tmp_path / "empty.safetensors")


def test_a_folder_is_refused(tmp_path):
    assert "is a folder" in refusal(tmp_path)


def test_a_missing_file_is_refused(tmp_path):
    assert "There is no file" in refusal(tmp_path / "missing.safetensors")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"just some text, nothing else", "not a weights file"),
        (b"{", "not a weights file"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "a Git LFS pointer"),
    ],
)
def test_text_under_the_name_of_weights_is_refused(tmp_path, content, said):
    (tmp_path / "model.safetensors").write_bytes(content)
    assert said in refusal(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 1 << 60) + b"{}",
        struct.pack("<Q", 200) + b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        struct.pack("<Q", 53) + b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}',
        struct.pack("<Q", 54) + b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        struct.pack("<Q", 54) + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,8]}}' + bytes(8),
        struct.pack("<Q", 54) + b'{"a":{"dtype":"XXX","shape":[2],"data_offsets":[0,8]}}' + bytes(8),
    ],
    ids=["absurd length", "length beyond the end", "broken json", "no data", "shape beyond data", "unknown type"],
)
def test_a_safetensors_file_with_a_lying_header_is_refused(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    assert "is damaged or incomplete" in refusal(tmp_path / "model.safetensors")


@pytest.mark.parametrize("extension", ["safetensors", "pth"])
def test_a_download_cut_short_is_refused(write, dit, extension):
    path = write(f"model.{extension}", dit.state_dict())
    whole = path.read_bytes()
    for kept in (20, 1000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:kept])
        assert "is damaged or incomplete" in refusal(path)


def test_a_zip_that_is_no_checkpoint_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "photos.pth", "w") as file:
        file.writestr("photo.txt", "not a photo")
    assert "is damaged or incomplete" in refusal(tmp_path / "photos.pth")


def test_random_damage_is_refused_in_one_sentence_or_goes_unnoticed_but_never_crashes(tmp_path):
    path = tmp_path / "model.pth"
    shuffle = random.Random(0)
    for zipped in (True, False):
        torch.save({"a": torch.zeros(3), "b": {"c": torch.ones(2, 2)}}, path, _use_new_zipfile_serialization=zipped)
        whole = path.read_bytes()
        for _ in range(150):
            damaged = bytearray(whole)
            for _ in range(shuffle.randint(1, 6)):
                damaged[shuffle.randrange(len(damaged))] = shuffle.randrange(256)
            path.write_bytes(damaged)
            try:
                inspect(path)
            except CheckpointError as error:
                assert "\n" not in str(error)


def test_tensors_without_data_count_as_missing(write, dit):
    weights = {**dit.state_dict(), "txt_in.bias": torch.empty(24, device="meta")}
    with pytest.raises(CheckpointError, match=r"lacks txt_in\.bias"):
        load_dit(write("model.pth", weights))
