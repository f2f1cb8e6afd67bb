"""The fast autoencoder against the plain one, which defines it: in fp64, where only a mistake makes a difference."""

import copy

import pytest
import torch
import torch.nn.functional as F

from seedvr2_core.models import causal_taps, frame_norm, winograd
from seedvr2_core.models.frames import channels_last
from seedvr2_core.models.vae import CausalState, VAEConfig, VideoVAE, posterior
from seedvr2_core.models.vae_fast import FastOptions, FastVAE, flow
from seedvr2_core.models.winograd import WinogradTaps
from tests.core.conftest import NEEDS_BF16

OPTIONS = [
    *(FastOptions(block=block, winograd_from=winograd) for block in (1, 2, 3) for winograd in (None, 16)),
    *(FastOptions(band=band, winograd_from=winograd) for band in (1, 40, 130) for winograd in (None, 16)),
    *(FastOptions(band=band, winograd_from=8, winograd_rows_from=16) for band in (None, 40)),
    *(FastOptions(turn=turn, winograd_from=16, winograd_rows_from=16) for turn in (1, 60_000)),
]
SHARING = pytest.mark.parametrize(
    "options",
    [FastOptions(), FastOptions(winograd_from=32), FastOptions(winograd_from=32, winograd_rows_from=32)],
    ids=str,
)
EXACT = pytest.mark.parametrize("options", OPTIONS, ids=str)


@pytest.fixture(scope="module")
def vae() -> VideoVAE:
    """Biases as large as anything else, so that none can be forgotten, and widths on both sides of Winograd's."""
    torch.manual_seed(0)
    vae = VideoVAE(VAEConfig(widths=(8, 8, 16, 24), blocks=1, groups=4)).double().requires_grad_(False)
    for parameter in vae.parameters():
        if parameter.ndim == 1:
            parameter.normal_(0.5, 0.5)
    return vae


def clip(frames, height=24, width=16, batch=1):
    generator = torch.Generator().manual_seed(frames)
    return torch.rand(batch, 3, frames, height, width, generator=generator, dtype=torch.float64) * 2 - 1


def in_slices(step, x, lengths):
    state, out = CausalState(), []
    for part in x.split(lengths, dim=2):
        y, state = step(part, state)
        out.append(y)
    return torch.cat(out, dim=2)


def close(actual, expected, atol=1e-12):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


@EXACT
@pytest.mark.parametrize("frames", [1, 5, 13])
def test_clips_come_out_as_from_the_plain_one(vae, options, frames):
    fast, x = FastVAE(vae, options), clip(frames, batch=2)
    moments = vae.encode(x, slice_frames=None)
    close(fast.encode(x), moments)
    latent = posterior(moments)[0]
    close(fast.decode(latent), vae.decode(latent, slice_latents=None))


@pytest.mark.parametrize("way", ["encode", "decode"])
def test_whoever_watches_is_asked_the_more_often_the_shorter_a_turn(vae, way):
    x = clip(1, 48, 32) if way == "encode" else torch.randn(1, 16, 1, 6, 4, dtype=torch.float64)
    asked = []
    for turn in (None, 1 << 20, 1 << 17):
        fast, seen = FastVAE(vae, FastOptions(turn=turn)), []
        with fast.watched(lambda seen=seen: seen.append(1)):
            getattr(fast, way)(x)
        asked.append(len(seen))
    assert asked[0] < asked[1] < asked[2]


