"""Evaluation: perfect, trivial, saved and shuffled predictors; tables; the real pairs' scores."""

import csv
import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from d3epth_jax import image
from d3epth_jax.data.sources.folder import folder
from d3epth_jax.evaluation import baselines
from d3epth_jax.evaluation.protocols import PROTOCOLS, make_protocol
from d3epth_jax.evaluation.scores import Predictor, batch_size_for, evaluate, score
from d3epth_jax.tables import format_table
from tests import metrics_oracle
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
        def predict(images, names):
            which = [
                next(i for i, x in enumerate(self.data["image"]) if (x == im).all())
                for im in images
            ]
            return function(self.data["depth"][which])

        return predict


def test_a_picture_without_ground_truth_is_neither_upright_nor_inverted():
    truth = np.linspace(1, 2, 12).reshape(3, 4, 1).astype(np.float32)
    sample, nothing = {"depth": truth}, np.zeros((3, 4, 1), bool)
    scores, _ = score(-truth, sample, nothing, "depth", make_protocol("default"))
    assert np.isnan([*scores.values()]).all(), scores
    scores, _ = score(-truth, sample, ~nothing, "depth", make_protocol("default"))
    assert scores["negative_scale"] == 1


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_affine_ground_truth_scores_perfectly(batch_size):
    source = Samples(5)
    predictors = {
        "affine": Predictor(source.oracle(lambda d: 0.1 * d + 3)),
        "inverted": Predictor(source.oracle(lambda d: 1 - 0.1 * d)),
        "disparity": Predictor(source.oracle(lambda d: 2 / d + 1), "disparity"),
        "sqrt": Predictor(source.oracle(lambda d: 2 / np.sqrt(d) + 1), "sqrt_disparity"),
    }
    results = evaluate(predictors, source, batch_size=batch_size, num_pictures=0)
    for name in predictors:
        assert results.mean(name) < 1e-6, name
        assert results.mean(name, "delta1") == 1
    assert results.mean("inverted", "negative_scale") == 1
    assert results.mean("affine", "negative_scale") == 0
    assert len(results.rows) == 5 * 4


def test_shuffled_pictures_are_worse():
    source = Samples(6)
    oracle = source.oracle(lambda d: d)
    predictors = {"true": Predictor(oracle), "shuffled": Predictor(oracle, shuffled=True)}
    results = evaluate(predictors, source, num_pictures=0)
    assert results.mean("true") < 1e-6 < 0.05 < results.mean("shuffled")


def test_constant_predictor_gets_the_mean_depth():
    source = Samples(3)
    results = evaluate({"c": Predictor(baselines.constant)}, source, num_pictures=0)
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
    results = evaluate(predictors, source, num_pictures=0)
    assert results.mean("mean") < results.mean("constant") / 2


def test_image_without_ground_truth_does_not_count():
    source = Samples(3)
    source.data["mask"][1] = False
    results = evaluate({"ramp": Predictor(baselines.ramp)}, source, num_pictures=3)
    values = [row["abs_rel"] for row in results.rows]
    assert np.isnan(values[1])
    np.testing.assert_allclose(results.mean("ramp"), np.mean([values[0], values[2]]))


def test_files_hold_every_image_and_the_galleries(tmp_path):
    source = Samples(4)
    results = evaluate(
        {"ramp": Predictor(baselines.ramp), "constant": Predictor(baselines.constant)},
        source,
        num_pictures=2,
        pictured=("ramp",),
        num_worst=3,
    )
    results.save(tmp_path)
    with (tmp_path / "evaluation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows if row["predictor"] == "ramp"] == [
        f"{i:06d}" for i in range(4)
    ]
    text = (tmp_path / "evaluation.md").read_text()
    assert "0.001 < d < 80 m" in text and f"{results.mean('ramp'):.4f}" in text
    summary = json.loads((tmp_path / "evaluation.json").read_text())
    assert summary["protocol"] == results.protocol
    assert summary["mean"]["ramp"]["silog"] == results.mean("ramp", "silog")
    assert summary["abs_rel_by_group"]["ramp"] == {"all": results.mean("ramp")}
    assert set(rows[0]) == {"predictor", "image", "group", *summary["mean"]["ramp"]}
    assert {"delta3", "i_rmse", "log10", "boundary_f1", "negative_scale"} <= set(rows[0])
    for name, pictures in (("", results.pictures), ("_worst", results.worst)):
        saved = image.load(tmp_path / f"evaluation{name}.png")
        np.testing.assert_array_equal(saved, pictures)
    assert results.worst.shape[0] > results.pictures.shape[0]  # three rows, two rows
    dataclasses.replace(results, pictures=None).save(tmp_path)
    assert not (tmp_path / "evaluation.png").exists(), "of other numbers than those beside it"


