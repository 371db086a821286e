"""Students from their teachers' weights, as BK-SDM prunes them."""

import dataclasses
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from configs import quickstart
from d3epth_jax import inference
from d3epth_jax.models import presets
from d3epth_jax.models.config import TinyAutoencoderConfig, UNetConfig
from d3epth_jax.models.depth_model import abstract_params, init_params
from d3epth_jax.models.tiny_vae import TinyDecoder, TinyEncoder
from d3epth_jax.training import model_setup
from d3epth_jax.weights import convert, hub, keys, surgery
from tests import unet_oracle as oracle
from tests.conftest import small_model, small_unet

# Stable Diffusion 2's shape, narrow; every level of another width, so that nothing fits by chance.
TEACHER = dataclasses.replace(
    presets.SD2_UNET,
    in_channels=8,
    block_out_channels=(8, 16, 24, 32),
    attention_head_dim=(2, 2, 4, 4),
    cross_attention_dim=8,
    norm_num_groups=4,
)
# The teacher's last two levels are equally wide in Stable Diffusion: BK-SDM tiny needs that.
TEACHER_OF_TINY = dataclasses.replace(TEACHER, block_out_channels=(8, 16, 24, 24))


def bk_sdm_source(key: str, kind: str) -> str:
    """METHOD 6's copy map on torch's keys, written apart from the code."""
    parts = key.split(".")
    if parts[0] == "up_blocks":
        if parts[2] in ("resnets", "attentions") and parts[3] == "1":
            parts[3] = "2"
        if kind in ("tiny", "turbo"):
            parts[1] = {"0": "1", "1": "2", "2": "3"}[parts[1]]
    return ".".join(parts)


def pruned(config: UNetConfig, kind: str) -> UNetConfig:
    return presets.turbo(config) if kind == "turbo" else presets.bk_sdm(config, kind)


@pytest.mark.parametrize("kind", ["base", "small", "tiny", "turbo"])
def test_every_tensor_of_a_pruned_student_is_its_bk_sdm_source(kind):
    shape = TEACHER_OF_TINY if kind in ("tiny", "turbo") else TEACHER
    student = pruned(shape, kind)
    params = oracle.random_like(oracle.abstract_unet(shape))
    own = oracle.random_like(oracle.abstract_unet(student))
    copied = surgery.copy_from_teacher(student, shape, own, params)
    assert not copied.fresh
    teacher, ours = convert.to_torch(params), convert.to_torch(copied.params)
    assert ours.keys() == convert.to_torch(own).keys()
    sources = {key: bk_sdm_source(key, kind) for key in ours}
    for key, tensor in ours.items():
        np.testing.assert_array_equal(tensor, teacher[sources[key]], err_msg=key)
    assert {keys.torch_key(path) for path in copied.taken} == ours.keys()
    left_out = {keys.torch_key(path) for path in copied.left_out}
    assert left_out == teacher.keys() - set(sources.values())
    top = "down_blocks.0.attentions.0.proj_in.weight"
    assert (top in left_out) == (kind == "turbo")


def test_what_the_teacher_lacks_or_has_otherwise_stays_random_and_is_listed():
    student = presets.bk_sdm(TEACHER, "base")
    own = oracle.random_like(oracle.abstract_unet(student))
    params = oracle.random_like(oracle.abstract_unet(TEACHER))
    del params["mid_block"]
    params["conv_out"]["bias"] = params["conv_out"]["bias"][:3]
    copied = surgery.copy_from_teacher(student, TEACHER, own, params)
    assert copied.fresh.pop(("conv_out", "bias")) == "(4,) <- conv_out/bias (3,)"
    assert copied.params["conv_out"]["bias"] is own["conv_out"]["bias"]
    assert ("conv_out", "bias") in copied.left_out
    assert copied.fresh and all(path[0] == "mid_block" for path in copied.fresh)
    assert copied.params["mid_block"] == own["mid_block"]
    assert surgery.in_modules(copied.fresh) == (
        "mid_block/attentions_0, mid_block/resnets_0, mid_block/resnets_1"
    )


def test_a_student_that_mostly_fits_nowhere_is_refused():
    student = dataclasses.replace(presets.bk_sdm(TEACHER, "base"), block_out_channels=(12,) * 4)
    own = oracle.random_like(oracle.abstract_unet(student))
    params = oracle.random_like(oracle.abstract_unet(TEACHER))
    with pytest.raises(
        ValueError, match=r"no pruned teacher.*\n.*conv_in/bias: \(12,\) <- .*\(8,\)"
    ):
        surgery.copy_from_teacher(student, TEACHER, own, params)


