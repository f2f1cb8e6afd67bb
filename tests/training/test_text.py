"""Which text a sample gets: its caption, the prompt, the null prompt or the negative one, in their shares."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from seedvr2_core.errors import CheckpointError, SettingError
from training import distill, loop, pretrain
from training.adapters import Base, LoraConfig
from training.apt import AdversarialStage, PostTraining
from training.buckets import Deal
from training.config import OptimConfig, RunConfig
from training.curriculum import Phase
from training.discriminator import Discriminator
from training.distill import Distillation, HalvingStage
from training.lora import AdaptedAdversarialStage, AdaptedDiscConfig, LoraTraining, flow_matching
from training.pretrain import Pretraining, PretrainStage
from training.restorer import Restorer
from training.shards import HELD_OUT, Latents, Pair, build_index, write_shard
from training.text import Chosen, TextConfig, Texts
from training.weights import NAMES

WIDTH = 24  # of tiny_dit
NEGATIVE = torch.full((5, WIDTH), -1.0)
CAPTION = TextConfig(mode="caption")
OPTIM = OptimConfig(lr=3e-3, final_lr=1e-3, warmup=2, weight_decay=0.0)


def write_latents(folder, width: int | None, shared: torch.Tensor | None = None) -> Latents:
    """Pictures and clips; every second sample has a caption of its own, all its values the sample's number."""

    def pairs(t):
        for number in range(HELD_OUT + 8):
            hq = torch.randn(16, t, 4, 4, generator=torch.Generator().manual_seed(number))
            text = torch.full((3, width), float(number)) if width and number % 2 else None
            yield f"{number:06d}", Pair(hq, [hq + 0.1], {}, text)

    names = [f"image-{0:06d}", f"clip-{0:06d}"]
    for name, t in zip(names, (1, 2), strict=True):
        write_shard(folder, name, pairs(t), {})
    build_index(folder, names, shared)
    return Latents(folder, seed=0)


@pytest.fixture(scope="module")
def captioned(tmp_path_factory) -> Latents:
    return write_latents(tmp_path_factory.mktemp("captioned"), WIDTH)


@pytest.fixture
def config(tiny_dit) -> Pretraining:
    run = RunConfig(steps=4, save_every=2, validate_every=4, preview_every=4, async_save=False)
    return Pretraining(model=tiny_dit, run=run, optim=OPTIM, batch=4, text=CAPTION)


class Listener(nn.Module):
    """Remembers what it was told about texts."""

    def __init__(self):
        super().__init__()
        self.weight, self.prompt = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.ones(2, WIDTH))
        self.device = self.weight.device
        self.told: list[tuple] = []

    def velocity(self, x, condition, u, dropped=None, texts=None):
        self.told.append((None if dropped is None else dropped.tolist(), texts))
        return condition + self.weight


def test_texts_depend_on_seed_and_step_alone():
    texts = Texts(TextConfig(negative_fraction=0.3), WIDTH, seed=1, dropout=0.4, negative=NEGATIVE)
    first = texts.choose(5, 1, 64)
    texts.choose(6, 0, 64)
    again, other = texts.choose(5, 1, 64), texts.choose(5, 0, 64)
    assert torch.equal(first.dropped, again.dropped) and torch.equal(first.negative, again.negative)
    assert not torch.equal(first.dropped, other.dropped) and not torch.equal(first.negative, other.negative)


def test_shares_are_kept_and_a_negative_prompt_is_never_dropped():
    texts = Texts(TextConfig(negative_fraction=0.05), WIDTH, seed=0, dropout=0.1, negative=NEGATIVE)
    chosen = texts.choose(0, 0, 20_000)
    assert chosen.negative.float().mean() == pytest.approx(0.05, abs=0.01)
    assert chosen.dropped.float().mean() == pytest.approx(0.95 * 0.1, abs=0.01)
    assert not (chosen.negative & chosen.dropped).any()
    assert {text is NEGATIVE for text, bad in zip(chosen.own, chosen.negative, strict=True) if bad} == {True}


