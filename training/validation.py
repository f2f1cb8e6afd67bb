"""What a restorer makes of held-out latents: how far off it is, and pictures of it.

b samples   c channels   t h w latent frames, height, width   T H W pixel frames, height, width
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from seedvr2_core.device import pick_dtype
from seedvr2_core.diffusion.conditioning import frame_noise
from seedvr2_core.diffusion.sampler import sample
from seedvr2_core.errors import CheckpointError
from seedvr2_core.models.vae_fast import FastOptions, FastVAE
from seedvr2_core.video.geometry import to_frames

from .previews import Preview, colour, colour_basis
from .restorer import Restorer
from .shards import Latents
from .weights import open_vae

log = logging.getLogger(__name__)

Captions = Sequence[Tensor | None]  # embedding l c of each sample that has one
# Latents c t h w that belong together, in the transformer's scale, to frames T 3 H W in 0..1 of each.
Show = Callable[[Sequence[Tensor]], list[Tensor]]


def latent_errors(
    module: Restorer, latents: Latents, steps: tuple[int, ...], captions: bool = False
) -> dict[str, float]:
    """RMS error and spread of restored held-out latents, relative to the clean ones; "lq" is the input's own error.

    "condition_effect" is by how much a sample that is restored in one step changes, RMS relative to the spread of clean
    ones, when it is given the degraded latent of another: 0 if the model makes up all that it shows, about 1.4 if it
    makes up nothing. It is missing where no two held-out samples have one shape.

    `captions`: with those that the samples have, else with the model's prompt.
    """
    result: dict[str, list[float]] = {}
    for hq, lq, texts in _held_out(latents, captions):
        result.setdefault("lq", []).append(_rms(lq - hq))
        for count in steps:
            restored = restore_latents(module, lq, count, texts)
            result.setdefault(f"rms_{count}", []).append(_rms(restored - hq))
            result.setdefault(f"std_{count}", []).append((restored.std() / hq.std()).item())
            if count == 1 and len(hq) > 1:
                # From the same noise and texts, so that nothing but the condition can make a difference.
                other = restore_latents(module, lq.roll(1, 0), count, texts)
                result.setdefault("condition_effect", []).append(_rms(other - restored) / hq.std().item())
    return {name: sum(values) / len(values) for name, values in result.items()}


def latent_previews(module: Restorer, latents: Latents, steps: int, captions: bool = False) -> list[Preview]:
    """The first held-out sample of every kind and shape: decoded, or as colours of its latents where the autoencoder
    that made them is not to be had."""
    show, shown = _decoder(latents, module.device), []
    for hq, lq, texts in _held_out(latents, captions):
        restored = restore_latents(module, lq[:1], steps, texts and texts[:1])
        pictures = (show or _colours(hq))([lq[0], restored[0], hq[0]])
        shown.append(Preview("x".join(map(str, hq.shape[2:])), *pictures))
    return shown


def _decoder(latents: Latents, device: torch.device) -> Show | None:
    """The decoder of the autoencoder that made the latents, for as long as someone holds it."""
    if latents.autoencoder is None:
        log.info("Previews are colours of latents: plain files do not say which autoencoder made them.")
        return None
    try:
        vae = open_vae(latents.autoencoder, pick_dtype("auto", device), device)
    except CheckpointError as error:
        log.info("Previews are colours of latents: %s", error)
        return None
    # Beside a model in training there is little memory, and no hurry.
    vae = FastVAE(vae, FastOptions(block=1, winograd_from=None))

    def show(samples: Sequence[Tensor]) -> list[Tensor]:
        own = [(latent[None] / latents.scale).to(device, vae.dtype) for latent in samples]
        return [to_frames(vae.decode(latent))[0].transpose(0, 1).cpu() for latent in own]

    return show


def _colours(hq: Tensor) -> Show:
    basis = colour_basis(hq)
    return lambda samples: [colour(latent, basis) for latent in samples]


def _rms(difference: Tensor) -> float:
    return difference.square().mean().sqrt().item()


def _held_out(latents: Latents, captions: bool) -> Iterator[tuple[Tensor, Tensor, Captions | None]]:
    if not captions:
        yield from ((hq, lq, None) for hq, lq in latents.held_out())
        return
    yield from ((batch.hq, batch.lq, batch.texts) for batch in latents.held_out_captioned())


def restore_latents(module: Restorer, lq: Tensor, steps: int, texts: Captions | None = None) -> Tensor:
    """Degraded latents b 16 t h w, restored from noise that is theirs for good; on the CPU.

    One by one: where there is room to train on a sample there is room to look at one, but not at all of them.
    """
    restored = []
    for i, condition in enumerate(lq.to(module.device).split(1)):
        told = () if texts is None else (None, texts[i : i + 1])
        noise = frame_noise(i, 0, *lq.shape[2:3], 16, *lq.shape[3:])[None].to(module.device)
        restored.append(_restored(module, noise, condition, steps, told).cpu())
    return torch.cat(restored)


def _restored(module: Restorer, noise: Tensor, lq: Tensor, steps: int, told: tuple) -> Tensor:
    return sample(lambda x, u: module.velocity(x, lq, x.new_full((len(x),), u), *told), noise, steps)
