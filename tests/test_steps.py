"""The train step and the two stages' losses, on models of some thousand parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from configs.nano import train as nano
from d3epth_jax import inference, losses, sharding, weighting
from d3epth_jax.models.depth_model import init_params
from d3epth_jax.training import from_config, model_setup, steps
from d3epth_jax.training.stages import latent, pixel
from d3epth_jax.training.train_state import (
    HostAverage,
    ema_decay,
    init_train_state,
    merge,
    split_trainable,
)
from tests.conftest import scenes, small_model, small_unet

TEACHER = small_model(small_unet((8, 16), layers=2))
STUDENT = small_model(small_unet((4, 8), mid=None))
PIXEL = {"ssi": 1.0, "edge": 0.5}


def setup_pixel(beta=PIXEL, trainable=("unet/",), accumulate=1, tx=None, model=STUDENT, **options):
    params = init_params(model, 0)
    params, rest = split_trainable(params, trainable)
    tx = tx or optax.adam(1e-3)
    tasks = tuple(task for task in pixel.TASKS if task in beta)
    weights = weighting.dwa(len(tasks))
    loss_fn = pixel.make_loss(model, terms=tuple(beta), **options)
    step = steps.make_train_step(
        loss_fn, tx, weights, beta=beta, tasks=tasks, accumulate=accumulate
    )
    return jax.jit(step), init_train_state(params, tx, weights), {"rest": rest, "teacher": {}}


def setup_latent(beta, tx, share_encoder=True, trainable=("unet/",)):
    params = init_params(STUDENT, 0)
    teacher = init_params(TEACHER, 1)
    if "feat" in beta:
        params["adapters"] = latent.init_adapters(STUDENT, TEACHER, jax.random.key(2), 32, 48)
        trainable = (*trainable, "adapters/")
    params, rest = split_trainable(params, trainable)
    loss_fn = latent.make_loss(STUDENT, TEACHER, terms=tuple(beta), share_encoder=share_encoder)
    weights = weighting.static(0)
    step = steps.make_train_step(loss_fn, tx, weights, beta=beta)
    return jax.jit(step), init_train_state(params, tx, weights), {"rest": rest, "teacher": teacher}


def assert_trees_equal(a, b):
    a, b = flatten_dict(a), flatten_dict(b)
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(np.asarray(a[path]), np.asarray(b[path]), err_msg=path)


def test_batch_loss_is_the_mean_over_images_with_a_loss():
    step, state, frozen = setup_pixel()
    batch = scenes(4)
    batch["mask"][1] = False
    _, metrics = step(state, frozen, batch)
    kept = {name: value[[0, 2, 3]] for name, value in batch.items()}
    _, expected = step(state, frozen, kept)
    for name in ("loss", "loss/ssi", "loss/edge"):
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-5)
    assert metrics["without_loss"] == 0.25


@pytest.mark.parametrize(
    "options",
    [losses.PRESETS["default"], pytest.param(losses.PRESETS["e2e_compat"], marks=pytest.mark.slow)],
)
def test_accumulated_step_equals_the_whole_batch(options):
    # SGD: Adam's division would blow rounding up where a gradient is near zero.
    batch = scenes(4)
    batch["mask"][0, :20] = False  # unequal pixel counts
    batch["mask"][3] = False  # one micro-batch has an image less
    results = []
    for accumulate in (1, 2):
        step, state, frozen = setup_pixel(accumulate=accumulate, tx=optax.sgd(0.1), **options)
        results.append(step(state, frozen, batch))
    for (path, one), two in zip(
        flatten_dict(results[0][0].params).items(),
        flatten_dict(results[1][0].params).values(),
        strict=True,
    ):
        np.testing.assert_allclose(one, two, atol=2e-6, err_msg=path)
    for name in results[0][1]:
        np.testing.assert_allclose(
            results[0][1][name], results[1][1][name], rtol=1e-4, err_msg=name
        )


def test_accumulation_keeps_losses_with_other_denominators_apart():
    # `gt` counts three of four images, `out` all: dividing by one common number would be wrong.
    batch = scenes(4)
    batch["mask"][2] = False
    results = []
    beta = {"gt": 1.0, "out": 1.0}
    params = init_params(STUDENT, 0)
    params, rest = split_trainable(params, ("unet/",))
    frozen = {"rest": rest, "teacher": init_params(TEACHER, 1)}
    loss_fn = latent.make_loss(STUDENT, TEACHER, terms=("gt", "out"))
    weights, tx = weighting.static(0), optax.sgd(0.1)
    for accumulate, known in ((1, False), (2, False), (2, True)):
        step = steps.make_train_step(
            loss_fn, tx, weights, beta=beta, accumulate=accumulate, weights_from_data=known
        )
        state = init_train_state(params, tx, weights)
        compiled = jax.jit(step).lower(state, frozen, batch).compile()
        results.append((*compiled(state, frozen, batch), compiled.cost_analysis()["flops"]))
    one = flatten_dict(results[0][0].params)
    for state, metrics, _ in results[1:]:
        for path, value in flatten_dict(state.params).items():
            np.testing.assert_allclose(one[path], value, atol=2e-6, err_msg=path)
        np.testing.assert_allclose(results[0][1]["loss"], metrics["loss"], rtol=1e-5)
    # A loop's operations are counted once: half of the batch. What is known from the data takes one
    # backward pass, and no network to count it.
    whole, apart, together = (flops for *_, flops in results)
    assert together < 0.52 * whole and apart > 1.05 * together, (whole, apart, together)


def test_batch_without_any_valid_pixel_changes_nothing_but_moments():
    step, state, frozen = setup_pixel(tx=optax.sgd(0.1))
    batch = scenes(2)
    batch["mask"][:] = False
    batch["depth"][:] = np.nan
    new_state, metrics = step(state, frozen, batch)
    assert_trees_equal(new_state.params, state.params)
    assert metrics["grad_norm"] == 0
    assert np.isfinite(metrics["loss"])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_sharded_step_equals_the_single_device(accumulate):
    batch = scenes(4)
    step, state, frozen = setup_pixel(tx=optax.sgd(0.1), accumulate=accumulate)
    expected, _ = step(state, frozen, batch)
    mesh = sharding.make_mesh(fsdp=2)
    assert mesh.size == 2
    placement = sharding.params_sharding(state, mesh, min_size=64)
    assert any("fsdp" in (s.spec or ()) for s in jax.tree.leaves(placement))
    state = jax.device_put(state, placement)
    got, _ = step(state, sharding.put_params(frozen, mesh), sharding.put_batch(batch, mesh))
    for path, value in flatten_dict(expected.params).items():
        np.testing.assert_allclose(flatten_dict(got.params)[path], value, atol=2e-6, err_msg=path)


def test_frozen_parameters_have_no_gradient_and_stay_bit_identical():
    step, state, frozen = setup_pixel(trainable=("unet/",))
    before = jax.tree.map(np.array, frozen)
    assert set(state.params) == {"unet"}
    # Adam's moments exist for the UNet alone: no gradient tree of the decoder is ever formed.
    count = len(jax.tree.leaves(state.params))
    assert len(jax.tree.leaves(state.opt_state[0].mu)) == count
    for _ in range(3):
        state, _ = step(state, frozen, scenes(2))
    assert_trees_equal(frozen["rest"], before["rest"])


def test_gradient_through_the_frozen_decoder_equals_finite_differences(monkeypatch):
    model = STUDENT
    params, rest = split_trainable(init_params(model, 3), ("unet/conv_out/",))
    batch = {name: jnp.asarray(value) for name, value in scenes(2, 24, 32).items()}
    loss_fn = pixel.make_loss(model, terms=("ssi",))

    def loss(kernel):
        conv = {**params["unet"]["conv_out"], "kernel": kernel}
        values, weights, _ = loss_fn(merge({"unet": {"conv_out": conv}}, rest), {}, batch)
        return losses.batch_mean(values["ssi"], weights["ssi"])

    kernel = params["unet"]["conv_out"]["kernel"]
    gradient = np.asarray(jax.grad(loss)(kernel))
    # Along the gradient's sign the slope is the sum of its magnitudes, far above float32 noise.
    direction = np.sign(gradient)
    h = 2e-4
    numeric = (loss(kernel + h * direction) - loss(kernel - h * direction)) / (2 * h)
    assert numeric > 0
    np.testing.assert_allclose(np.abs(gradient).sum(), numeric, rtol=2e-2)

    # The check is not blind: with the gradient cut at the decoder it would fail.
    decode = inference.decode_depth
    cut = lambda model, params, z: decode(model, params, jax.lax.stop_gradient(z))  # noqa: E731
    monkeypatch.setattr(inference, "decode_depth", cut)
    assert np.abs(np.asarray(jax.grad(loss)(kernel))).sum() < numeric / 100


def test_one_batch_can_be_overfitted_in_latent_space():
    step, state, frozen = setup_latent({"out": 1.0}, optax.adam(3e-3))
    batch = scenes(2)
    first = None
    for _ in range(400):
        state, metrics = step(state, frozen, batch)
        first = first or float(metrics["loss/out"])
    assert float(metrics["loss/out"]) < first / 20


@pytest.mark.slow  # the quickstart's test trains in pixels too
def test_one_batch_can_be_overfitted_in_pixel_space():
    step, state, frozen = setup_pixel(
        {"ssi": 1.0, "edge": 0.5, "range": 0.1},
        ("unet/", "encoder/", "decoder/"),
        tx=optax.adam(3e-3),
        model=TEACHER,
    )
    batch = scenes(2)
    history = []
    for _ in range(500):
        state, metrics = step(state, frozen, batch)
        history.append(float(metrics["loss/ssi"]))
    assert history[-1] < history[0] / 5


def test_stage1_trains_adapters_and_own_encoder():
    beta = {"gt": 1.0, "out": 1.0, "feat": 0.1, "enc": 1.0}
    step, state, frozen = setup_latent(
        beta, optax.adam(1e-3), share_encoder=False, trainable=("unet/", "encoder/")
    )
    assert set(state.params) == {"unet", "encoder", "adapters"}
    batch = scenes(2)
    before = flatten_dict(state.params, sep="/")
    state, first = step(state, frozen, batch)
    assert {f"loss/{name}" for name in beta} < first.keys()
    for _ in range(20):
        state, last = step(state, frozen, batch)
    assert last["loss"] < first["loss"]
    # Not after one step: branches end in zeros, so what lies before them has no gradient then.
    after = flatten_dict(state.params, sep="/")
    still = {path for path in before if np.array_equal(before[path], after[path])}
    # The prompt is two zero tokens: nothing flows through the attention to it but its bias.
    silent = ("attn2/to_q/", "attn2/to_k/", "attn2/to_v/", "attn2/to_out_0/kernel", "ks_0/norm2/")
    assert still == {p for p in before if p.startswith("unet/") and any(s in p for s in silent)}


def test_total_is_the_weighted_sum_of_the_losses():
    step, state, frozen = setup_pixel({"ssi": 1.0, "edge": 0.5, "range": 0.25})
    _, m = step(state, frozen, scenes(2))
    expected = (
        m["weight/ssi"] * m["loss/ssi"]
        + 0.5 * m["weight/edge"] * m["loss/edge"]
        + 0.25 * m["loss/range"]
    )
    np.testing.assert_allclose(m["loss"], expected, rtol=1e-6)


def test_inverted_prediction_is_counted():
    loss_fn = pixel.make_loss(STUDENT, terms=("ssi",))
    batch = {name: jnp.asarray(value) for name, value in scenes(3).items()}
    params = init_params(STUDENT, 0)
    upright = loss_fn(params, {}, batch)
    last = max(params["decoder"], key=lambda name: int(name.split("_")[1]))
    flipped = jax.tree.map(lambda x: x, params)
    flipped["decoder"] = {
        **params["decoder"],
        last: {
            "kernel": -params["decoder"][last]["kernel"],
            "bias": 1 - params["decoder"][last]["bias"],
        },
    }
    inverted = loss_fn(flipped, {}, batch)
    np.testing.assert_allclose(upright[0]["ssi"], inverted[0]["ssi"], rtol=1e-4)
    np.testing.assert_array_equal(
        upright[2]["negative_scale"] + inverted[2]["negative_scale"], np.ones(3)
    )


def test_upright_tasks_leave_inverted_images_to_the_range_term():
    batch = {name: jnp.asarray(value) for name, value in scenes(6).items()}
    params = init_params(STUDENT, 0)
    loss_fn = pixel.make_loss(STUDENT, terms=("ssi", "range"), upright=True)
    _, weights, metrics = loss_fn(params, {}, batch)
    inverted = np.asarray(metrics["negative_scale"]) > 0
    assert inverted.any() and not inverted.all()
    np.testing.assert_array_equal(weights["ssi"], ~inverted)
    np.testing.assert_array_equal(weights["range"], np.ones(6))
    np.testing.assert_array_equal(weights["negative_scale"], np.ones(6))


def test_loss_terms_have_clear_errors():
    with pytest.raises(ValueError, match=r"unknown terms.*'sssi'"):
        pixel.make_loss(STUDENT, terms=("sssi",))
    with pytest.raises(ValueError, match="teacher"):
        pixel.make_loss(STUDENT, terms=("ssi", "teacher"))
    with pytest.raises(ValueError, match="share_encoder"):
        latent.make_loss(STUDENT, TEACHER, terms=("enc",), share_encoder=True)
    with pytest.raises(ValueError, match=r"trainable patterns.*nothing/.*unet/"):
        split_trainable(init_params(STUDENT, 0), ("unet/", "nothing/"))
    config = nano.stage1()
    config.loss.beta.update(dict.fromkeys(config.loss.beta, 0.0), enc=1.0)
    with pytest.raises(ValueError, match=r"no loss has a weight.*enc is for a trained encoder"):
        from_config.make_loss(config, STUDENT, {}, {"unet": {}}, model_setup.Start())


@pytest.mark.parametrize("step,expected", [(0, 0.1), (9, 10 / 19), (10**6, 0.9999)])
def test_ema_decay_warms_up(step, expected):
    np.testing.assert_allclose(ema_decay(jnp.int32(step), 0.9999), expected, rtol=1e-6)


def test_feature_pairs_follow_bk_sdm_where_the_student_lacks_a_level():
    def unet(levels, layers):
        cross = levels - 1 if levels == 4 else levels
        return small_unet((8,) * levels, layers).__class__(
            block_out_channels=(8,) * levels,
            down_block_types=("CrossAttnDownBlock2D",) * cross
            + ("DownBlock2D",) * (levels - cross),
            up_block_types=("UpBlock2D",) * (levels - cross) + ("CrossAttnUpBlock2D",) * cross,
            layers_per_block=layers,
            attention_head_dim=2,
            norm_num_groups=4,
        )

    assert latent.feature_pairs(unet(3, 1), unet(4, 2)) == [
        ("down_blocks_0", "down_blocks_0"),
        ("down_blocks_1", "down_blocks_1"),
        ("down_blocks_2.attentions_0.proj_out", "down_blocks_2.attentions_1.proj_out"),
        ("up_blocks_0", "up_blocks_1"),
        ("up_blocks_1", "up_blocks_2"),
        ("up_blocks_2", "up_blocks_3"),
    ]
    with pytest.raises(ValueError, match="as many levels or one fewer"):
        latent.feature_pairs(unet(3, 1), small_unet((8,) * 5))


def test_metric_targets_leave_the_edge_term_in_normalised_units():
    batch = scenes(2)
    values = []
    for normalize_target in (True, False):
        loss_fn = pixel.make_loss(STUDENT, normalize_target=normalize_target)
        values.append(loss_fn(init_params(STUDENT, 0), {}, batch)[0])
    np.testing.assert_array_equal(values[0]["edge"], values[1]["edge"])
    assert np.abs(values[0]["ssi"] - values[1]["ssi"]).min() > 1e-3


def test_an_average_on_the_host_decays_as_over_the_steps_between():
    params = {"kernel": np.ones(3, np.float32)}
    average = HostAverage({"kernel": np.zeros(3, np.float32)}, every=2, maximum=0.9999)
    average.update(1, params)
    assert average.params["kernel"][0] == 0
    average.update(2, params)
    np.testing.assert_allclose(average.params["kernel"], 1 - 1 / 10 * 2 / 11, rtol=1e-6)
    average.update(3, {"kernel": 2 * params["kernel"]}, last=True)  # of what is left
    expected = 2 + 3 / 12 * (1 - 1 / 10 * 2 / 11 - 2)
    np.testing.assert_allclose(average.params["kernel"], expected, rtol=1e-6)
