"""MACs against METHOD 6's figures, XLA's own counts, and programs that can be counted by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d3epth_jax import inference, macs
from d3epth_jax.models import attention, convolve, presets
from d3epth_jax.models.depth_model import DepthModel, abstract_params
from d3epth_jax.weights import fold
from tests.conftest import small_model, small_unet

SIZE = (576, 768)


def shape(*dims):
    return jax.ShapeDtypeStruct(dims, jnp.float32)


def preset(name, tokens=2):
    model = DepthModel(*presets.get(name), presets.SINGLE_STEP)
    params = dict(abstract_params(model))
    params["prompt"] = shape(1, tokens, model.unet.cross_attention_dim)
    return model, params


@pytest.mark.parametrize(
    ("name", "part", "giga"),
    [
        *(("d2_base", part, n) for part, n in (("unet", 748), ("encoder", 962), ("decoder", 2142))),
        *(("d3_fast", part, n) for part, n in (("unet", 452), ("encoder", 103), ("decoder", 119))),
        ("d3_base", "unet", 484),
        ("d3_small", "unet", 474),
    ],
)
def test_the_figures_of_method_6(name, part, giga):
    model, params = preset(name, tokens=77)
    function, inputs = macs.part_programs(model, SIZE)[part]
    with macs.plain_forms():
        assert abs(macs.count(function, params, *inputs).dense / 1e9 - giga) < 1


def test_numbers_do_not_depend_on_the_form_that_a_device_computes_fast(monkeypatch):
    model, params = small_model(), abstract_params(small_model())
    once = macs.of_model(model, params, (96, 128), batch=2)
    monkeypatch.setitem(attention.MAX_LOGITS, "cpu", 1000)
    monkeypatch.setattr(attention, "MIN_QUERIES", 1)
    monkeypatch.setitem(convolve.PATCHES, "all", ((1, None),) * 3)
    limits = dict(attention.MAX_LOGITS)
    assert macs.of_model(model, params, (96, 128), batch=2) == once
    assert limits == attention.MAX_LOGITS and convolve.REWRITTEN_ON
    bfloat = dataclasses.replace(model, dtype="bfloat16", remat=True)
    assert macs.of_model(bfloat, params, (96, 128), batch=2) == once
    # A loop over chunks does the same products, and more where the last chunk is filled up.
    qkv = [shape(1, 96, 2, 8)] * 3
    count = macs.count(attention.attention, *qkv).dense
    assert 1 <= count / (2 * 2 * 96 * 96 * 8) < 1.2
    assert any(times > 1 for _, times in macs.operations(attention.attention, *qkv))


def test_a_batch_and_steps_multiply():
    model, params = small_model(), abstract_params(small_model())
    one = macs.of_model(model, params, (64, 64))
    many = macs.of_model(model, params, (64, 64), batch=3, steps=4)
    assert many["encoder"].dense == 3 * one["encoder"].dense
    # The time embedding and the prompt's projections are shared by the batch.
    assert 0.95 < many["unet"].dense / (12 * one["unet"].dense) <= 1


def conv(x, kernel, **settings):
    settings = {"window_strides": (1, 1), "padding": "SAME"} | settings
    return jax.lax.conv_general_dilated(
        x, kernel, dimension_numbers=("NHWC", "HWIO", "NHWC"), **settings
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"window_strides": (2, 2), "padding": ((0, 1), (1, 1))},
        {"rhs_dilation": (2, 1)},
        {"lhs_dilation": (2, 3), "padding": ((1, 2), (2, 2))},
        {"feature_group_count": 2},
        {"padding": ((-1, 0), (0, 0))},
    ],
)
def test_valid_taps_are_those_that_xla_counts(settings):
    x, kernel = shape(2, 9, 7, 4), shape(3, 3, 4 // settings.get("feature_group_count", 1), 6)

    def function(x, kernel):
        return conv(x, kernel, **settings)

    found = macs.count(function, x, kernel)
    assert found.valid == macs.by_xla(function, x, kernel)
    assert found.dense == jax.eval_shape(function, x, kernel).size * 9 * kernel.shape[2]


def test_valid_taps_of_a_padded_3x3_convolution():
    h, w = 9, 7
    found = macs.count(conv, shape(1, h, w, 4), shape(3, 3, 4, 6))
    assert found == macs.Macs(h * w * 9 * 24, (3 * h - 2) * (3 * w - 2) * 24)


def test_products_inside_loops_branches_and_wrappers():
    a, b = shape(2, 3, 5), shape(2, 5, 7)
    once = 2 * 3 * 5 * 7

    def product(a, b):
        return jnp.einsum("bij,bjk->bik", a, b)

    def loop(a, b):
        body = jax.checkpoint(jax.jit(lambda c, _: (c + product(a, b).sum(), None)))
        return jax.lax.scan(body, 0.0, None, length=11)[0]

    def branch(a, b):
        return jax.lax.cond(a[0, 0, 0] > 0, lambda: product(a, b).sum(), lambda: 0.0)

    def endless(a, b):
        return jax.lax.while_loop(lambda c: c < 9, lambda c: c + product(a, b).sum(), 0.0)

    assert macs.count(product, a, b) == macs.Macs(once, once)
    assert macs.count(loop, a, b).dense == 11 * once
    assert macs.count(branch, a, b).dense == once
    with pytest.raises(ValueError, match="while loop"):
        macs.count(endless, a, b)


def test_each_piece_of_folding_saves_what_xla_says_it_saves():
    unet = dataclasses.replace(small_unet(), in_channels=8)
    table = macs.saved_by_piece(small_model(unet), (104, 32))
    assert set(table) == {"time", "prompt", "latent", "head", "upsampling", "mean", "all"}
    for piece, found in table.items():
        saved = {kind: found[kind][0] - found[kind][1] for kind in ("macs", "xla")}
        assert saved["macs"] == pytest.approx(saved["xla"], rel=0.02), piece
        assert (saved["macs"] > 0) == (piece != "head"), piece
    assert table["upsampling"]["params"][1] > table["upsampling"]["params"][0]


@pytest.mark.parametrize("piece", ["upsampling", "prompt", "mean", "all"])
def test_whole_programs_cost_less_by_what_folding_saves(piece):
    """By the cost analysis of lowered programs, which also counts what is no product: 2 %."""
    model = DepthModel(*presets.get("d3_nano"), presets.SINGLE_STEP)
    params = dict(abstract_params(model))
    pieces = fold.foldable(model) if piece == "all" else (piece,)
    formula, xla = [], []
    for described, shapes in ((model, params), macs.folded(model, pieces)):
        programs = macs.part_programs(described, (96, 128)).values()
        with macs.plain_forms():
            formula.append(sum(macs.count(f, shapes, *inputs).valid for f, inputs in programs))
            lowered = [jax.jit(f).lower(shapes, *inputs) for f, inputs in programs]
        xla.append(sum(program.cost_analysis()["flops"] for program in lowered) / 2)
    assert 0 < formula[0] - formula[1] == pytest.approx(xla[0] - xla[1], rel=0.02)


@pytest.mark.parametrize("part", macs.PARTS)
def test_a_whole_program_costs_its_products(part):
    """By the cost analysis of the lowered program, which also counts all else: 3 %."""
    model, params = preset("d3_fast")
    function, inputs = macs.part_programs(model, (256, 256))[part]
    with macs.plain_forms():
        count = macs.count(function, params, *inputs)
        xla = jax.jit(function).lower(params, *inputs).cost_analysis()["flops"] / 2
    assert count.valid < xla < 1.03 * count.valid


def test_training_costs_as_many_macs_as_its_gradient_has():
    model, params = preset("d3_fast")

    def loss(unet, rest, image):
        everything = {**rest, "unet": unet}
        rgb = inference.encode_image(model, everything, image)
        latent, _ = inference.predict_latent(model, everything, rgb)
        return inference.decode_depth(model, everything, latent).sum()

    rest = {name: tree for name, tree in params.items() if name != "unet"}
    with macs.plain_forms():
        traced = macs.count(jax.grad(loss), params["unet"], rest, shape(1, 128, 128, 3)).valid
    forward = macs.of_model(model, params, (128, 128))
    formula = macs.of_training(
        {part: found.valid for part, found in forward.items()}, ["unet"], ["decoder"]
    )
    assert formula == pytest.approx(traced, rel=0.01)


def test_folded_shapes_need_no_weights():
    model, params = preset("d3_fast")
    folded, shapes = macs.folded(model)
    assert jax.tree.map(np.shape, shapes) == jax.tree.map(np.shape, abstract_params(folded))
    before, after = (macs.of_model(m, p, SIZE) for m, p in ((model, params), (folded, shapes)))
    assert after["unet"].dense < before["unet"].dense
    assert after["decoder"].dense < before["decoder"].dense
