"""Streaming: what waits on the host comes back as it left, in time, and the results are the same."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from seedvr2_core.memory.streaming import (
    CpuFerry,
    DeviceState,
    HostState,
    PretendFerry,
    Stored,
    StreamedBlocks,
    new_state,
    placed,
    streamed_indices,
)
from seedvr2_core.models.dit import DiT
from seedvr2_core.models.vae import CausalState, VideoVAE
from seedvr2_core.models.vae_fast import FastVAE
from tests.core.conftest import RUNNABLE_DIT, RUNNABLE_VAE

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")]),
]


@pytest.fixture
def vae() -> VideoVAE:
    return VideoVAE(RUNNABLE_VAE).requires_grad_(False)


def decode(vae: FastVAE, latents: list[Tensor], state: CausalState, move: dict | None = None) -> Tensor:
    out = []
    for index, latent in enumerate(latents):
        if move and index in move:
            state = placed(state, move[index], latent.device)
        clip, state = vae.decode_slice(latent, state, last=index == len(latents) - 1)
        out.append(clip)
    assert not state
    return torch.cat(out, dim=2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("block", "band"), [(1, None), (2, None), (4, None), (1, 100), (2, 300)])
def test_a_state_gives_the_same_wherever_it_waits(vae, device, block, band):
    fast = FastVAE(vae.to(device))
    fast.take(block, band)
    latents = list(torch.randn(5, 1, 16, 1, 4, 4, device=device))
    expected = decode(fast, latents, CausalState())
    for placement in ("device", "host"):
        assert torch.equal(decode(fast, latents, new_state(placement, torch.device(device))), expected)
    for move in ({1: "host"}, {2: "device"}, {1: "host", 3: "device"}):
        assert torch.equal(decode(fast, latents, CausalState(), move), expected)


def test_encoding_gives_the_same_too(vae):
    fast, clip = FastVAE(vae), torch.randn(1, 3, 13, 32, 32)
    outs = []
    for state in (CausalState(), DeviceState(), HostState(CpuFerry())):
        out = []
        for part in clip.split([5, 4, 4], dim=2):
            moments, state = fast.encode_slice(part, state)
            out.append(moments)
        outs.append(torch.cat(out, dim=2))
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("band", [None, 100])
def test_a_layer_finds_its_past_sent_for_before_it_looks(vae, band):
    class Counting(CpuFerry):
        def __init__(self):
            self.stored, self.values, self.fetched = 0, [], 0

        def store(self, x):
            self.stored += 1
            return super().store(x)

        def fetch(self, stored, into=None, index=...):
            self.fetched += 1
            self.values.append(stored.host[index].numel())
            return super().fetch(stored, into, index)

    class Watching(HostState):
        late = looks = 0

        def bring(self, stored, look):
            fetched = self.ferry.fetched
            self.looks += 1
            expected = bool(self._coming) and self._coming[0].answers(stored, look.index)
            self.late += not expected
            out = super().bring(stored, look)
            assert expected or self.ferry.fetched > fetched
            return out

    ferry = Counting()
    fast, state = FastVAE(vae), Watching(ferry)
    fast.take(1, band)
    for index in range(5):
        if index == 3:
            state.looks = state.late = ferry.stored = ferry.fetched = 0
            ferry.values.clear()
        _, state = fast.decode_slice(torch.randn(1, 16, 1, 4, 4), state)
    assert state.looks > 40
    # The first of a slice has nobody before it, and nothing is sent for in vain.
    assert state.late <= 2 and ferry.fetched == state.looks
    # A frame that stays in a state for another turn does not leave twice.
    assert ferry.stored < ferry.fetched
    largest = max(
        frame.host.numel()
        for frames in dict.values(state)
        for frame in tree_leaves(frames)
        if isinstance(frame, Stored)
    )
    assert (max(ferry.values) == largest) == (band is None)


def test_in_place_states_hold_one_past_and_copies_two(vae):
    fast = FastVAE(vae)
    for state, same in ((CausalState(), False), (DeviceState(), True)):
        _, first = fast.decode_slice(torch.randn(1, 16, 1, 4, 4), state)
        _, second = fast.decode_slice(torch.randn(1, 16, 1, 4, 4), first)
        assert (second is first) == same


def test_a_pretended_ferry_keeps_nothing_on_the_host():
    ferry, x = PretendFerry(), torch.empty(1000, device="meta")
    stored = ferry.store(x)
    assert stored.host.untyped_storage().nbytes() == 4
    assert ferry.fetch(stored)().shape == x.shape


# --- blocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "streamed"), [(32, 0), (32, 1), (32, 5), (36, 17), (32, 32), (2, 1)])
def test_streamed_blocks_lie_evenly_among_the_others(depth, streamed):
    indices = streamed_indices(depth, streamed)
    assert len(set(indices)) == streamed and indices == sorted(indices)
    gaps = [b - a for a, b in zip([-1, *indices], indices, strict=False)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def run(dit: DiT, blocks: StreamedBlocks | None, device: str) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    latent, text = torch.randn(1, 33, 3, 8, 8, generator=draw), torch.randn(5, 64, generator=draw)
    with torch.inference_mode():
        return dit(latent.to(device), [text.to(device)], torch.ones(1, device=device), blocks=blocks)[0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("streamed", [0, 1, 3, 5])
def test_streamed_blocks_compute_the_same_as_all_at_once(device, streamed):
    dit = DiT(replace(RUNNABLE_DIT, depth=5, separate_layers=2)).requires_grad_(False).to(device)
    state = {name: tensor.clone() for name, tensor in deepcopy(dit).state_dict().items()}
    expected = run(dit, None, device)
    blocks = StreamedBlocks(dit.blocks, torch.device(device), streamed)
    assert len(blocks) == 5
    for _ in range(2):
        assert torch.equal(run(dit, blocks, device), expected)
    blocks.close()
    # An ordinary module again: with its own weights, which can be streamed in another way.
    for name, tensor in dit.state_dict().items():
        assert torch.equal(tensor.to(device), state[name])
    again = StreamedBlocks(dit.blocks, torch.device(device), 5 - streamed)
    assert torch.equal(run(dit, again, device), expected)
    again.close()
    # And back.
    back = StreamedBlocks(dit.blocks, torch.device(device), 0)
    assert torch.equal(run(dit, back, device), expected)


def test_blocks_are_sent_for_once_in_the_order_of_a_pass_forwards_and_backwards():
    class Listing(CpuFerry):
        def fetch(self, stored, into=None, index=...):
            sent.append(numbers[id(stored)])
            return super().fetch(stored, into, index)

    dit = DiT(replace(RUNNABLE_DIT, depth=7, separate_layers=2)).requires_grad_(False)
    state = deepcopy(dit).state_dict()
    blocks = StreamedBlocks(dit.blocks, torch.device("cpu"), 5)
    numbers = {id(stored): index for index, stored in blocks._stored.items()}
    blocks.ferry, sent = Listing(), []

    def visit(index: int) -> list[int]:
        """What is sent for when a block is asked for, which has its weights then."""
        sent.clear()
        found = blocks.at(index)
        for name, tensor in found.named_parameters():
            assert torch.equal(tensor, state[f"blocks.{index}.{name}"])
        return list(sent)

    first, *others = streamed_indices(7, 5)
    assert (first, *others) == (0, 1, 3, 4, 6)
    for _ in range(2):
        assert [visit(index) for index in range(7)] == [[0, 1], [3], [], [4], [6], [], []]
        # The last two are still there.
        assert [visit(index) for index in reversed(range(7))] == [[], [], [3], [1], [], [0], []]
        # Then the backward pass of what came before, whose last block is not.
        assert [visit(index) for index in reversed(range(7))] == [[6, 4], [], [3], [1], [], [0], []]
        blocks._there.clear()


def test_a_pass_cut_short_waits_for_the_weights_that_are_on_their_way():
    class Noting(CpuFerry):
        sent = arrived = 0

        def fetch(self, stored, into=None, index=...):
            self.sent += 1
            arrive = super().fetch(stored, into, index)

            def noted():
                self.arrived += 1
                return arrive()

            return noted

    dit = DiT(replace(RUNNABLE_DIT, depth=5, separate_layers=2)).requires_grad_(False)
    blocks = StreamedBlocks(dit.blocks, torch.device("cpu"), 3)
    blocks.ferry = ferry = Noting()
    for index, _ in enumerate(blocks):
        if index == streamed_indices(5, 3)[0]:
            break
    assert (ferry.sent, ferry.arrived) == (2, 1)
    blocks.close()
    assert ferry.arrived == 2
    blocks.close()
    assert ferry.arrived == 2
