"""The diffusion transformer of SeedVR and SeedVR2: one class, several sizes.

Video and text are two streams of tokens that meet in attention, inside 3-D windows of the token grid. Samples of any
shapes are packed into one sequence; each meets only itself. Attribute names are those of the published checkpoints, so
their tensors load strictly.

    c channels   t h w latent frames, height, width (even; a token covers 2 x 2)
    n video tokens of all samples   l text tokens of all samples   b samples   heads, d attention heads and their width
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..attention import AttentionCall, Sequences, varlen_attention, windows
from ..errors import SettingError
from ..kernels import Choices, Question, rounded
from ..kernels.modulate import gate_residual, norm_modulate
from ..video.geometry import PATCH, Grid
from .linear import Linear
from .rope import RopeBuffer, RopeKind, Turns, rotate, window_factors
from .windows import WindowConfig, window_tokens

NORM_EPS = 1e-5
# Sines and cosines that describe a timestep.
TIME_CHANNELS = 256
# Timesteps are 0..1 everywhere else, 1 being pure noise; the embedding was trained on 0..1000.
TIME_SCALE = 1000.0
# Rows that a CPU takes at a time: what lies between two products then stays in its cache, and is reused memory.
CPU_ROWS = 512

Stream = Literal["vid", "txt"]
Mlp = Literal["swiglu", "gelu"]


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Sizes of one transformer."""

    dim: Annotated[int, "channels of every token"]
    depth: Annotated[int, "layers"]
    heads: Annotated[int, "of the attention"]
    separate_layers: Annotated[int, "layers, counted from the first, whose text has weights of its own"]
    mlp: Annotated[Mlp, "swiglu: gated, three matrices; gelu: two"]
    mlp_hidden: Annotated[int, "channels between these"]
    rope: Annotated[RopeKind, "whether rotary positions are given to text as well"]
    out_norm: Annotated[bool, "normalise and modulate before the last projection"]
    modulate_last_text: Annotated[bool, "whether text is scaled and shifted on its way into the last attention"]
    head_dim: Annotated[int, "channels of a head"] = 128
    text_dim: Annotated[int, "channels of the prompt"] = 5120
    in_channels: Annotated[int, "noisy latent 16, condition 16, mask 1"] = 33
    out_channels: Annotated[int, "of the velocity"] = 16
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
    """How the tokens of a batch are dealt into the windows of one kind of layer; equal windows lie side by side."""

    gather: Tensor  # packed window sequences -> index into [video tokens, text tokens]
    spread: Tensor  # n+r, where in the packed sequences the video tokens lie, then the text of every window
    texts: tuple[tuple[int, int], ...]  # of each sample: windows and text tokens; r is the sum of their products
    turns: tuple[Turns, ...]  # rotary factors of each run of equal windows
    sequences: Sequences
    samples: tuple[int, ...]  # of each window

    @cached_property
    def map(self) -> windows.WindowMap:
        """The same windows as our kernel reads them: sample after sample, and the largest first, so that the last ones
        to be computed are short."""
        lengths, starts = self.sequences.lengths, self.sequences.offsets
        dealt: list[list[int]] = [[] for _ in self.texts]
        places = []
        for index in sorted(range(len(lengths)), key=lambda index: (self.samples[index], -lengths[index])):
            sample = self.samples[index]
            dealt[sample].append(lengths[index] - self.texts[sample][1])
            places.append(torch.arange(starts[index], starts[index] + dealt[sample][-1]))
        device = self.gather.device
        order = self.gather[torch.cat(places).to(device)]
        return windows.window_map(order, dealt, [length for _, length in self.texts], device)

    @cached_property
    def angles(self) -> tuple[Tensor, Tensor]:
        """Cosine and sine n+l d/2 of the rotation of every token, fp32."""
        packed = torch.cat([factors.repeat(count, 1) for count, factors in self.turns])
        tokens = len(self.spread) - sum((count - 1) * length for count, length in self.texts)
        # Text has the same angles in every window.
        of_token = packed.new_empty(tokens, packed.shape[1])
        of_token[self.gather] = packed
        return of_token.real.contiguous(), of_token.imag.contiguous()


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


