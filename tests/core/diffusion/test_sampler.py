"""Sampling and guidance against the published numbers."""

import pytest
import torch

from seedvr2_core.diffusion.sampler import guide, sample


@pytest.mark.parametrize("steps", [1, 2, 4, 10])
def test_steps_along_a_toy_field_match(golden, steps):
    tensors, meta = golden("dit/sampling")
    out = sample(lambda x, u: 0.5 * x.tanh() + 0.3 * u, tensors["xT"], steps)
    torch.testing.assert_close(out, tensors[f"euler_{steps}"], atol=meta["tolerance"]["max_abs"], rtol=0)


@pytest.mark.parametrize("case", ["case0", "case1"])
def test_steps_along_a_given_prediction_match(golden, case):
    tensors, _ = golden("pipeline/diffusion")
    noise, pred = tensors[f"{case}/noise"], tensors[f"{case}/pred"]
    torch.testing.assert_close(sample(lambda x, u: pred, noise), tensors[f"{case}/x0_one_step"], atol=1e-6, rtol=0)
    for steps in (2, 4):
        out = sample(lambda x, u: 0.5 * x + u * pred, noise, steps)
        torch.testing.assert_close(out, tensors[f"{case}/x0_{steps}_steps"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_true_velocity_leads_to_the_data(steps):
    data, noise = torch.randn(2, 1, 16, 2, 3, 4)
    torch.testing.assert_close(sample(lambda x, u: noise - data, noise, steps), data)


def test_the_path_stays_in_the_type_of_the_noise():
    seen = []

    def velocity(x, u):
        seen.append((x.dtype, u))
        return x.bfloat16()

    assert sample(velocity, torch.randn(1, 16, 1, 2, 2), steps=2).dtype == torch.float32
    assert seen == [(torch.float32, 1.0), (torch.float32, 0.5)]


def test_guidance_matches(golden):
    tensors, meta = golden("dit/sampling")
    for scale in (1.0, 7.5):
        out = guide(tensors["cfg_pos"], tensors["cfg_neg"], scale)
        torch.testing.assert_close(out, tensors[f"cfg_{scale}_0.0"], atol=meta["tolerance"]["max_abs"], rtol=0)


@pytest.mark.parametrize("case", ["case0", "case1"])
def test_guidance_between_latents_matches(golden, case):
    tensors, _ = golden("pipeline/diffusion")
    out = guide(tensors[f"{case}/pred"], tensors[f"{case}/aug_noise"], 2.5)
    torch.testing.assert_close(out, tensors[f"{case}/cfg_s2.5_r0.0"], atol=1e-6, rtol=0)
