"""From tensor names and shapes to what a file holds: which models, of which sizes, under which prefix.

Names are those of the published checkpoints. Whatever comes in front of them (`model.diffusion_model.`, `vae.`,
`module.`, `ema.generator.`) is the prefix, found by looking for one tensor every such model has.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from ..models.dit import SEEDVR2_3B, SEEDVR2_7B, DiTConfig
from ..models.vae import SEEDVR2_VAE, VAEConfig
from .format import Header
from .sizes import DIT_KEY, dit_config, vae_config

Kind = Literal["dit", "vae", "combined", "prompts", "other"]

# A tensor that only this autoencoder has, and has whatever its size; DIT_KEY is that of the transformer.
VAE_KEY = "decoder.up_blocks.0.upsamplers.0.upscale_conv.weight"
# Prompt embeddings inside a transformer's file, as ComfyUI stores them.
PROMPT_KEYS = {"positive": "positive_conditioning", "negative": "negative_conditioning"}
# Width of the published prompt embeddings, and the length of the negative one; the positive one has 58 tokens.
TEXT_DIM, NEGATIVE_TOKENS = 5120, 64
# Parts that compilers and parallel wrappers put in the middle of names.
WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Attention of the VAE as older libraries named it.
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# Where the common convention for safetensors metadata keeps a model's name.
TITLE_KEY = "modelspec.title"
PUBLISHED = {SEEDVR2_3B: "SeedVR2 3B", SEEDVR2_7B: "SeedVR2 7B", SEEDVR2_VAE: "SeedVR2 VAE"}

# What people load by mistake, most telling first.
LOOK_ALIKES = (
    (r"\.?lora_(A|B|up|down|unet|te)|\.lora\.|\.hada_w|\.lokr_w", "a LoRA"),
    (r"^(model\.)?diffusion_model\.input_blocks\.|^input_blocks\.", "a Stable Diffusion checkpoint"),
    (r"\bjoint_blocks\.", "a Stable Diffusion 3 checkpoint"),
    (r"\bdouble_blocks\.", "a Flux or HunyuanVideo model"),
    (r"\bblocks\.\d+\.(self|cross)_attn\.", "a Wan model"),
    (r"\btransformer_blocks\.", "a diffusion transformer of another family"),
    (r"\bconv_first\.|\bRDB\d|\brdb\d", "an ESRGAN-style upscaler"),
    (r"\b(text_model|encoder\.block|model\.layers)\.", "a text encoder or language model"),
    (r"^((first_stage_model|vae)\.)?(encoder|decoder)\.(conv_in|conv1|down|up)", "the VAE of another model"),
)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One model inside a file."""

    kind: Literal["dit", "vae"]
    label: str  # for people: "SeedVR2 3B"
    config: DiTConfig | VAEConfig
    prefix: str  # what stands in front of its tensors' names
    stored: Mapping[str, str]  # the module's tensor names -> names in the file


@dataclass(frozen=True, kw_only=True)
class Content:
    """All that a file holds."""

    kind: Kind
    label: str
    parts: tuple[Part, ...] = ()  # the transformer first
    prompts: Mapping[str, str] = field(default_factory=dict)  # "positive", "negative" -> names in the file

    def part(self, kind: Kind) -> Part | None:
        return next((part for part in self.parts if part.kind == kind), None)


def detect(header: Header) -> Content:
    """Say what a file holds. SeedVR (multi-step) has the shapes of SeedVR2 and gets its label.

    Raises:
        CheckpointError: it is one of our models, but incomplete or of impossible shapes.
    """
    bare = header.tensors.get("")
    if bare is not None and len(bare.shape) == 2 and bare.shape[1] == TEXT_DIM:
        sign = "negative" if bare.shape[0] == NEGATIVE_TOKENS else "positive"
        return Content(kind="prompts", label=f"SeedVR2 {sign} prompt embedding", prompts={sign: ""})

    if look_alike := _look_alike(header.tensors, only="a LoRA"):
        return Content(kind="other", label=look_alike)
    dit, vae = _prefix(header.tensors, DIT_KEY), _prefix(header.tensors, VAE_KEY)
    parts = []
    if dit is not None:
        stored = _names(header.tensors, dit, other=vae)
        config = dit_config(header, stored)
        parts.append(Part(kind="dit", label=_label(header, config), config=config, prefix=dit, stored=stored))
    if vae is not None:
        stored = {_renamed(name): at for name, at in _names(header.tensors, vae, other=dit).items()}
        config = vae_config(header, stored)
        parts.append(Part(kind="vae", label=_label(header, config), config=config, prefix=vae, stored=stored))

    prompts = {
        sign: name
        for sign, key in PROMPT_KEYS.items()
        for name in dict.fromkeys((f"{dit or ''}{key}", key))
        if name in header.tensors and len(header.tensors[name].shape) == 2
    }
    if parts:
        label = " and ".join(part.label for part in parts)
        return Content(kind="combined" if len(parts) > 1 else parts[0].kind, label=label, parts=tuple(parts),
                       prompts=prompts)  # fmt: skip
    if prompts:
        return Content(kind="prompts", label="SeedVR2 prompt embeddings", prompts=prompts)
    unknown = f"an unknown set of {len(header.tensors)} tensors"
    return Content(kind="other", label=_look_alike(header.tensors) or unknown)


def _look_alike(names: Iterable[str], only: str | None = None) -> str | None:
    names = list(names)
    for pattern, label in LOOK_ALIKES:
        if only in (None, label) and any(re.search(pattern, name) for name in names):
            return label
    return None


def _prefix(names: Iterable[str], key: str) -> str | None:
    """What stands in front of `key`; of several models the averaged one, never a discriminator if it can be helped."""
    found = [name.removesuffix(key) for name in names if name == key or name.endswith("." + key)]

    def rank(prefix: str) -> tuple[bool, bool, int]:
        return "discriminator." in prefix, "ema" not in prefix, len(prefix)

    return min(found, key=rank, default=None)


def _names(names: Iterable[str], prefix: str, other: str | None) -> dict[str, str]:
    """The tensors under a prefix: plain name -> name in the file, without those of another model and the prompts."""
    found = {}
    for name in names:
        of_other = bool(other) and len(other) > len(prefix) and name.startswith(other)
        plain = WRAPPERS.sub("", name[len(prefix) :])
        if name.startswith(prefix) and not of_other and plain not in PROMPT_KEYS.values():
            found[plain] = name
    return found


def _renamed(name: str) -> str:
    return re.sub(
        r"(\.attentions\.\d+)\.(query|key|value|proj_attn)\.",
        lambda match: f"{match[1]}.{OLD_ATTENTION[match[2]]}.",
        name,
    )


def _label(header: Header, config: DiTConfig | VAEConfig) -> str:
    if config in PUBLISHED:
        return PUBLISHED[config]
    if title := header.metadata.get(TITLE_KEY):
        return title
    if isinstance(config, VAEConfig):
        return f"SeedVR2-style VAE of widths {', '.join(map(str, config.widths))}"
    return f"SeedVR2-style DiT, {config.depth} layers of width {config.dim}"
