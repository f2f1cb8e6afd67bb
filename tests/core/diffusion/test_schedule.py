"""The path and the times against the published numbers."""

import pytest
import torch

from seedvr2_core.diffusion.schedule import (
    interpolate,
    shift,
    shift_factor,
    to_data,
    to_noise,
    trailing_times,
    velocity,
)

# Golden times are 0..1000.
SCALE = 1000.0


def test_points_on_the_path_match(golden):
    tensors, meta = golden("dit/sampling")
    data, noise, v = tensors["x0"], tensors["xT"], tensors["pred"]
    atol = meta["tolerance"]["max_abs"]
    for i, u in enumerate(tensors["t"] / SCALE):
        torch.testing.assert_close(interpolate(data, noise, u), tensors["interpolated"][i], atol=atol, rtol=0)
        torch.testing.assert_close(to_data(noise, v, u), tensors["to_x0"][i], atol=atol, rtol=0)
        torch.testing.assert_close(to_noise(noise, v, u), tensors["to_xT"][i], atol=atol, rtol=0)
    torch.testing.assert_close(velocity(data, noise), tensors["velocity_target"], atol=atol, rtol=0)


@pytest.mark.parametrize("u", [0.0, 0.3, 1.0])
def test_1_the_velocity_leads_to_both_ends_of_the_path(u):
    data, noise = torch.randn(2, 3, 4)
    x, v = interpolate(data, noise, u), velocity(data, noise)
    torch.testing.assert_close(to_data(x, v, u), data)
    torch.testing.assert_close(to_noise(x, v, u), noise)


def test_1_trailing_times_match(golden):
    tensors, _ = golden("dit/sampling")
    published = {n: (tensors[f"timesteps_{n}"] / SCALE).tolist() for n in (1, 2, 4, 10)}
    for steps, times in published.items():
        assert trailing_times(steps) == pytest.approx(times, rel=1e-5)
    for steps, times in golden("pipeline/diffusion")[1]["trailing_timesteps"].items():
        assert trailing_times(int(steps)) == pytest.approx([time / SCALE for time in times], rel=1e-5)


@pytest.mark.parametrize("steps", [1, 3, 49, 98, 103, 197])
def test_there_are_as_many_times_as_steps(steps):
    times = trailing_times(steps)
    assert len(times) == steps
    assert times[0] == 1
    assert times[-1] == pytest.approx(1 / steps)


def test_shifted_times_match(golden):
    tensors, meta = golden("dit/sampling")
    for shape, expected in zip(tensors["shift_shapes"].tolist(), tensors["shifted_t"], strict=True):
        shifted = SCALE * shift(tensors["shift_t"] / SCALE, shift_factor(*shape))
        torch.testing.assert_close(shifted, expected, atol=meta["tolerance"]["shifted_t_max_abs"], rtol=0)
    for row in golden("pipeline/diffusion")[1]["timestep_transform"]:
        shifted = SCALE * shift(row["t"] / SCALE, shift_factor(*row["latent_thw"]))
        assert shifted == pytest.approx(row["out"], rel=1e-5)


def test_2_the_shift_is_anchored_at_four_sizes():
    assert shift_factor(1, 32, 32) == pytest.approx(1)
    assert shift_factor(1, 128, 128) == pytest.approx(3.2)
    assert shift_factor(10, 32, 32) == pytest.approx(1)
    assert shift_factor(37, 90, 160) == pytest.approx(5)


def test_the_shift_keeps_the_ends_and_a_factor_of_one_keeps_all():
    times = torch.linspace(0, 1, 11)
    torch.testing.assert_close(shift(times, 1.0), times)
    assert shift(0.0, 4.0) == 0
    assert shift(1.0, 4.0) == 1
    assert (shift(times, 4.0)[1:-1] > times[1:-1]).all()
