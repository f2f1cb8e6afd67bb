"""Seconds of our kernels beside the library, one operation at a time. `python -m tests.bench.kernels --device cuda`

Every call does its operation several times over, because one alone takes less than a launch may vary. All contenders
do the same work, what a kernel has fused included. Results are compared on a part that is small enough to bring home.
"""
# T H W frames out, height, width

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from seedvr2_core.attention import AttentionCall, Sequences, varlen_attention
from seedvr2_core.attention import windows as attention
from seedvr2_core.kernels import causal_conv3d as conv
from seedvr2_core.kernels import frame_attention, group_norm, modulate
from seedvr2_core.kernels.choice import why_not
from seedvr2_core.models.vae import attend_to_frame
from seedvr2_core.models.windows import WindowConfig, window_tokens
from seedvr2_core.video.geometry import Grid
from tests.bench.measure import Call, Case, Options, main, random

REPEATS = 20
DTYPE = torch.bfloat16
LAST = torch.channels_last_3d
GROUPS, VAE_EPS, DIT_EPS = 32, 1e-6, 1e-5
# Channels in and out, and a slice of 768x1344 where the decoder has them; then an output frame, and an odd size.
CONVS = (
    (128, 128, (4, 768, 1344)),
    (256, 256, (4, 384, 672)),
    (512, 512, (4, 192, 336)),
    (512, 512, (2, 96, 168)),
    (512, 256, (4, 384, 672)),
    (128, 3, (4, 768, 1344)),
)
QUICK_CONVS = ((64, 64, (2, 20, 36)),)
NORMS = ((128, (4, 768, 1344)), (256, (4, 384, 672)), (512, (4, 192, 336)))
QUICK_NORMS = ((64, (2, 20, 36)),)
# Positions of a frame of 720p and of the paper's, for the attention of the autoencoder, and its channels.
FRAMES, QUICK_FRAMES, FRAME_CHANNELS = (90 * 160, 96 * 168), (200,), 512
# Tokens and channels of 25 frames of 720p, 3B and 7B; a 4K picture.
TOKENS = ((25200, 2560), (25200, 3072), (32400, 2560))
QUICK_TOKENS = ((90, 256),)
# A picture and 25 frames of 720p, 101 frames of 768x1344.
GRIDS = (Grid(1, 45, 80), Grid(7, 45, 80), Grid(26, 48, 84))
QUICK_GRIDS = (Grid(1, 6, 9),)
# Of the 3B model, and its published positive prompt.
HEADS, HEAD_DIM, PAIRS, TEXT_TOKENS = 20, 128, 63, 58


def repeated(operation: Callable[[], Tensor]) -> Call:
    """The operation several times over, and a part of its last result."""

    def call() -> Tensor:
        for _ in range(REPEATS):
            out = operation()
        # The first channels, tokens or positions of every axis; clips and frames whole.
        return out[tuple(slice(0, 64) for _ in out.shape)]

    return call


def convolution(how: str, c_in: int, c_out: int, shape: tuple[int, int, int], device: torch.device) -> Call:
    """+ bias and residual. `how` is a tile's name, or a layout that the library gets."""
    t, h, w = shape
    x = random((1, c_in, t + 2, h, w), DTYPE, device).to(memory_format=LAST)
    weight = (random((c_out, c_in, 3, 3, 3), torch.float32, device, seed=2) * (27 * c_in) ** -0.5).to(DTYPE)
    weight = weight.to(memory_format=LAST)
    bias = random((c_out,), DTYPE, device, seed=3)
    residual = random((1, c_out, t, h, w), DTYPE, device, seed=4).to(memory_format=LAST)
    if how == "fp32":
        return repeated(lambda: conv.reference(x, weight, bias, residual))
    if how == "NCDHW":
        x, weight, residual = x.contiguous(), weight.contiguous(), residual.contiguous()
        return repeated(lambda: F.conv3d(x, weight, bias, padding=(0, 1, 1)).add_(residual))
    if how == "channels_last_3d":
        return repeated(lambda: F.conv3d(x, weight, bias, padding=(0, 1, 1)).add_(residual))
    tile = next(tile for tile in conv.TILES if tile.name == how)
    return repeated(lambda: conv.causal_conv3d(x, weight, tile, bias, residual))


