"""Adapters: nothing at first, merged what they were beside the weights, and two sets on one base."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from seedvr2_core.errors import CheckpointError, SettingError
from seedvr2_core.models.dit import SEEDVR2_3B, SEEDVR2_7B, DiTConfig
from tests.training.toys import in_processes, untimed
from training import config as configs
from training import export, journal, loop, state
from training.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    AboutAdapters,
    AdaptedDiscriminator,
    AdaptedRestorer,
    Adapters,
    Base,
    LoraConfig,
    load_adapters,
    merged,
    save_adapters,
)
from training.config import OptimConfig, ParallelConfig, RunConfig
from training.curriculum import Phase
from training.discriminator import tap_blocks
from training.lora import (
    RECIPES,
    AdaptedAdversarialStage,
    AdaptedDiscConfig,
    LoraTraining,
    flow_matching,
    keep_adapters,
    open_base,
    players,
)
from training.parallel import Layers, Processes, connect
from training.pretrain import RECIPES as PRETRAIN_RECIPES
from training.pretrain import load_run
from training.restorer import Restorer
from training.shards import Latents
from training.weights import NAMES, open_restorer

SMALL = LoraConfig(rank=4, alpha=8.0, base="fp32")
RUN = RunConfig(steps=2, save_every=1, validate_every=2, async_save=False)
RATE = OptimConfig(lr=1e-2, final_lr=1e-2, warmup=0, weight_decay=0.0)


@pytest.fixture
def restorer(tiny_dit) -> Restorer:
    torch.manual_seed(0)
    restorer = Restorer(tiny_dit)
    for parameter in restorer.parameters():
        nn.init.normal_(parameter, std=0.1)
    return restorer


@pytest.fixture
def inputs():
    x, condition = torch.randn(2, 2, 16, 2, 4, 4).unbind()
    return x, condition, torch.tensor([0.3, 1.0])


def trained(adapted: AdaptedRestorer) -> AdaptedRestorer:
    for parameter in adapted.parameters():
        nn.init.normal_(parameter, std=0.1)
    return adapted


@pytest.fixture
def shard_latents(latents_folder) -> Latents:
    return Latents(latents_folder, seed=0)


@pytest.fixture
def config(tiny_dit):
    return LoraTraining(init="unused", model=tiny_dit, run=RUN, g=RATE, d=RATE, lora=SMALL, batch=2,
                        curriculum=(Phase(share=1.0, frames=(1, 5)),))  # fmt: skip


def test_a_base_with_room_for_adapters_is_the_model_it_was(restorer, inputs):
    before = restorer.velocity(*inputs)
    base = Base(restorer)
    assert torch.equal(base.restorer.velocity(*inputs), before)


def test_fresh_adapters_add_nothing(restorer, inputs):
    before = restorer.velocity(*inputs)
    torch.testing.assert_close(AdaptedRestorer(Base(restorer), SMALL).velocity(*inputs), before, atol=0, rtol=0)


def test_13_strength_zero_is_the_base_to_the_bit(restorer, inputs):
    before = restorer.velocity(*inputs)
    adapted = trained(AdaptedRestorer(Base(restorer), SMALL))
    assert not torch.equal(adapted.velocity(*inputs), before)
    adapted.adapters.strength = 0.0
    assert torch.equal(adapted.velocity(*inputs), before)


def test_13_merged_adapters_give_what_they_gave_beside_the_weights(restorer, inputs):
    base = Base(restorer.double())
    base.restorer.double()
    adapted = trained(AdaptedRestorer(base, SMALL)).double()
    # What merges is fp32, so it has to hold these values exactly.
    for parameter in adapted.parameters():
        parameter.data = parameter.data.float().double()
    inputs = [tensor.double() for tensor in inputs]
    beside = adapted.velocity(*inputs)
    merged = base.merge(adapted.adapters).double()
    torch.testing.assert_close(merged.velocity(*inputs), beside, atol=1e-5, rtol=1e-5)
    assert not any("lora" in name for name in merged.state_dict())


def test_a_merged_model_has_the_tensors_of_a_plain_one(restorer, tiny_dit):
    base = Base(restorer)
    merged = base.merge(trained(AdaptedRestorer(base, SMALL)).adapters)
    plain = Restorer(tiny_dit).state_dict()
    assert {name: t.shape for name, t in merged.state_dict().items()} == {name: t.shape for name, t in plain.items()}


def test_every_linear_layer_of_every_block_has_an_adapter(restorer):
    base = Base(restorer)
    per_stream = ("attn.proj_qkv", "attn.proj_out", "mlp")
    mlp = ("proj_in", "proj_in_gate", "proj_out")
    wanted = set()
    for block, streams in enumerate((("vid", "txt"), ("all",))):
        for stream in streams:
            wanted |= {f"blocks.{block}.{name}.{stream}" for name in per_stream[:2]}
            wanted |= {f"blocks.{block}.mlp.{stream}.{layer}" for layer in mlp}
    assert set(base.layers) == wanted


@pytest.mark.parametrize(("model", "millions"), [(SEEDVR2_3B, 58.8), (SEEDVR2_7B, 113.0)], ids=["3b", "7b"])
def test_rank_32_has_as_many_parameters_as_the_estimates_assume(model, millions):
    with torch.device("meta"):
        # Two of the blocks and their share: the whole model takes seconds to lay out.
        base = Base(Restorer(replace(model, depth=2, separate_layers=1)))
        counts = [sum(p.numel() for name, p in Adapters(base, LoraConfig(rank=32)).named_parameters()
                      if name.startswith(f"blocks.{block}.")) for block in (0, 1)]  # fmt: skip
    total = counts[0] * model.separate_layers + counts[1] * (model.depth - model.separate_layers)
    assert total / 1e6 == pytest.approx(millions, rel=0.01)


def test_only_adapters_receive_gradients(restorer, inputs):
    adapted = trained(AdaptedRestorer(Base(restorer), SMALL))
    adapted.velocity(*inputs).square().mean().backward()
    assert all(parameter.grad is None for parameter in adapted.base.restorer.parameters())
    silent = {name for name, p in adapted.named_parameters() if p.grad is None or not p.grad.any()}
    assert not silent
    assert {name.split(".")[0] for name, _ in adapted.named_parameters()} == {"adapters"}


def test_recomputing_in_the_backward_pass_uses_the_same_adapters(restorer, inputs):
    base = Base(restorer)
    adapted, other = (trained(AdaptedRestorer(base, SMALL)) for _ in range(2))

    def gradients() -> list[torch.Tensor]:
        adapted.zero_grad()
        loss = adapted.velocity(*inputs).square().mean()
        # Whoever uses the base before the backward pass begins must not matter.
        with torch.no_grad():
            other.velocity(*inputs)
        loss.backward()
        return [parameter.grad.clone() for parameter in adapted.parameters()]

    plain = gradients()
    adapted.layers = Layers(recompute=True)
    for one, again in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(one, again)


def test_two_sets_on_one_base_do_not_disturb_each_other(restorer, inputs):
    base = Base(restorer)
    first, second = (trained(AdaptedRestorer(base, SMALL)) for _ in range(2))
    alone = first.velocity(*inputs)
    assert not torch.allclose(second.velocity(*inputs), alone)
    assert torch.equal(first.velocity(*inputs), alone)


def test_the_discriminator_shares_the_base_and_owns_adapters_and_readout(restorer, inputs, tiny_dit):
    base = Base(restorer)
    critic = AdaptedDiscriminator(base, SMALL)
    assert {name.split(".")[0] for name, _ in critic.named_parameters()} == {"adapters", "readout"}
    x, condition, u = inputs
    logits, features = critic(x, condition, [restorer.prompt] * 2, u)
    assert logits.shape == (2,) and len(features) == len(tap_blocks(tiny_dit.depth))


def test_a_base_in_fp8_is_close_to_the_model_and_passes_gradients(restorer, inputs):
    before = restorer.velocity(*inputs)
    adapted = trained(AdaptedRestorer(Base(restorer, "fp8"), replace(SMALL, base="fp8")))
    adapted.adapters.strength = 0.0
    error = (adapted.velocity(*inputs) - before).norm() / before.norm()
    assert error < 0.15
    adapted.adapters.strength = 1.0
    x = inputs[0].requires_grad_()
    adapted.velocity(x, *inputs[1:]).square().mean().backward()
    assert x.grad.any() and all(p.grad is not None for p in adapted.parameters())


def test_saved_adapters_have_pefts_names_and_come_back(restorer, inputs, tmp_path):
    adapted = trained(AdaptedRestorer(Base(restorer), SMALL))
    save_adapters(tmp_path, adapted.adapters.state_dict(), SMALL, "nano", prompted=False)
    with safe_open(tmp_path / ADAPTER_FILE, "pt") as file:
        assert "base_model.model.blocks.0.attn.proj_qkv.vid.lora_A.weight" in file.keys()  # noqa: SIM118
    assert AboutAdapters.in_folder(tmp_path) == AboutAdapters("nano", replace(SMALL, base="bf16"), prompted=False)
    expected = adapted.state_dict()
    again = load_adapters(tmp_path)
    assert again.keys() == expected.keys() and all(torch.equal(again[name], expected[name]) for name in again)


def keep_together(model: DiTConfig, config: LoraTraining, folder: Path, init_method: str) -> dict[str, torch.Tensor]:
    """In one of several processes that share the weights; what they were before."""
    processes = connect(ParallelConfig(), torch.device("cpu"), init_method)
    torch.manual_seed(0)
    adapted = trained(AdaptedRestorer(Base(Restorer(model)), SMALL))
    before = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    keep_adapters(processes.place(adapted), config, folder, processes)
    return before


def test_adapters_that_several_processes_share_are_saved_whole(tiny_dit, config, tmp_path):
    expected, _ = in_processes(2, keep_together, tmp_path / "work", tiny_dit, config, tmp_path / "adapter")
    saved = load_adapters(tmp_path / "adapter")
    assert saved.keys() == expected.keys() and all(torch.equal(saved[name], expected[name]) for name in saved)


def test_a_folder_of_adapters_is_opened_and_exported_merged(inputs, tmp_path):
    """It is small and can be sent to whoever has what it is for."""
    base = Base(open_restorer("nano"))
    adapted = trained(AdaptedRestorer(base, SMALL))
    save_adapters(tmp_path / "sent", adapted.adapters.state_dict(), SMALL, "nano")
    expected = adapted.velocity(*inputs)
    torch.testing.assert_close(open_restorer(tmp_path / "sent").velocity(*inputs), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(open_restorer("nano").velocity(*inputs), expected, atol=1e-2)
    file = tmp_path / "mine.safetensors"
    assert export.main(["--run", str(tmp_path / "sent"), "--out", str(file), "--dtype", "fp32"]) == 0
    torch.testing.assert_close(open_restorer(file).velocity(*inputs), expected, atol=1e-4, rtol=1e-4)
    save_adapters(tmp_path / "sent", adapted.adapters.state_dict(), SMALL, "nano", prompted=False)
    assert not open_restorer(tmp_path / "sent").prompt.any()


def test_adapters_of_another_model_are_refused(restorer, tiny_dit, tmp_path):
    save_adapters(tmp_path, Adapters(Base(restorer), SMALL).state_dict(), SMALL, "nano")
    with pytest.raises(CheckpointError, match="another model"):
        merged(Restorer(replace(tiny_dit, mlp_hidden=56)), SMALL, load_adapters(tmp_path), tmp_path)
    assert AboutAdapters.in_folder(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"r": 4}', "base_model_name_or_path"),
        ('{"base_model_name_or_path": "nano", "r": "many", "lora_alpha": 4}', "cannot be read"),
        ('{"base_model_name_or_path": "nano", "r": 0, "lora_alpha": 4}', "at least 1"),
        ('{"base_model_name_or_path": "nowhere", "r": 4, "lora_alpha": 4}', "nowhere is neither"),
        # As large as it says, it would take more memory than there is.
        ('{"base_model_name_or_path": "nano", "r": 1000000000, "lora_alpha": 4}', "another model"),
    ],
)
def test_adapters_that_lie_about_themselves_are_refused(config, words, tmp_path):
    save_adapters(tmp_path, Adapters(Base(open_restorer("nano")), SMALL).state_dict(), SMALL, "nano")
    (tmp_path / ADAPTER_CONFIG).write_text(config)
    with pytest.raises(CheckpointError, match=words):
        open_restorer(tmp_path)


def test_adapters_for_themselves_are_refused(restorer, tmp_path):
    for name, base in (("ours", tmp_path / "theirs"), ("theirs", tmp_path / "ours")):
        save_adapters(tmp_path / name, Adapters(Base(restorer), SMALL).state_dict(), SMALL, str(base))
    with pytest.raises(CheckpointError, match="ends at a checkpoint"):
        open_restorer(tmp_path / "ours")


def test_adapters_that_were_cut_off_are_refused(tmp_path, capsys):
    save_adapters(tmp_path, Adapters(Base(open_restorer("nano")), SMALL).state_dict(), SMALL, "nano")
    file = tmp_path / ADAPTER_FILE
    file.write_bytes(file.read_bytes()[:-100])
    assert export.main(["--run", str(tmp_path), "--out", str(tmp_path / "mine.safetensors")]) == 1
    assert "adapter_model.safetensors cannot be read" in capsys.readouterr().err
    file.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_restorer(tmp_path)


def test_flow_matching_trains_adapters_and_resumes_to_the_bit(restorer, config, shard_latents, tmp_path):
    def run(directory, **session):
        stage = flow_matching(config, shard_latents, Base(copy.deepcopy(restorer)))
        return loop.run(stage, config, {"g": RATE}, directory, loop.Session(**session))

    whole = run(tmp_path / "whole")
    with pytest.raises(loop.Preempted):
        run(tmp_path / "halves", most_steps=1)
    halves = run(tmp_path / "halves")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), halves.parameters(), strict=True))
    assert any(p.abs().sum() > 0 for name, p in whole.named_parameters() if "lora_B" in name)


def test_adversarial_training_moves_both_sets_and_leaves_the_base(restorer, config, shard_latents, tmp_path):
    before = {name: tensor.clone() for name, tensor in restorer.state_dict().items()}
    base = Base(restorer)
    stage = AdaptedAdversarialStage(config, shard_latents, base, base)
    starts = {name: [p.clone() for p in module.parameters()] for name, module in stage.modules.items()}
    loop.run(stage, config, {"d": RATE, "g": RATE}, tmp_path)
    for name, module in stage.modules.items():
        assert any(not torch.equal(p, start) for p, start in zip(module.parameters(), starts[name], strict=True)), name
    after = base.restorer.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


# Blocks that wait in host memory.


def deep(tiny_dit, seed: int = 0, depth: int = 5) -> Restorer:
    """A restorer of several blocks in which everything matters."""
    torch.manual_seed(seed)
    restorer = Restorer(replace(tiny_dit, depth=depth))
    for parameter in restorer.parameters():
        nn.init.normal_(parameter, std=0.1)
    return restorer


def both_halves(config: LoraTraining, latents: Latents, *made_of: Base | Restorer) -> Mapping[str, object]:
    """What both halves of a step log, and all gradients they leave."""
    stage = AdaptedAdversarialStage(config, latents, *made_of)
    torch.manual_seed(1)
    found = {}
    for module in stage.modules.values():
        trained(module).layers = Layers(recompute=True)
    for name, module in stage.modules.items():
        found[name] = untimed(stage.backward(name, 0, 0, 1.0))
        found |= {f"{name}/{key}": p.grad.clone() for key, p in module.named_parameters() if p.grad is not None}
        module.zero_grad()
    return found


@pytest.mark.parametrize("backward", ["joint", "replay"])
@pytest.mark.parametrize(("dtype", "offloaded"), [("fp32", 1), ("fp32", 2), ("fp32", 5), ("bf16", 3), ("fp8", 4)])
def test_13_offloaded_blocks_change_nothing_to_the_bit(tiny_dit, config, shard_latents, dtype, offloaded, backward):
    config = replace(config, lora=replace(SMALL, base=dtype), disc=AdaptedDiscConfig(backward=backward))

    def results(count: int) -> Mapping[str, object]:
        base = Base(deep(tiny_dit), dtype).to(torch.device("cpu"), count)
        return both_halves(config, shard_latents, base, base)

    expected, found = results(0), results(offloaded)
    assert expected.keys() == found.keys() and any(name.startswith("g/adapters") for name in found)
    for name, value in expected.items():
        assert torch.equal(value, found[name]) if isinstance(value, torch.Tensor) else value == found[name], name


def test_offloaded_blocks_share_two_places_and_are_merged_all_the_same(tiny_dit, inputs):
    inputs = [tensor.double() for tensor in inputs]
    merged = []
    for offloaded in (0, 4):
        base = Base(deep(tiny_dit)).to(torch.device("cpu"), offloaded)
        memory = {p.untyped_storage().data_ptr() for path, p in base.dit.blocks.named_parameters() if "weight" in path}
        torch.manual_seed(1)
        adapted = trained(AdaptedRestorer(base, SMALL))
        with torch.no_grad():
            adapted.velocity(*(tensor.float() for tensor in inputs))
        merged.append(base.merge(adapted.adapters).double().velocity(*inputs))
        if offloaded:
            # The fourth block stays, and has its own.
            assert len(memory) == 2 + sum(1 for path, _ in base.dit.blocks[3].named_parameters() if "weight" in path)
    assert torch.equal(*merged)


def test_gradients_through_overwritten_blocks_are_refused_and_never_wrong(tiny_dit, inputs):
    adapted = trained(AdaptedRestorer(Base(deep(tiny_dit)).to(torch.device("cpu"), 5), SMALL))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        adapted.velocity(*inputs).square().mean().backward()


def test_more_blocks_than_there_are_cannot_wait(restorer):
    with pytest.raises(SettingError, match=r"lora\.offload_blocks is 3, and the base has 2 blocks"):
        Base(restorer).to(torch.device("cpu"), 3)


# A discriminator's own base, and a generator without one.


def test_a_base_of_its_own_changes_the_discriminator_and_not_where_the_generator_starts(
    tiny_dit, config, shard_latents, inputs
):
    base, other = Base(deep(tiny_dit)), Base(deep(tiny_dit, seed=1, depth=3))
    shared = AdaptedAdversarialStage(config, shard_latents, base, base)
    apart = AdaptedAdversarialStage(config, shard_latents, Base(deep(tiny_dit)), other)
    starts = shared.generator.state_dict()
    assert all(torch.equal(tensor, starts[name]) for name, tensor in apart.generator.state_dict().items())
    assert torch.equal(apart.generator.velocity(*inputs), shared.generator.velocity(*inputs))
    samples = [stage.draw("d", 0, 0) for stage in (shared, apart)]
    judged = [stage._judge(sample.real, sample)[1][-1] for stage, sample in zip((shared, apart), samples, strict=True)]
    assert torch.equal(apart.prompt, other.restorer.prompt) and not torch.allclose(*judged)
    before = {name: tensor.clone() for name, tensor in other.restorer.state_dict().items()}
    for half in ("d", "g"):
        apart.backward(half, 0, 0, 1.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.restorer.state_dict().items())


def test_who_plays_with_which_weights(config):
    named = replace(config, init="own", disc=AdaptedDiscConfig(base="other"))
    for changes, expected in [
        (replace(named, disc=AdaptedDiscConfig()), (["base own"], ["base own"])),
        (named, (["base own"], ["base other"])),
        (replace(named, generator="full"), (["all of own"], ["base other"])),
        (replace(named, generator="full", disc=AdaptedDiscConfig()), (["all of own"], ["base own"])),
    ]:
        generator, critic = players(changes, lambda where: [f"base {where}"], lambda where: [f"all of {where}"])
        assert (generator, critic) == expected
        assert (generator is critic) == (generator == critic)


def test_a_discriminator_that_cannot_be_told_the_same_is_refused(tiny_dit, config, shard_latents):
    base, other = Base(deep(tiny_dit)), Base(Restorer(replace(tiny_dit, text_dim=40)))
    with pytest.raises(CheckpointError, match="texts 40 wide, and the generator those of 16 channels and 24 wide"):
        AdaptedAdversarialStage(config, shard_latents, base, other)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"lora": replace(SMALL, offload_blocks=2)}, r"set run\.parallel\.activation_checkpoint=true"),
        ({"run": replace(RUN, parallel=ParallelConfig(sp=2))}, r"a frozen base takes whole samples"),
        ({"objective": "flow", "generator": "full"}, r"of all weights it is training\.pretrain"),
        ({"objective": "flow", "disc": AdaptedDiscConfig(base="nano")}, "flow matching has no discriminator"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(config, changes, sentence):
    with pytest.raises(SettingError, match=sentence):
        replace(config, **changes)


@pytest.fixture
def start(tiny_dit, tmp_path) -> Path:
    """A run of a stage before."""
    folder = tmp_path / "start"
    state.save_averaged(folder, 1, deep(tiny_dit, depth=2).state_dict(), Processes())
    state.write_whole(folder / configs.CONFIG_FILE, configs.to_yaml(replace(PRETRAIN_RECIPES["nano"], model=tiny_dit)))
    return folder


def train(config: LoraTraining, latents: Latents, directory: Path, init_method: str = "", **session) -> nn.Module:
    processes = connect(config.run.parallel, torch.device("cpu"), init_method)
    adapted = partial(open_base, config=config.lora, device=torch.device("cpu"))
    both = players(config, adapted, partial(load_run, config=config.model))
    stage = AdaptedAdversarialStage(config, latents, *both)
    optims = {"d": config.d, "g": config.g}
    return loop.run(stage, config, optims, directory, loop.Session(**session, processes=processes))


@pytest.fixture
def whole(config, start) -> LoraTraining:
    """All weights of the generator, against adapters on a copy in bf16 that waits in host memory."""
    run = replace(RUN, steps=6, save_every=3, validate_every=6, parallel=ParallelConfig(activation_checkpoint=True))
    small = replace(SMALL, base="bf16", offload_blocks=2)
    return replace(config, init=str(start), generator="full", lora=small, run=run)


def test_a_whole_generator_resumes_to_the_bit_and_is_exported_as_it_is(whole, shard_latents, tmp_path, inputs):
    train(whole, shard_latents, tmp_path / "six")
    with pytest.raises(loop.Preempted):
        train(whole, shard_latents, tmp_path / "halves", most_steps=3)
    train(whole, shard_latents, tmp_path / "halves")
    for what in ("ema", "raw"):
        once, again = (export.read(tmp_path / name, what=what) for name in ("six", "halves"))
        assert "prompt" in once and all(torch.equal(tensor, again[name]) for name, tensor in once.items())
    kinds = ("d_loss", "g_loss", "d_grad_norm")
    once, again = (
        [[row[kind] for kind in kinds] for row in journal.read(tmp_path / name / journal.METRICS)]
        for name in ("six", "halves")
    )
    assert once == again and len(once) == 6
    export.export(tmp_path / "six", tmp_path / "model.safetensors", dtype=torch.float32)
    exported, run, before = (open_restorer(where) for where in (tmp_path / "model.safetensors", tmp_path / "six",
                                                                whole.init))  # fmt: skip
    assert exported.state_dict().keys() == before.state_dict().keys()
    torch.testing.assert_close(exported.velocity(*inputs), run.velocity(*inputs))
    moved = [name for name, tensor in run.state_dict().items() if not torch.equal(tensor, before.state_dict()[name])]
    assert len(moved) > 10 and "prompt" not in moved


def train_in_bf16(config, folder, directory, init_method):
    train(config, Latents(folder, seed=0), directory, init_method)


def test_a_whole_generator_trains_in_bf16(whole, latents_folder, tmp_path):
    parallel = replace(whole.run.parallel, precision="bf16")
    config = replace(whole, run=replace(whole.run, steps=2, save_every=2, validate_every=2, parallel=parallel))
    in_processes(1, train_in_bf16, tmp_path / "work", config, latents_folder, tmp_path / "run")
    raw = export.read(tmp_path / "run", what="raw")
    before, name = open_restorer(whole.init).state_dict(), "dit.blocks.0.attn.proj_qkv.vid.weight"
    assert all(tensor.dtype == torch.float32 for tensor in raw.values())
    assert not torch.equal(raw[name], before[name])


@pytest.mark.parametrize("config", RECIPES.values(), ids=RECIPES)
def test_every_recipe_is_complete(config):
    assert config.objective == "flow" or config.d is not None
    assert config.run.parallel == ParallelConfig() or config.run.parallel.activation_checkpoint


def test_recipes_for_the_published_models_are_adversarial_and_no_turn_of_their_game_is_skipped():
    for name, recipe in RECIPES.items():
        assert recipe.objective == ("flow" if "flow" in name else "apt"), name
        assert recipe.guard.on_spike == ("skip" if "flow" in name else "alert"), name
        assert (recipe.init in NAMES) == (recipe.objective == "apt"), name
