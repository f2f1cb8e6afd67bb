"""Averaged weights: how fast they follow, and that they are fed by the module without touching it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from training.ema import EMA


def constant(value: float) -> nn.Linear:
    module = nn.Linear(3, 2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)
    return module


def average(ema: EMA) -> float:
    values = torch.cat([value.flatten() for value in ema.averages.values()])
    torch.testing.assert_close(values, values[:1].expand_as(values))
    return values[0].item()


def test_13_early_averages_forget_the_initialisation():
    ema = EMA(constant(0.0), decay=0.999)
    expected = 0.0
    for update in range(1, 6):
        ema.update(constant(1.0))
        decay = (1 + update) / (10 + update)
        expected = decay * expected + (1 - decay)
        assert average(ema) == pytest.approx(expected, rel=1e-5)
    assert average(ema) > 0.99


def test_13_the_warm_up_ends_at_the_decay_asked_for():
    ema = EMA(constant(0.0), decay=0.5)
    ema.updates = 1000
    ema.update(constant(1.0))
    assert average(ema) == pytest.approx(0.5)


def test_every_third_update_with_the_decay_of_three_follows_as_fast():
    often, seldom = EMA(constant(0.0), decay=0.9), EMA(constant(0.0), decay=0.9, every=3, device="cpu")
    often.updates = seldom.updates = 3000
    for _ in range(3):
        often.update(constant(1.0))
        seldom.update(constant(1.0))
    assert average(seldom) == pytest.approx(average(often)) == pytest.approx(1 - 0.9**3)


def test_the_average_of_weights_that_stand_still_is_those_weights():
    ema = EMA(constant(0.7), decay=0.9)
    for _ in range(3):
        ema.update(constant(0.7))
    assert average(ema) == pytest.approx(0.7)


def test_the_average_is_apart_from_the_module_and_takes_no_gradient():
    module = constant(1.0)
    ema = EMA(module, decay=0.9)
    with torch.no_grad():
        module.weight.zero_()
    assert average(ema) == 1.0
    assert module.weight.requires_grad and not ema.averages["weight"].requires_grad


def test_a_module_shows_the_average_for_a_while_and_has_its_own_weights_again_after():
    module = constant(2.0)
    ema = EMA(constant(1.0), decay=0.9)
    with pytest.raises(ZeroDivisionError), ema.shown_by(module) as shown:
        assert shown is module and shown.weight.unique().tolist() == [1.0]
        raise ZeroDivisionError
    assert module.weight.unique().tolist() == [2.0]
    ema.copy_to(module)
    assert module.weight.unique().tolist() == [1.0]


def test_the_distance_is_that_of_the_weights():
    assert EMA(constant(1.0), decay=0.9).distance(constant(3.0)).item() == pytest.approx(4.0 * 8)