class _Window(NamedTuple):
    shape: Grid
    sample: int
    vid: Tensor  # index into [video tokens, text tokens]
    txt: Tensor

    @property
    def kind(self) -> tuple[int, Grid, int]:
        """Sorts sequences of one length next to each other and, among them, those with the same rotary factors."""
        return len(self.vid) + len(self.txt), self.shape, len(self.txt)


def _window_layout(
    grids: Sequence[Grid], text_lengths: Sequence[int], config: DiTConfig, shifted: bool, device: torch.device
) -> WindowLayout:
    n = sum(math.prod(grid) for grid in grids)
    vid_start, txt_start = 0, n
    dealt = []
    for sample, (grid, text_length) in enumerate(zip(grids, text_lengths, strict=True)):
        order, shapes = window_tokens(grid, config.windows, shifted)
        text = torch.arange(txt_start, txt_start + text_length)
        parts = (vid_start + order).split([math.prod(shape) for shape in shapes])
        dealt += [_Window(shape, sample, part, text) for shape, part in zip(shapes, parts, strict=True)]
        vid_start += len(order)
        txt_start += text_length
    dealt.sort(key=lambda window: window.kind)

    gather = torch.cat([part for window in dealt for part in (window.vid, window.txt)])
    runs = [(kind, len(list(run))) for kind, run in groupby(window.kind for window in dealt)]
    counts = Counter(window.sample for window in dealt)
    # Video tokens come first and in order; the text of the windows follows, sample after sample.
    sample = torch.cat([torch.full(window.txt.shape, window.sample) for window in dealt])
    rank = gather.clone()
    rank[gather >= n] = n + sample
    return WindowLayout(
        gather=gather.to(device),
        spread=rank.argsort(stable=True).to(device),
        texts=tuple((counts[i], length) for i, length in enumerate(text_lengths)),
        turns=tuple(
            Turns(count, window_factors(config.rope, config.head_dim, shape, text_length).to(device))
            for (_, shape, text_length), count in runs
        ),
        sequences=Sequences(tuple(length for (length, _, _), count in runs for _ in range(count)), device),
        samples=tuple(window.sample for window in dealt),
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
        self.embedding = rearrange(embedding, "b (c sub kind) -> sub kind b 1 c", sub=2, kind=3)
        self.sample = None
        if len(set(lengths)) > 1:
            sample = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
            self.sample = sample.to(embedding.device)

    def __call__(self, sub: int, *offsets: Tensor) -> tuple[Tensor, ...]:
        """The embedding plus a layer's own offsets, in the order of kinds.

        Returns:
            of every kind s 1 c for s equal shares of the tokens: one, or one a sample, or where samples differ in
            length as many as there are tokens.
        """
        # The offsets are small differences; their sum is formed in fp32 as in the published model.
        kinds = self.embedding[sub, : len(offsets)].float() + torch.stack(offsets).float()[:, None, None]
        kinds = kinds.to(self.embedding.dtype)
        return (kinds if self.sample is None else kinds[:, self.sample]).unbind()


ATTN, MLP = range(2)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * scale + shift, n c; there is no "1 +", the learned scale already lies around 1."""
    return torch.addcmul(shift, _shares(x, scale), scale).flatten(0, 1)


def _shares(x: Tensor, kind: Tensor) -> Tensor:
    """Tokens n c as the shares s n/s c that a kind of `Conditioning` speaks of."""
    return x.unflatten(0, (len(kind), -1))


class Modulation(nn.Module):
    """The learned offsets of one layer and stream."""

    def __init__(self, dim: int):
        super().__init__()
        for sub in ("attn", "mlp"):
            for kind, start in (("shift", 0.0), ("scale", 1.0), ("gate", 1.0)):
                self.register_parameter(f"{sub}_{kind}", nn.Parameter(torch.full((dim,), start)))

    def forward(self, conditioning: Conditioning) -> tuple[Gains, Gains]:
        """What happens to the tokens around the attention, and around the feed-forward."""
        return (
            Gains(*conditioning(ATTN, self.attn_shift, self.attn_scale, self.attn_gate)),
            Gains(*conditioning(MLP, self.mlp_shift, self.mlp_scale, self.mlp_gate)),
        )


class Gains(NamedTuple):
    """Shift, scale and gate of one sub-layer, each as `Conditioning` gives it."""

    shift: Tensor
    scale: Tensor
    gate: Tensor

    def enter(self, x: Tensor, choices: Choices | None = None) -> Tensor:
        """Normalised and modulated, what the sub-layer reads."""

        def library() -> Tensor:
            return modulate(rms(x), self.shift, self.scale)

        if choices is None or len(self.scale) > 1:
            return library()
        kernel = partial(norm_modulate, x, self.scale[0], self.shift[0], NORM_EPS)
        return choices.run(_token_question("norm_modulate", x), library, {"kernel": kernel})

    def leave(self, x: Tensor, out: Tensor, choices: Choices | None = None) -> Tensor:
        """The residual stream x plus the gated result of the sub-layer."""

        def library() -> Tensor:
            return torch.addcmul(_shares(x, self.gate), _shares(out, self.gate), self.gate).flatten(0, 1)

        if choices is None or len(self.gate) > 1:
            return library()
        kernel = partial(gate_residual, x, out, self.gate[0])
        return choices.run(_token_question("gate_residual", x), library, {"kernel": kernel})


def _token_question(operation: str, x: Tensor) -> Question:
    return Question(operation, (x.shape[1], rounded(len(x))), x.dtype, x.device)


class SwiGLU(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.proj_in_gate = Linear(dim, hidden, bias=False)
        self.proj_out = Linear(hidden, dim, bias=False)
        self.proj_in = Linear(dim, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj_out(self.proj_in(x, factor=self.proj_in_gate(x, "silu")))


class GeluMlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.proj_in = Linear(dim, hidden)
        self.proj_out = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj_out(self.proj_in(x, "gelu"))


class WindowAttention(nn.Module):
    """Every window attends to itself and to all text of its sample; text gets the mean over its windows."""

    def __init__(self, config: DiTConfig, shared: bool):
        super().__init__()
        self.head_dim = config.head_dim
        inner = config.heads * config.head_dim
        self.proj_qkv = Streams(lambda: Linear(config.dim, 3 * inner, bias=False), shared)
        self.proj_out = Streams(lambda: Linear(inner, config.dim), shared)
        self.norm_q = Streams(lambda: nn.RMSNorm(config.head_dim, eps=NORM_EPS), shared)
        self.norm_k = Streams(lambda: nn.RMSNorm(config.head_dim, eps=NORM_EPS), shared)
        self.rope = RopeBuffer(config.rope, config.head_dim)

    def forward(
        self,
        vid: Tensor,
        txt: Tensor,
        layout: WindowLayout,
        attention: str,
        rows: int | None = None,
        choices: Choices | None = None,
        answers: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """n c and l c in and out. The text that comes out is still to be projected, see `project_text`; there is none
        unless `answers`."""
        projected = self._project(vid, txt)
        gathered = partial(self._gathered, projected, layout, attention, answers, rows)
        # An implementation that was asked for by name is what runs.
        tiles = windows.tiles(self.head_dim) if choices and attention == "auto" else ()
        if not tiles:
            out = gathered()
        else:
            n, heads, d = len(vid), projected[0].shape[2], self.head_dim
            shape = (heads, d, int(answers), rounded(n), rounded(layout.map.longest))
            question = Question("windows", shape, vid.dtype, vid.device, slack=windows.SLACK)
            in_place = partial(self._in_place, projected, n, layout, answers)
            kernels = {tile.name: partial(in_place, tile) for tile in tiles}
            out = choices.run(question, gathered, kernels, trial=partial(gathered, keep=True))
            projected.clear()
        return self.proj_out["vid"](out[0]), out[1] if answers else None

    def project_text(self, txt: Tensor) -> Tensor:
        return self.proj_out["txt"](txt)

    def _project(self, vid: Tensor, txt: Tensor) -> list[Tensor]:
        """Queries, keys and values 3 n heads d: of all tokens where weights are shared, else of video and of text."""
        if self.proj_qkv.shared:
            projected = [self.proj_qkv["vid"](torch.cat([vid, txt]))]
        else:
            projected = [self.proj_qkv["vid"](vid), self.proj_qkv["txt"](txt)]
        return [rearrange(x, "n (three heads d) -> three n heads d", three=3, d=self.head_dim) for x in projected]

    def _gathered(
        self,
        projected: list[Tensor],
        layout: WindowLayout,
        attention: str,
        answers: bool,
        rows: int | None,
        keep: bool = False,
    ) -> list[Tensor]:
        """Video n c and, if it answers, text l c; every window with copies of what it reads. Uses up what is projected,
        unless told to keep it."""
        q, k, v = (_rows(x, layout.gather) for x in self._normed_heads(projected, rows, keep))
        call = AttentionCall(rotate(q, layout.turns), rotate(k, layout.turns), v, layout.sequences)
        out = _rows(varlen_attention(call, attention).flatten(1), layout.spread)
        texts = [count * length for count, length in layout.texts]
        vid, *texts = out.split([len(out) - sum(texts), *texts])
        if not answers:
            return [vid]
        txt = [text.unflatten(0, shape).mean(0) for text, shape in zip(texts, layout.texts, strict=True)]
        return [vid, torch.cat(txt)]

    def _normed_heads(self, projected: list[Tensor], rows: int | None, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of [video tokens, text tokens], not rotated yet: n+l heads d."""
        heads = []
        for (q, k, v), stream in zip(projected, ("vid", "txt"), strict=False):
            q, k = (_normed(x, norm[stream].weight, rows, keep) for x, norm in ((q, self.norm_q), (k, self.norm_k)))
            heads.append((q, k, v))
        if not keep:
            # Whoever called this still holds the list; the tensors shall go as soon as they have been dealt out.
            projected.clear()
        if len(heads) == 1:
            return heads[0]
        q, k, v = zip(*heads, strict=True)
        return torch.cat(q), torch.cat(k), torch.cat(v)

    def _in_place(
        self, projected: list[Tensor], n: int, layout: WindowLayout, answers: bool, tile: windows.Tile
    ) -> list[Tensor]:
        """The same by our kernel, which finds tokens where they are."""
        if len(projected) == 1:
            projected = [projected[0][:, :n], projected[0][:, n:]]
        streams = [
            windows.StreamCall(
                q=q if answers or stream == "vid" else None,
                k=k,
                v=v,
                norm_q=self.norm_q[stream].weight,
                norm_k=self.norm_k[stream].weight,
            )
            for (q, k, v), stream in zip(projected, ("vid", "txt"), strict=True)
        ]
        cos, sin = layout.angles
        vid, txt = windows.attend(
            windows.WindowCall(vid=streams[0], txt=streams[1], cos=cos, sin=sin, eps=NORM_EPS, windows=layout.map), tile
        )
        out = [vid] if txt is None else [vid, windows.mean_over_windows(txt, layout.map)]
        return [x.flatten(1) for x in out]


def _normed(x: Tensor, weight: Tensor, rows: int | None, keep: bool) -> Tensor:
    """RMS norm of n heads d; in the memory of x unless that is to be kept, or a gradient needed."""
    if keep or torch.is_grad_enabled():
        return F.rms_norm(x, x.shape[-1:], weight, NORM_EPS)
    for part in x.split(rows or len(x)):
        part.mul_(inverse_rms(part)).mul_(weight)
    return x


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x[index]. An embedding, because its gradient is the only one of torch's ways to gather that is not slow."""
    return F.embedding(index, x.flatten(1)).unflatten(1, x.shape[1:])


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
        rows: int | None = None,
        choices: Choices | None = None,
    ) -> tuple[Tensor, Tensor]:
        """n c and l c in and out; `rows` as for the model, where all tokens have one conditioning."""
        (vid_attn, vid_mlp), (txt_attn, txt_mlp) = self.ada["vid"](vid_cond), self.ada["txt"](txt_cond)
        vid_in = in_turns(partial(vid_attn.enter, choices=choices), vid, rows)
        txt_in = txt_attn.enter(txt, choices) if self.modulate_text else rms(txt)
        vid_out, txt_out = self.attn(vid_in, txt_in, layout, attention, rows, choices, answers=not self.last)
        vid = vid_attn.leave(vid, vid_out, choices)
        vid = in_turns(partial(self._feed, "vid", vid_mlp, choices), vid, rows)
        if self.last:
            return vid, txt
        txt = txt_attn.leave(txt, self.attn.project_text(txt_out), choices)
        return vid, self._feed("txt", txt_mlp, choices, txt)

    def _feed(self, stream: Stream, gains: Gains, choices: Choices | None, x: Tensor) -> Tensor:
        return gains.leave(x, self.mlp[stream](gains.enter(x, choices)), choices)


