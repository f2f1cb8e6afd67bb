"""The autoencoder against the published numbers, block by block and whole; then slicing, which must not show."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from seedvr2_core.models import vae as vae_module
from seedvr2_core.models.vae import (
    SEEDVR2_VAE,
    CausalConv3d,
    CausalState,
    Downsampler,
    FrameAttention,
    FrameNorm,
    MidBlock,
    Pass,
    ResnetBlock,
    Upsampler,
    VideoVAE,
    causal_conv,
    channel_to_space,
    posterior,
)
from tests.core.conftest import NEEDS_BF16

SMALL, ALL = "vae/modules_small", "vae/modules"
CAUSAL = {
    "conv_k3": (SMALL, lambda: causal_conv(6, 8)),
    "conv_k1": (SMALL, lambda: CausalConv3d(6, 4, 1)),
    "down_spatiotemporal": (SMALL, lambda: Downsampler(8, temporal=True)),
    "down_spatial": (SMALL, lambda: Downsampler(8, temporal=False)),
    "up_spatiotemporal": (SMALL, lambda: Upsampler(8, temporal=True)),
    "up_spatial": (SMALL, lambda: Upsampler(8, temporal=False)),
    "mid_block": (SMALL, lambda: MidBlock(32, groups=32)),
    "resnet_32_64": (ALL, lambda: ResnetBlock(32, 64, groups=32)),
    "resnet_64_64": (ALL, lambda: ResnetBlock(64, 64, groups=32)),
}
PER_FRAME = {
    "attention": (SMALL, lambda: FrameAttention(64, groups=32)),
    "group_norm": (SMALL, lambda: FrameNorm(32, 64)),
}
TINY = pytest.mark.parametrize("name", ["tiny_a", "tiny_b"])


def close(actual, expected, atol, name=""):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0, msg=lambda text: f"{name}: {text}")


@pytest.fixture
def block(golden):
    """Build a block of the golden file with its weights: block("mid_block") -> (module, its tensors, meta)."""

    def build(name):
        file, make = (CAUSAL | PER_FRAME)[name]
        tensors, meta = golden(file)
        tensors = {key.removeprefix(f"{name}/"): x for key, x in tensors.items() if key.startswith(f"{name}/")}
        module = make().requires_grad_(False)
        module.load_state_dict({key.removeprefix("w/"): x for key, x in tensors.items() if key.startswith("w/")})
        return module, tensors, meta["modules"][name]

    return build


def whole():
    return Pass(CausalState(), keep=False)


def in_slices(module, parts):
    """Outputs of a block for successive slices, and the state after each."""
    state, outputs, states = CausalState(), [], []
    for part in parts:
        slice_ = Pass(state, keep=True)
        outputs.append(module(part, slice_))
        state = slice_.kept
        states.append(state)
    return outputs, states


# Names


def test_names_and_shapes_are_those_of_the_published_checkpoint(golden):
    _, manifest = golden("manifest_vae")
    with torch.device("meta"):
        state = VideoVAE(SEEDVR2_VAE).state_dict()
    assert {name: list(x.shape) for name, x in state.items()} == {name: x["shape"] for name, x in manifest.items()}


# Blocks


@pytest.mark.parametrize("name", CAUSAL)
def test_a_causal_block_matches_the_published_one(block, name):
    module, tensors, _ = block(name)
    close(module(tensors["x"], whole()), tensors["y"], 1e-5)


@pytest.mark.parametrize("name", PER_FRAME)
def test_a_block_that_sees_single_frames_matches_the_published_one(block, name):
    module, tensors, _ = block(name)
    close(module(tensors["x"]), tensors["y"], 1e-5)


@pytest.mark.parametrize("name", CAUSAL)
def test_a_block_in_slices_matches_and_keeps_the_same_frames(block, name):
    module, tensors, meta = block(name)
    for index, (slicing, expected) in enumerate(meta["slices"].items()):
        parts = tensors["x"].split([int(length) for length in slicing.split("+")], dim=2)
        outputs, states = in_slices(module, parts)
        assert [out.shape[2] for out in outputs] == expected["out_frames"]
        close(torch.cat(outputs, dim=2), tensors["y"], 1e-5, slicing)
        if index > 0:
            continue
        for i, (out, state) in enumerate(zip(outputs, states, strict=True)):
            close(out, tensors[f"y_slice{i}"], 1e-5, f"slice {i}")
            prefix = f"cache_after_slice{i}/"
            caches = {key.removeprefix(prefix): x for key, x in tensors.items() if key.startswith(prefix)}
            assert len(state) == len(caches)
            for conv, cache in caches.items():
                close(state[module if conv == "self" else module.get_submodule(conv)], cache, 1e-5, prefix + conv)


@pytest.mark.parametrize("name", ["down_spatiotemporal", "down_spatial", "up_spatiotemporal", "up_spatial"])
def test_a_sampler_matches_on_a_single_frame(golden, block, name):
    module, _, _ = block(name)
    tensors, _ = golden(SMALL)
    x = tensors[f"{name}_single_frame/x"]
    close(module(x, whole()), tensors[f"{name}_single_frame/y"], 1e-5)
    if isinstance(module, Upsampler):
        finer = channel_to_space(module.upscale_conv(x), module.times)
        close(finer, tensors[f"{name}_single_frame/after_rearrange_before_drop"], 1e-5)


def test_channels_become_a_finer_grid_in_the_published_order(golden):
    tensors, _ = golden(SMALL)
    y = channel_to_space(tensors["depth_to_space_t/x"], 2)
    assert torch.equal(y, tensors["depth_to_space_t/y"])
    assert torch.equal(torch.cat([y[:, :, :1], y[:, :, 2:]], 2), tensors["depth_to_space_t/y_first_frame_dropped"])
    assert torch.equal(channel_to_space(tensors["depth_to_space_s/x"], 1), tensors["depth_to_space_s/y"])


def test_posterior_matches(golden):
    tensors, _ = golden(SMALL)
    mean, std = posterior(tensors["posterior/moments"])
    assert torch.equal(mean, tensors["posterior/mean"])
    close(std, tensors["posterior/std"], 1e-5)
    close(2 * std.log(), tensors["posterior/logvar"], 1e-5)
    close(mean + std * tensors["posterior/noise"], tensors["posterior/sample"], 1e-5)


def test_attention_in_turns_is_attention(block, monkeypatch):
    module, tensors, _ = block("attention")
    monkeypatch.setattr(vae_module, "MAX_SCORES", 3 * 5 * 7 * 4)
    close(module(tensors["x"]), tensors["y"], 1e-5)


# Whole


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_every_block_on_the_way_matches(golden, tiny_vae, half):
    tensors, meta = golden(f"vae/tiny_a_trace_{half}")
    network = getattr(tiny_vae("tiny_a"), half)
    seen = {}

    def record(name):
        return lambda module, args, out: seen.update({name: out})

    # The activation has no module of its own here.
    names = {name: "conv_norm_out" if name == "conv_act" else name for name in meta["order"]}
    hooks = [network.get_submodule(module).register_forward_hook(record(name)) for name, module in names.items()]
    network(tensors["input"], whole())
    for hook in hooks:
        hook.remove()

    seen["conv_act"] = F.silu(seen["conv_act"])
    seen["mid_block.attentions.0"] = rearrange(seen["mid_block.attentions.0"], "b c t h w -> (b t) c h w")
    assert list(seen) == meta["order"]
    for name, out in seen.items():
        close(out, tensors[f"out/{name}"], 2e-5, name)


@TINY
def test_encoded_clips_match(golden, tiny_vae, name):
    tensors, meta = golden(f"vae/{name}_encode")
    for case in meta["cases"]:
        clip, moments = tensors[f"{case}/x"], tensors[f"{case}/moments"]
        close(tiny_vae(name).encode(clip, slice_frames=None), moments, 2e-5, case)
        close(tiny_vae(name).encode(clip), tensors.get(f"{case}/moments_sliced", moments), 2e-5, case)


@TINY
def test_decoded_latents_match(golden, tiny_vae, name):
    tensors, meta = golden(f"vae/{name}_decode")
    for case in meta["cases"]:
        latent, clip = tensors[f"{case}/z"], tensors[f"{case}/sample"]
        close(tiny_vae(name).decode(latent, slice_latents=None), clip, 2e-5, case)
        close(tiny_vae(name).decode(latent), tensors.get(f"{case}/sample_sliced", clip), 2e-5, case)


@NEEDS_BF16
@TINY
def test_bfloat16_is_as_close_as_the_published_code(golden, tiny_vae, name):
    vae = copy.deepcopy(tiny_vae(name)).bfloat16()
    for kind, run, x, y in (("encode", vae.encode, "x", "moments"), ("decode", vae.decode, "z", "sample")):
        tensors, meta = golden(f"vae/{name}_{kind}")
        for case, expected in meta["cases"].items():
            difference = run(tensors[f"{case}/{x}"].bfloat16()).float() - tensors[f"{case}/{y}"]
            assert difference.square().mean().sqrt() < 1.5 * expected["rms_diff_bfloat16_vs_float32"], case


@TINY
def test_fp64_agrees_with_fp32(golden, tiny_vae, name):
    vae = copy.deepcopy(tiny_vae(name)).double()
    for kind, run, x, y in (("encode", vae.encode, "x", "moments"), ("decode", vae.decode, "z", "sample")):
        tensors, meta = golden(f"vae/{name}_{kind}")
        # The largest clips would only take longer.
        for case in sorted(meta["cases"], key=lambda case: tensors[f"{case}/{x}"].numel())[:-3]:
            close(run(tensors[f"{case}/{x}"].double()).float(), tensors[f"{case}/{y}"], 1e-5, case)


# Slices


def random_parts(total, unit, rng):
    """Lengths of slices that add up to `total`, which is a multiple of `unit` plus 1; the first holds the odd one."""
    lengths, left = [], (total - 1) // unit
    while left > 0:
        lengths.append(rng.randint(1, left))
        left -= lengths[-1]
    lengths = [length * unit for length in lengths] or [0]
    # The frame that stands alone may also be a slice of its own.
    return [1, *lengths] if rng.random() < 0.3 else [1 + lengths[0], *lengths[1:]]


def run_slices(step, parts):
    state, out = CausalState(), []
    for part in parts:
        y, state = step(part, state)
        out.append(y)
    return torch.cat(out, dim=2)


@pytest.mark.parametrize("seed", range(4))
def test_time_may_be_cut_anywhere(random_vae, seed):
    vae, rng = random_vae, random.Random(seed)
    clip = torch.rand(1, 3, 17, 16, 24) * 2 - 1
    moments = vae.encode(clip, slice_frames=None)
    close(run_slices(vae.encode_slice, clip.split(random_parts(17, 4, rng), dim=2)), moments, 1e-5)
    close(vae.encode(clip, slice_frames=4 * rng.randint(1, 4)), moments, 1e-5)
    latent = moments[:, :16]
    decoded = vae.decode(latent, slice_latents=None)
    close(run_slices(vae.decode_slice, latent.split(random_parts(5, 1, rng), dim=2)), decoded, 1e-5)
    close(vae.decode(latent, slice_latents=rng.randint(1, 4)), decoded, 1e-5)


def test_a_lone_frame_takes_a_shortcut_to_the_same_numbers(random_vae):
    vae, frame = random_vae, torch.rand(2, 3, 1, 24, 16) * 2 - 1
    moments = vae.encode(frame)
    close(moments, vae.encode_slice(frame, CausalState())[0], 1e-5)
    close(vae.decode(moments[:, :16]), vae.decode_slice(moments[:, :16], CausalState())[0], 1e-5)


@pytest.mark.parametrize("count", range(1, 7))
def test_any_number_of_latents_decodes(random_vae, count):
    vae, latent = random_vae, torch.randn(1, 16, count, 2, 2)
    assert vae.decode(latent).shape == (1, 3, 4 * (count - 1) + 1, 16, 16)
    first, state = vae.decode_slice(latent[:, :, :1], CausalState())
    assert first.shape[2] == 1
    assert vae.decode_slice(latent, state)[0].shape[2] == 4 * count


def test_the_past_does_not_depend_on_the_future(random_vae):
    vae, latent = random_vae, torch.randn(1, 16, 4, 2, 3)
    other = torch.cat([latent[:, :, :2], torch.randn(1, 16, 2, 2, 3)], dim=2)
    assert torch.equal(vae.decode(latent)[:, :, :5], vae.decode(other)[:, :, :5])


def test_two_clips_in_turns_do_not_meet(random_vae):
    vae = random_vae
    clips = [torch.rand(1, 3, 9, 16, 16) * 2 - 1 for _ in range(2)]
    states, out = [CausalState(), CausalState()], [[], []]
    for part in zip(*(clip.split([5, 4], dim=2) for clip in clips), strict=True):
        for i in range(2):
            y, states[i] = vae.encode_slice(part[i], states[i])
            out[i].append(y)
    for clip, pieces in zip(clips, out, strict=True):
        assert torch.equal(torch.cat(pieces, dim=2), run_slices(vae.encode_slice, clip.split([5, 4], dim=2)))


def test_a_state_may_be_used_twice(random_vae):
    vae, latent = random_vae, torch.randn(1, 16, 2, 2, 2)
    _, state = vae.decode_slice(latent[:, :, :1], CausalState())
    assert torch.equal(vae.decode_slice(latent[:, :, 1:], state)[0], vae.decode_slice(latent[:, :, 1:], state)[0])


def test_the_state_is_as_large_as_documented():
    side = 2048
    with torch.device("meta"):
        vae = VideoVAE(SEEDVR2_VAE)
        _, encoding = vae.encode_slice(torch.empty(1, 3, 5, side, side), CausalState())
        _, decoding = vae.decode_slice(torch.empty(1, 16, 2, side // 8, side // 8), CausalState())
    for state, expected in ((encoding, 1942), (decoding, 4321)):
        assert sum(x.numel() for x in state.values()) / side**2 == pytest.approx(expected, rel=2e-3)
