"""Linear layers: torch's own as long as nothing is packed; every packing against the plain product; and how to pack."""

import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from seedvr2_core.errors import SettingError
from seedvr2_core.models import linear
from seedvr2_core.models.linear import (
    E4M3_MAX,
    FP8,
    ONEDNN,
    PACKING_NAMES,
    PACKINGS,
    Linear,
    finish,
    pack,
    resolve,
    to_fp8,
)

EVERY_PACKING = pytest.mark.parametrize("packing", PACKINGS, ids=lambda packing: packing.name)
EVERY_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
EVERY_ACTIVATION = pytest.mark.parametrize("activation", ["none", "silu", "gelu"])


def random_layer(c_in=96, c_out=64, bias=True, dtype=torch.float32):
    layer = Linear(c_in, c_out, bias=bias)
    nn.init.normal_(layer.weight, std=c_in**-0.5)
    return layer.to(dtype).requires_grad_(False)


def packed(layer, packing):
    if reason := packing.why_not(layer.weight):
        pytest.skip(reason)
    return pack(layer, packing.name)


def relative(actual, expected):
    return ((actual.float() - expected).norm() / expected.norm()).item()


def written_out(y, activation, factor):
    """What `finish` means."""
    y = {"none": lambda y: y, "silu": F.silu, "gelu": lambda y: F.gelu(y, approximate="tanh")}[activation](y)
    return y if factor is None else y * factor


# Unpacked


def test_an_unpacked_layer_is_the_one_of_torch():
    layer, own = Linear(6, 4), nn.Linear(6, 4)
    own.load_state_dict(layer.state_dict())
    x = torch.randn(3, 6)
    assert torch.equal(layer(x), own(x))


@EVERY_ACTIVATION
@pytest.mark.parametrize("multiplied", [False, True], ids=["alone", "multiplied"])
def test_what_follows_the_product_is_the_same_with_and_without_gradients(activation, multiplied):
    layer, x = Linear(6, 4), torch.randn(3, 6)
    factor = torch.randn(3, 4) if multiplied else None
    expected = written_out(F.linear(x, layer.weight, layer.bias), activation, factor)
    out = layer(x, activation, factor)
    out.sum().backward()
    gradient = layer.weight.grad.clone()
    layer.weight.grad = None
    expected.sum().backward()
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(gradient, layer.weight.grad)
    with torch.no_grad():
        torch.testing.assert_close(layer(x, activation, factor), expected)


def test_a_product_without_a_gradient_is_finished_in_its_own_memory():
    y, factor = torch.randn(3, 4), torch.randn(3, 4)
    assert finish(y, "silu", factor).data_ptr() == y.data_ptr()
    held = torch.randn(3, 4, requires_grad=True)
    kept = held.detach().clone()
    finish(held, "silu", factor)
    assert torch.equal(held, kept)


# Packed


@EVERY_PACKING
@EVERY_DTYPE
@EVERY_ACTIVATION
@pytest.mark.parametrize("multiplied", [False, True], ids=["alone", "multiplied"])
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize(("rows", "c_in", "c_out"), [(1, 32, 16), (7, 96, 64), (130, 160, 432)])
def test_a_packed_layer_computes_the_same(packing, dtype, activation, multiplied, bias, rows, c_in, c_out):
    layer, x = random_layer(c_in, c_out, bias, dtype), torch.randn(rows, c_in).to(dtype)
    factor = torch.randn(rows, c_out).to(dtype) if multiplied else None
    plain = F.linear(x.float(), layer.weight.float(), layer.bias.float() if bias else None)
    out = packed(layer, packing)(x, activation, factor)
    assert out.dtype == dtype
    expected = written_out(plain, activation, factor)
    # Where silu and gelu are flat they lower, and where they bend they raise, the error of the product.
    error = packing.error * (1 if activation == "none" else 1.5)
    assert relative(out, expected) < error


def test_an_exact_packing_is_exact():
    assert ONEDNN.exact
    layer, x = random_layer(), torch.randn(50, 96)
    plain = layer(x)
    assert relative(packed(layer, ONEDNN)(x), plain) < 1e-6


@EVERY_PACKING
def test_a_packed_layer_lets_go_of_its_plain_weight(packing):
    layer = random_layer()
    weight = weakref.ref(layer.weight)
    packed(layer, packing)
    assert weight() is None
    assert [name for name, _ in layer.named_parameters()] == ["bias"]


@EVERY_PACKING
def test_a_packed_layer_is_for_inference_where_it_is(packing):
    layer = packed(random_layer(), packing)
    with pytest.raises(RuntimeError, match="passes no gradient"):
        layer(torch.randn(2, 96, requires_grad=True))
    with pytest.raises(RuntimeError, match="stays as and where it is"):
        nn.Sequential(layer).double()
    with pytest.raises(RuntimeError, match="has no weight to save"):
        nn.Sequential(layer).state_dict()