def test_a_narrower_unet_has_evenly_spaced_channels_of_every_layer():
    teacher = small_model(small_unet((16, 32)))
    params = init_params(teacher, 0)
    model, thinned = surgery.thin(teacher, params, (8, 24))
    assert model.unet == dataclasses.replace(teacher.unet, block_out_channels=(8, 24))
    abstract, unet = abstract_params(model)["unet"], thinned["unet"]
    assert jax.tree.map(np.shape, unet) == jax.tree.map(lambda x: x.shape, abstract)
    inner = np.arange(24) * 32 // 24  # 0 1 2 4 5 6 8 ...: every fourth is left out
    before = params["unet"]["down_blocks_1"]["resnets_0"]["conv1"]["kernel"]
    kernel = unet["down_blocks_1"]["resnets_0"]["conv1"]["kernel"]
    np.testing.assert_array_equal(kernel, before[:, :, ::2][..., inner])
    # The outer up block's input: the inner level's channels, then those of the skip.
    before = params["unet"]["up_blocks_1"]["resnets_0"]["conv1"]["kernel"]
    kernel = unet["up_blocks_1"]["resnets_0"]["conv1"]["kernel"]
    index = [*inner, *range(32, 48, 2)]
    np.testing.assert_array_equal(kernel, before[:, :, index][..., ::2])
    prediction = inference.predict_latent(model, thinned, jnp.ones((1, 8, 8, 4)))[0]
    assert np.isfinite(prediction).all() and np.std(prediction) > 0


def test_thinned_to_its_own_widths_a_unet_is_itself_and_none_gets_wider():
    teacher = small_model(small_unet((16, 32)))
    params = init_params(teacher, 0)
    jax.tree.map(np.testing.assert_array_equal, surgery.thin(teacher, params, (16, 32))[1], params)
    for widths in ((16, 40), (16,)):
        with pytest.raises(ValueError, match="cannot be thinned"):
            surgery.thin(teacher, params, widths)
    with pytest.raises(ValueError, match=r"\(16, 16\): one of them alone has down_blocks_1/resn"):
        surgery.thin(teacher, params, (16, 16))  # which needs no shortcut


