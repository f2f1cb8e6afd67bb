"""Our nodes in a real ComfyUI, with nano on real clips and pictures."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from seedvr2_core import Settings, Target, load_models, pick, restore
from seedvr2_core.video.files import probe
from tests.host.clips import cut
from tests.host.server import Graph, Server, failure, files, succeeded

MODEL = {"class_type": "SVR2LoadModel", "inputs": {
    "model": "nano", "precision": "fp32", "attention": "auto", "compile": False
}}  # fmt: skip
VAE = {"class_type": "SVR2LoadVAE", "inputs": {"vae": "nano", "precision": "fp32"}}
COMMON = {"size": "scale", "size.factor": 2.0, "seed": 7, "color": "lab", "strength": 1.0}
NODES = {
    "SVR2Encode", "SVR2RestoreLatent", "SVR2Decode", "SVR2ColorFix", "SVR2Compare", "SVR2LoadModel", "SVR2LoadVAE",
    "SVR2Options", "SVR2RestoreFrames", "SVR2RestoreVideo",
}  # fmt: skip


def restored(image: str, frames_are: str = "independent images", **inputs: object) -> Graph:
    """A picture in, the restored one out."""
    return {
        "load": {"class_type": "LoadImage", "inputs": {"image": image}},
        "model": MODEL,
        "restore": {"class_type": "SVR2RestoreFrames", "inputs": {
            "images": ["load", 0], "frames_are": frames_are, "model": ["model", 0], **COMMON, **inputs
        }},
        "save": {"class_type": "SaveImage", "inputs": {"images": ["restore", 0], "filename_prefix": "test"}},
    }  # fmt: skip


def staged(frames: list, **decode: object) -> Graph:
    """The stages one by one, from frames to a preview of frames."""
    return {
        "model": MODEL,
        "vae": VAE,
        "encode": {"class_type": "SVR2Encode", "inputs": {
            "images": frames, "vae": ["vae", 0], "frames_are": "video", "size": "scale", "size.factor": 2.0
        }},
        "restore": {"class_type": "SVR2RestoreLatent", "inputs": {
            "latent": ["encode", 0], "model": ["model", 0], "seed": 7, "steps": 1, "cfg": 1.0, "condition_noise": 0.0,
            "windows": "as trained"
        }},
        "decode": {"class_type": "SVR2Decode", "inputs": {
            "latent": ["restore", 0], "vae": ["vae", 0], "tiling": "exact", **decode
        }},
        "color": {"class_type": "SVR2ColorFix", "inputs": {
            "images": ["decode", 0], "source": frames, "frames_are": "video", "color": "lab", "strength": 1.0
        }},
        "save": {"class_type": "SaveImage", "inputs": {"images": ["color", 0], "filename_prefix": "stages"}},
    }  # fmt: skip


def told(entry: dict) -> str:
    """What went wrong."""
    return (failure(entry) or {}).get("exception_message", "nothing")


def pixels(server: Server, file: dict) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(server.view(file))))


@pytest.fixture(scope="module")
def picture(server: Server, tmp_path_factory) -> Callable[..., str]:
    """Uploads a picture with something to see in it and gives its name."""

    def make(name: str, width: int = 48, height: int = 40, mode: str = "RGB") -> str:
        y, x = np.mgrid[:height, :width] / max(width, height)
        channels = [x, y, 0.5 + 0.5 * np.sin(20 * (x + y)), np.where(x > 0.5, 1.0, 0.25)][: len(mode)]
        path = tmp_path_factory.mktemp("pictures") / name
        Image.fromarray((np.stack(channels, -1) * 255).astype(np.uint8), mode).save(path)
        return server.upload(path)

    return make


@pytest.fixture(scope="module")
def clip(sample, tmp_path_factory) -> Path:
    """The first 13 frames of a real clip, small, with their sound."""
    source = sample("lq/clips/chaplin_640x360_audio.mp4")
    return cut(source, tmp_path_factory.mktemp("clips") / "clip.mp4", frames=13, height=64)


def test_every_node_is_there(server: Server):
    nodes = server.pack_nodes()
    assert set(nodes) == NODES
    for node in nodes.values():
        assert node["display_name"].startswith(("SeedVR2 ", "Load SeedVR2 "))
        assert node["category"].startswith("SeedVR2")
        assert node["description"] and node["search_aliases"]
        assert all(name == name.lower() for name in node["output_name"])


def test_every_input_and_output_says_what_it_is(server: Server):
    for node, info in server.pack_nodes().items():
        assert all(info["output_tooltips"]), node
        for group in ("required", "optional"):
            for name, (_, *options) in info["input"].get(group, {}).items():
                assert options[0].get("tooltip"), f"{node}.{name}"


def test_a_picture_is_what_the_engine_makes_of_it(server: Server, picture):
    name = picture("one.png")
    entry = server.run(restored(name))
    assert succeeded(entry), told(entry)
    (file,) = files(entry, "save")
    source = torch.from_numpy(np.array(Image.open(server.base / "input" / name))).float() / 255
    models = load_models(*pick("nano"), torch.device("cpu"), torch.float32)
    expected = restore(source[None], models, Settings(target=Target.scale(2), seed=7))[0]
    found = torch.from_numpy(pixels(server, file).copy()).float() / 255
    assert (found - expected).abs().max() < 1.5 / 255


def test_a_batch_of_independent_images_does_not_mix(server: Server, picture):
    first, second = picture("first.png"), picture("second.png", width=48, height=40, mode="RGB")
    graph = restored(first)
    graph["other"] = {"class_type": "LoadImage", "inputs": {"image": second}}
    graph["flip"] = {"class_type": "ImageInvert", "inputs": {"image": ["other", 0]}}
    graph["batch"] = {"class_type": "ImageBatch", "inputs": {"image1": ["flip", 0], "image2": ["load", 0]}}
    alone = server.run(restored(first))
    graph["restore"]["inputs"]["images"] = ["batch", 0]
    both = server.run(graph)
    assert succeeded(both), told(both)
    assert len(files(both, "save")) == 2
    np.testing.assert_array_equal(pixels(server, files(both, "save")[1]), pixels(server, files(alone, "save")[0]))


def test_a_mask_is_enlarged_with_the_picture(server: Server, picture):
    graph = restored(picture("alpha.png", mode="RGBA"))
    graph["restore"]["inputs"]["mask"] = ["load", 1]
    graph["mask"] = {"class_type": "MaskToImage", "inputs": {"mask": ["restore", 1]}}
    graph["save_mask"] = {"class_type": "SaveImage", "inputs": {"images": ["mask", 0], "filename_prefix": "mask"}}
    entry = server.run(graph)
    assert succeeded(entry), told(entry)
    mask = pixels(server, files(entry, "save_mask")[0])[..., 0]
    assert mask.shape == (80, 96)
    # ComfyUI's mask is 1 where the picture is transparent.
    assert mask[:, :40].mean() == pytest.approx(0.75 * 255, abs=3)
    assert mask[:, 56:].mean() < 3


@pytest.mark.parametrize("color", ["none", "lab"])
def test_the_stages_make_what_the_one_node_makes(server: Server, picture, color):
    name = picture("stages.png")
    whole = server.run(restored(name, frames_are="video", color=color))
    graph = staged(["load", 0])
    graph["load"] = {"class_type": "LoadImage", "inputs": {"image": name}}
    graph["color"]["inputs"]["color"] = color
    stages = server.run(graph)
    assert succeeded(stages), told(stages)
    one, other = (pixels(server, files(entry, "save")[0]).astype(int) for entry in (whole, stages))
    assert one.shape == other.shape
    difference = abs(one - other)
    # Between nodes images are cut to 0..1, which a colour transfer sees.
    assert difference.max() <= 1 if color == "none" else difference.mean() < 1


def test_a_latent_of_several_frames_passes_through_other_nodes(server: Server, clip):
    graph = staged(["parts", 0])
    graph["load"] = {"class_type": "LoadVideo", "inputs": {"file": server.upload(clip)}}
    graph["parts"] = {"class_type": "GetVideoComponents", "inputs": {"video": ["load", 0]}}
    graph["encode"]["inputs"]["size.factor"] = 1.0
    direct = server.run(graph)
    # Copied, and the copy taken: the same latent, b c t h w, from another node.
    graph["repeat"] = {"class_type": "RepeatLatentBatch", "inputs": {"samples": ["restore", 0], "amount": 2}}
    graph["second"] = {"class_type": "LatentFromBatch", "inputs": {
        "samples": ["repeat", 0], "batch_index": 1, "length": 1
    }}  # fmt: skip
    graph["decode"]["inputs"]["latent"] = ["second", 0]
    entry = server.run(graph)
    assert succeeded(entry), told(entry)
    assert len(files(entry, "save")) == len(files(direct, "save")) == 13
    for file, expected in zip(files(entry, "save"), files(direct, "save"), strict=True):
        np.testing.assert_array_equal(pixels(server, file), pixels(server, expected))


def test_an_image_latent_of_another_node_is_decoded_as_one_frame(server: Server):
    entry = server.run({
        "latent": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 64, "height": 48, "batch_size": 2}},
        "vae": VAE,
        "decode": {"class_type": "SVR2Decode", "inputs": {
            "latent": ["latent", 0], "vae": ["vae", 0], "tiling": "exact"
        }},
        "save": {"class_type": "SaveImage", "inputs": {"images": ["decode", 0], "filename_prefix": "image_latent"}},
    })  # fmt: skip
    assert succeeded(entry), told(entry)
    assert [pixels(server, file).shape for file in files(entry, "save")] == [(48, 64, 3)] * 2


def test_a_latent_of_another_kind_is_refused_in_one_sentence(server: Server):
    entry = server.run({
        "latent": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "vae": VAE,
        "decode": {"class_type": "SVR2Decode", "inputs": {
            "latent": ["latent", 0], "vae": ["vae", 0], "tiling": "exact"
        }},
        "save": {"class_type": "PreviewImage", "inputs": {"images": ["decode", 0]}},
    })  # fmt: skip
    assert "is not of SeedVR2; expected batch x 16 x time x height x width." in told(entry)


def test_blended_tiles_are_close_to_the_exact_way(server: Server, picture):
    name = picture("tiles.png", width=96, height=96)
    results = []
    for tiling in ({"tiling": "exact"}, {"tiling": "blended tiles", "tiling.tile": 128, "tiling.overlap": 64}):
        graph = staged(["load", 0])
        graph["load"] = {"class_type": "LoadImage", "inputs": {"image": name}}
        graph["decode"]["inputs"] |= tiling
        entry = server.run(graph)
        assert succeeded(entry), told(entry)
        results.append(pixels(server, files(entry, "save")[0]).astype(float))
    difference = np.square(results[0] - results[1]).mean()
    assert 0 < difference < 255**2 / 10**3  # 30 dB


def test_a_video_goes_from_file_to_file(server: Server, clip):
    name = server.upload(clip)
    graph = {
        "load": {"class_type": "LoadVideo", "inputs": {"file": name}},
        "model": MODEL,
        "restore": {"class_type": "SVR2RestoreVideo", "inputs": {
            "path": "", "video": ["load", 0], "model": ["model", 0], **COMMON, "filename_prefix": "video/test",
            "format": "mkv"
        }},
    }  # fmt: skip
    previews = []
    entry = server.run(graph, on_message=lambda message: previews.append(message) if type(message) is bytes else None)
    assert succeeded(entry), told(entry)
    (file,) = files(entry, "restore")
    info, source = probe(server.path(file)), probe(clip)
    assert (info.width, info.height) == (2 * source.width, 2 * source.height)
    with av.open(str(server.path(file))) as container:
        assert len(list(container.decode(video=0))) == 13
    with av.open(str(server.path(file))) as container:
        assert container.streams.audio
    assert previews


def test_a_path_serves_as_well_as_a_video(server: Server, clip):
    server.upload(clip, name="by_path.mp4")
    graph = {"restore": {"class_type": "SVR2RestoreVideo", "inputs": {
        "path": "by_path.mp4", **COMMON, "filename_prefix": "video/path", "format": "as the source"
    }}}  # fmt: skip
    entry = server.run(graph)
    assert succeeded(entry), told(entry)
    assert files(entry, "restore")[0]["filename"].endswith(".mp4")


def from_path(path: str, **inputs: object) -> Graph:
    return {"restore": {"class_type": "SVR2RestoreVideo", "inputs": {
        "path": path, **COMMON, "size.factor": 1.0, "filename_prefix": "video/path", "format": "as the source", **inputs
    }}}  # fmt: skip


def test_a_kind_of_video_that_can_only_be_read_becomes_mkv_and_the_node_says_so(server: Server, tmp_path):
    source, shown = tmp_path / "old.avi", []
    with av.open(str(source), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame(32, 32, "yuv420p")))
        container.mux(stream.encode())
    graph = from_path(str(source), filename_prefix="video/at 10:30")
    entry = server.run(graph, on_message=lambda message: shown.append(message) if type(message) is bytes else None)
    assert succeeded(entry), told(entry)
    (file,) = files(entry, "restore")
    # Windows takes no colon in a name.
    assert file["filename"].startswith("at 10_30_") and file["filename"].endswith(".mkv")
    assert any(b"as .mkv" in message for message in shown)


def test_sound_that_does_not_fit_is_refused_in_words_that_help_here(server: Server, clip):
    wrong = failure(server.run(from_path(str(clip), format="webm")))
    assert wrong["exception_type"] == "SeedVR2.MediaError"
    assert "choose .mkv, which takes all." in wrong["exception_message"]


def test_a_picture_is_sent_to_the_node_for_pictures(server: Server, picture):
    assert "is a picture, not a video; restore it with Load Image" in told(server.run(from_path(picture("still.png"))))


def test_too_few_frames_at_once_are_refused_before_anything_runs(server: Server, picture):
    graph = restored(picture("few.png"))
    graph["options"] = {"class_type": "SVR2Options", "inputs": {"memory_limit": 0.0, "frames_at_once": 5}}
    graph["restore"]["inputs"]["options"] = ["options", 0]
    assert "frames_at_once is 5; use 9 to 1025, or 0" in str(server.node_errors(graph)["options"]["errors"])


def test_a_mask_that_masks_nothing_may_have_any_size(server: Server, picture):
    graph = restored(picture("unmasked.png"))
    graph["mask"] = {"class_type": "SolidMask", "inputs": {"value": 0.0, "width": 512, "height": 16}}
    graph["restore"]["inputs"]["mask"] = ["mask", 0]
    entry = server.run(graph)
    assert succeeded(entry), told(entry)


def test_a_stage_alone_shows_and_logs_only_itself(server: Server):
    begun, shown = len(server.log()), []
    graph = {
        "latent": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 64, "height": 48, "batch_size": 1}},
        "vae": VAE,
        "decode": {"class_type": "SVR2Decode", "inputs": {
            "latent": ["latent", 0], "vae": ["vae", 0],
            "tiling": "blended tiles", "tiling.tile": 64, "tiling.overlap": 16,
        }},
        "save": {"class_type": "PreviewImage", "inputs": {"images": ["decode", 0]}},
    }  # fmt: skip
    entry = server.run(graph, on_message=lambda message: shown.append(message) if type(message) is bytes else None)
    assert succeeded(entry), told(entry)
    assert any(b"decode: " in message for message in shown) and not any(b"encode: " in message for message in shown)
    (line,) = [line for line in server.log()[begun:].splitlines() if "Frames: 1 frame -> 64 x 48" in line]
    assert "attention" not in line and "restore" not in line and ", ;" not in line


def test_freeing_memory_lets_go_of_models_that_no_node_holds(server: Server, picture):
    graph = restored(picture("free.png"))
    del graph["model"], graph["restore"]["inputs"]["model"]
    assert succeeded(server.run(graph))
    begun = len(server.log())
    server.post("/free", {"unload_models": True, "free_memory": True})
    # ComfyUI does it in its own time, and no more after an error there.
    time.sleep(3)
    graph["restore"]["inputs"]["seed"] = 99
    entry = server.run(graph)
    assert succeeded(entry), told(entry)
    assert "Requested to load VideoVAE" in server.log()[begun:] and "Traceback" not in server.log()[begun:]


def test_a_cut_video_is_restored_without_the_rest(server: Server, clip):
    name = server.upload(clip)
    graph = {
        "load": {"class_type": "LoadVideo", "inputs": {"file": name}},
        "cut": {"class_type": "Video Slice", "inputs": {
            "video": ["load", 0], "start_time": 0.0, "duration": 0.2, "strict_duration": False
        }},
        "model": MODEL,
        "restore": {"class_type": "SVR2RestoreVideo", "inputs": {
            "path": "", "video": ["cut", 0], "model": ["model", 0], **COMMON, "filename_prefix": "video/cut",
            "format": "as the source"
        }},
    }  # fmt: skip
    entry = server.run(graph)
    assert succeeded(entry), told(entry)
    found = probe(server.path(files(entry, "restore")[0]))
    assert 4 <= found.frames <= 7 < probe(clip).frames


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"size.factor": -1.0}, "smaller than min"),
        ({"color": "sepia"}, "not in list"),
        ({"frames_are": "both"}, "not in list"),
    ],
    ids=str,
)
def test_a_bad_value_is_refused_before_anything_runs(server: Server, picture, inputs, words):
    errors = server.node_errors(restored(picture("bad.png"), **inputs))
    assert words in str(errors["restore"]["errors"]).lower()


def test_a_missing_model_is_one_clear_sentence(server: Server, picture):
    graph = restored(picture("missing.png"))
    graph["model"] = {"class_type": "SVR2LoadModel", "inputs": {**MODEL["inputs"], "model": "3b"}}
    told = failure(server.run(graph))
    # The tests have no connection.
    assert told["node_type"] == "SVR2LoadModel"
    assert told["exception_message"].strip().count("\n") == 0
    assert "could not be downloaded" in told["exception_message"]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("nowhere.mp4", "nowhere.mp4 does not exist; write the whole path"),
        ("/there/is/no.mp4", "/there/is/no.mp4 does not exist; write the whole path"),
        (" ", "Neither is a video connected nor a path written"),
    ],
)
def test_a_missing_video_is_one_clear_sentence(server: Server, path, words):
    graph = {"restore": {"class_type": "SVR2RestoreVideo", "inputs": {
        "path": path, **COMMON, "filename_prefix": "video/none", "format": "mkv"
    }}}  # fmt: skip
    sentence = told(server.run(graph)).strip()
    assert words in sentence and sentence.endswith(".") and "\n" not in sentence


def test_nothing_is_computed_twice_and_nothing_stale_is_kept(server: Server, picture):
    name = picture("again.png")

    def ran(graph: Graph) -> set[str]:
        names: set[str] = set()
        server.run(graph, on_message=lambda m: names.add(m["data"]["node"]) if _executing(m) else None)
        return names

    first = restored(name)
    assert "restore" in ran(first)
    assert "restore" not in ran(restored(name))
    changed = restored(name, seed=8)
    assert "restore" in ran(changed) and "model" not in ran(restored(name, seed=9))


def _executing(message: object) -> bool:
    return isinstance(message, dict) and message["type"] == "executing" and message["data"]["node"] is not None


def test_a_run_stops_within_two_seconds(server: Server, picture):
    # Half a minute of work, all of it on one frame.
    graph = restored(picture("large.png", width=640, height=480), **{"size.factor": 3.0})
    begun = len(server.log())
    prompt = server.queue(graph)
    while "Frames: 1 frame -> 1920 x 1440" not in server.log()[begun:]:
        time.sleep(0.1)
    time.sleep(3)
    start = time.monotonic()
    server.interrupt(prompt)
    entry = server.wait(prompt, timeout=60)
    assert time.monotonic() - start < 2
    assert not succeeded(entry)
    assert server.answers()


def test_a_video_goes_on_where_it_was_when_comfyui_crashed(server: Server, sample, tmp_path):
    source = cut(sample("lq/clips/chaplin_640x360_audio.mp4"), tmp_path / "long.mp4", frames=80, height=240)
    graph = from_path(str(source), filename_prefix="video/stopped", options=["options", 0])
    graph["options"] = {"class_type": "SVR2Options", "inputs": {"memory_limit": 0.0, "frames_at_once": 17}}
    folder = server.base / "output" / "video"
    prompt = server.queue(graph)
    while not list(folder.glob(".stopped_00001_.mp4.resume/*/state")):
        assert server.history(prompt) is None
        time.sleep(0.1)
    server.restart()
    assert not list(folder.glob("stopped*"))
    begun = len(server.log())
    entry = server.run(graph)
    assert succeeded(entry), told(entry)
    assert "going on after" in server.log()[begun:]
    (file,) = files(entry, "restore")
    assert (file["filename"], list(folder.glob(".stopped*"))) == ("stopped_00001_.mp4", [])
    with av.open(str(folder / file["filename"])) as container:
        assert sum(1 for _ in container.decode(video=0)) == 80


def test_memory_does_not_grow_from_run_to_run(server: Server, picture):
    name = picture("memory.png", width=160, height=120)

    def resident() -> int:
        with open(f"/proc/{server.pid}/statm") as file:
            return int(file.read().split()[1]) * 4096

    sizes = []
    for seed in range(8):
        server.run(restored(name, seed=100 + seed))
        sizes.append(resident())
    # The first runs fill caches.
    assert sizes[-1] - sizes[2] < 30e6, [round(size / 1e6) for size in sizes]
