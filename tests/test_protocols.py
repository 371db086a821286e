"""The benchmarks' protocols: METHOD 10's table, crops, changes by config, and the header."""

import math

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import common
from configs import eval as eval_config
from d3epth_jax import alignment, data, metrics
from d3epth_jax.evaluation import evaluate
from d3epth_jax.evaluation.protocols import CROPS, PROTOCOLS, Protocol, make_protocol
from tests import metrics_oracle


def test_rows_are_those_of_the_method():
    rows = {
        name: (p.num_images, p.min_depth, p.max_depth, p.clip_range, p.processing_resolution)
        for name, p in PROTOCOLS.items()
        if name not in ("default", "ibims", "hypersim")
    }
    assert rows == {
        "nyu": (654, 1e-3, 10, (1e-3, 10), 0),
        "kitti": (652, 1e-5, 80, (1e-5, 80), 0),
        "eth3d": (454, 1e-5, math.inf, (1e-5, math.inf), 756),
        "scannet": (800, 1e-3, 10, (1e-3, 10), 0),
        "diode": (771, 0, math.inf, (0.6, 350), 640),
    }
    assert {n for n, p in PROTOCOLS.items() if p.fit_resolution} == {"eth3d"}
    assert {n: p.crop for n, p in PROTOCOLS.items() if p.crop} == {
        "nyu": "nyu_eigen",
        "kitti": "kitti_eigen",
    }
    assert set(metrics_oracle.ROWS) == set(PROTOCOLS)
    assert tuple(metrics.EXPONENT) == alignment.SPACES


@pytest.mark.parametrize(
    ("crop", "size", "corners"),
    [
        ("nyu_eigen", (480, 640), (45, 471, 41, 601)),
        ("kitti_eigen", (352, 1216), (117, 321, 43, 1172)),
        ("kitti_garg", (352, 1216), (143, 349, 43, 1172)),
        ("kitti_garg", (375, 1242), (153, 371, 44, 1197)),  # the often quoted corners
    ],
)
def test_crops_have_the_published_corners(crop, size, corners):
    counted = Protocol(crop=crop).valid(np.ones((*size, 1)), np.ones((*size, 1), bool))[..., 0]
    rows, columns = counted.any(1).nonzero()[0], counted.any(0).nonzero()[0]
    assert (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1) == corners
    assert counted.sum() == (corners[1] - corners[0]) * (corners[3] - corners[2])


def test_the_nyu_crop_refuses_other_sizes():
    with pytest.raises(ValueError, match="480x640 pixels, not of 427x561"):
        PROTOCOLS["nyu"].valid(np.ones((427, 561, 1)), np.ones((427, 561, 1), bool))


def test_the_range_is_open_and_the_mask_decides_alone_for_diode():
    depth = np.array([0, 1e-3, 0.002, 9.99, 10, 400, np.nan], np.float32).reshape(1, 7, 1)
    mask = np.ones_like(depth, bool)
    scannet = PROTOCOLS["scannet"].valid(depth, mask)
    # Compared in float32: as a float64 its 1e-3 would be above 1e-3.
    assert scannet.ravel().tolist() == [False, False, True, True, False, False, False]
    diode = PROTOCOLS["diode"].valid(depth, mask)
    assert diode.ravel().tolist() == [False, True, True, True, True, True, False]
    assert not PROTOCOLS["diode"].valid(depth, ~mask).any()


@pytest.mark.parametrize("name", [n for n in metrics_oracle.ROWS if n != "nyu"])
def test_valid_pixels_agree_with_the_oracle(name):
    rng = np.random.default_rng(0)
    depth = rng.lognormal(2, 2, (61, 83)).astype(np.float32)
    mask = rng.uniform(size=depth.shape) < 0.7
    ours = PROTOCOLS[name].valid(depth[..., None], mask[..., None])[..., 0]
    np.testing.assert_array_equal(ours, metrics_oracle.valid(name, depth, mask))