def test_the_worst_images_of_the_first_predictor_are_pictured(monkeypatch):
    from d3epth_jax import gallery

    source = Samples(7)
    drawn = []
    monkeypatch.setattr(gallery, "sheet", lambda rows: drawn.append([r.title for r in rows]))
    predictors = {"ramp": Predictor(baselines.ramp), "constant": Predictor(baselines.constant)}
    for worst_of in ("ramp", "constant"):
        drawn.clear()
        results = evaluate(
            predictors, source, batch_size=2, num_pictures=0, num_worst=3, worst_of=worst_of
        )
        rows = [row for row in results.rows if row["predictor"] == worst_of]
        rows.sort(key=lambda row: -row["abs_rel"])
        expected = [f"AbsRel {row['abs_rel']:.3f}\n{row['image']}" for row in rows[:3]]
        assert [[title.rsplit("\n", 2)[0] for title in titles] for titles in drawn] == [expected]


def test_nothing_to_evaluate_is_an_error():
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate({}, Samples(1))
    shuffled = {"shuffled": Predictor(baselines.ramp, shuffled=True)}
    with pytest.raises(ValueError, match="needs a second image"):
        evaluate(shuffled, Samples(1))
    with pytest.raises(ValueError, match="needs a second image"):
        evaluate(shuffled, Samples(3), num_images=1)
    assert evaluate(shuffled, Samples(2), num_pictures=0).mean("shuffled") > 0


def test_unusable_predictions_are_named():
    source = Samples(2)

    def broken(images, names):
        return np.where(images[..., :1] == images[1, ..., :1], np.nan, 1)

    with pytest.raises(ValueError, match=r"bad predicts NaN or infinity on 000001"):
        evaluate({"bad": Predictor(broken)}, source)
    flat = Predictor(lambda images, names: images[..., 0])
    with pytest.raises(ValueError, match=r"flat predicts \[2, 32, 48\], expected \[2, 32, 48, 1\]"):
        evaluate({"flat": flat}, source)


SIZES = {"nyu": (480, 640), "kitti": (71, 243), "eth3d": (24, 1500), "ibims": (60, 80)}


class Holes:
    """Random depth maps with holes, and predictions that are right but for noise."""

    def __init__(self, name: str, count: int = 2):
        self.samples, self.predictions = [], {}
        for i in range(count):
            rng = np.random.default_rng(i)
            shape = (*SIZES.get(name, (37, 53)), 1)
            steps = np.kron(rng.normal(0, 0.5, (4, 5, 1)), np.ones((200, 400, 1)))
            depth = np.exp(1 + rng.normal(0, 0.2, shape) + steps[: shape[0], : shape[1]])
            sample = {
                "image": rng.integers(0, 255, (*shape[:2], 3)).astype(np.uint8),
                "depth": depth.astype(np.float32),
                "mask": rng.uniform(size=shape) < 0.8,
            }
            if name == "ibims":
                sample["depth"][:, 33:] += 8
                sample["edges"] = np.zeros(shape, bool)
                sample["edges"][:, 30 + 3 * i] = True
            self.samples.append(sample)
            noise = np.exp(rng.normal(0, 0.15, shape))
            self.predictions[self.name(i)] = {
                "depth": 0.2 * sample["depth"] * noise + 0.7,
                "disparity": 0.9 / sample["depth"] * noise - 0.05,  # some are not above zero
                "sqrt_disparity": 2 - 2 / np.sqrt(sample["depth"]) * noise,  # inverted
            }

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        return self.samples[i]

    def name(self, i):
        return f"scene/{i}"


