"""The loop from config to model directory: resume, teachers, errors before training."""

import json
import os
import signal
import types

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import common, quickstart, stage1, stage2
from configs.nano import train as nano
from d3epth_jax.checkpoint import Checkpoints
from d3epth_jax.data.sources.files import SourceError
from d3epth_jax.metric_writer import MetricWriter, read_metrics
from d3epth_jax.models import presets
from d3epth_jax.models.depth_model import init_params
from d3epth_jax.training import model_setup, train
from d3epth_jax.weights import hub
from tests.conftest import small_model, small_unet, with_teachers_autoencoder, write_pairs


@pytest.fixture(autouse=True)
def small_presets(monkeypatch):
    """The configs' presets stand for models of some thousand parameters here."""
    teacher, student = small_model(small_unet((8, 16))), small_model(small_unet((4, 8), mid=None))
    for name, model in (("d2_nano", teacher), ("d3_nano", student)):
        monkeypatch.setitem(presets.PRESETS, name, (model.unet, model.autoencoder))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"), 10)


def on_pairs(config: ConfigDict, pairs, steps: int = 6) -> ConfigDict:
    config.data.source = common.folder(str(pairs), split="train")
    config.data.height, config.data.width, config.data.batch_size = 32, 48, 4
    config.eval.source = common.folder(str(pairs), split="validation")
    config.eval.update(num_images=0, num_pictures=1, batch_size=2, every=steps)
    config.model.processing_resolution = 48
    config.train.update(steps=steps, log_every=1, checkpoint_every=2)
    if "weighting" in config:
        config.weighting.dwa.window = 3  # a checkpoint every 2 steps falls inside windows
    return config


def teacher_config(pairs, **settings) -> ConfigDict:
    return on_pairs(nano.teacher(tiny=True), pairs, **settings)


def weights(directory) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*.safetensors")}


@pytest.mark.parametrize(
    "source",
    ["folder", *(pytest.param(n, marks=pytest.mark.slow) for n in ("procedural", "little memory"))],
)
def test_interrupted_run_resumes_bit_for_bit(source, pairs, tmp_path, monkeypatch):
    config = teacher_config(pairs)
    if source == "procedural":
        config.data.source = common.procedural(common.PROCEDURAL_TRAIN, 1000)
        config.data.height, config.data.width = 16, 24
    if source == "little memory":
        config.optim.moments = "bfloat16"
        config.train.host_ema_every = 3  # a checkpoint every 2 steps falls between updates
    train.run(config, tmp_path / "whole")

    def interrupted(self, step, values, **kwargs):
        if step == 5:
            raise KeyboardInterrupt
        scalars(self, step, values, **kwargs)

    scalars = MetricWriter.scalars
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MetricWriter, "scalars", interrupted)
        train.run(config, tmp_path / "parts")
    assert not (tmp_path / "parts/model").exists()
    train.run(config, tmp_path / "parts")

    assert weights(tmp_path / "parts/model") == weights(tmp_path / "whole/model")
    # Weighting state, moments and data position as well: the last checkpoints are the same.
    whole, parts = (leaves_of_last_checkpoint(tmp_path / name) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for key in whole:
        np.testing.assert_array_equal(whole[key], parts[key], err_msg=key)
    # And the metrics of steps 5 and 6 are there once, the same as without interruption.
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts")]
    timeless = [
        [{key: v for key, v in row.items() if key != "train/data_wait"} for row in run]
        for run in rows
    ]
    assert timeless[0] == timeless[1]


def leaves_of_last_checkpoint(workdir) -> dict[str, np.ndarray]:
    import orbax.checkpoint as ocp

    steps = sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    path = (workdir / "checkpoints" / str(steps[-1])).absolute()
    state = ocp.StandardCheckpointer().restore(path / "state")
    data = json.loads((path / "data" / "metadata").read_text())
    flat = jax.tree_util.tree_flatten_with_path({"state": state, "data": data})[0]
    return {jax.tree_util.keystr(key): np.asarray(value) for key, value in flat}


@pytest.mark.slow
def test_an_average_on_the_host_is_the_devices(pairs, tmp_path):
    averages = []
    for every in (0, 1):
        config = teacher_config(pairs, steps=3)
        config.train.host_ema_every = every
        _, params, *_ = hub.load_model(train.run(config, tmp_path / str(every)))
        averages.append(params)
    differences = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), *averages)
    assert max(jax.tree.leaves(differences)) < 1e-6
    # `convert` and further stages read a checkpoint of either.
    start = model_setup.read_run(tmp_path / "1")
    jax.tree.map(np.testing.assert_array_equal, start.params["unet"], averages[1]["unet"])