def test_which_samples_are_dropped_has_not_changed_since_there_was_one_prompt_alone():
    from training.randomness import torch_rng

    expected = torch.rand(8, generator=torch_rng(2, "text_drop", 7, 1)) < 0.5
    chosen = Texts(TextConfig(), WIDTH, seed=2, dropout=0.5).choose(7, 1, 8)
    assert torch.equal(chosen.dropped, expected) and chosen.own is None


def test_captions_are_used_by_their_mode_alone():
    captions = [torch.ones(2, WIDTH), None]
    assert Texts(CAPTION, WIDTH, seed=0).choose(0, 0, 2, captions).own == captions
    assert Texts(TextConfig(), WIDTH, seed=0).choose(0, 0, 2, captions).own is None
    none = Texts(TextConfig(mode="none"), WIDTH, seed=0).choose(0, 0, 2, captions)
    assert none.own is None and none.dropped.all()


def test_a_sample_of_the_negative_prompt_is_restored_to_its_degraded_self():
    chosen = Chosen(torch.zeros(2, dtype=torch.bool), torch.tensor([False, True]))
    hq, lq = torch.randn(2, 2, 16, 1, 4, 4).unbind()
    target = chosen.target(hq, lq)
    assert torch.equal(target[0], hq[0]) and torch.equal(target[1], lq[1])


def test_captions_reach_the_restorer_with_the_samples_they_belong_to(config, captioned):
    listener = Listener()
    stage = PretrainStage(replace(config, text_dropout=0.0), captioned, listener)
    for changes in ({}, {"batch_tokens": 16}):
        stage.config = replace(stage.config, **changes)
        listener.told.clear()
        for step in range(4):
            stage.backward("g", step, 0, 1.0)
        texts = [text for _, told in listener.told for text in told or [None]]
        # Samples of even numbers have none, and are told the prompt.
        numbers = {text[0, 0].item() for text in texts if text is not None}
        assert None in texts and len(numbers) > 1
        assert all(number % 2 == 1 and number >= HELD_OUT for number in numbers)


def test_a_share_of_bad_targets_changes_the_loss_of_just_those_samples(config, captioned):
    share = replace(config, text=TextConfig(negative_fraction=0.5, negative="unused"), text_dropout=0.0, batch=16)
    stage = PretrainStage(replace(share, text=TextConfig()), captioned, Listener())
    *_, plain, _ = stage.draw(0, 0, torch.device("cpu"))
    stage.texts = Texts(share.text, WIDTH, share.run.seed, negative=NEGATIVE)
    *_, target, chosen = stage.draw(0, 0, torch.device("cpu"))
    moved = (target - plain).abs().flatten(1).sum(1) > 0
    assert 0 < chosen.negative.sum() < 16
    assert torch.equal(moved, chosen.negative)


def test_training_on_captions_goes_on_to_the_bit_after_an_interruption(config, captioned, tmp_path):
    class Stopping(PretrainStage):
        def backward(self, name, step, micro, scale):
            if step == 2:
                raise KeyboardInterrupt
            return super().backward(name, step, micro, scale)

    optims = {"g": OPTIM}
    whole = loop.run(PretrainStage(config, captioned), config, optims, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        loop.run(Stopping(config, captioned), config, optims, tmp_path / "halves")
    loop.run(PretrainStage(config, captioned), config, optims, tmp_path / "halves")
    halves = pretrain.load_run(tmp_path / "halves", config.model)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), halves.parameters(), strict=True))


