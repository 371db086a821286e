"""What an evaluation scores: saved predictions of anybody's model, and saved models."""

from types import SimpleNamespace

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import common
from configs import eval as eval_config
from d3epth_jax import image
from d3epth_jax.data.sources.folder import folder
from d3epth_jax.evaluation import baselines, evaluate, scores
from d3epth_jax.evaluation.evaluate import make_predictors, model_predictor, saved_predictions
from d3epth_jax.evaluation.protocols import make_protocol
from d3epth_jax.evaluation.scores import Predictor
from d3epth_jax.models.depth_model import init_params
from d3epth_jax.weights import hub
from tests.conftest import small_model, write_pairs


def saved_as(source, root, function, end=".npy", dtype=np.float32):
    """A folder of predictions function(depth [H,W]) of all samples."""
    for i in range(len(source)):
        file = root / f"{source.name(i)}{end}"
        file.parent.mkdir(parents=True, exist_ok=True)
        values = function(source[i]["depth"][..., 0].astype(np.float64))
        if end == ".npy":
            np.save(file, values.astype(dtype))
        else:
            image.save_png(file, np.rint(values).astype(np.uint16))
    return SimpleNamespace(path=str(root), space="depth", scale=1.0)


@pytest.fixture
def pairs(tmp_path):
    for name in ("a", "b"):
        write_pairs(tmp_path / "pairs" / name, 2, seed=ord(name))
    return folder(str(tmp_path / "pairs"), depth_scale=1000.0)


def test_saved_predictions_are_scored_by_their_samples_names(pairs, tmp_path):
    assert [pairs.name(i) for i in range(4)] == ["a/000", "a/001", "b/000", "b/001"]
    settings = {
        "float64": saved_as(pairs, tmp_path / "1", lambda d: d * 3 + 1e6, dtype=np.float64),
        "with axis": saved_as(pairs, tmp_path / "2", lambda d: d[..., None]),
        "png": saved_as(pairs, tmp_path / "3", lambda d: d * 5000, ".png"),
        "predict's png": saved_as(
            pairs, tmp_path / "4", lambda d: 2e4 / np.maximum(d, 0.4), "_depth.png"
        ),
    }
    settings["predict's png"].space = "disparity"
    predictors = saved_predictions(settings, pairs, 0)
    predictors["shuffled"] = Predictor(predictors["float64"].predict, shuffled=True)
    results = scores.evaluate(predictors, pairs, batch_size=3, num_pictures=0)
    assert results.mean("float64") <= 1e-6 and results.mean("with axis") <= 1e-6
    assert results.mean("png") < 1e-4 and results.mean("predict's png") < 1e-4  # 16 bits
    assert results.mean("shuffled") > 0.1
    assert f"files of {tmp_path / '1'}, 32x48 pixels" in results.protocol


def test_metric_predictions_use_their_scale(pairs, tmp_path):
    settings = {"metric": saved_as(pairs, tmp_path / "m", lambda d: d * 2 * 4000, ".png")}
    settings["metric"].scale = 4000.0
    protocol = make_protocol("default", alignment="none")
    results = scores.evaluate(
        saved_predictions(settings, pairs, 0), pairs, protocol, num_pictures=0
    )
    assert results.mean("metric") == pytest.approx(1, rel=1e-4)  # twice the depth
    assert "no alignment" in results.protocol and "aligned" not in results.protocol
    settings["metric"].scale = 0.0
    with pytest.raises(ValueError, match=r"predictions.metric: .*scale"):
        saved_predictions(settings, pairs, 0)


def test_what_predict_wrote_for_the_sources_folder_is_found(pairs, tmp_path):
    """`d3epth predict ROOT` names its results by the picture's path, not by the sample."""
    for i in range(4):
        picture = pairs.files(i)["image"].relative_to(pairs.root)
        file = tmp_path / "out" / picture.with_suffix(".npy")
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, pairs[i]["depth"][..., 0])
    settings = {"ours": SimpleNamespace(path=str(tmp_path / "out"), space="depth", scale=1.0)}
    results = scores.evaluate(saved_predictions(settings, pairs, 0), pairs, num_pictures=0)
    assert results.mean("ours") <= 1e-6


def test_predictions_of_another_size_are_resized_bilinearly(pairs, tmp_path):
    for i in range(4):
        file = tmp_path / "small" / f"{pairs.name(i)}.npy"
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, np.arange(16 * 24, dtype=np.float32).reshape(16, 24))
    settings = {"small": SimpleNamespace(path=str(tmp_path / "small"), space="depth", scale=1.0)}
    predictor = saved_predictions(settings, pairs, 0)["small"]
    prediction = predictor.predict(np.zeros((1, 32, 48, 3), np.uint8), ["b/001"])[0]
    expected = np.arange(16 * 24, dtype=np.float32).reshape(16, 24, 1)
    expected = image.resize(expected, (32, 48), antialias=False)
    np.testing.assert_array_equal(prediction, expected)
    assert "16x24 pixels, resized bilinearly" in predictor.note