def test_a_normal_run_compiles_one_program_per_shape_of_batch(pairs, tmp_path, monkeypatch, caplog):
    made = []

    class Watched(train.OneProgramPerShape):
        def __init__(self, step):
            super().__init__(step)
            made.append(self)

        def __call__(self, state, frozen, batch):
            result = super().__call__(state, frozen, batch)
            # Its memory is the new state's.
            kept = [
                f"{jax.tree_util.keystr(path)} {x.shape}"
                for path, x in jax.tree.leaves_with_path(state)
                if x.size > 3 and not x.is_deleted()  # those of 3 XLA copies
            ]
            assert not kept
            return result

    monkeypatch.setattr(train, "OneProgramPerShape", Watched)
    config = teacher_config(pairs, steps=6)
    config.data.also.wide = common.other(0.5, common.folder(str(pairs), "train"), 24, 48)
    train.run(config, tmp_path)
    assert made[0].programs == 2
    config.train.steps = 7  # resumed
    (tmp_path / "config.json").unlink()
    train.run(config, tmp_path)
    assert made[1].programs == 1
    assert not [message for message in caplog.messages if "compiled again" in message]


def test_a_further_compilation_of_the_step_is_told(caplog):
    step = train.OneProgramPerShape(jax.jit(lambda state, frozen, batch: state + batch["image"]))
    batch = {"image": np.zeros((2, 3), np.float32)}
    with caplog.at_level("WARNING", logger="d3epth_jax"):
        step(np.float32(1), {}, batch)
        step(np.float32(2), {}, batch)
        step(np.float32(2), {}, {"image": np.zeros((4, 3), np.float32)})
        assert not caplog.messages
        step(np.int32(2), {}, batch)
        step(np.int32(3), {}, batch)
    assert len(caplog.messages) == 1
    assert "compiled again" in caplog.text and "image float32[2, 3]" in caplog.text


def test_finished_run_is_not_trained_again(pairs, tmp_path, monkeypatch):
    config = teacher_config(pairs, steps=2)
    output = train.run(config, tmp_path)
    before = weights(output)
    monkeypatch.setattr(train.training_data, "make_batches", lambda *_: pytest.fail("again"))
    assert train.run(config, tmp_path) == output
    assert weights(output) == before


def test_a_workdir_of_other_settings_is_refused(pairs, tmp_path):
    train.run(teacher_config(pairs, steps=2), tmp_path)
    before = (tmp_path / "config.json").read_text()
    config = teacher_config(pairs, steps=2)
    config.schedule.learning_rate = 7e-4
    config.seed = 3
    with pytest.raises(ValueError, match=r"learning_rate: 0.0008 -> 0.0007; seed: 0 -> 3"):
        train.run(config, tmp_path)
    assert (tmp_path / "config.json").read_text() == before
    config = teacher_config(pairs, steps=2)
    config.eval.batch_size, config.train.log_every = 1, 2  # nothing depends on them
    config.model.attention = "chunked"
    train.run(config, tmp_path)


def evaluated_steps(workdir) -> list[int]:
    rows = read_metrics(workdir / "metrics.jsonl")
    return [row["step"] for row in rows if "eval/abs_rel" in row]


def test_a_run_that_ends_before_its_scores_has_its_checkpoint_and_is_scored(
    pairs, tmp_path, monkeypatch
):
    config, score = teacher_config(pairs, steps=2), train.score

    def ends(*args):
        if args[-1] == 2:
            raise OSError("No space left on device")
        return score(*args)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(train, "score", ends)
        train.run(config, tmp_path)
    assert evaluated_steps(tmp_path) == [0]
    monkeypatch.setattr(train.OneProgramPerShape, "__call__", lambda *_: pytest.fail("trained"))
    train.run(config, tmp_path)
    assert evaluated_steps(tmp_path) == [0, 2] and (tmp_path / "model").is_dir()


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_run_that_is_asked_to_end_keeps_the_step_it_is_at(number, pairs, tmp_path, monkeypatch):
    config, handler = teacher_config(pairs, steps=4), signal.getsignal(number)
    config.train.checkpoint_every = 100
    step = train.OneProgramPerShape.__call__

    def signalled(self, state, *args):
        if int(state.step) == 2:
            os.kill(os.getpid(), number)
        return step(self, state, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="after step 3"):
        patch.setattr(train.OneProgramPerShape, "__call__", signalled)
        train.run(config, tmp_path)
    assert signal.getsignal(number) is handler

    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest == 3
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="is saved"):
        patch.setattr(train, "score", lambda *_: os.kill(os.getpid(), number))  # the last one
        train.run(config, tmp_path)
    assert (tmp_path / "model").is_dir()


