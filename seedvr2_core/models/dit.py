"""The diffusion transformer of SeedVR and SeedVR2: one class, several sizes.

Video and text are two streams of tokens that meet in attention, inside 3-D windows of the token grid. Samples of any
shapes are packed into one sequence; each meets only itself. Attribute names are those of the published checkpoints, so
their tensors load strictly.

    c channels   t h w latent frames, height, width (even; a token covers 2 x 2)
    n video tokens of all samples   l text tokens of all samples   b samples   heads, d attention heads and their width
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..attention import AttentionCall, Sequences, varlen_attention
from ..errors import SettingError
from ..video.geometry import PATCH, Grid
from .rope import RopeBuffer, RopeKind, rotate, text_angles, video_angles
from .windows import WindowConfig, window_tokens

NORM_EPS = 1e-5
# Sines and cosines that describe a timestep.
TIME_CHANNELS = 256
# Timesteps are 0..1 everywhere else, 1 being pure noise; the embedding was trained on 0..1000.
TIME_SCALE = 1000.0

Stream = Literal["vid", "txt"]
Mlp = Literal["swiglu", "gelu"]


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Sizes of one transformer."""

    dim: int
    depth: int
    heads: int
    separate_layers: int  # layers, counted from the first, whose text has weights of its own
    mlp: Mlp
    mlp_hidden: int
    rope: RopeKind
    out_norm: bool  # normalise and modulate before the last projection
    modulate_last_text: bool  # whether text is scaled and shifted on its way into the last attention
    head_dim: int = 128
    text_dim: int = 5120
    in_channels: int = 33  # noisy latent 16, condition 16, mask 1
    out_channels: int = 16
    windows: WindowConfig = WindowConfig()


SEEDVR2_3B = DiTConfig(
    dim=2560,
    depth=32,
    heads=20,
    separate_layers=10,
    mlp="swiglu",
    mlp_hidden=6912,
    rope="video_text",
    out_norm=True,
    modulate_last_text=False,
)
SEEDVR2_7B = DiTConfig(
    dim=3072,
    depth=36,
    heads=24,
    separate_layers=36,
    mlp="gelu",
    mlp_hidden=12288,
    rope="video",
    out_norm=False,
    modulate_last_text=True,
)


@dataclass(frozen=True)
class WindowLayout:
    """How the packed tokens of a batch are dealt into the windows of one kind of layer."""

    gather: Tensor  # packed window sequences -> index into [video tokens, text tokens]
    vid_place: Tensor  # n, where a video token lies in the window sequences
    txt_place: tuple[Tensor, ...]  # of each sample: windows l, where its text lies in each window
    cos: Tensor  # n+l m, rotary angles of [video tokens, text tokens]
    sin: Tensor
    sequences: Sequences


@dataclass(frozen=True)
class Layout:
    """The two window layouts of a batch, which layers use in turn. Made once per clip: only shapes matter."""

    grids: tuple[Grid, ...]
    text_lengths: tuple[int, ...]
    regular: WindowLayout
    shifted: WindowLayout

    def of_layer(self, index: int) -> WindowLayout:
        """Even layers have regular windows, odd ones shifted windows."""
        return self.shifted if index % 2 else self.regular


def make_layout(
    grids: Sequence[Grid], text_lengths: Sequence[int], config: DiTConfig, device: torch.device | str = "cpu"
) -> Layout:
    """Deal the tokens of a batch into windows.

    Args:
        grids: token grid of every sample.
        text_lengths: text tokens of every sample.
    """
    regular, shifted = (_window_layout(grids, text_lengths, config, flag, torch.device(device)) for flag in (0, 1))
    return Layout(tuple(grids), tuple(text_lengths), regular, shifted)


