"""Export: what a run learnt, under the published names, and at work in the command line at once."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from seedvr2_core.__main__ import main as seedvr2
from seedvr2_core.checkpoints import inspect, load_dit, load_prompts, load_vae, save
from seedvr2_core.checkpoints.folders import NANO_DIT as NANO_FILE
from seedvr2_core.checkpoints.folders import NANO_VAE
from seedvr2_core.errors import CheckpointError
from training import loop
from training.adapters import Base, LoraConfig
from training.config import CONFIG_FILE, OptimConfig, RunConfig, load_saved, to_yaml
from training.export import export, main, read
from training.lora import LoraTraining, flow_matching
from training.pretrain import NANO_DIT, Pretraining, PretrainStage
from training.procedural import still
from training.restorer import Restorer
from training.shards import Latents
from training.vae import NANO_VAE as NANO_VAE_CONFIG
from training.vae import RECIPES as VAE_RECIPES
from training.weights import build_restorer, open_restorer, open_vae

RUN = RunConfig(steps=2, save_every=1, validate_every=2, keep_averaged_every=1, async_save=False, ema=0.5)
RATE = OptimConfig(lr=1e-2, final_lr=1e-2, warmup=0)


@pytest.fixture(scope="module")
def pretrain_run(tiny_dit, latents_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "pretrain"
    config = Pretraining(model=tiny_dit, run=RUN, optim=RATE, batch=2)
    torch.manual_seed(0)
    restorer = Restorer(tiny_dit)
    for parameter in restorer.parameters():
        nn.init.normal_(parameter, std=0.1)
    loop.run(PretrainStage(config, Latents(latents_folder, 0), restorer), config, {"g": RATE}, folder)
    return folder


@pytest.fixture(scope="module")
def other_run(pretrain_run) -> Path:
    """Another run of the same model."""
    generator = torch.Generator().manual_seed(1)
    weights = {name: torch.randn(t.shape, generator=generator) for name, t in read(pretrain_run).items()}
    return kept_run(pretrain_run.parent / "other", pretrain_run / CONFIG_FILE, weights)


@pytest.fixture
def smaller_run(pretrain_run, tmp_path) -> Path:
    """A run of a model with fewer numbers in the same layers."""
    return kept_run(tmp_path / "smaller", pretrain_run / CONFIG_FILE, {n: t[:1] for n, t in read(pretrain_run).items()})


def kept_run(folder: Path, config: Path, weights: dict[str, torch.Tensor]) -> Path:
    (folder / "ema").mkdir(parents=True)
    shutil.copy(config, folder)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "ema/step_000002.safetensors")
    return folder


@pytest.fixture(scope="module")
def lora_run(pretrain_run, tiny_dit, latents_folder) -> Path:
    folder = pretrain_run.parent / "lora"
    config = LoraTraining(
        init=str(pretrain_run), model=tiny_dit, run=RUN, g=RATE, lora=LoraConfig(rank=4, base="fp32"), batch=2
    )
    base = Base(open_restorer(pretrain_run))
    loop.run(flow_matching(config, Latents(latents_folder, 0), base), config, {"g": RATE}, folder)
    return folder


@pytest.fixture
def inputs():
    x, condition = torch.randn(2, 2, 16, 2, 4, 4).unbind()
    return x, condition, torch.tensor([0.3, 1.0])


def test_13_an_exported_run_comes_back_as_it_was(pretrain_run, tmp_path, inputs):
    assert main(["--run", str(pretrain_run), "--out", str(tmp_path / "model.safetensors"), "--dtype", "fp32"]) == 0
    again, run = open_restorer(tmp_path / "model.safetensors"), open_restorer(pretrain_run)
    assert again.dit.config == run.dit.config
    weights = again.state_dict(), run.state_dict()
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    torch.testing.assert_close(again.velocity(*inputs), run.velocity(*inputs))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_weights_are_stored_in_the_type_asked_for_with_published_names(pretrain_run, tmp_path, dtype):
    assert main(["--run", str(pretrain_run), "--out", str(tmp_path / "m.safetensors"), "--dtype", dtype]) == 0
    info = inspect(tmp_path / "m.safetensors")
    assert info.dtype == {"bf16": "bfloat16", "fp16": "float16"}[dtype]
    assert set(info.prompts) == {"positive", "negative"} and info.why_not == "" and info.prefix == ""
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert {"vid_in.proj.weight", "blocks.0.attn.proj_qkv.vid.weight"} <= set(file.keys())
        assert json.loads(file.metadata()["seedvr2_config"])["dim"] == 32


def test_raw_weights_and_those_of_an_earlier_step_can_be_had(pretrain_run):
    raw, averaged, earlier = (read(pretrain_run, *which) for which in ((None, "raw"), (2, "ema"), (1, "ema")))
    assert raw.keys() >= averaged.keys() == earlier.keys()
    name = "dit.blocks.0.attn.proj_qkv.vid.weight"
    assert not torch.equal(raw[name], averaged[name]) and not torch.equal(averaged[name], earlier[name])


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_weights_go_a_share_of_the_way_to_those_of_another_run(pretrain_run, other_run, tmp_path, share):
    runs = ["--run", str(pretrain_run), "--toward", str(other_run), "--share", str(share)]
    assert main([*runs, "--out", str(tmp_path / "between.safetensors"), "--dtype", "fp32"]) == 0
    found = open_restorer(tmp_path / "between.safetensors").state_dict()
    here, there = (open_restorer(run).state_dict() for run in (pretrain_run, other_run))
    for name in read(pretrain_run):
        torch.testing.assert_close(found[name], (1 - share) * here[name] + share * there[name])
    with safe_open(tmp_path / "between.safetensors", "pt") as file:
        assert f"{share:g} of the way to other" in file.metadata()["seedvr2_run"]


@pytest.mark.parametrize("share, toward, said", [
    ("1.5", "other_run", "number in 0..1, got 1.5"),
    ("0.5", "smaller_run", "takes a run of the same model"),
    ("0.5", "nowhere", "holds no ema weights"),
])  # fmt: skip
def test_a_way_that_leads_nowhere_is_refused(pretrain_run, request, tmp_path, capsys, share, toward, said):
    toward = tmp_path / toward if toward == "nowhere" else request.getfixturevalue(toward)
    runs = ["--run", str(pretrain_run), "--toward", str(toward), "--share", share]
    assert main([*runs, "--out", str(tmp_path / "m.safetensors")]) == 1
    assert said in capsys.readouterr().err and not (tmp_path / "m.safetensors").exists()


@pytest.mark.parametrize("half", [["--share", "0.5"], ["--toward", "runs/pretrain"]])
def test_a_run_without_a_share_and_a_share_without_a_run_are_refused(pretrain_run, tmp_path, capsys, half):
    with pytest.raises(SystemExit):
        main(["--run", str(pretrain_run), "--out", str(tmp_path / "m.safetensors"), *half])
    assert "--toward and --share go together" in capsys.readouterr().err


def test_adapters_are_not_moved(lora_run, pretrain_run, tmp_path, capsys):
    runs = ["--run", str(lora_run), "--toward", str(pretrain_run), "--share", "0.5"]
    assert main([*runs, "--out", str(tmp_path / "m.safetensors")]) == 1
    assert "takes runs of whole models" in capsys.readouterr().err


def test_weights_that_were_not_kept_are_refused_with_those_that_were(pretrain_run, tmp_path, capsys):
    with pytest.raises(CheckpointError, match="step 7; there are those of 1, 2"):
        read(pretrain_run, 7)
    assert main(["--run", str(tmp_path), "--out", str(tmp_path / "m.safetensors")]) == 1
    assert "no ema weights of any step; run the stage" in capsys.readouterr().err


def test_averages_that_were_cut_off_are_refused(pretrain_run, tmp_path, capsys):
    kept = tmp_path / "run/ema/step_000003.safetensors"
    kept.parent.mkdir(parents=True)
    save_file(read(pretrain_run), kept)
    kept.write_bytes(kept.read_bytes()[:-100])
    assert main(["--run", str(tmp_path / "run"), "--out", str(tmp_path / "m.safetensors")]) == 1
    assert "step_000003.safetensors cannot be read" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="take another step"):
        open_restorer(tmp_path / "run")
    assert not (tmp_path / "m.safetensors").exists()


def test_adapters_are_exported_merged(lora_run, tmp_path, tiny_dit, inputs, pretrain_run):
    export(lora_run, tmp_path / "merged.safetensors", dtype=torch.float32)
    merged = open_restorer(tmp_path / "merged.safetensors")
    expected = open_restorer(lora_run).velocity(*inputs)
    torch.testing.assert_close(merged.velocity(*inputs), expected)
    assert not torch.allclose(expected, open_restorer(pretrain_run).velocity(*inputs))
    base = Base(open_restorer(pretrain_run))
    stage = flow_matching(
        LoraTraining(init=str(pretrain_run), model=tiny_dit, run=RUN, g=RATE, lora=LoraConfig(rank=4, base="fp32")),
        None, base,
    )  # fmt: skip
    stage.modules["g"].load_state_dict(read(lora_run))
    torch.testing.assert_close(stage.modules["g"].velocity(*inputs), expected, atol=1e-4, rtol=1e-4)


def negative_of(run: Path, file: Path) -> torch.Tensor:
    export(run, file, dtype=torch.bfloat16)
    return load_prompts(file).negative


def renamed(run: Path, folder: Path, **changes) -> Path:
    """A copy of a run with another config; a change to None takes a setting out."""
    copied = folder / run.name
    shutil.copytree(run, copied, symlinks=True)
    saved = {key: value for key, value in (load_saved(run) | changes).items() if value is not None}
    (copied / CONFIG_FILE).write_text(yaml.safe_dump(saved))
    return copied


def test_the_negative_prompt_of_a_run_goes_into_its_file(pretrain_run, lora_run, tiny_dit, tmp_path):
    assert not negative_of(pretrain_run, tmp_path / "plain.safetensors").any()
    prompts = {f"{sign}_conditioning": torch.full((3, tiny_dit.text_dim), value)
               for sign, value in (("positive", 1.0), ("negative", -1.0))}  # fmt: skip
    save(tmp_path / "published.safetensors", open_restorer(pretrain_run).dit, tiny_dit, extra_tensors=prompts)
    text = {"mode": "fixed", "negative_fraction": 0.05, "negative": str(tmp_path / "published.safetensors")}
    taught = renamed(pretrain_run, tmp_path, text=text)
    # Of flow matching, of its student, and of adapters on that one.
    student = renamed(pretrain_run, tmp_path / "student", text=text | {"negative": str(taught)})
    adapters = renamed(lora_run, tmp_path, init=str(student))
    for run in (taught, student, adapters):
        found = negative_of(run, tmp_path / "file.safetensors")
        assert torch.equal(found.float(), prompts["negative_conditioning"]), run


def test_adapters_of_before_their_base_was_called_init_are_still_opened(lora_run, pretrain_run, tmp_path, inputs):
    old = renamed(lora_run, tmp_path, init=None, base=str(pretrain_run), text=None)
    assert torch.equal(open_restorer(old).velocity(*inputs), open_restorer(lora_run).velocity(*inputs))


def test_adapters_trained_without_text_are_exported_with_the_null_prompt(lora_run, tmp_path):
    silent = renamed(lora_run, tmp_path, text={"mode": "none"})
    assert open_restorer(lora_run).prompt.any() and not open_restorer(silent).prompt.any()


def test_an_exported_model_restores_a_clip_at_the_command_line(tmp_path):
    """A run of nano's sizes: its weights become a checkpoint's, and that restores."""
    run = tmp_path / "run"
    nano = open_restorer("nano")
    state = {name: tensor for name, tensor in nano.state_dict().items() if "rope" not in name}
    (run / "ema").mkdir(parents=True)
    save_file(state, run / "ema/step_000003.safetensors")
    (run / "config.yaml").write_text(to_yaml(Pretraining(model=NANO_DIT, run=RUN, optim=RATE)))
    assert main(["--run", str(run), "--step", "3", "--what", "ema", "--out", str(tmp_path / "mine.safetensors")]) == 0
    clip = tmp_path / "clip"
    clip.mkdir()
    for number in range(2):
        Image.fromarray(still(0, 0, 34)[:, number : number + 32]).save(clip / f"{number:03d}.png")
    outputs = []
    for model in (tmp_path / "mine.safetensors", NANO_FILE):
        out = tmp_path / f"out-{model.stem}"
        command = ["restore", str(clip), str(out), "--model", str(model), "--vae", str(NANO_VAE), "--same"]
        assert seedvr2([*command, "--device", "cpu", "--dtype", "fp32"]) == 0
        outputs.append([path.read_bytes() for path in sorted(out.iterdir())])
    assert len(outputs[0]) == 2 and outputs[0] == outputs[1]


def vae_run(path: Path, **changes: Any) -> Path:
    """A run of `training.vae` that ends with nano's autoencoder."""
    (path / "ema").mkdir(parents=True)
    save_file(open_vae("nano").state_dict(), path / "ema/step_000001.safetensors")
    (path / "config.yaml").write_text(to_yaml(replace(VAE_RECIPES["nano"], model=NANO_VAE_CONFIG, **changes)))
    return path