def test_no_convolution_sees_more_values_than_a_library_can_count(vae, monkeypatch):
    conv3d, seen, latent = F.conv3d, [], torch.randn(1, 16, 2, 6, 4, dtype=torch.float64)
    expected = vae.decode(latent)

    def counted(x, *args, **kwargs):
        seen.append(x.numel())
        return conv3d(x, *args, **kwargs)

    monkeypatch.setattr(F, "conv3d", counted)
    close(FastVAE(vae, FastOptions(winograd_from=None)).decode(latent), expected)
    whole = max(seen)
    seen.clear()
    monkeypatch.setattr(causal_taps, "COUNTED", whole // 3)
    close(FastVAE(vae, FastOptions(winograd_from=None)).decode(latent), expected)
    # A band has a neighbour's row on either side.
    assert whole // 3 < max(seen) < whole // 2


@pytest.mark.parametrize("counted", [2**31, 500], ids=["whole", "parts"])
@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_norms_of_large_frames_agree_however_a_device_takes_them(vae, monkeypatch, device, counted):
    """Computed here as there."""
    monkeypatch.setattr(frame_norm, "SUMMED", 16)
    monkeypatch.setattr(frame_norm, "COUNTED", counted)
    single, latent = copy.deepcopy(vae).float(), torch.randn(1, 16, 2, 6, 4)
    fast = FastVAE(single, FastOptions(winograd_from=None, device=device))
    close(fast.decode(latent), single.decode(latent), 2e-5)


@pytest.mark.parametrize(
    ("version", "cudnn", "device", "dtype", "slow"),
    [
        ("2.9.1+cu130", 91300, "cuda", torch.bfloat16, True),
        ("2.9.1+cu130", 91500, "cuda", torch.bfloat16, False),
        ("2.9.1+cu130", 91300, "cuda", torch.float32, False),
        ("2.11.0", 91900, "cuda", torch.float16, False),
        ("2.11.0", None, "cpu", torch.float32, True),
        ("2.11.0", None, "cpu", torch.bfloat16, False),
    ],
)
def test_clips_are_convolved_by_frames_where_torch_would_be_slow(monkeypatch, version, cudnn, device, dtype, slow):
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    weight, options = torch.zeros(4, 4, 3, 3, 3, dtype=dtype), FastOptions(winograd_from=None, device=device)
    taps = causal_taps.three_taps(weight, None, options)
    assert isinstance(taps, causal_taps.StackedTaps if slow else causal_taps.DirectTaps)


@EXACT
@pytest.mark.parametrize("lengths", [[1, 4, 8], [5, 4, 4], [9, 4]], ids=str)
def test_time_may_be_cut_anywhere(vae, options, lengths):
    fast, x = FastVAE(vae, options), clip(13)
    moments = vae.encode(x, slice_frames=None)
    close(in_slices(fast.encode_slice, x, lengths), moments)
    latent = posterior(moments)[0]
    latents = [(lengths[0] - 1) // 4 + 1, *(length // 4 for length in lengths[1:])]
    close(in_slices(fast.decode_slice, latent, latents), vae.decode(latent, slice_latents=None))


@pytest.mark.parametrize(("height", "width"), [(8, 8), (44, 37), (16, 48)])
def test_frames_of_any_size_agree(vae, height, width):
    fast, x = FastVAE(vae), clip(5, height, width)
    close(fast.encode(x), vae.encode(x))
    latent = torch.randn(1, 16, 2, height // 8, width // 8, dtype=torch.float64)
    close(fast.decode(latent), vae.decode(latent))


@pytest.mark.parametrize("name", ["tiny_a", "tiny_b"])
@SHARING
def test_the_published_numbers_are_met(golden, tiny_vae, name, options):
    fast = FastVAE(tiny_vae(name), options)
    for kind, run, x, y in (("encode", fast.encode, "x", "moments"), ("decode", fast.decode, "z", "sample")):
        tensors, meta = golden(f"vae/{name}_{kind}")
        for case in meta["cases"]:
            close(run(tensors[f"{case}/{x}"]), tensors[f"{case}/{y}"], 2e-5)


@NEEDS_BF16
@pytest.mark.parametrize("name", ["tiny_a", "tiny_b"])
@pytest.mark.parametrize("options", [FastOptions(), FastOptions(winograd_from=32)], ids=str)
def test_bfloat16_is_no_further_off_than_1_3_times_the_plain_one(golden, tiny_vae, name, options):
    plain = copy.deepcopy(tiny_vae(name)).bfloat16()
    fast = FastVAE(plain, options)
    for kind, x, y in (("encode", "x", "moments"), ("decode", "z", "sample")):
        tensors, meta = golden(f"vae/{name}_{kind}")
        errors = {}
        for vae in (plain, fast):
            run = getattr(vae, kind)
            differences = [run(tensors[f"{c}/{x}"].bfloat16()) - tensors[f"{c}/{y}"] for c in meta["cases"]]
            errors[vae] = torch.cat([difference.flatten() for difference in differences]).square().mean().sqrt()
        assert errors[fast] < 1.3 * errors[plain], kind


def test_a_slice_leaves_the_state_it_was_given_as_it_was(vae):
    fast, latent = FastVAE(vae), torch.randn(1, 16, 2, 2, 2, dtype=torch.float64)
    _, state = fast.decode_slice(latent[:, :, :1], CausalState())
    first = fast.decode_slice(latent[:, :, 1:], state)[0]
    assert torch.equal(first, fast.decode_slice(latent[:, :, 1:], state)[0])


def test_two_clips_in_turns_do_not_meet(vae):
    fast, clips = FastVAE(vae), [clip(9), -clip(9)]
    states, out = [CausalState(), CausalState()], [[], []]
    for part in zip(*(c.split([5, 4], dim=2) for c in clips), strict=True):
        for i in range(2):
            y, states[i] = fast.encode_slice(part[i], states[i])
            out[i].append(y)
    for c, pieces in zip(clips, out, strict=True):
        assert torch.equal(torch.cat(pieces, dim=2), in_slices(fast.encode_slice, c, [5, 4]))


def test_after_the_last_slice_nothing_is_kept(vae):
    fast = FastVAE(vae)
    assert not fast.encode_slice(clip(5), CausalState(), last=True)[1]
    assert fast.encode_slice(clip(5), CausalState())[1]


def test_no_more_frames_are_under_way_than_a_block_holds():
    under_way, most = 0, 0

    def source():
        nonlocal under_way, most
        for _ in range(9):
            under_way += 1
            most = max(most, under_way)
            yield [torch.zeros(1)]

    for block in flow(lambda frames, state: frames, source(), CausalState(), size=2):
        under_way -= len(block)
    assert most == 2


@pytest.mark.parametrize(("kernel", "paired_rows"), [(3, True), (3, False), (2, False)])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 5), (7, 6), (12, 9)])
@pytest.mark.parametrize("band", [1, 36, 8192])
def test_shared_products_are_those_of_the_convolution(kernel, paired_rows, height, width, band, monkeypatch):
    monkeypatch.setattr(winograd, "BAND", band)
    frames = torch.randn(2, 5, 7, height, width, dtype=torch.float64)
    weight, bias = torch.randn(4, 5, 3, kernel, kernel, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    for added in (bias, None):
        taps = WinogradTaps(weight, added, paired_rows)
        expected = F.conv3d(frames, weight, added, padding=(0, 1, 1))
        # Pairs of frames, and a last one on its own.
        close(torch.stack(taps.moving([channels_last(frame) for frame in frames.unbind(2)]), dim=2), expected)
        still = F.conv2d(frames[:, :, 0], weight.sum(2), added, padding=1)
        close(taps.still(channels_last(frames[:, :, 0])), still)
