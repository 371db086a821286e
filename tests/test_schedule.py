"""NoiseSchedule against diffusers' DDIMScheduler, to float32 rounding, and METHOD's constants."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from d3epth_jax.schedule import NoiseSchedule

STABLE_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
}
SPACINGS = ("leading", "trailing", "linspace")
PREDICTIONS = ("v_prediction", "epsilon", "sample")


def latents(seed, shape=(2, 3, 5, 4)):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def tensor(array):
    return torch.tensor(np.asarray(array))


def relative(ours, theirs):
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


@pytest.mark.parametrize("config", [{}, STABLE_DIFFUSION])
@pytest.mark.parametrize("rescale", [False, True])
def test_alphas_match_diffusers(config, rescale):
    config = config | {"rescale_betas_zero_snr": rescale}
    theirs = DDIMScheduler(**config).alphas_cumprod.numpy()
    ours = NoiseSchedule.from_dict(config).alphas_cumprod
    assert ours.dtype == np.float64
    # diffusers forms the rescaled table by float32 ratios, hence the absolute part.
    np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=5e-8)
    assert (ours[-1] == 0) == rescale


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("offset", [0, 1])
def test_timesteps_match_diffusers(spacing, offset):
    config = {"timestep_spacing": spacing, "steps_offset": offset}
    schedule, oracle = NoiseSchedule.from_dict(config), DDIMScheduler(**config)
    for n in (1, 2, 3, 4, 7, 10, 50, 300, 999):
        oracle.set_timesteps(n)
        np.testing.assert_array_equal(schedule.timesteps(n), oracle.timesteps.numpy())


@pytest.mark.parametrize("spacing", SPACINGS)
def test_any_number_of_steps_has_as_many_falling_timesteps(spacing):
    """diffusers has one more, -1, for 62 numbers of trailing steps, such as 61."""
    schedule = NoiseSchedule.from_dict({"timestep_spacing": spacing, "steps_offset": 0})
    for n in range(1, 1001):
        steps = schedule.timesteps(n)
        assert len(steps) == n and 0 <= steps[-1] <= steps[0] < 1000
        assert (np.diff(steps) < 0).all()


def test_an_offset_beyond_the_last_timestep_is_told():
    schedule = NoiseSchedule.from_dict({"timestep_spacing": "leading", "steps_offset": 1})
    with pytest.raises(ValueError, match="1000 steps begin at timestep 1000, beyond the last, 999"):
        schedule.timesteps(1000)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_steps_match_diffusers(prediction, spacing, rescale):
    for offset, alpha_one, clip in itertools.product((0, 1), (False, True), (False, True)):
        config = STABLE_DIFFUSION | {
            "prediction_type": prediction,
            "timestep_spacing": spacing,
            "rescale_betas_zero_snr": rescale,
            "steps_offset": offset,
            "set_alpha_to_one": alpha_one,
            "clip_sample": clip,
        }
        schedule, oracle = NoiseSchedule.from_dict(config), DDIMScheduler(**config)
        for n in (1, 4):
            oracle.set_timesteps(n)
            for t in oracle.timesteps.tolist():
                output, z_t = jnp.asarray(latents(t)), jnp.asarray(latents(t + 1))
                # diffusers forms 1 - abar in float32, which near t = 0 has few digits left.
                tolerance = 3e-6 + 6e-8 / (1 - schedule.alphas_cumprod[t])
                if prediction == "epsilon" and schedule.alphas_cumprod[t] == 0:
                    with pytest.raises(ValueError, match="epsilon"):
                        schedule.step(output, z_t, t, n)
                    continue
                step = oracle.step(tensor(output), t, tensor(z_t), eta=0.0)
                ours = schedule.step(output, z_t, t, n)
                assert relative(ours, step.prev_sample.numpy()) < tolerance, (config, n, t)
                if not clip:
                    z0 = schedule.z0(output, z_t, t)
                    theirs = step.pred_original_sample.numpy()
                    assert relative(z0, theirs) < tolerance, (config, n, t)


def test_constants_of_the_single_step_model():
    schedule = NoiseSchedule.from_dict(STABLE_DIFFUSION)
    assert schedule.alphas_cumprod[999] == pytest.approx(0.0046601, abs=5e-8)
    assert schedule.alphas_cumprod[0] == pytest.approx(0.99915, abs=1e-9)
    output, zeros = jnp.ones((1, 2, 2, 4)), jnp.zeros((1, 2, 2, 4))

    def factor(**changes):
        return float(
            NoiseSchedule.from_dict(STABLE_DIFFUSION | changes).z0(output, zeros, 999)[0, 0, 0, 0]
        )

    assert factor(prediction_type="v_prediction") == pytest.approx(-0.997667, abs=5e-7)
    assert factor(prediction_type="epsilon") == pytest.approx(-14.61, abs=5e-3)
    assert factor(prediction_type="sample") == 1
    assert factor(prediction_type="v_prediction", rescale_betas_zero_snr=True) == -1


def test_what_we_save_makes_a_ddim_step_equal_z0():
    """Trailing, alpha one, zero SNR: the step returns z0 whatever the noise is."""
    schedule = NoiseSchedule.from_dict(
        STABLE_DIFFUSION
        | {
            "prediction_type": "v_prediction",
            "timestep_spacing": "trailing",
            "set_alpha_to_one": True,
            "rescale_betas_zero_snr": True,
        }
    )
    assert schedule.timesteps(1).tolist() == [999]
    output = jnp.asarray(latents(0))
    for seed in (1, 2):
        z_t = jnp.asarray(latents(seed))
        np.testing.assert_array_equal(schedule.step(output, z_t, 999, 1), -output)
        np.testing.assert_array_equal(schedule.z0(output, z_t, 999), -output)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_traced_timesteps_equal_static_ones(prediction):
    schedule = NoiseSchedule.from_dict(STABLE_DIFFUSION | {"prediction_type": prediction})
    output, z_t = jnp.asarray(latents(0)), jnp.asarray(latents(1))
    steps = (999, 400)
    static = jnp.concatenate(
        [schedule.z0(output[i : i + 1], z_t[i : i + 1], t) for i, t in enumerate(steps)]
    )
    batched = jax.jit(schedule.z0)(output, z_t, jnp.asarray(steps))
    np.testing.assert_allclose(batched, static, rtol=2e-6, atol=1e-6)
    scalar = jax.jit(schedule.step, static_argnums=3)(output, z_t, jnp.asarray(400), 4)
    np.testing.assert_allclose(scalar, schedule.step(output, z_t, 400, 4), rtol=2e-6, atol=1e-6)


def test_traced_epsilon_is_refused_where_a_timestep_could_have_zero_snr():
    schedule = NoiseSchedule(prediction_type="epsilon", rescale_betas_zero_snr=True)
    z = jnp.zeros((1, 2, 2, 4))
    with pytest.raises(ValueError, match="rescale_betas_zero_snr"):
        jax.jit(schedule.z0)(z, z, jnp.asarray(10))
    assert np.isfinite(schedule.z0(z, z, 10)).all()


def test_half_precision_models_are_stepped_in_float32():
    schedule = NoiseSchedule.from_dict(STABLE_DIFFUSION)
    z = jnp.asarray(latents(0), jnp.bfloat16)
    assert schedule.z0(z, z, 500).dtype == jnp.float32
    assert schedule.step(z, z, 500, 2).dtype == jnp.float32


def test_config_round_trips_through_diffusers(tmp_path):
    config = STABLE_DIFFUSION | {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    schedule = NoiseSchedule.from_dict(config)
    path = tmp_path / "scheduler_config.json"
    path.write_text(json.dumps(schedule.to_dict()))
    theirs = DDIMScheduler.from_pretrained(tmp_path)
    assert NoiseSchedule.from_dict(dict(theirs.config)) == schedule
    assert NoiseSchedule.from_dict({}) == NoiseSchedule.from_dict(dict(DDIMScheduler().config))
    assert hash(schedule) == hash(NoiseSchedule.from_dict(config))  # a static argument of jit


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"_class_name": "LCMScheduler"}, ["LCMScheduler"]),
        ({"trained_betas": [0.1], "thresholding": True}, ["trained_betas", "thresholding"]),
        (
            {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "flow"},
            ["squaredcos_cap_v2", "scaled_linear", "flow", "v_prediction"],
        ),
        ({"beta_start": 0.5, "beta_end": 0.1, "num_train_timesteps": 1}, ["beta_start", "least 2"]),
    ],
)
def test_unsupported_configs_are_refused_all_at_once(config, words):
    with pytest.raises(ValueError) as error:
        NoiseSchedule.from_dict(config)
    assert all(word in str(error.value) for word in words)


def test_numbers_outside_the_schedule_are_refused():
    schedule, z = NoiseSchedule(), jnp.zeros((1, 2, 2, 4))
    for n in (0, 1001):
        with pytest.raises(ValueError, match=r"1\.\.1000"):
            schedule.timesteps(n)
    for t in (-1, 1000):
        with pytest.raises(ValueError, match=r"0\.\.999"):
            schedule.z0(z, z, t)
