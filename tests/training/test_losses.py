"""Losses by value: where they are known, what exchanging the sides does, and which of them pass gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from training import losses

SIGMA = 0.05


def logits(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_7_equal_logits_cost_ln_2_and_exchanging_the_sides_exchanges_the_losses():
    r, f = torch.randn(2, 50, dtype=torch.float64).unbind()
    assert losses.relativistic_d(r, r).item() == pytest.approx(math.log(2))
    assert losses.relativistic_g(r, r).item() == pytest.approx(math.log(2))
    torch.testing.assert_close(losses.relativistic_d(r, f), losses.relativistic_g(f, r))
    # softplus(u) - softplus(-u) = u
    gap = losses.relativistic_g(r, f) - losses.relativistic_d(r, f)
    torch.testing.assert_close(gap, (r - f).mean())


def test_relativistic_losses_see_only_the_difference_within_a_pair():
    r, f = torch.randn(2, 50, dtype=torch.float64).unbind()
    torch.testing.assert_close(losses.relativistic_d(r + 7, f + 7), losses.relativistic_d(r, f))
    shuffled = f.flip(0)
    assert losses.relativistic_d(r, shuffled) != losses.relativistic_d(r, f)


def test_non_saturating_values():
    r, f = logits(1.0, -2.0), logits(0.5, 3.0)
    softplus = [math.log1p(math.exp(value)) for value in (-1.0, 2.0, 0.5, 3.0)]
    assert losses.non_saturating_d(r, f).item() == pytest.approx(sum(softplus) / 2)
    assert losses.non_saturating_g(r, f).item() == pytest.approx(sum(math.log1p(math.exp(-v)) for v in (0.5, 3.0)) / 2)


@pytest.mark.parametrize("d_loss, g_loss", [
    (losses.relativistic_d, losses.relativistic_g), (losses.non_saturating_d, losses.non_saturating_g),
    (losses.hinge_d, losses.hinge_g),
], ids=["rp", "ns", "hinge"])  # fmt: skip
def test_the_discriminator_wants_real_above_restored_and_the_generator_the_reverse(d_loss, g_loss):
    r, f = logits(0.3, -0.1).requires_grad_(), logits(0.2, 0.4).requires_grad_()
    d_r, d_f = torch.autograd.grad(d_loss(r, f), (r, f))
    assert (d_r < 0).all() and (d_f > 0).all()
    assert (torch.autograd.grad(g_loss(r, f), f)[0] < 0).all()


def test_the_hinge_asks_for_a_margin_of_1_and_no_more():
    assert losses.hinge_d(logits(0.0, 0.0), logits(0.0, 0.0)).item() == 2
    assert losses.hinge_d(logits(1.0, 4.0), logits(-1.0, -9.0)).item() == 0
    assert losses.hinge_d(logits(0.0, 3.0), logits(-1.0, 1.0)).item() == pytest.approx(0.5 + 1.0)
    assert losses.hinge_g(logits(5.0, 5.0), logits(-1.0, 3.0)).item() == -1


@pytest.fixture
def critic():
    """A small smooth discriminator 24 -> 1 and its inputs, in fp64."""
    net = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)).double()
    return net, torch.randn(4000, 24, dtype=torch.float64)


def perturbed_penalty(net, x, detach=False):
    near = net(x + SIGMA * torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1)))[:, 0]
    return losses.approximate_penalty(net(x)[:, 0], near.detach() if detach else near) / SIGMA**2


def exact_penalty(net, x):
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    return gradient.square().sum(1).mean()


def cosine(net, a, b):
    grads = [torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()), allow_unused=True,
                                                                 materialize_grads=True)]) for loss in (a, b)]
    return torch.cosine_similarity(*grads, dim=0).item()


def test_4_the_approximate_penalty_is_sigma_squared_times_the_squared_gradient(critic):
    net, x = critic
    assert perturbed_penalty(net, x).item() == pytest.approx(exact_penalty(net, x).item(), rel=0.05)


def test_4_its_gradient_is_that_of_the_exact_penalty(critic):
    net, x = critic
    assert cosine(net, perturbed_penalty(net, x), exact_penalty(net, x)) > 0.98


def test_4_detaching_the_perturbed_branch_keeps_the_value_and_loses_the_gradient(critic):
    net, x = critic
    whole, detached = perturbed_penalty(net, x), perturbed_penalty(net, x, detach=True)
    assert detached.item() == pytest.approx(whole.item())
    assert cosine(net, detached, exact_penalty(net, x)) < 0.9


def test_the_distance_of_a_tap_does_not_depend_on_its_size():
    small, large = torch.zeros(2, 3), torch.zeros(50, 40)
    assert losses.feature_distances([small, large], [small + 1, large - 3]).tolist() == [1.0, 3.0]


def test_l1_is_a_mean_over_everything():
    assert losses.l1(torch.zeros(2, 3), torch.tensor([[1.0, -1, 1], [0, 0, 0]])).item() == 0.5


def test_relative_l1_weighs_a_sample_by_what_its_input_is_off_by():
    real = torch.zeros(2, 3, 4)
    degraded = torch.tensor([0.07, 0.97]).view(2, 1, 1).expand_as(real)
    restored = torch.tensor([0.05, -0.25]).view(2, 1, 1).expand_as(real)
    assert losses.relative_l1(restored, real, degraded).item() == pytest.approx((0.05 / 0.1 + 0.25 / 1) / 2)


def test_the_gradient_ratio_makes_two_losses_pull_alike():
    output = torch.randn(6, requires_grad=True)
    a, b = (3 * output).sum(), (output * torch.tensor([2.0, 0, 0, 0, 0, 0])).sum()
    ratio = losses.gradient_ratio(a, b, output)
    assert ratio.item() == pytest.approx(3 * math.sqrt(6) / 2, rel=1e-3)
    assert not ratio.requires_grad
    # As small as those of means over a whole clip.
    assert losses.gradient_ratio(1e-7 * a, 1e-7 * b, output).item() == pytest.approx(ratio.item(), rel=1e-3)
    assert losses.gradient_ratio(1e9 * a, b, output).item() == pytest.approx(1e4)
    # The graphs are still there.
    (a + b).backward()


def test_the_high_frequency_ratio_is_of_energies_and_ignores_what_is_smooth():
    real = torch.randn(2, 3, 5, 16, 16)
    assert losses.high_frequency_ratio(real, real).item() == pytest.approx(1)
    assert losses.high_frequency_ratio(0.5 * real + 0.3, real).item() == pytest.approx(0.25, rel=1e-4)
    blurred = nn.functional.avg_pool3d(real, (1, 3, 3), stride=1, padding=(0, 1, 1))
    assert losses.high_frequency_ratio(blurred, real).item() < 0.2
