"""Every backend against the reference, and the reference against the definition; then how one is chosen."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from seedvr2_core.attention import (
    ATTENTION_NAMES,
    BACKENDS,
    AttentionCall,
    Sequences,
    choose,
    flash,
    reference,
    varlen,
    varlen_attention,
)
from seedvr2_core.attention.backend import needs_half_on_cuda
from seedvr2_core.errors import SettingError

# One token, short sequences, sizes around a kernel's block, equal windows, and a window of 720p with its text.
LENGTHS = ((1,), (3, 1, 3), (63, 64, 65), (90,) * 4, (405 + 58, 189 + 58, 405 + 58))

EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
EVERY_LENGTH = pytest.mark.parametrize("lengths", LENGTHS, ids=str)
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def random_call(lengths, heads=4, d=64, dtype=torch.float32, device="cpu"):
    q, k, v = torch.randn(3, sum(lengths), heads, d, dtype=dtype, device=device)
    return AttentionCall(q, k, v, Sequences(tuple(lengths), torch.device(device)))


def leaves(call, dtype=None):
    """The same call on tensors of its own that collect gradients."""
    q, k, v = (x.detach().to(dtype or x.dtype).requires_grad_() for x in (call.q, call.k, call.v))
    return AttentionCall(q, k, v, call.sequences)


def skip_unless_it_can(backend, call):
    if reason := backend.why_not(call):
        pytest.skip(reason)


def assert_agrees(backend, call):
    """Result, and gradients if there are any, are as close to the fp32 reference as the backend says."""
    wide, own = leaves(call, torch.float32), leaves(call)
    expected, out = reference.run(wide), backend.run(own)
    assert out.dtype == call.q.dtype
    torch.testing.assert_close(out.float(), expected, **backend.tolerance)
    if backend.differentiable:
        direction = torch.randn_like(expected).to(call.q.dtype)
        expected.backward(direction.float())
        out.backward(direction)
        # A gradient sums over a sequence, so its error does too.
        atol = backend.tolerance["atol"] * 4
        for x, y in ((own.q, wide.q), (own.k, wide.k), (own.v, wide.v)):
            torch.testing.assert_close(x.grad.float(), y.grad, atol=atol, rtol=4 * backend.tolerance["rtol"])


@EVERY_LENGTH
def test_the_reference_is_attention_of_each_sequence_alone(lengths):
    call = random_call(lengths)
    alone = [
        F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in part)).transpose(0, 1)
        for part in zip(*(x.split(lengths) for x in (call.q, call.k, call.v)), strict=True)
    ]
    torch.testing.assert_close(reference.run(call), torch.cat(alone), atol=1e-5, rtol=0)


def test_the_reference_keeps_fp64_and_computes_halves_in_fp32():
    call = random_call((5, 9), dtype=torch.float64)
    assert reference.run(call).dtype == torch.float64
    half = AttentionCall(call.q.bfloat16(), call.k.bfloat16(), call.v.bfloat16(), call.sequences)
    wide = AttentionCall(half.q.float(), half.k.float(), half.v.float(), call.sequences)
    assert torch.equal(reference.run(half), reference.run(wide).bfloat16())


@EVERY_BACKEND
@EVERY_LENGTH
def test_a_backend_agrees_with_the_reference(backend, lengths):
    call = random_call(lengths)
    skip_unless_it_can(backend, call)
    assert_agrees(backend, call)


@pytest.mark.gpu
@NEEDS_CUDA
# The reference is left out: it rounds its result to bf16, which its own tolerance of 0 does not allow for.
@pytest.mark.parametrize("backend", BACKENDS[:-1], ids=lambda backend: backend.name)
@EVERY_LENGTH
def test_a_backend_agrees_with_the_reference_in_bfloat16_on_a_gpu(backend, lengths):
    call = random_call(lengths, d=128, dtype=torch.bfloat16, device="cuda")
    skip_unless_it_can(backend, call)
    assert_agrees(backend, call)


@pytest.mark.parametrize(
    ("capability", "d", "reason"),
    [((9, 0), 128, None), ((8, 0), 20, "in multiples of 8, got 20"), ((9, 0), 264, "up to 256 channels"),
     ((7, 5), 128, "needs compute capability 8.0 or later, got 7.5")],
)  # fmt: skip
def test_fused_kernels_refuse_heads_and_gpus_that_they_were_not_written_for(monkeypatch, capability, d, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    q = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16, shape=(7, 2, d))
    got = needs_half_on_cuda(AttentionCall(q, q, q, Sequences((7,), q.device)))
    assert got is None if reason is None else reason in got


@pytest.mark.parametrize(("built", "hip"), [(False, None), (True, "7.2")])
def test_a_torch_without_flash_attention_takes_another(monkeypatch, built, hip):
    """Such are those for Windows, and for some GPUs of AMD."""
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: built)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(varlen, "THERE", True)
    q = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16, shape=(7, 2, 64))
    assert "built with flash attention" in varlen.why_not(AttentionCall(q, q, q, Sequences((7,), q.device)))


@EVERY_BACKEND
def test_a_sequence_does_not_see_its_neighbours(backend):
    call = random_call((7, 5, 7))
    skip_unless_it_can(backend, call)
    k, v = call.k.clone(), call.v.clone()
    k[7:12], v[7:12] = 3, 100
    changed = backend.run(AttentionCall(call.q, k, v, call.sequences))
    out = backend.run(call)
    assert torch.equal(out[:7], changed[:7])
    assert torch.equal(out[12:], changed[12:])
    assert not torch.equal(out[7:12], changed[7:12])


# The choice


@EVERY_BACKEND
def test_a_backend_asked_for_by_name_runs_or_says_why_not(backend):
    call = random_call((4, 4))
    if (reason := backend.why_not(call)) is None:
        assert choose(call, backend.name) is backend
        assert torch.equal(varlen_attention(call, backend.name), backend.run(call))
    else:
        with pytest.raises(SettingError) as caught:
            varlen_attention(call, backend.name)
        assert f"Attention '{backend.name}' cannot run here: it {reason}" in str(caught.value)


def test_an_unknown_name_is_refused_with_the_choices():
    with pytest.raises(SettingError) as caught:
        varlen_attention(random_call((4,)), "xformers")
    assert "no attention 'xformers'" in str(caught.value)
    for name in ATTENTION_NAMES:
        assert name in str(caught.value)


def test_auto_takes_the_first_that_can():
    call = random_call((4, 4))
    assert choose(call, "auto") is next(backend for backend in BACKENDS if backend.why_not(call) is None)
    assert choose(call, "auto").name == "sdpa"


def test_names_are_unique_and_auto_comes_first():
    assert ATTENTION_NAMES[0] == "auto"
    assert len(set(ATTENTION_NAMES)) == len(BACKENDS) + 1


# Sequences


def test_sequences_know_where_they_lie():
    sequences = Sequences((3, 1, 3), torch.device("cpu"))
    assert sequences.offsets == (0, 3, 4, 7)
    assert sequences.cu_seqlens.tolist() == [0, 3, 4, 7]
    assert sequences.cu_seqlens.dtype == torch.int32


@pytest.mark.parametrize("version", [2, 3])
def test_flash_attention_is_told_to_be_the_same_every_time(monkeypatch, version):
    told = []
    monkeypatch.setattr(flash, f"flash_{version}", lambda q, *_, deterministic: told.append(deterministic) or q)
    run = {2: flash.run_2, 3: flash.run_3}[version]
    call = random_call((3,))
    run(call)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    run(call)
    assert told == [False, True]