def test_a_restorer_answers_to_the_text_it_is_told_and_always_has_a_gradient_of_its_prompt(tiny_dit):
    torch.manual_seed(0)
    restorer = Restorer(tiny_dit)
    for parameter in restorer.parameters():
        nn.init.normal_(parameter, std=0.1)
    x, condition = torch.randn(2, 2, 16, 1, 4, 4).unbind()
    u, own = torch.tensor([0.5, 0.9]), torch.randn(3, WIDTH)
    with torch.no_grad():
        plain = restorer.velocity(x, condition, u)
        told = restorer.velocity(x, condition, u, None, [own, None])
        torch.testing.assert_close(told[1], plain[1])
        assert not torch.allclose(told[0], plain[0])
        as_prompt = restorer.velocity(x, condition, u, None, [restorer.prompt, restorer.prompt])
        torch.testing.assert_close(as_prompt, plain)
    restorer.velocity(x, condition, u, None, [own, own]).square().mean().backward()
    # Or processes that share gradients would not agree on how many there are.
    assert restorer.prompt.grad is not None and not restorer.prompt.grad.any()


def test_without_text_the_prompt_is_the_null_prompt_and_stays_it(config, captioned, tmp_path):
    silent = replace(config, text=TextConfig(mode="none"), optim=replace(OPTIM, weight_decay=0.1))
    averaged = loop.run(PretrainStage(silent, captioned), silent, {"g": silent.optim}, tmp_path)
    assert not averaged.prompt.any()


def test_a_student_and_its_teacher_are_told_the_same_captions(tiny_dit, captioned):
    config = Distillation(model=tiny_dit, run=RunConfig(steps=4), optim=OPTIM, teacher="unused", steps=4, batch=4,
                          text=CAPTION)  # fmt: skip
    teacher, student = Listener(), Listener()
    HalvingStage(config, captioned, teacher, 4, student).backward("g", 1, 0, 1.0)
    assert any(text is not None for text in student.told[0][1])
    assert teacher.told == student.told * 2


def test_guidance_leads_away_from_the_negative_prompt_where_there_is_one(tiny_dit, captioned):
    config = Distillation(model=tiny_dit, run=RunConfig(steps=4), optim=OPTIM, teacher="unused", steps=4, cfg=7.5,
                          batch=2)  # fmt: skip
    stage = HalvingStage(config, captioned, Listener(), 4, Listener())
    stage.backward("g", 0, 0, 1.0)
    assert stage.teacher.told == [(None, None), ([True, True], None)] * 2
    stage.texts, stage.teacher.told = Texts(TextConfig(negative="3b"), WIDTH, 0, negative=NEGATIVE), []
    stage.backward("g", 0, 0, 1.0)
    assert stage.teacher.told[1][0] is None and all(text is NEGATIVE for text in stage.teacher.told[1][1])


def test_null_prompts_are_for_the_first_halving(tiny_dit, captioned):
    config = Distillation(model=tiny_dit, run=RunConfig(steps=4), optim=OPTIM, teacher="unused", steps=4, batch=2,
                          text_dropout=1.0)  # fmt: skip
    for steps, told in ((4, [True, True]), (2, None)):
        stage = HalvingStage(config, captioned, Listener(), steps, Listener())
        stage.backward("g", 0, 0, 1.0)
        assert stage.modules["g"].told == [(told, None)]


def test_samples_without_a_caption_share_the_prompt_of_the_data_set(tmp_path):
    latents = write_latents(tmp_path, None, shared=torch.full((4, WIDTH), 9.0))
    assert latents.text_width == WIDTH
    assert {text[0, 0].item() for text in latents.batch(0, Deal(samples=4)).texts} == {9.0}


def test_captions_that_are_not_there_are_refused(config, latents, tmp_path):
    with pytest.raises(CheckpointError, match=r"hold no text.*NAME\.txt\.safetensors"):
        PretrainStage(config, latents)
    with pytest.raises(CheckpointError, match="hold no text"):
        PretrainStage(config, write_latents(tmp_path, None))


def test_captions_of_another_width_than_the_models_are_refused(config, tmp_path):
    with pytest.raises(CheckpointError, match="16 wide and the model takes 24"):
        PretrainStage(config, write_latents(tmp_path, 16))


def test_captions_of_two_widths_make_no_data_set(tmp_path):
    with pytest.raises(CheckpointError, match="texts 16 and 24 wide"):
        write_latents(tmp_path, 16, shared=torch.ones(4, WIDTH))