def test_all_unusable_predictions_are_told_before_any_is_scored(pairs, tmp_path):
    root = tmp_path / "bad" / "a"
    (tmp_path / "bad" / "b").mkdir(parents=True)
    root.mkdir()
    np.save(root / "000.npy", np.ones((48, 32)))  # turned
    np.save(root / "001.npy", np.array([{}]), allow_pickle=True)
    image.save_png(tmp_path / "bad/b/001.png", np.ones((32, 48), np.uint8))
    other = tmp_path / "nan" / "a"
    other.mkdir(parents=True)
    np.save(other / "000.npy", np.full((32, 48), np.nan))
    np.save(other / "001.npy", np.ones((32, 48, 3)))
    settings = {
        name: SimpleNamespace(path=str(tmp_path / name), space="depth", scale=1.0)
        for name in ("bad", "nan")
    }
    with pytest.raises(ValueError) as error:
        saved_predictions(settings, pairs, 0)
    text = str(error.value)
    for words in (
        "predictions.bad",
        "4 prediction(s) cannot be used",
        "a/000.npy: prediction is 32x48 but its ground truth 48x32",
        "a/001.npy: unreadable .npy",
        "b/000: no prediction; looked for",
        "b/001.png: Pillow mode 'L'",
        "predictions.nan",
        "a/000.npy: holds NaN or infinity",
        "a/001.npy: not a depth map: float64 [32, 48, 3]",
    ):
        assert words in text, words
    assert saved_predictions({}, pairs, 0) == {}
    with pytest.raises(ValueError, match="2 prediction"):
        saved_predictions(settings, pairs, 2)  # the first two images only


@pytest.mark.parametrize(
    ("picture", "prediction"),
    [
        ("test/kitchen_0004/rgb_0001", "test/kitchen_0004/pred_0001"),  # NYU
        ("ai_003_010/rgb_cam_00_fr0047", "ai_003_010/pred_cam_00_fr0047"),  # Hypersim
        ("rgb/office/images/dslr_images/DSC_0219", "rgb/office/images/dslr_images/pred_DSC_0219"),
        ("a/i_d_1_rgb", "a/i_d_1_pred"),
        ("rgb_7", "pred_7"),
    ],
)
def test_predictions_of_marigolds_inference_are_found(picture, prediction, tmp_path):
    path = tmp_path / f"{prediction}.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, np.full((32, 48), 3.0))
    saved = baselines.SavedPredictions(tmp_path, {"name": ([picture], (32, 48))})
    assert (saved(np.zeros((1, 32, 48, 3), np.uint8), ["name"]) == 3).all()
    path.rename(path.with_name("other.npy"))
    with pytest.raises(ValueError) as error:
        baselines.SavedPredictions(tmp_path, {"name": ([picture], (32, 48))})
    told = str(error.value)
    for words in (
        "name",
        picture,
        prediction,
        "pred_name",
        ".npy, .png, _depth.png",
        str(tmp_path),
    ):
        assert words in told


def test_missing_files_are_counted_and_none_is_looked_for_outside_the_folder(tmp_path):
    np.save(tmp_path / "outside.npy", np.ones((32, 48)))
    many = {f"{i}": ((), None) for i in range(300)}
    with pytest.raises(ValueError, match=r"300 prediction(.|\n)*and 200 more"):
        baselines.SavedPredictions(tmp_path / "folder", many)
    with pytest.raises(ValueError, match="no prediction"):
        baselines.SavedPredictions(tmp_path / "folder", {"../outside": ((), (32, 48))})


@pytest.mark.parametrize(
    ("resolution", "told"),
    [
        (0, "the picture's own size"),
        (64, "longest side 64 px"),
        (-1, "longest side 768 px (its default)"),
    ],
)
def test_a_models_processing_resolution_is_told_and_used(pairs, resolution, told):
    calls = []

    def pipeline(images, **settings):
        calls.append(settings)
        return SimpleNamespace(prediction=baselines.ramp(images))

    class Pipeline:
        model = SimpleNamespace(
            processing_resolution=768, processing_aspect=None, prediction_type="disparity"
        )
        __call__ = staticmethod(pipeline)

    protocol = make_protocol("default", processing_resolution=resolution)
    predictor = model_predictor(Pipeline(), protocol, 4)
    assert told in predictor.note and predictor.space == "disparity"
    scores.evaluate({"model": predictor}, pairs, protocol, num_pictures=0)
    assert calls == [
        {"processing_resolution": 768 if resolution < 0 else resolution, "batch_size": 4}
    ]


