"""What a file is, told from names and shapes alone."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from seedvr2_core.checkpoints import inspect
from seedvr2_core.checkpoints.detect import detect
from seedvr2_core.checkpoints.format import Header, TensorInfo
from seedvr2_core.errors import CheckpointError
from seedvr2_core.models.dit import SEEDVR2_3B, SEEDVR2_7B, DiT
from seedvr2_core.models.vae import SEEDVR2_VAE, VideoVAE
from seedvr2_core.models.windows import WindowConfig
from seedvr2_core.video.geometry import Grid


def header(tensors, metadata=None, file="file.safetensors"):
    infos = {
        name: TensorInfo(shape=tuple(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."))
        for name, tensor in tensors.items()
    }
    return Header(file=file, tensors=infos, metadata=metadata or {})


def prefixed(prefix, tensors):
    return {prefix + name: tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("build", "config", "label"),
    [(DiT, SEEDVR2_3B, "SeedVR2 3B"), (DiT, SEEDVR2_7B, "SeedVR2 7B"), (VideoVAE, SEEDVR2_VAE, "SeedVR2 VAE")],
    ids=["3b", "7b", "vae"],
)
def test_published_models_are_known_by_their_shapes(build, config, label):
    with torch.device("meta"):
        content = detect(header(build(config).state_dict()))
    assert content.label == label
    assert content.parts[0].config == config


def test_sizes_of_an_unpublished_dit_are_read_off_its_shapes(either_dit):
    assert detect(header(either_dit.state_dict())).parts[0].config == either_dit.config


def test_rotary_kind_follows_the_feed_forward_when_the_frequencies_are_absent(either_dit):
    tensors = {name: tensor for name, tensor in either_dit.state_dict().items() if "rope" not in name}
    assert detect(header(tensors)).parts[0].config == either_dit.config


def test_sizes_of_an_unpublished_vae_are_read_off_its_shapes(vae):
    assert detect(header(vae.state_dict())).parts[0].config == vae.config


def test_settings_that_shapes_cannot_show_come_from_the_metadata(dit, vae):
    windows = WindowConfig(splits=Grid(2, 1, 1), train_area=(8, 8), max_t=6, size=Grid(1, 2, 3))
    stated = replace(dit.config, windows=windows, modulate_last_text=True)
    assert detect(header(dit.state_dict(), {"seedvr2_config": json.dumps(asdict(stated))})).parts[0].config == stated
    stated = replace(vae.config, groups=16, scale=1.25)
    assert detect(header(vae.state_dict(), {"seedvr2_config": json.dumps(asdict(stated))})).parts[0].config == stated


@pytest.mark.parametrize(
    "stated",
    [
        "{",
        "[1]",
        "[" * 100_000,
        '{"windows": 3}',
        '{"windows": {"splits": [0, 1, 1]}}',
        '{"windows": {"splits": [4, 3]}}',
        '{"windows": {"max_t": true}}',
        '{"windows": {"size": [1, 0, 4]}}',
        '{"windows": {"train_area": [1e9, 1]}}',
        '{"modulate_last_text": "yes"}',
    ],
    ids=lambda stated: stated[:30],
)
def test_damaged_settings_are_refused(dit, stated):
    with pytest.raises(CheckpointError, match=r"file\.safetensors .*seedvr2_config"):
        detect(header(dit.state_dict(), {"seedvr2_config": stated}))


@pytest.mark.parametrize("scale", ["0", "-1", "NaN", "Infinity", '"0.9"', "true"])
def test_a_scale_that_is_no_positive_number_is_refused(vae, scale):
    with pytest.raises(CheckpointError, match="scale"):
        detect(header(vae.state_dict(), {"seedvr2_config": f'{{"scale": {scale}}}'}))


@pytest.mark.parametrize(
    "prefix",
    ["model.diffusion_model.", "module.", "_orig_mod.", "ema.", "generator.", "module._orig_mod.", "state_dict.model."],
)
def test_a_prefix_is_recognised_and_reported(dit, prefix):
    content = detect(header(prefixed(prefix, dit.state_dict())))
    assert (content.kind, content.parts[0].prefix) == ("dit", prefix)
    assert set(content.parts[0].stored) == set(dit.state_dict())


def test_blocks_compiled_one_by_one_are_recognised(dit):
    compiled = {name.replace("blocks.1.", "blocks.1._orig_mod."): t for name, t in dit.state_dict().items()}
    assert set(detect(header(compiled)).parts[0].stored) == set(dit.state_dict())


def test_averaged_weights_are_preferred_among_those_of_a_training_run(dit):
    weights = dit.state_dict()
    tensors = {
        **prefixed("discriminator.", weights),
        **prefixed("generator.", weights),
        **prefixed("ema.", weights),
        "optimizer.state.0.exp_avg": torch.zeros(3),
    }
    assert detect(header(tensors)).parts[0].prefix == "ema."
    del tensors["ema.vid_in.proj.weight"]
    assert detect(header(tensors)).parts[0].prefix == "generator."


@pytest.mark.parametrize("dit_prefix", ["model.diffusion_model.", ""])
@pytest.mark.parametrize("vae_prefix", ["vae.", "first_stage_model."])
def test_a_combined_file_holds_both_models(dit, vae, dit_prefix, vae_prefix):
    tensors = prefixed(dit_prefix, dit.state_dict()) | prefixed(vae_prefix, vae.state_dict())
    tensors[f"{dit_prefix}positive_conditioning"] = torch.zeros(5, 16)
    content = detect(header(tensors))
    assert content.kind == "combined"
    assert set(content.part("dit").stored) == set(dit.state_dict())
    assert set(content.part("vae").stored) == set(vae.state_dict())
    assert content.prompts == {"positive": f"{dit_prefix}positive_conditioning"}


@pytest.mark.parametrize(("tokens", "sign"), [(58, "positive"), (64, "negative")])
def test_a_bare_tensor_of_the_right_width_is_a_prompt_embedding(write, tokens, sign):
    info = inspect(write("pos_emb.pt", torch.zeros(tokens, 5120, dtype=torch.bfloat16)))
    assert (info.kind, info.label, info.prompts) == ("prompts", f"SeedVR2 {sign} prompt embedding", (sign,))
    assert (info.dtype, info.parameters) == ("bfloat16", tokens * 5120)


@pytest.mark.parametrize(
    ("name", "looks_like"),
    [
        ("diffusion_model.blocks.0.attn.proj_qkv.vid.lora_A.weight", "a LoRA"),
        ("lora_unet_down_blocks_0.lora_up.weight", "a LoRA"),
        ("model.diffusion_model.input_blocks.0.0.weight", "a Stable Diffusion checkpoint"),
        ("model.diffusion_model.joint_blocks.0.x.weight", "a Stable Diffusion 3 checkpoint"),
        ("double_blocks.0.img_attn.qkv.weight", "a Flux or HunyuanVideo model"),
        ("blocks.0.self_attn.q.weight", "a Wan model"),
        ("encoder.down_blocks.0.resnets.0.conv1.weight", "the VAE of another model"),
        ("model.layers.0.self_attn.q_proj.weight", "a text encoder or language model"),
        ("blocks.0.attn.proj_qkv.vid.weight", "an unknown set of 1 tensors"),
        ("", "an unknown set of 1 tensors"),
    ],
)
def test_other_files_are_called_what_they_look_like(name, looks_like):
    content = detect(header({name: torch.zeros(4, 4)}))
    assert (content.kind, content.label) == ("other", looks_like)


def test_a_lora_of_this_very_model_is_still_a_lora(dit):
    names = ("vid_in.proj.lora_A.weight", "vid_in.proj.weight")
    assert detect(header(dict.fromkeys(names, torch.zeros(4, 4)))).label == "a LoRA"


@pytest.mark.parametrize(
    ("name", "shape", "complaint"),
    [
        ("vid_in.proj.weight", (24,), "vid_in.proj.weight of shape"),
        ("txt_in.weight", None, "lacks the tensor txt_in.weight"),
        ("blocks.1.attn.proj_qkv.all.weight", None, None),
        ("blocks.0.attn.norm_q.vid.weight", (0,), "norm_q.vid.weight of shape"),
        ("blocks.0.attn.norm_q.vid.weight", (7,), "no whole number of heads"),
        ("blocks.0.attn.rope.rope.freqs", (9,), "9 rotary frequencies"),
        ("blocks.99999.attn.norm_q.all.weight", (12,), r"lacks the tensors blocks\.3\.\*"),
        ("blocks.2.attn.proj_qkv.vid.weight", (72, 24), r"lacks the tensors blocks\.1\.attn\.proj_qkv\.vid\.\*"),
    ],
)
def test_impossible_shapes_are_refused_by_name(dit, name, shape, complaint):
    tensors = dict(dit.state_dict())
    tensors.pop(name, None)
    if shape is not None:
        tensors[name] = torch.zeros(shape)
    if complaint is None:  # a matter for the strict loader
        assert detect(header(tensors)).kind == "dit"
    else:
        with pytest.raises(CheckpointError, match=complaint):
            detect(header(tensors))


def test_a_vae_cut_short_is_refused_by_name(vae):
    decoder = {name: tensor for name, tensor in vae.state_dict().items() if name.startswith("decoder.")}
    with pytest.raises(CheckpointError, match=r"lacks the tensor encoder\.down_blocks\.0"):
        detect(header(decoder))