@pytest.mark.parametrize("name", metrics_oracle.ROWS)
def test_every_protocol_agrees_with_its_formulas_in_every_space(name):
    source = Holes(name)
    predictors = {
        space: Predictor(
            lambda images, names, space=space: np.stack(
                [source.predictions[n][space] for n in names]
            ),
            space,
        )
        for space in ("depth", "disparity", "sqrt_disparity")
    }
    results = evaluate(predictors, source, PROTOCOLS[name], num_pictures=0)
    assert len(results.rows) == 6
    for row in results.rows:
        i, space = int(row["image"][-1]), row["predictor"]
        prediction = source.predictions[row["image"]][space][..., 0]
        expected = metrics_oracle.score(name, prediction, source[i], space)
        assert set(expected) == set(row) - {"predictor", "image", "group"}
        for metric, value in expected.items():
            tolerance = 1e-4 if metric == "boundary_f1" else 1e-6
            assert row[metric] == pytest.approx(value, rel=tolerance), (metric, row)
        assert row["boundary_f1"] > 0.05 and row["abs_rel"] > 0.01
    assert results.mean("sqrt_disparity", "negative_scale") == 1
    assert ("DBE acc" in results.table()) == (name == "ibims")


@pytest.mark.parametrize("name", metrics_oracle.ROWS)
@pytest.mark.parametrize(("scale", "offset"), [(0.3, 2.0), (1e-2, 1e4), (50.0, 1e6)])
def test_affine_ground_truth_is_perfect_under_every_protocol(name, scale, offset):
    source = Holes(name, 1)
    depth = source[0]["depth"].astype(np.float64)
    predictors = {
        space: Predictor(lambda images, names, d=scale * depth**p + offset: d[None], space)
        for space, p in (("depth", 1), ("disparity", -1), ("sqrt_disparity", -0.5))
    }
    protocol = make_protocol(name, clip=(1e-3, 500.0))  # what is clipped cannot be perfect
    results = evaluate(predictors, source, protocol, num_pictures=0)
    for space in predictors:
        assert results.mean(space) <= 1e-6
        assert results.mean(space, "delta1") == 1
        assert results.mean(space, "boundary_f1") > 0.99 * results.mean("depth", "boundary_f1")


def test_the_header_states_the_whole_protocol():
    source = Holes("eth3d")
    noted = Predictor(lambda images, names: images[..., :1] + 1.0, "disparity", "processed at 756")
    predictors = {"ramp": Predictor(baselines.ramp), "other": noted}
    results = evaluate(
        predictors, source, PROTOCOLS["eth3d"], title="evaluation on eth3d", num_pictures=0
    )
    assert results.protocol in results.table()
    for words in (
        "evaluation on eth3d, protocol eth3d",
        "2 images, 2 with valid pixels; the published split has 454 (ETH3D)",
        "24x1500 pixels",
        "d > 1e-05 m",
        "1024 px",
        "ramp: predicts depth, aligned in depth",
        "other: predicts disparity, aligned in disparity (fit over prediction > 0; fitted values"
        " raised to 0.001, then inverted); processed at 756",
        "unweighted mean over the images",
    ):
        assert words in results.protocol, words
    changed = make_protocol("ibims", alignment="disparity", max_depth=9.0)
    text = evaluate(predictors, Holes("ibims", 1), changed, num_pictures=0).protocol
    assert "ibims with alignment='disparity', max_depth=9.0" in text
    assert "ramp: predicts depth, aligned in disparity" in text
    full = make_protocol("ibims", num_images=1)
    text = evaluate(predictors, Holes("ibims", 1), full, num_pictures=0).protocol
    assert "1 image, 1 with valid pixels: as many as the published split has" in text


