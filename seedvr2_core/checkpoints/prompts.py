"""The fixed prompts of SeedVR2, as text embeddings; there is no text encoder at inference."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..errors import CheckpointError
from .checkpoint import Checkpoint
from .published import PROMPTS, sha256_of

# l tokens   c channels


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Embeddings of one pair of prompts, in the type they are stored in (published: bfloat16)."""

    positive: Tensor  # l c; published 58 5120
    negative: Tensor | None  # l c; published 64 5120; only guidance needs it


def load_prompts(path: Path) -> Prompts:
    """Load the prompt embeddings that belong to a transformer.

    They are taken from inside its file, else from `pos_emb.pt` and `neg_emb.pt` beside it.

    Args:
        path: file of a transformer, or of prompt embeddings.

    Raises:
        CheckpointError: there is no positive embedding, its width is not the model's, or a `pos_emb.pt` or
            `neg_emb.pt` is not the published one.
    """
    checkpoint = Checkpoint.open(Path(path))
    inside = checkpoint.content.prompts
    if "positive" in inside:
        tensors = checkpoint.read(inside.values())
        prompts = {sign: tensors[name] for sign, name in inside.items()}
    else:
        prompts = _published(checkpoint.path.parent)
    if "positive" not in prompts:
        raise CheckpointError(
            f"{checkpoint.path.name} holds no positive prompt embedding and there is no {PROMPTS['positive'].file} "
            f"beside it; fetch it with: seedvr2 download prompts --dir {checkpoint.path.parent}"
        )
    if part := checkpoint.content.part("dit"):
        for sign, prompt in prompts.items():
            if prompt.shape[1] != part.config.text_dim:
                raise CheckpointError(
                    f"The {sign} prompt embedding for {checkpoint.path.name} is {prompt.shape[1]} wide, expected "
                    f"{part.config.text_dim}; it belongs to another model."
                )
    return Prompts(positive=prompts["positive"], negative=prompts.get("negative"))


def _published(folder: Path) -> dict[str, Tensor]:
    """The published embeddings found in a folder."""
    found = {}
    for sign, published in PROMPTS.items():
        file = folder / published.file
        if not file.is_file():
            continue
        if (sha256 := sha256_of(file)) != published.sha256:
            raise CheckpointError(
                f"{file} is not the published prompt embedding: its SHA-256 is {sha256}, expected {published.sha256}; "
                f"move it away and run: seedvr2 download prompts --dir {file.parent}"
            )
        found[sign] = Checkpoint.open(file).read([""])[""]
    return found
