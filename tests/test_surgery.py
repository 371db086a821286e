"""Students from their teachers' weights, as BK-SDM prunes them."""

import dataclasses
import json

import numpy as np
import pytest

from d3epth_jax.models import presets
from d3epth_jax.models.config import UNetConfig
from d3epth_jax.weights import convert, keys, surgery
from tests import unet_oracle as oracle

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
        if kind == "tiny":
            parts[1] = {"0": "1", "1": "2", "2": "3"}[parts[1]]
    return ".".join(parts)


@pytest.mark.parametrize("kind", ["base", "small", "tiny"])
def test_every_tensor_of_a_pruned_student_is_its_bk_sdm_source(kind):
    shape = TEACHER_OF_TINY if kind == "tiny" else TEACHER
    student = presets.bk_sdm(shape, kind)
    params = oracle.random_like(oracle.abstract_unet(shape))
    own = oracle.random_like(oracle.abstract_unet(student))
    copied, random = surgery.copy_from_teacher(student, shape, own, params)
    assert random == []
    teacher, ours = convert.to_torch(params), convert.to_torch(copied)
    assert ours.keys() == convert.to_torch(own).keys()
    for key, tensor in ours.items():
        np.testing.assert_array_equal(tensor, teacher[bk_sdm_source(key, kind)], err_msg=key)


def test_what_the_teacher_lacks_is_listed_and_what_does_not_fit_is_refused():
    student = presets.bk_sdm(TEACHER, "base")
    own = oracle.random_like(oracle.abstract_unet(student))
    params = oracle.random_like(oracle.abstract_unet(TEACHER))
    del params["mid_block"]
    copied, random = surgery.copy_from_teacher(student, TEACHER, own, params)
    assert random and all(path.startswith("mid_block/") for path in random)
    assert copied["mid_block"] == own["mid_block"]
    params["conv_in"]["bias"] = params["conv_in"]["bias"][:3]
    params["conv_out"]["bias"] = params["conv_out"]["bias"][:3]
    with pytest.raises(ValueError, match=r"conv_in/bias \(8,\) <- .*\n.*conv_out/bias"):
        surgery.copy_from_teacher(student, TEACHER, own, params)


@pytest.mark.parametrize("kind", ["base", "small", "tiny"])
def test_the_copy_fits_the_published_shapes(kind, shared):
    path = shared / "hf_configs/bk_sdm/sd21" / f"bk_{kind}" / "config.json"
    student = UNetConfig.from_dict(json.loads(path.read_text()))
    shapes = [
        {p: np.broadcast_to(np.float32(0), x.shape) for p, x in keys.flatten(tree).items()}
        for tree in map(oracle.abstract_unet, (student, presets.SD2_UNET))
    ]
    own, params = map(keys.unflatten, shapes)
    _, random = surgery.copy_from_teacher(student, presets.SD2_UNET, own, params)
    assert random == []
