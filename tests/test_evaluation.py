"""Evaluation: perfect, trivial and shuffled predictors; tables; the real pictures' known scores."""

import csv

import numpy as np
import pytest

from d3epth_jax import baselines
from d3epth_jax.data.sources.folder import folder
from d3epth_jax.evaluation import Predictor, evaluate, format_table
from tests.conftest import scenes


class Samples:
    """Scenes in memory, as a source; `predict` looks the ground truth up by its picture."""

    def __init__(self, count, **settings):
        self.data = scenes(count, **settings)

    def __len__(self):
        return len(self.data["image"])

    def __getitem__(self, i):
        return {name: value[i] for name, value in self.data.items()}

    def oracle(self, function):
        def predict(images):
            which = [
                next(i for i, x in enumerate(self.data["image"]) if (x == im).all())
                for im in images
            ]
            return function(self.data["depth"][which])

        return predict


LIMITS = {"min_depth": 1e-3, "max_depth": 80.0}


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_affine_ground_truth_scores_perfectly(batch_size):
    source = Samples(5)
    predictors = {
        "affine": Predictor(source.oracle(lambda d: 0.1 * d + 3)),
        "inverted": Predictor(source.oracle(lambda d: 1 - 0.1 * d)),
        "disparity": Predictor(source.oracle(lambda d: 2 / d + 1), "disparity"),
        "sqrt": Predictor(source.oracle(lambda d: 2 / np.sqrt(d) + 1), "sqrt_disparity"),
    }
    results = evaluate(predictors, source, batch_size=batch_size, num_pictures=0, **LIMITS)
    for name in predictors:
        assert results.mean(name) < 1e-5, name
        assert results.mean(name, "delta1") == 1
    assert results.mean("inverted", "negative_scale") == 1
    assert results.mean("affine", "negative_scale") == 0
    assert len(results.rows) == 5 * 4


def test_shuffled_pictures_are_worse():
    source = Samples(6)
    oracle = source.oracle(lambda d: d)
    predictors = {"true": Predictor(oracle), "shuffled": Predictor(oracle, shuffled=True)}
    results = evaluate(predictors, source, num_pictures=0, **LIMITS)
    assert results.mean("true") < 1e-6 < 0.05 < results.mean("shuffled")


def test_constant_predictor_gets_the_mean_depth():
    source = Samples(3)
    results = evaluate({"c": Predictor(baselines.constant)}, source, num_pictures=0, **LIMITS)
    expected = []
    for i in range(3):
        d = source[i]["depth"][source[i]["mask"]].astype(np.float64)
        expected.append(np.mean(np.abs(d.mean() - d) / d))
    np.testing.assert_allclose(results.mean("c"), np.mean(expected), rtol=1e-5)


def test_mean_map_beats_a_constant_where_scenes_share_a_layout():
    source = Samples(8)
    ramp = np.linspace(5, 1, 32, dtype=np.float32)[None, :, None, None]
    source.data["depth"] = source.data["depth"] * 0.1 + ramp
    mean_map = baselines.MeanMap(source, num_images=8, height=16, width=24)
    predictors = {"constant": Predictor(baselines.constant), "mean": Predictor(mean_map)}
    results = evaluate(predictors, source, num_pictures=0, **LIMITS)
    assert results.mean("mean") < results.mean("constant") / 2


def test_image_without_ground_truth_does_not_count():
    source = Samples(3)
    source.data["mask"][1] = False
    results = evaluate({"ramp": Predictor(baselines.ramp)}, source, num_pictures=3, **LIMITS)
    values = [row["abs_rel"] for row in results.rows]
    assert np.isnan(values[1])
    np.testing.assert_allclose(results.mean("ramp"), np.mean([values[0], values[2]]))


def test_files_hold_every_image_and_the_gallery(tmp_path):
    source = Samples(4)
    results = evaluate(
        {"ramp": Predictor(baselines.ramp), "constant": Predictor(baselines.constant)},
        source,
        num_pictures=2,
        pictured=("ramp",),
        **LIMITS,
    )
    results.save(tmp_path)
    with (tmp_path / "evaluation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows if row["predictor"] == "ramp"] == [
        f"{i:06d}" for i in range(4)
    ]
    text = (tmp_path / "evaluation.md").read_text()
    assert "0.001 < d < 80 m" in text and f"{results.mean('ramp'):.4f}" in text
    assert results.pictures.dtype == np.uint8 and results.pictures.ndim == 3


def test_nothing_to_evaluate_is_an_error():
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate({}, Samples(1), **LIMITS)


def test_table_columns_align():
    lines = format_table(["name", "AbsRel"], [["a", "0.1"], ["longer", "10.25"]]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[2] == "| a      |    0.1 |"


def test_ramp_and_constant_on_the_real_pictures_score_as_published(shared):
    """FIELD.md's table, to its three digits."""
    source = folder(str(shared / "rgbd"))
    predictors = {"constant": Predictor(baselines.constant), "ramp": Predictor(baselines.ramp)}
    results = evaluate(predictors, source, batch_size=8, num_pictures=0, **LIMITS)
    expected = {
        "iclnuim_livingroom1_rendered": (0.167, 0.140),
        "kitti_object_lidar": (0.493, 0.332),
        "middlebury_motorcycle": (0.251, 0.148),
        "nyu_diningroom_slambook": (0.619, 0.395),
        "realsense_room_chen": (0.629, 0.354),
        "rellis3d_lidar": (0.530, 0.194),
        "tum_fr2_desk_kinect": (0.338, 0.327),
    }
    assert results.groups == sorted(expected)
    for group, scores in expected.items():
        for name, score in zip(predictors, scores, strict=True):
            assert abs(results.mean(name, group=group) - score) < 6e-4, (group, name)
    assert abs(results.mean_over_groups("ramp") - 0.270) < 6e-4
    assert abs(results.mean_over_groups("constant") - 0.432) < 6e-4