def norm(how: str, channels: int, shape: tuple[int, int, int], device: torch.device) -> Call:
    """Group norm and SiLU of every frame."""
    x = random((1, channels, *shape), DTYPE, device).to(memory_format=LAST)
    weight, bias = random((2, channels), DTYPE, device, seed=2)
    frames = x[0].transpose(0, 1)
    if how == "channels-last library":
        statistics, apply = group_norm.torch_statistics, group_norm.torch_apply_norm_silu
        return repeated(lambda: apply(frames, statistics(frames, GROUPS), weight, bias, VAE_EPS))
    if how == "library":
        return repeated(lambda: F.silu(F.group_norm(frames, GROUPS, weight, bias, VAE_EPS), inplace=True))
    if how == "kernel":
        statistics, apply = group_norm.group_statistics, group_norm.apply_norm_silu
    else:
        statistics, apply = group_norm.reference_statistics, group_norm.reference_apply_norm_silu
    return repeated(lambda: apply(frames, statistics(frames, GROUPS), weight, bias, VAE_EPS))


def modulation(how: str, tokens: int, channels: int, device: torch.device) -> Call:
    """Into a sub-layer and out of it again."""
    x = random((tokens, channels), DTYPE, device)
    scale, shift, gate = (1 + 0.1 * random((3, 1, channels), torch.float32, device, seed=2)).unbind()

    def library() -> Tensor:
        normed = F.rms_norm(x, (channels,), eps=DIT_EPS)
        return torch.addcmul(x, torch.addcmul(shift.to(DTYPE), normed, scale.to(DTYPE)), gate.to(DTYPE))

    if how == "library":
        return repeated(library)
    enter, leave = {
        "kernel": (modulate.norm_modulate, modulate.gate_residual),
        "fp32": (modulate.reference_norm_modulate, modulate.reference_gate_residual),
    }[how]
    return repeated(lambda: leave(x, enter(x, scale, shift, DIT_EPS), gate))


def frame(how: str, positions: int, device: torch.device) -> Call:
    """The attention of the autoencoder, a single head, in one frame."""
    q, k, v = random((3, 1, positions, FRAME_CHANNELS), DTYPE, device).unbind()
    if how == "library":
        return repeated(lambda: attend_to_frame(q, k, v))
    if how == "fp32":
        return repeated(lambda: attend_to_frame(q.float(), k.float(), v.float()))
    tile = next(tile for tile in frame_attention.TILES if tile.name == how)
    return repeated(lambda: frame_attention.attend(q, k, v, tile))


def windows(how: str, grid: Grid, shifted: bool, device: torch.device) -> Call:
    """Norm, rotation and attention of queries, keys and values as they are projected."""
    tokens = math.prod(grid)
    order, shapes = window_tokens(grid, WindowConfig(), shifted)
    turns = random((tokens + TEXT_TOKENS, PAIRS), torch.float32, device, seed=2)

    def stream(count: int, seed: int) -> attention.StreamCall:
        q, k, v = random((count, 3, HEADS, HEAD_DIM), DTYPE, device, seed).unbind(1)
        weights = 1 + 0.1 * random((2, HEAD_DIM), DTYPE, device, seed)
        return attention.StreamCall(q=q, k=k, v=v, norm_q=weights[0], norm_k=weights[1])

    call = attention.WindowCall(
        vid=stream(tokens, 3),
        txt=stream(TEXT_TOKENS, 4),
        cos=turns.cos(),
        sin=turns.sin(),
        eps=DIT_EPS,
        windows=attention.window_map(order, [[math.prod(shape) for shape in shapes]], [TEXT_TOKENS], device),
    )
    if how == "fp32":
        return repeated(lambda: attention.reference(call)[0])
    if how == "library":
        lengths = [math.prod(shape) for shape in shapes]
        return repeated(gathered(call, order.split(lengths), torch.complex(turns.cos(), turns.sin()), device))
    tile = next(tile for tile in attention.TILES if tile.name == how)
    return repeated(lambda: attention.attend(call, tile)[0])