def test_an_autoencoder_is_exported_with_the_scale_of_its_latents(tmp_path, latents_folder):
    export(vae_run(tmp_path / "vae"), tmp_path / "vae.safetensors", latents=latents_folder)
    loaded = load_vae(tmp_path / "vae.safetensors")
    assert loaded.config.scale == pytest.approx(Latents(latents_folder, 0).scale, abs=1e-4)
    assert torch.equal(loaded.decoder.conv_in.weight, open_vae("nano").decoder.conv_in.weight.bfloat16())


def test_an_autoencoder_that_was_trained_on_keeps_the_scale_of_its_latents(tmp_path, caplog):
    export(vae_run(tmp_path / "decoder", init=Path("nano")), tmp_path / "vae.safetensors")
    assert load_vae(tmp_path / "vae.safetensors").config.scale == open_vae("nano").config.scale != 1
    assert not caplog.text


def test_the_scale_of_a_new_autoencoder_is_asked_for(tmp_path, caplog):
    export(vae_run(tmp_path / "vae"), tmp_path / "vae.safetensors")
    assert "--latents" in caplog.text


def test_a_stage_may_start_from_a_published_model_by_its_name():
    restorer = open_restorer("nano")
    assert restorer.dit.config == load_dit(NANO_FILE).config == NANO_DIT
    assert torch.equal(restorer.prompt.bfloat16(), load_prompts(NANO_FILE).positive)
    assert open_vae("nano").config.widths == NANO_VAE_CONFIG.widths


def test_a_name_or_path_that_leads_nowhere_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="neither a run directory"):
        open_restorer(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        open_restorer(tmp_path)


def test_weights_of_another_model_are_refused(pretrain_run):
    with pytest.raises(CheckpointError, match="another stage or model"):
        build_restorer(pretrain_run, {"prompt": torch.zeros(8, 24), "odd": torch.zeros(1)})