def test_single_values_change_and_are_told():
    assert make_protocol("nyu") is PROTOCOLS["nyu"]
    assert make_protocol("nyu", max_depth=None, crop="nyu_eigen") is PROTOCOLS["nyu"]
    changed = make_protocol("nyu", max_depth=5.0, crop="")
    assert (changed.max_depth, changed.crop, changed.clip_range) == (5.0, "", (1e-3, 5.0))
    assert changed.name == "nyu with max_depth=5.0, crop=''"
    assert make_protocol("diode", max_depth=50.0).clip_range == (0.6, 350)


def test_senseless_protocols_are_refused_with_all_reasons():
    with pytest.raises(ValueError, match=r"unknown protocol 'nyud'.*scannet"):
        make_protocol("nyud")
    with pytest.raises(ValueError) as error:
        make_protocol("kitti", crop="gard", alignment="log", max_depth=0.0, fit_resolution=-1)
    for word in ("'gard'", "kitti_garg", "'log'", "sqrt_disparity", "(1e-05, 0.0)", "-1 is below"):
        assert word in str(error.value)
    with pytest.raises(ValueError, match="clip"):
        Protocol(clip=(3.0, 2.0))
    with pytest.raises(ValueError, match="clip"):
        Protocol(clip=("a", "b"))


def test_description_has_every_number():
    nyu = " ".join(PROTOCOLS["nyu"].describe())
    for words in ("0.001 < d < 10 m", "rows 45:471, columns 41:601", "all valid", "0.001 .. 10 m"):
        assert words in nyu
    eth3d = " ".join(PROTOCOLS["eth3d"].describe())
    for words in ("and d > 1e-05 m", "nearest subsampling to 1024 px", "at least 1e-05 m"):
        assert words in eth3d
    diode = " ".join(PROTOCOLS["diode"].describe())
    assert " < " not in diode and " > " not in diode and "0.6 .. 350 m" in diode
    assert all(CROPS[name].__doc__ for name in CROPS)


def test_settings_without_changes_give_the_protocol_itself():
    for name in PROTOCOLS:
        settings = common.evaluation(common.folder("DIR"), protocol=name)
        assert evaluate.protocol_of(settings) is PROTOCOLS[name]
    settings.max_depth = 20
    settings.clip = (0.5, 20.0)
    protocol = evaluate.protocol_of(settings)
    assert (protocol.max_depth, protocol.clip_range) == (20.0, (0.5, 20.0))


@pytest.mark.parametrize("word", eval_config.BENCHMARKS)
def test_a_word_gives_the_benchmarks_source_and_protocol(word):
    config = eval_config.get_config(word)
    assert config.eval.source.name == config.eval.protocol == word
    assert config.eval.source.path == "DIR"
    assert evaluate.protocol_of(config.eval) is PROTOCOLS[word]
    evaluate.check(config)
    with pytest.raises(ValueError, match=r"DIR|needs eigen_list"):
        data.make_source(**config.eval.source)


def test_the_shipped_pair_is_evaluated_on_scenes_without_a_data_set():
    config = eval_config.get_config("scenes")
    evaluate.check(config)
    source = data.make_source(**config.eval.source)
    assert len(source) == 512 and (config.eval.source.height, config.eval.source.width) == (
        144,
        192,
    )
    assert evaluate.wanted(config)[0] == {"student": "nano", "second": "nano-teacher"}
    assert config.order == ("student", "second") == eval_config.get_config().order


def test_settings_can_replace_those_of_another_config():
    """As stage 2 does with the config of a stage 1 that has to be run first."""
    first, own = (
        ConfigDict({"eval": common.evaluation(common.folder("DIR"), protocol="nyu")})
        for _ in range(2)
    )
    own.eval.max_depth = 5.0
    first.update(eval=own.copy_and_resolve_references().eval)
    assert evaluate.protocol_of(first.eval) == make_protocol("nyu", max_depth=5.0)