def _window_layout(
    grids: Sequence[Grid], text_lengths: Sequence[int], config: DiTConfig, shifted: bool, device: torch.device
) -> WindowLayout:
    total = sum(math.prod(grid) for grid in grids)
    gather, lengths, txt_place = [], [], []
    vid_place = torch.empty(total, dtype=torch.long)
    vid_angles, txt_angles = [], []
    vid_start, txt_start, place = 0, total, 0
    for grid, text_length in zip(grids, text_lengths, strict=True):
        order, shapes = window_tokens(grid, config.windows, shifted)
        counts = [math.prod(shape) for shape in shapes]
        of_shape = {shape: video_angles(config.rope, config.head_dim, shape, text_length) for shape in set(shapes)}
        angles = torch.cat([of_shape[shape] for shape in shapes])
        vid_angles.append(torch.empty_like(angles).index_copy_(0, order, angles))
        angles = text_angles(config.rope, config.head_dim, text_length)
        # An angle of zero leaves text as it is.
        txt_angles.append(vid_angles[0].new_zeros(text_length, vid_angles[0].shape[1]) if angles is None else angles)

        text = torch.arange(txt_start, txt_start + text_length)
        text_rows = []
        for tokens in order.split(counts):
            gather += [vid_start + tokens, text]
            vid_place[vid_start + tokens] = torch.arange(place, place + len(tokens))
            place += len(tokens) + text_length
            text_rows.append(torch.arange(place - text_length, place))
            lengths.append(len(tokens) + text_length)
        txt_place.append(torch.stack(text_rows).to(device))
        vid_start += len(order)
        txt_start += text_length
    angles = torch.cat([*vid_angles, *txt_angles])
    return WindowLayout(
        gather=torch.cat(gather).to(device),
        vid_place=vid_place.to(device),
        txt_place=tuple(txt_place),
        cos=angles.cos().to(device),
        sin=angles.sin().to(device),
        sequences=Sequences(tuple(lengths), device),
    )


class Streams(nn.Module):
    """The video and the text version of a module, or one that serves both."""

    def __init__(self, make: Callable[[], nn.Module], shared: bool):
        super().__init__()
        self.shared = shared
        for name in ("all",) if shared else ("vid", "txt"):
            self.add_module(name, make())

    def __getitem__(self, stream: Stream) -> nn.Module:
        return self.get_submodule("all" if self.shared else stream)


class TimeEmbedding(nn.Module):
    """Timesteps b in 0..1 -> b 6*dim: shift, scale and gate of both sub-layers, see `Modulation`."""

    def __init__(self, dim: int):
        super().__init__()
        self.proj_in = nn.Linear(TIME_CHANNELS, dim)
        self.proj_hid = nn.Linear(dim, dim)
        self.proj_out = nn.Linear(dim, 6 * dim)

    def forward(self, timesteps: Tensor) -> Tensor:
        x = sinusoid(timesteps).to(self.proj_in.weight.dtype)
        return self.proj_out(F.silu(self.proj_hid(F.silu(self.proj_in(x)))))


def sinusoid(timesteps: Tensor) -> Tensor:
    """Timesteps b in 0..1 -> b 256: sines, then cosines. In fp32, because the arguments reach 1000."""
    half = TIME_CHANNELS // 2
    freqs = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half)
    angles = TIME_SCALE * timesteps.float()[:, None] * freqs
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class Conditioning:
    """The timestep embedding as the layers read it: shift, scale and gate of every token.

    In the embedding the channel is the slowest axis, then the sub-layer (attention, feed-forward), then the kind.
    """

    def __init__(self, embedding: Tensor, lengths: Sequence[int]):
        self.embedding = rearrange(embedding, "b (c sub kind) -> sub kind b c", sub=2, kind=3)
        self.sample = None
        if len(lengths) > 1:
            counts = torch.tensor(lengths, device=embedding.device)
            self.sample = torch.arange(len(lengths), device=embedding.device).repeat_interleave(counts)

    def __call__(self, sub: int, kind: int, offset: Tensor) -> Tensor:
        """The embedding plus a layer's own offset: n c, or 1 c if all tokens belong to one sample."""
        # The offsets are small differences; their sum is formed in fp32 as in the published model.
        value = self.embedding[sub, kind].float() + offset.float()
        return value if self.sample is None else value[self.sample]