def gathered(
    call: attention.WindowCall, parts: Sequence[Tensor], turns: Tensor, device: torch.device
) -> Callable[[], Tensor]:
    """The same without a kernel: norm, gathered windows with a text each, rotation, variable-length attention."""
    tokens = len(call.vid.k)
    text = torch.arange(tokens, tokens + TEXT_TOKENS)
    gather = torch.cat([index for part in parts for index in (part, text)]).to(device)
    place = torch.argsort(gather, stable=True)[:tokens]
    sequences = Sequences(tuple(len(part) + TEXT_TOKENS for part in parts), device)
    turns = F.pad(turns, (0, HEAD_DIM // 2 - PAIRS), value=1)[gather, None]

    def pack(vid: Tensor, txt: Tensor, norms: tuple[Tensor, Tensor] | None = None) -> Tensor:
        if norms:
            vid, txt = (F.rms_norm(x, (HEAD_DIM,), w, DIT_EPS) for x, w in zip((vid, txt), norms, strict=True))
        packed = torch.cat([vid, txt]).index_select(0, gather)
        if not norms:
            return packed
        pairs = torch.view_as_complex(packed.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs.mul_(turns)).flatten(-2).to(DTYPE)

    def run() -> Tensor:
        vid, txt = call.vid, call.txt
        q, k = pack(vid.q, txt.q, (vid.norm_q, txt.norm_q)), pack(vid.k, txt.k, (vid.norm_k, txt.norm_k))
        out = varlen_attention(AttentionCall(q, k, pack(vid.v, txt.v), sequences))
        return out.index_select(0, place)

    return run


def list_cases(options: Options) -> Sequence[Case]:
    if reason := why_not(options.device):
        sys.exit(f"There is nothing to measure here: a kernel {reason}. Run it with --device cuda.")
    quick = options.quick
    capability = torch.cuda.get_device_capability(options.device)
    cases = []

    def add(name: str, make: Callable[..., Call], baseline: str, others: Sequence[str], *sizes: object) -> None:
        hows = ("fp32", baseline, *others)
        cases.append(
            Case(
                name=f"{REPEATS} {name}",
                contenders={how: partial(make, how, *sizes) for how in hows},
                reference="fp32",
                against=dict.fromkeys(others, baseline),
            )
        )

    for c_in, c_out, shape in QUICK_CONVS if quick else CONVS:
        tiles = [tile.name for tile in conv.tiles(capability, c_in, c_out)]
        name = f"conv {c_in}->{c_out} {'x'.join(map(str, shape))}"
        add(name, convolution, "channels_last_3d", ["NCDHW", *tiles], c_in, c_out, shape)
    for channels, shape in QUICK_NORMS if quick else NORMS:
        others = ["channels-last library", "kernel"]
        add(f"norm {channels} {'x'.join(map(str, shape))}", norm, "library", others, channels, shape)
    for tokens, channels in QUICK_TOKENS if quick else TOKENS:
        add(f"modulate {tokens}x{channels}", modulation, "library", ["kernel"], tokens, channels)
    tiles = [tile.name for tile in frame_attention.tiles(capability, FRAME_CHANNELS)]
    for positions in QUICK_FRAMES if quick else FRAMES:
        add(f"frame {positions}", frame, "library", tiles, positions)
    tiles = [tile.name for tile in attention.TILES]
    for grid in QUICK_GRIDS if quick else GRIDS:
        for shifted in (False, True):
            name = f"windows {'x'.join(map(str, grid))}{' shifted' if shifted else ''}"
            add(name, windows, "library", tiles, grid, shifted)
    return cases


if __name__ == "__main__":
    main("kernels", list_cases)