def test_a_negative_share_without_a_negative_prompt_is_refused(config, latents):
    with pytest.raises(SettingError, match=r"text\.negative=3b"):
        PretrainStage(replace(config, text=TextConfig(negative_fraction=0.05)), latents)
    with pytest.raises(SettingError, match=r"text\.mode is none"):
        Texts(TextConfig(mode="none", negative_fraction=0.05), WIDTH, 0, negative=NEGATIVE)
    with pytest.raises(CheckpointError, match="5 wide, expected 24"):
        Texts(TextConfig(negative_fraction=0.05, negative="other"), WIDTH, 0, negative=torch.ones(2, 5))
    # The prompts of nano are as wide as nano's text, not as this model's.
    with pytest.raises(CheckpointError, match="nano is 192 wide"):
        PretrainStage(replace(config, text=TextConfig(negative_fraction=0.05, negative="nano")), latents)


def test_what_comes_after_flow_matching_is_taught_good_texts_alone(tiny_dit):
    share = {"model": tiny_dit, "run": RunConfig(steps=4), "text": TextConfig(negative_fraction=0.1)}
    with pytest.raises(SettingError, match=r"training\.pretrain"):
        Distillation(**share, optim=OPTIM, teacher="unused")
    with pytest.raises(SettingError, match=r"training\.pretrain"):
        PostTraining(**share, g=OPTIM, d=OPTIM, pretrained="unused", distilled="unused")
    with pytest.raises(SettingError, match=r"training\.lora"):
        LoraTraining(**share, g=OPTIM, init="unused")
    assert LoraTraining(**share, g=OPTIM, init="unused", objective="flow").text.negative_fraction == 0.1


@pytest.mark.parametrize("name", ["3b", "7b", "7b_scratch"])
def test_large_recipes_teach_the_published_negative_prompt_and_lead_away_from_it(name):
    text = pretrain.RECIPES[name].text
    assert text.negative_fraction == 0.05 and text.negative in NAMES
    student = distill.RECIPES[name.removesuffix("_scratch")]
    assert student.text.negative == text.negative and student.cfg == 7.5


def test_without_a_negative_prompt_a_large_recipe_says_how_to_do_without(config, latents, tmp_path):
    for where, words in ((tmp_path / "3b.safetensors", "neither a run directory"), (tmp_path, "holds no negative")):
        with pytest.raises(CheckpointError, match=words) as refused:
            PretrainStage(replace(config, text=TextConfig(negative_fraction=0.05, negative=str(where))), latents)
        assert "text.negative=none text.negative_fraction=0" in str(refused.value)


# Adversarial training, and adapters.