SHIFT, SCALE, GATE = range(3)
ATTN, MLP = range(2)


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x * scale + shift; there is no "1 +", the learned scale already lies around 1."""
    return x * scale.to(x.dtype) + shift.to(x.dtype)


class Modulation(nn.Module):
    """The learned offsets of one layer and stream."""

    def __init__(self, dim: int):
        super().__init__()
        for sub in ("attn", "mlp"):
            for kind, start in (("shift", 0.0), ("scale", 1.0), ("gate", 1.0)):
                self.register_parameter(f"{sub}_{kind}", nn.Parameter(torch.full((dim,), start)))

    def enter(self, x: Tensor, sub: int, conditioning: Conditioning) -> Tensor:
        shift, scale, _ = self.offsets(sub)
        return modulate(x, conditioning(sub, SCALE, scale), conditioning(sub, SHIFT, shift))

    def leave(self, x: Tensor, sub: int, conditioning: Conditioning) -> Tensor:
        return x * conditioning(sub, GATE, self.offsets(sub)[GATE]).to(x.dtype)

    def offsets(self, sub: int) -> tuple[Tensor, Tensor, Tensor]:
        if sub == ATTN:
            return self.attn_shift, self.attn_scale, self.attn_gate
        return self.mlp_shift, self.mlp_scale, self.mlp_gate


class SwiGLU(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.proj_in_gate = nn.Linear(dim, hidden, bias=False)
        self.proj_out = nn.Linear(hidden, dim, bias=False)
        self.proj_in = nn.Linear(dim, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj_out(F.silu(self.proj_in_gate(x)) * self.proj_in(x))


class GeluMlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.proj_in = nn.Linear(dim, hidden)
        self.proj_out = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj_out(F.gelu(self.proj_in(x), approximate="tanh"))


class WindowAttention(nn.Module):
    """Every window attends to itself and to all text of its sample; text gets the mean over its windows."""

    def __init__(self, config: DiTConfig, shared: bool):
        super().__init__()
        self.head_dim = config.head_dim
        inner = config.heads * config.head_dim
        self.proj_qkv = Streams(lambda: nn.Linear(config.dim, 3 * inner, bias=False), shared)
        self.proj_out = Streams(lambda: nn.Linear(inner, config.dim), shared)
        self.norm_q = Streams(lambda: nn.RMSNorm(config.head_dim, eps=NORM_EPS), shared)
        self.norm_k = Streams(lambda: nn.RMSNorm(config.head_dim, eps=NORM_EPS), shared)
        self.rope = RopeBuffer(config.rope, config.head_dim)

    def forward(self, vid: Tensor, txt: Tensor, layout: WindowLayout, attention: str) -> tuple[Tensor, Tensor]:
        """n c and l c in and out. The text that comes out is still to be projected, see `project_text`."""
        q, k, v = (torch.cat(pair) for pair in zip(self._qkv(vid, "vid"), self._qkv(txt, "txt"), strict=True))
        q, k = rotate(q, layout.cos, layout.sin), rotate(k, layout.cos, layout.sin)
        call = AttentionCall(q[layout.gather], k[layout.gather], v[layout.gather], layout.sequences)
        out = varlen_attention(call, attention).flatten(-2)
        txt = torch.cat([out[place].mean(dim=0) for place in layout.txt_place])
        return self.proj_out["vid"](out[layout.vid_place]), txt

    def project_text(self, txt: Tensor) -> Tensor:
        return self.proj_out["txt"](txt)

    def _qkv(self, x: Tensor, stream: Stream) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.proj_qkv[stream](x)
        q, k, v = rearrange(qkv, "n (three heads d) -> three n heads d", three=3, d=self.head_dim)
        return self.norm_q[stream](q), self.norm_k[stream](k), v


class Block(nn.Module):
    """One layer. In the last one nothing depends on the text that would come out, so it is not computed."""

    def __init__(self, config: DiTConfig, index: int):
        super().__init__()
        shared = index >= config.separate_layers
        self.last = index == config.depth - 1
        self.modulate_text = config.modulate_last_text or not self.last
        self.attn = WindowAttention(config, shared)
        make_mlp = SwiGLU if config.mlp == "swiglu" else GeluMlp
        self.mlp = Streams(lambda: make_mlp(config.dim, config.mlp_hidden), shared)
        self.ada = Streams(lambda: Modulation(config.dim), shared)

    def forward(
        self,
        vid: Tensor,
        txt: Tensor,
        vid_cond: Conditioning,
        txt_cond: Conditioning,
        layout: WindowLayout,
        attention: str,
    ) -> tuple[Tensor, Tensor]:
        vid_in = self.ada["vid"].enter(rms(vid), ATTN, vid_cond)
        txt_in = self.ada["txt"].enter(rms(txt), ATTN, txt_cond) if self.modulate_text else rms(txt)
        vid_out, txt_out = self.attn(vid_in, txt_in, layout, attention)
        vid = self._feed(vid + self.ada["vid"].leave(vid_out, ATTN, vid_cond), "vid", vid_cond)
        if self.last:
            return vid, txt
        txt_out = self.attn.project_text(txt_out)
        return vid, self._feed(txt + self.ada["txt"].leave(txt_out, ATTN, txt_cond), "txt", txt_cond)

    def _feed(self, x: Tensor, stream: Stream, cond: Conditioning) -> Tensor:
        ada = self.ada[stream]
        return x + ada.leave(self.mlp[stream](ada.enter(rms(x), MLP, cond)), MLP, cond)


def rms(x: Tensor) -> Tensor:
    """RMS norm without weights; torch computes it in fp32."""
    return F.rms_norm(x, (x.shape[-1],), eps=NORM_EPS)


class Projection(nn.Module):
    """Patches in or out; exists for the published name `vid_in.proj`."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.proj = nn.Linear(c_in, c_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class OutModulation(nn.Module):
    """Scale and shift before the last projection; it reuses the attention's part of the timestep embedding."""

    def __init__(self, dim: int):
        super().__init__()
        self.out_shift = nn.Parameter(torch.zeros(dim))
        self.out_scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, cond: Conditioning) -> Tensor:
        return modulate(x, cond(ATTN, SCALE, self.out_scale), cond(ATTN, SHIFT, self.out_shift))


