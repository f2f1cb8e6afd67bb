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
    values = torch.cat([parameter.flatten() for parameter in ema.module.parameters()])
    torch.testing.assert_close(values, values[:1].expand_as(values))
    return values[0].item()


def test_early_averages_forget_the_initialisation():
    ema = EMA(constant(0.0), decay=0.999)
    expected = 0.0
    for update in range(1, 6):
        ema.update(constant(1.0))
        decay = (1 + update) / (10 + update)
        expected = decay * expected + (1 - decay)
        assert average(ema) == pytest.approx(expected, rel=1e-5)
    assert average(ema) > 0.99


def test_the_warm_up_ends_at_the_decay_asked_for():
    ema = EMA(constant(0.0), decay=0.5)
    ema.updates = 1000
    ema.update(constant(1.0))
    assert average(ema) == pytest.approx(0.5)


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
    assert module.weight.requires_grad and not ema.module.weight.requires_grad


def test_a_saved_average_goes_on_where_it_was():
    first, second = EMA(constant(0.0), decay=0.99), EMA(constant(5.0), decay=0.99)
    first.update(constant(1.0))
    second.load_state_dict(first.state_dict())
    first.update(constant(2.0))
    second.update(constant(2.0))
    assert average(first) == average(second)
    assert first.updates == second.updates == 2