def alive(module: nn.Module) -> nn.Module:
    """With weights that let everything through."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    return module


def adversarial(kind: str, tiny_dit, latents, text: TextConfig, backward: str = "joint") -> AdversarialStage:
    common = {"model": tiny_dit, "run": RunConfig(steps=4), "g": OPTIM, "d": OPTIM, "batch": 8, "text": text,
              "disc": AdaptedDiscConfig(backward=backward), "curriculum": (Phase(share=1.0, frames=(1,)),)}  # fmt: skip
    restorer = alive(Restorer(tiny_dit))
    if kind == "lora":
        config = LoraTraining(**common, init="unused", objective="apt", lora=LoraConfig(rank=2, base="fp32"))
        base = Base(restorer)
        return AdaptedAdversarialStage(config, latents, base, base)
    config = PostTraining(**common, pretrained="unused", distilled="unused")
    return AdversarialStage(config, latents, restorer, alive(Restorer(tiny_dit)))


@pytest.fixture
def told(monkeypatch) -> list[list[torch.Tensor]]:
    """The embeddings of every pass through a discriminator from now on."""
    seen = []
    forward = Discriminator.forward
    monkeypatch.setattr(Discriminator, "forward", lambda self, samples, condition, texts, u, **more: (
        seen.append(list(texts)), forward(self, samples, condition, texts, u, **more))[1])  # fmt: skip
    return seen


@pytest.mark.parametrize("backward", ["joint", "replay"])
@pytest.mark.parametrize("kind", ["all weights", "lora"])
def test_generator_and_discriminator_are_told_the_caption_of_each_sample(kind, backward, tiny_dit, captioned, told):
    stage = adversarial(kind, tiny_dit, captioned, CAPTION, backward)
    listened = []
    velocity = stage.generator.velocity
    stage.generator.velocity = lambda *args: (listened.append(args[4]), velocity(*args))[1]
    numbers = set()
    for step in range(3):
        for half in ("d", "g"):
            listened.clear(), told.clear()
            stage.backward(half, step, 0, 1.0)
            sample = stage.draw(half, step, 0)
            own = sample.texts.own
            assert all(a is b or torch.equal(a, b) for a, b in zip(listened[0], own, strict=True))
            for texts in told:
                for text, caption in zip(texts, own * (len(texts) // 8), strict=True):
                    assert torch.equal(text, stage.prompt if caption is None else caption)
            for caption, real in zip(own, sample.real, strict=True):
                if caption is not None:
                    numbers.add(number := int(caption[0, 0]))
                    hq = torch.randn(16, 1, 4, 4, generator=torch.Generator().manual_seed(number))
                    torch.testing.assert_close(real, hq * captioned.scale)
    assert len(numbers) > 1 and all(number % 2 and number >= HELD_OUT for number in numbers)


@pytest.mark.parametrize("kind", ["all weights", "lora"])
def test_the_adversarial_game_without_text_is_told_nothing_but_zeros(kind, tiny_dit, captioned, told):
    stage = adversarial(kind, tiny_dit, captioned, TextConfig(mode="none"))
    for half in ("d", "g"):
        stage.backward(half, 0, 0, 1.0)
    assert told and not any(text.any() for texts in told for text in texts)
    assert not stage.generator.prompt.any()


@pytest.mark.parametrize("kind", ["all weights", "lora"])
def test_captions_of_held_out_samples_are_what_they_are_judged_with(kind, tiny_dit, captioned):
    results = [adversarial(kind, tiny_dit, captioned, text).validate for text in (TextConfig(), CAPTION)]
    module = adversarial(kind, tiny_dit, captioned, CAPTION).generator
    with torch.no_grad():
        fixed, own = (validate(module) for validate in results)
    assert fixed["lq"] == own["lq"] and fixed["rms_1"] != own["rms_1"]


def test_latents_without_captions_are_refused_by_the_adversarial_stages_too(tiny_dit, latents):
    for kind in ("all weights", "lora"):
        with pytest.raises(CheckpointError, match="hold no text"):
            adversarial(kind, tiny_dit, latents, CAPTION)


def test_adapters_for_flow_matching_are_told_captions_and_the_negative_prompt(tiny_dit, captioned):
    config = LoraTraining(model=tiny_dit, run=RunConfig(steps=4), g=OPTIM, init="unused", batch=16, text=CAPTION,
                          text_dropout=0.0, lora=LoraConfig(rank=2, base="fp32"))  # fmt: skip
    stage = flow_matching(config, captioned, Base(alive(Restorer(tiny_dit))))
    stage.texts = Texts(replace(CAPTION, negative_fraction=0.3), WIDTH, 0, negative=NEGATIVE)
    *inputs, _, chosen = stage.draw(1, 0, torch.device("cpu"))
    plain = Chosen.prompts(16)
    adapted = stage.modules["g"]
    with torch.no_grad():
        changed = (chosen.velocity(adapted, *inputs) - plain.velocity(adapted, *inputs)).abs().flatten(1).amax(1) > 1e-6
    assert changed.tolist() == [text is not None for text in chosen.own] and 0 < chosen.negative.sum() < 16
    assert "loss" in stage.backward("g", 1, 0, 1.0)