class DiT(nn.Module):
    """Predicts the velocity noise - data of a noisy latent, given a degraded one and a prompt.

    Source: SeedVR2, arXiv 2506.05301; sizes and quirks as in the released models.
    """

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        self.vid_in = Projection(config.in_channels * PATCH**2, config.dim)
        self.txt_in = nn.Linear(config.text_dim, config.dim)
        self.emb_in = TimeEmbedding(config.dim)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.depth))
        if config.out_norm:
            self.vid_out_norm = nn.RMSNorm(config.dim, eps=NORM_EPS)
            self.vid_out_ada = OutModulation(config.dim)
        self.vid_out = Projection(config.dim, config.out_channels * PATCH**2)

    def forward(
        self,
        latents: Sequence[Tensor] | Tensor,
        texts: Sequence[Tensor] | Tensor,
        timesteps: Tensor,
        *,
        layout: Layout | None = None,
        attention: str = "auto",
        on_block: Callable[[int, int], None] | None = None,
    ) -> list[Tensor]:
        """Velocity of every sample.

        Args:
            latents: of every sample c t h w, c = 33: noisy latent 16, condition 16, mask 1. A tensor b c t h w is a
                sequence of samples too.
            texts: of every sample l text_dim.
            timesteps: b in 0..1, 1 being pure noise.
            layout: from `layout_of` for these shapes, where several calls share one.
            attention: a name of `seedvr2_core.attention`, or "auto".
            on_block: called as on_block(done, total) after every layer; it may raise to cancel.

        Returns:
            of every sample c t h w, c = 16.

        Raises:
            SettingError: a height or width is odd.
        """
        layout = layout or self.layout_of(latents, texts)
        vid = self.vid_in(torch.cat([patchify(latent) for latent in latents]))
        txt = self.txt_in(torch.cat(list(texts)))
        counts = [math.prod(grid) for grid in layout.grids]
        embedding = self.emb_in(timesteps)
        vid_cond, txt_cond = Conditioning(embedding, counts), Conditioning(embedding, layout.text_lengths)
        for index, block in enumerate(self.blocks):
            vid, txt = block(vid, txt, vid_cond, txt_cond, layout.of_layer(index), attention)
            if on_block:
                on_block(index + 1, len(self.blocks))
        if self.config.out_norm:
            vid = self.vid_out_ada(self.vid_out_norm(vid), vid_cond)
        out = self.vid_out(vid).split(counts)
        return [unpatchify(tokens, grid) for tokens, grid in zip(out, layout.grids, strict=True)]

    def layout_of(self, latents: Sequence[Tensor] | Tensor, texts: Sequence[Tensor] | Tensor) -> Layout:
        """The window layout of samples of these shapes."""
        grids = [token_grid(latent) for latent in latents]
        return make_layout(grids, [len(text) for text in texts], self.config, latents[0].device)

    def reset_frequencies(self) -> None:
        """Put the exact rotary frequencies back into the buffers, after loading rounded ones."""
        for block in self.blocks:
            block.attn.rope.reset(self.config.rope, self.config.head_dim)


def token_grid(latent: Tensor) -> Grid:
    """Token grid of a latent c t h w."""
    _, t, h, w = latent.shape
    if h % PATCH or w % PATCH:
        raise SettingError(f"A latent of {h} x {w} does not divide into 2 x 2 patches; pad frames to multiples of 16.")
    return Grid(t, h // PATCH, w // PATCH)


def patchify(latent: Tensor) -> Tensor:
    """Latent c t h w -> tokens n 4c: rows slowest, then columns, then channels."""
    return rearrange(latent, "c t (h p) (w q) -> (t h w) (p q c)", p=PATCH, q=PATCH)


def unpatchify(tokens: Tensor, grid: Grid) -> Tensor:
    """Tokens n 4c -> latent c t h w; the inverse of `patchify`."""
    t, h, w = grid
    return rearrange(tokens, "(t h w) (p q c) -> c t (h p) (w q)", t=t, h=h, w=w, p=PATCH, q=PATCH)