def test_many_groups_stay_out_of_the_table(tmp_path):
    source = Samples(14)
    source.group = lambda i: f"group{i % source.groups}"
    for source.groups in (2, 14):
        results = evaluate({"ramp": Predictor(baselines.ramp)}, source, num_pictures=0)
        assert ("mean of sources" in results.table()) == (source.groups == 2)
        results.save(tmp_path)
        saved = json.loads((tmp_path / "evaluation.json").read_text())
        assert len(saved["abs_rel_by_group"]["ramp"]) == source.groups


def test_large_pictures_come_in_small_batches():
    assert batch_size_for((480, 640), 16) == 16
    assert batch_size_for((1024, 2048), 16) == 8
    assert batch_size_for((4032, 6048), 16) == 1
    source, seen = Samples(5), []
    source.shape = lambda i: (2048, 4096) if i < 4 else (32, 48)

    def predict(images, names):
        seen.append(list(names))
        return baselines.ramp(images)

    evaluate({"ramp": Predictor(predict)}, source, num_pictures=0)
    assert seen == [["000000", "000001"], ["000002", "000003"], ["000004"]]


MEMORY = """
import pathlib, sys
import numpy as np
from d3epth_jax.evaluation import baselines
from d3epth_jax.evaluation.scores import Predictor, evaluate
from d3epth_jax.evaluation.protocols import PROTOCOLS

class Source:
    def __init__(self, *size):
        self.size = size
    def __len__(self):
        return 1
    def name(self, i):
        return "a"
    def shape(self, i):
        return self.size
    def __getitem__(self, i):
        rng = np.random.default_rng(0)
        depth = np.empty((*self.size, 1), np.float32)
        for row in depth:
            row[:, 0] = 2 + 3 * (rng.random(len(row), np.float32) > 0.95)
        mask = np.ones(depth.shape, bool)
        mask[::3] = False
        return {"image": np.zeros((*self.size, 3), np.uint8), "depth": depth, "mask": mask}

def run(*size):
    saved = baselines.SavedPredictions(sys.argv[1], {"a": ((), size)})
    predictors = {"ramp": Predictor(baselines.ramp), "saved": Predictor(saved, "disparity")}
    return evaluate(predictors, Source(*size), PROTOCOLS[sys.argv[2]], num_pictures=1, num_worst=1)

run(672, 1008)

def memory(key):  # not ru_maxrss: that begins with the peak of the process that started this one
    status = pathlib.Path("/proc/self/status").read_text()
    return next(int(x.split()[1]) * 1024 for x in status.splitlines() if x.startswith(key))

before = memory("VmRSS:")
assert run(4032, 6048).mean("ramp") > 0.01
print(memory("VmHWM:") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="measures memory as Linux tells")
@pytest.mark.parametrize("protocol", ["eth3d", "default"])
def test_a_picture_of_eth3d_needs_less_than_one_and_a_half_gigabytes(tmp_path, protocol):
    np.save(tmp_path / "a.npy", np.random.default_rng(0).random((504, 756), np.float32))
    command = [sys.executable, "-c", MEMORY, str(tmp_path), protocol]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 2e8 < int(done.stdout) < 1.5e9


def test_table_columns_align():
    lines = format_table(["name", "AbsRel"], [["a", "0.1"], ["longer", "10.25"]]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[2] == "| a      |    0.1 |"


def test_ramp_and_constant_on_the_real_pictures_score_as_published(shared):
    """FIELD.md's table, to its three digits."""
    source = folder(str(shared / "rgbd"))
    predictors = {"constant": Predictor(baselines.constant), "ramp": Predictor(baselines.ramp)}
    results = evaluate(predictors, source, batch_size=8, num_pictures=0)
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
        for name, expected_score in zip(predictors, scores, strict=True):
            assert abs(results.mean(name, group=group) - expected_score) < 6e-4, (group, name)
    assert abs(results.mean_over_groups("ramp") - 0.270) < 6e-4
    assert abs(results.mean_over_groups("constant") - 0.432) < 6e-4


def test_fewer_images_are_spread_over_the_source():
    results = evaluate({"ramp": Predictor(baselines.ramp)}, Samples(9), num_images=3)
    assert [row["image"] for row in results.rows] == ["000000", "000004", "000008"]
    assert "3 images, 3 with valid pixels, evenly spread over 9" in results.protocol