def in_turns(f: Callable[[Tensor], Tensor], x: Tensor, rows: int | None) -> Tensor:
    """f(x), for an f that treats every row alone, a few rows at a time: what it holds in between stays small."""
    if rows is None or rows >= len(x) or torch.is_grad_enabled():
        return f(x)
    out = None
    for start in range(0, len(x), rows):
        part = f(x[start : start + rows])
        if out is None:
            out = part.new_empty(len(x), *part.shape[1:])
        out[start : start + rows] = part
    return out


def rms(x: Tensor) -> Tensor:
    """RMS norm of n c without weights, in fp32 inside."""
    if x.is_cuda:
        return F.rms_norm(x, (x.shape[-1],), eps=NORM_EPS)
    # Elsewhere torch puts it together from passes that write squares and fp32 copies of all tokens.
    return (x * inverse_rms(x)).to(x.dtype)


def inverse_rms(x: Tensor) -> Tensor:
    """What to multiply x ... c with to normalise it: ... 1, fp32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    return (norm.square() / x.shape[-1] + NORM_EPS).rsqrt()


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

    def forward(self, x: Tensor, conditioning: Conditioning) -> Tensor:
        return modulate(x, *conditioning(ATTN, self.out_shift, self.out_scale))


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
        rows: int | None = None,
        blocks: Sequence[Block] | None = None,
        choices: Choices | None = None,
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
            rows: video tokens that norms and feed-forwards take at a time, given one sample and no gradient; fewer
                take less memory. None: all of them, but on a CPU only as many as its cache holds.
            blocks: the layers, where they do not simply lie in `self.blocks`; each is used when it is handed out, until
                the next one is asked for.
            choices: who says where kernels of our own are faster than the library. They compute no gradients, and take
                part in attention only if that is "auto". None: the library everywhere.
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
        if len(counts) > 1:
            rows = None
        elif rows is None and vid.device.type == "cpu":
            rows = CPU_ROWS
        if torch.is_grad_enabled():
            choices = None
        embedding = self.emb_in(timesteps)
        vid_cond, txt_cond = Conditioning(embedding, counts), Conditioning(embedding, layout.text_lengths)
        blocks = self.blocks if blocks is None else blocks
        for index, block in enumerate(blocks):
            vid, txt = block(vid, txt, vid_cond, txt_cond, layout.of_layer(index), attention, rows, choices)
            if on_block:
                on_block(index + 1, len(blocks))
        out = in_turns(partial(self._head, vid_cond), vid, rows).split(counts)
        return [unpatchify(tokens, grid) for tokens, grid in zip(out, layout.grids, strict=True)]

    def _head(self, conditioning: Conditioning, x: Tensor) -> Tensor:
        if self.config.out_norm:
            x = self.vid_out_ada(self.vid_out_norm(x), conditioning)
        return self.vid_out(x)

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