@pytest.mark.parametrize("alignment", [None, "depth"])
def test_baselines_also_come_in_the_space_that_something_is_aligned_in(pairs, tmp_path, alignment):
    config = eval_config.get_config()
    config.models = ConfigDict()
    config.eval.alignment = alignment
    saved = saved_as(pairs, tmp_path / "of", lambda d: 1 / np.sqrt(np.maximum(d, 0.4)))
    config.predictions.other.update(path=saved.path, space="sqrt_disparity")
    predictors = make_predictors(config, pairs)
    more = [] if alignment else ["constant in sqrt_disparity", "ramp in sqrt_disparity"]
    assert sorted(predictors) == sorted(["constant", "ramp", "other", *more])
    results = scores.evaluate(predictors, pairs, num_pictures=0)
    if not alignment:  # what is lower is nearer: a disparity that grows downwards
        column = predictors["ramp in sqrt_disparity"].predict(np.zeros((1, 4, 2, 3), np.uint8))[0]
        np.testing.assert_allclose(column[:, 0, 0], [1, 1.25, 1.5, 1.75])
        assert results.mean("other") < 1e-4 < results.mean("ramp in sqrt_disparity")
        assert results.mean("constant in sqrt_disparity") < results.mean("constant")


def test_what_cannot_be_evaluated_or_written_is_told_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "evaluate", lambda *_, **__: pytest.fail("it was evaluated"))
    config = eval_config.get_config()
    config.eval.source = common.procedural(1, 2, height=16, width=24)
    config.baselines, config.models = ("ramp",), {}
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="file"):
        evaluate.run(config, tmp_path / "file")
    config.eval.update(num_images=-3, num_pictures=-1, batch_size=0)
    told = "num_images is at least 0, not -3\n.*num_pictures is .*\n.*batch_size is at least 1"
    with pytest.raises(ValueError, match=told):
        evaluate.run(config, tmp_path)


def evaluated(config, pairs, workdir):
    config.eval.source = common.folder(str(pairs.root))
    config.eval.num_pictures = 0
    config.baselines, config.models = ("constant",), {}
    evaluate.run(config, workdir)


def test_maps_that_are_upside_down_are_told(pairs, tmp_path, caplog):
    config = eval_config.get_config()
    for space in ("depth", "disparity"):
        saved = saved_as(pairs, tmp_path / "maps", lambda d: 1 / np.maximum(d, 0.1))
        config.predictions = {"other": {"path": saved.path, "space": space, "scale": 1.0}}
        caplog.clear()
        evaluated(config, pairs, tmp_path / space)
        told = "other is upside down on most pictures (s<0): is its space right?"
        assert (told in caplog.text) is (space == "depth")


def test_results_say_of_what_they_are_and_what_they_replace(pairs, tmp_path, caplog):
    model = small_model(processing_resolution=48)
    hub.save_model(tmp_path / "model", model, init_params(model, 0))
    config = eval_config.get_config()
    for count in (1, 2):
        caplog.clear()
        config.eval.source = common.folder(str(pairs.root))
        config.eval.update(num_pictures=0, num_images=count)
        config.models = {"student": str(tmp_path / "model")}
        evaluate.run(config, tmp_path / "out")
        assert ("is replaced" in caplog.text) is (count == 2)
    text = (tmp_path / "out/evaluation.md").read_text()
    assert "- data: depth_scale 1000.0, holdout_every 5, min_valid 16, name folder" in text
    assert f"path {pairs.root}" in text and f"the model {tmp_path / 'model'}, processed" in text


def test_models_are_not_scored_as_if_they_were_metric():
    config = eval_config.get_config()
    config.eval.alignment = "none"
    with pytest.raises(ValueError, match=r"none is for predictions in metres.*: student"):
        evaluate.check(config)
    config.models = {}
    evaluate.check(config)


def test_a_set_of_which_nothing_counts_is_no_success(pairs, tmp_path, capsys):
    config = eval_config.get_config()
    config.eval.min_depth, config.eval.max_depth = 1e6, 2e6
    with pytest.raises(ValueError, match="not one pixel of the ground truth counts"):
        evaluated(config, pairs, tmp_path / "none")
    assert "| constant" in capsys.readouterr().out
    assert not list((tmp_path / "none").iterdir())  # nor does it replace one


def test_nothing_to_evaluate_is_told_before_the_source_is_read(tmp_path):
    config = eval_config.get_config()
    config.baselines, config.models = (), {"student": ""}
    config.eval.source = common.folder(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"nothing to evaluate.*predictions\.NAME\.path"):
        evaluate.run(config, tmp_path)