def test_scores_of_a_run_that_left_nothing_do_not_stay(pairs, tmp_path, monkeypatch):
    config = teacher_config(pairs, steps=2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.OneProgramPerShape, "__call__", interrupt)
        train.run(config, tmp_path)
    scored, score = [], train.score
    monkeypatch.setattr(train, "score", lambda *args: (scored.append(args[-1]), score(*args))[1])
    train.run(config, tmp_path)
    assert evaluated_steps(tmp_path) == scored == [0, 2]


def interrupt(*_):
    raise KeyboardInterrupt


def test_files_beside_a_model_that_would_be_replaced_are_told_at_once(pairs, tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/notes.txt").write_text("mine")
    monkeypatch.setattr(train.training_data, "make_sources", lambda *_: pytest.fail("read data"))
    with pytest.raises(FileExistsError, match="holds more than a model"):
        train.run(teacher_config(pairs), tmp_path)


def test_a_model_of_another_run_is_not_taken_for_this_ones(pairs, tmp_path):
    config = teacher_config(pairs, steps=2)
    train.run(config, tmp_path)
    (tmp_path / "checkpoints").rename(tmp_path / "elsewhere")
    before = (tmp_path / "config.json").read_text()
    config.train.steps = 4
    with pytest.raises(FileExistsError, match="no checkpoint of its training is left"):
        train.run(config, tmp_path)
    assert (tmp_path / "config.json").read_text() == before


def test_another_models_checkpoint_is_refused(pairs, tmp_path, monkeypatch):
    config = teacher_config(pairs, steps=2)
    output = train.run(config, tmp_path)
    output.rename(tmp_path / "elsewhere")  # as if the run had not finished
    wider = small_model(small_unet((8, 24)))
    monkeypatch.setitem(presets.PRESETS, "d2_nano", (wider.unet, wider.autoencoder))
    with pytest.raises(ValueError, match="does not fit this run's model"):
        train.run(config, tmp_path)


def test_training_on_the_pairs_of_the_evaluation_is_refused(pairs, tmp_path):
    config = teacher_config(pairs)
    config.eval.source.holdout_every = 2
    with pytest.raises(ValueError, match="samples are both trained and evaluated on"):
        train.run(config, tmp_path)


def test_a_typo_in_the_teachers_path_starts_no_training(pairs, tmp_path):
    config = on_pairs(stage1.get_config("tiny"), pairs)
    config.teacher.path = str(tmp_path / "teechar/model")
    with pytest.raises(FileNotFoundError, match=r"no model there: teacher.path=.*teechar/model"):
        train.run(config, tmp_path / "student")
    assert not (tmp_path / "teechar").exists()


# Stage 2 trains what stage 1 would, first.
@pytest.mark.parametrize("stage", [pytest.param(stage1, marks=pytest.mark.slow), stage2])
def test_tiny_stages_train_what_is_absent_first_and_tell_before_and_after(
    stage, pairs, tmp_path, caplog
):
    config = on_pairs(stage.get_config("tiny"), pairs)
    teacher = train.run(teacher_config(pairs, steps=2), tmp_path / "teacher")
    config.teacher.path = config.autoencoder.path = str(teacher)
    if stage is stage2:
        config.autoencoder.path = ""
        config.init = str(tmp_path / "stage1/model")
        config.init_config = on_pairs(config.init_config, pairs, steps=2)
        config.init_config.autoencoder.path = str(teacher)
        config.init_config.workdir = str(tmp_path / "stage1")
        config.init_config.data.source.path = "nowhere"  # replaced by this run's
    with caplog.at_level("INFO", logger="d3epth_jax"):
        output = train.run(config, tmp_path / "student")
    assert (stage is stage1) or (tmp_path / "stage1/model/unet").is_dir()
    assert any("AbsRel before" in message for message in caplog.messages)
    model, params, *_ = hub.load_model(output)
    assert model.unet == presets.get("d3_nano")[0]
    assert set(params) == {"unet", "encoder", "decoder", "prompt"}  # no adapters


def test_frozen_parts_and_teacher_are_bit_identical_after_training(pairs, tmp_path):
    teacher = train.run(teacher_config(pairs, steps=2), tmp_path / "teacher")
    before = weights(teacher)
    config = on_pairs(quickstart.stage1(tiny=True), pairs, steps=3)
    with_teachers_autoencoder(config, teacher)
    student = train.run(config, tmp_path / "student")
    assert (tmp_path / "student/curves.png").is_file()
    assert weights(teacher) == before
    assert (
        weights(student)["vae/" + f"{hub.STEM}.safetensors"]
        == before["vae/" + f"{hub.STEM}.safetensors"]
    )
    assert (
        weights(student)["unet/" + f"{hub.STEM}.safetensors"]
        != before["unet/" + f"{hub.STEM}.safetensors"]
    )


def test_every_broken_pair_is_reported_before_training(tmp_path):
    root = write_pairs(tmp_path / "pairs", 12)
    (root / "depth/001.png").unlink()
    (root / "rgb/003.png").write_bytes(b"no picture")
    (root / "depth/005.png").write_bytes(b"no depth")
    config = teacher_config(root)
    with pytest.raises(SourceError) as error:
        train.run(config, tmp_path / "run")
    # 001 belongs to no split, 003 to the training's and 005 to the evaluation's.
    assert len(error.value.problems) == 3
    assert all(f"{number}.png" in str(error.value) for number in ("001", "003", "005"))
    config.data.source.on_error = config.eval.source.on_error = "skip"
    config.train.steps = 2
    train.run(config, tmp_path / "run")


@pytest.mark.parametrize(
    "change,message",
    [
        ({"trainable": ("unet/", "nett/")}, "match no parameter: .'nett/'."),
        ({"data.batch_size": 3}, "not a multiple of the 2 devices"),
        ({"train.accumulate": 4}, "micro-batches"),
        ({"model.decoder": "teacher"}, "there is no teacher"),
        ({"data.height": 36}, "multiples of 8, .* data: 36x48"),
        ({"init": "runs/nowhere/model"}, "no model there: init=runs/nowhere/model"),
    ],
)
def test_wrong_settings_are_named(change, message, pairs, tmp_path):
    config = teacher_config(pairs)
    config.update_from_flattened_dict(change)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train.run(config, tmp_path)


def test_a_start_is_not_trained_into_the_run_s_own_workdir(tmp_path):
    config = stage2.get_config("tiny")
    config.init = str(tmp_path / "model")
    with pytest.raises(ValueError, match="is where the model to start from"):
        train.run(config, tmp_path)


def test_one_folder_is_not_read_in_two_ways(pairs, tmp_path):
    config = teacher_config(pairs)
    config.data.source.depth_scale = 256.0
    config.eval.source.path = f"{pairs}/."
    with pytest.raises(ValueError, match=r"two ways: depth_scale 256.0 and 1000.0"):
        train.run(config, tmp_path)


def test_what_cannot_be_learnt_in_the_latent_stage_is_refused(pairs, tmp_path):
    model = small_model(small_unet((8, 16)), prediction_type="disparity")
    hub.save_model(tmp_path / "teacher", model, init_params(model, 0))
    config = on_pairs(quickstart.stage1(tiny=True), pairs)
    with_teachers_autoencoder(config, tmp_path / "teacher")
    with pytest.raises(ValueError, match="student predicts sqrt_disparity, its teacher disparity"):
        train.run(config, tmp_path / "run")
    config.model.prediction_type = "disparity"
    config.trainable = ("unet/", "decoder/")
    with pytest.raises(ValueError, match="no loss of the latent stage reaches the decoder"):
        train.run(config, tmp_path / "run")


def test_a_loss_that_is_not_finite_stops_the_run_and_names_it():
    checkpoints = types.SimpleNamespace(latest=5)
    with pytest.raises(train.TrainingError, match=r"step 7.*loss/ssi.*checkpoint is of step 5"):
        train.require_finite({"loss/ssi": float("nan"), "loss": 1.0}, 7, checkpoints)
    train.require_finite({"loss": 1.0}, 7, checkpoints)


def test_maps_upside_down_are_not_taken_for_pictures_without_depth(caplog):
    assert not train.tell_if_depthless({"without_loss": 1.0, "negative_scale": 1.0}, 3, False)
    assert not caplog.text
    assert train.tell_if_depthless({"without_loss": 1.0, "negative_scale": 0.0}, 3, False)
    assert "no picture of the batch has depth" in caplog.text


def test_profile_of_some_steps_is_written(pairs, tmp_path):
    config = teacher_config(pairs, steps=3)
    config.train.profile = (2, 1)
    train.run(config, tmp_path)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_a_profile_that_was_never_begun_is_not_told_as_made(tmp_path, caplog):
    profile = train.Profile(tmp_path / "profile", 2, 2)
    with profile:
        for step in (3, 4, 5):  # a run that went on after step 2
            profile.at(step)
    assert "no profile: this run began after step 2" in caplog.text
    assert not (tmp_path / "profile").exists()


def test_checkpoint_restores_into_shardings(tmp_path):
    state = {"a": jax.numpy.arange(4.0)}
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        assert checkpoints.latest is None
        checkpoints.save(3, state, {"next_index": 5})
    with Checkpoints(tmp_path / "c") as checkpoints:
        restored, position = checkpoints.restore(jax.eval_shape(lambda: state))
    np.testing.assert_array_equal(restored["a"], state["a"])
    assert position == {"next_index": 5}