def test_fp8_gives_every_row_a_scale_of_its_own():
    x = torch.randn(5, 64)
    x[1] *= 1e4
    x[2] *= 1e-6
    x[3] = 0
    rows, scale = to_fp8(x)
    assert rows.float().abs().amax(dim=1).tolist() == [E4M3_MAX, E4M3_MAX, E4M3_MAX, 0, E4M3_MAX]
    # Half of the last of 3 bits; below 2^-6 the step no longer shrinks.
    step = torch.maximum(x.abs() / 16, 2.0**-10 * scale)
    assert ((rows.float() * scale - x).abs() <= step * 1.001).all()


@EVERY_DTYPE
def test_fp8_survives_rows_of_zeros_and_outliers(dtype):
    layer, x = packed(random_layer(dtype=dtype), FP8), torch.randn(4, 96).to(dtype)
    x[0] = 0
    x[1, 3] = 3e4
    out = layer(x)
    assert out.isfinite().all()
    assert torch.equal(out[0], layer.bias)


# Packing


def test_a_module_is_packed_in_place_and_only_once():
    model = nn.Sequential(random_layer(), nn.ModuleList([random_layer(64, 32)]), nn.Linear(4, 4))
    assert pack(model, "fp8") is model
    first, second = model[0].packed, model[1][0].packed
    assert first is not None
    assert second is not None
    assert isinstance(model[2].weight, nn.Parameter)
    pack(model, "fp8")
    assert model[0].packed is first


def test_auto_takes_the_first_exact_packing_that_can_run():
    layer = random_layer()
    if reason := ONEDNN.why_not(layer.weight):
        pytest.skip(reason)
    assert isinstance(pack(layer).packed, linear.OneDnnWeight)


def test_auto_leaves_alone_what_no_exact_packing_can_take():
    layer = random_layer(dtype=torch.float64)
    x = torch.randn(2, 96, dtype=torch.float64)
    expected = layer(x)
    assert torch.equal(pack(layer)(x), expected)
    assert layer.packed is None


def test_without_onednn_nothing_is_packed(monkeypatch):
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    layer = random_layer()
    assert pack(layer).packed is None
    with pytest.raises(SettingError, match="it needs a torch built with oneDNN"):
        pack(layer, "onednn")


def test_a_packing_asked_for_by_name_runs_or_says_why_not():
    model = nn.Sequential(random_layer(), random_layer(dtype=torch.float64))
    with pytest.raises(SettingError, match="Packing 'onednn' cannot run here: it needs fp32 or bf16, got float64"):
        pack(model, "onednn")
    # Refused as a whole: no layer is packed and the rest is not.
    assert all(layer.packed is None for layer in model)
    with pytest.raises(SettingError, match=f"no packing 'int3'; choose one of {', '.join(PACKING_NAMES)}"):
        pack(model, "int3")


def test_a_packing_is_told_or_refused_before_there_is_anything_to_pack():
    cpu = torch.device("cpu")
    assert resolve("fp8", cpu, torch.bfloat16) == "fp8"
    assert resolve("auto", cpu, torch.float64) == "none"
    assert resolve("auto", cpu, torch.float32) == ("none" if ONEDNN.why_not(torch.empty(16, 16)) else "onednn")
    with pytest.raises(SettingError, match="Packing 'onednn' cannot run here: it needs a CPU, got meta"):
        resolve("onednn", torch.device("meta"), torch.float32)
    with pytest.raises(SettingError, match="Packing 'fp8' cannot run here: it needs a CUDA device, got meta"):
        resolve("fp8", torch.device("meta"), torch.bfloat16)


def test_a_gpu_whose_torch_has_no_such_product_is_refused_in_its_words(monkeypatch):
    """As on Windows."""
    says = "Rowwise scaling is not currently supported on your device"

    def product(*_, **__):
        raise RuntimeError(f"{says}\nand where that was")

    monkeypatch.setattr(torch, "_scaled_mm", product)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    on_cpu = linear.fp8_failure.__wrapped__
    monkeypatch.setattr(linear, "fp8_failure", lambda _: on_cpu(torch.device("cpu")))
    weight = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16, shape=(16, 16))
    assert FP8.why_not(weight) == f"needs a torch that multiplies in fp8 on this GPU, which says: {says}"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@EVERY_ACTIVATION
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
def test_fp8_on_a_gpu_agrees_with_its_reference_on_a_cpu(activation, bias):
    layer = random_layer(256, 512, bias, torch.bfloat16)
    x, factor = torch.randn(300, 256).bfloat16(), torch.randn(300, 512).bfloat16()
    on_gpu = Linear(256, 512, bias=bias, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    on_gpu.load_state_dict(layer.state_dict())
    if reason := FP8.why_not(on_gpu.weight):
        pytest.skip(reason)
    expected = pack(layer, "fp8")(x, activation, factor)
    out = pack(on_gpu, "fp8")(x.cuda(), activation, factor.cuda())
    assert relative(out.cpu(), expected.float()) < 1e-2