def test_an_up_block_joins_the_levels_that_the_unet_gives_it():
    """Level by level in channels that tell where they come from: 0.., 100.., 200.. ."""
    teacher = small_model(small_unet((16, 32, 48), layers=2))
    student, widths = dataclasses.replace(teacher.unet, block_out_channels=(8, 24, 40)), (8, 24, 40)
    params = init_params(teacher, 0)
    thinned = surgery.thin(teacher, params, widths)[1]["unet"]
    kept = [np.arange(a) * b // a for a, b in zip(widths, (16, 32, 48), strict=True)]
    own = flatten_dict(abstract_params(dataclasses.replace(teacher, unet=student))["unet"])
    # (block, layer): levels of what comes from below, and of the skip, as diffusers builds them.
    joined = {(0, 0): (2, 2), (0, 1): (2, 2), (0, 2): (2, 1), (1, 0): (2, 1), (1, 1): (1, 1)}
    joined |= {(1, 2): (1, 0), (2, 0): (1, 0), (2, 1): (0, 0), (2, 2): (0, 0)}
    for (block, layer), (below, skip) in joined.items():
        where = f"up_blocks_{block}", f"resnets_{layer}"
        index = [*kept[below], *(teacher.unet.block_out_channels[below] + kept[skip])]
        assert own[*where, "conv1", "kernel"].shape[2] == len(index)
        for name, axis in (("norm1", "scale"), ("conv1", "kernel")):
            before = params["unet"][where[0]][where[1]][name][axis]
            after = thinned[where[0]][where[1]][name][axis]
            if name == "norm1":
                np.testing.assert_array_equal(after, before[index])
            else:
                np.testing.assert_array_equal(after, before[:, :, index][..., kept[2 - block]])


def test_where_channels_are_not_all_that_differs_nothing_is_thinned():
    wide, narrow = small_unet((16, 32)), small_unet((8, 24))
    assert model_setup._is_narrower(narrow, wide)
    for other in (wide, small_unet((8,)), small_unet((8, 40)), small_unet((16, 32, 48))):
        assert not model_setup._is_narrower(other, wide)
    assert not model_setup._is_narrower(dataclasses.replace(narrow, norm_num_groups=8), wide)


def test_the_first_commands_student_starts_with_its_teachers_channels(caplog):
    with caplog.at_level(logging.INFO):
        teacher, student, *_ = model_setup.make_models(quickstart.stage1(tiny=True))
    mine, its = (start.params["unet"]["conv_out"]["kernel"] for start in (student, teacher))
    assert (mine.shape[2], its.shape[2]) == (24, 40)
    np.testing.assert_array_equal(mine, its[:, :, np.arange(24) * 40 // 24])
    assert "evenly thinned: (24, 32, 56, 64) of the teacher's (40, 80, 128, 160)" in caplog.text
    assert "random" not in caplog.text


@pytest.mark.parametrize("kind", ["base", "small", "tiny"])
def test_the_copy_fits_the_published_shapes(kind, shared):
    path = shared / "hf_configs/bk_sdm/sd21" / f"bk_{kind}" / "config.json"
    copy_of_shapes(UNetConfig.from_dict(json.loads(path.read_text())))


def test_the_copy_fits_turbo_at_full_size():
    copy_of_shapes(presets.turbo(presets.SD2_UNET))


def copy_of_shapes(student: UNetConfig) -> None:
    shapes = [
        {p: np.broadcast_to(np.float32(0), x.shape) for p, x in flatten_dict(tree).items()}
        for tree in map(oracle.abstract_unet, (student, presets.SD2_UNET))
    ]
    own, params = map(unflatten_dict, shapes)
    assert not surgery.copy_from_teacher(student, presets.SD2_UNET, own, params).fresh


# Tiny autoencoders

# Layers that d3_turbo keeps of TAESD's, counted by hand: convolutions, and one block a stage.
KEPT = {"encoder": (0, 2, 3, 6, 7, 10, 11, 14), "decoder": (0, 2, 6, 7, 11, 12, 16, 18)}
PLACES = {"encoder": (0, 1, 2, 3, 4, 5, 6, 7), "decoder": (0, 2, 4, 5, 7, 8, 10, 11)}


def test_turbo_takes_taesds_own_weights(shared):
    taesd, params = hub.load_autoencoder(shared / "weights/taesd")
    config, kept = surgery.prune_tiny_autoencoder(taesd, params, presets.TAESD_TURBO)
    assert config == presets.TAESD_TURBO
    abstract = oracle.abstract_tiny(config)
    assert jax.tree.structure(kept) == jax.tree.structure(abstract)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x.shape, y.shape), kept, abstract)
    for side in KEPT:
        assert len(kept[side]) == len(KEPT[side])
        for place, origin in zip(PLACES[side], KEPT[side], strict=True):
            assert kept[side][f"layers_{place}"] is params[side][f"layers_{origin}"]


def test_a_block_that_does_nothing_can_be_dropped():
    # After another block's ReLU, a block whose branch ends in zeros is the identity.
    config = TinyAutoencoderConfig(
        encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4
    )
    params = oracle.random_like(oracle.abstract_tiny(config))
    idle = {"encoder": (4, 5, 8, 9, 12, 13), "decoder": (3, 4, 8, 9, 13, 14)}
    for side, numbers in idle.items():
        for number in numbers:
            conv = params[side][f"layers_{number}"]["conv_4"]
            conv.update(jax.tree.map(np.zeros_like, conv))
    like = dataclasses.replace(config, num_encoder_blocks=(1,) * 4, num_decoder_blocks=(1, 1, 1, 2))
    pruned_config, kept = surgery.prune_tiny_autoencoder(config, params, like)
    assert pruned_config.num_decoder_blocks == (1,) * 4  # of the last stage there is but one
    for side, module, x in (
        ("encoder", TinyEncoder, oracle.normal(1, 1, 16, 24, 3)),
        ("decoder", TinyDecoder, oracle.normal(2, 1, 2, 3, 4)),
    ):
        whole, lighter = (
            oracle.run(module(c).apply, {"params": p[side]}, x)
            for c, p in ((config, params), (pruned_config, kept))
        )
        np.testing.assert_allclose(lighter, whole, rtol=1e-5, atol=1e-5)


def test_autoencoders_of_other_cells_are_refused():
    three = TinyAutoencoderConfig(
        encoder_block_out_channels=(8,) * 3,
        decoder_block_out_channels=(8,) * 3,
        num_encoder_blocks=(1,) * 3,
        num_decoder_blocks=(1,) * 3,
    )
    with pytest.raises(ValueError, match="3 stages, so cells of 4 pixels; 4 stages"):
        surgery.prune_tiny_autoencoder(three, {}, presets.TAESD)


def test_channels_are_not_pruned():
    narrow = dataclasses.replace(presets.TAESD, encoder_block_out_channels=(32,) * 4)
    with pytest.raises(ValueError, match="channels not"):
        surgery.prune_tiny_autoencoder(presets.TAESD, {}, narrow)
