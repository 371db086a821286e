"""What d3epth bench's workers compute, on small networks: predictions and training steps."""

import dataclasses

import jax
import numpy as np
import pytest

from configs import d2, stage1, stage2
from d3epth_jax import macs, sharding
from d3epth_jax.bench import predict as bench
from d3epth_jax.bench import train as bench_train
from d3epth_jax.bench.worker import Worker, WorkerError
from d3epth_jax.models import presets
from d3epth_jax.models.config import AutoencoderKLConfig
from d3epth_jax.models.depth_model import DepthModel, init_params
from d3epth_jax.training import from_config
from d3epth_jax.training.stages import pixel
from d3epth_jax.training.train_state import init_train_state
from d3epth_jax.weights import fold, hub
from tests.conftest import small_model, small_unet

TEACHER, STUDENT = small_unet((8, 16, 16)), small_unet((8, 16))  # one level more
STUDENT = dataclasses.replace(STUDENT, in_channels=8)
TINY = small_model().autoencoder
KL = AutoencoderKLConfig(block_out_channels=(8,) * 4, norm_num_groups=4)
MODELS = {
    "d2_light": (TEACHER, TINY),
    "d3_light": (STUDENT, TINY),
    "d2_base": (TEACHER, KL),
    "d3_turbo": (STUDENT, TINY),  # with an encoder that is not its teacher's
}


@pytest.fixture
def small_presets(monkeypatch):
    for name, model in MODELS.items():
        monkeypatch.setitem(presets.PRESETS, name, model)
    monkeypatch.setitem(bench.MATMUL_SIDE, "cpu", 64)


def opened(folded: bool, tmp_path) -> tuple[bench.Ours, dict, np.ndarray]:
    ours = bench.Ours()
    ours.open("d3_light", [44, 64], 2, "float32", folded)
    first = ours.run(save=str(tmp_path / "depth.npy"))
    assert 0 < first["compile_s"] < first["seconds"]
    assert ours.run()["compile_s"] == 0
    return ours, ours.count(), np.load(tmp_path / "depth.npy")


def test_prediction_is_measured_as_a_whole_and_by_part(small_presets, tmp_path, monkeypatch):
    ours, answer, depth = opened(True, tmp_path)
    _, unfolded, same = opened(False, tmp_path)
    assert depth.shape == (2, 44, 64, 1) and depth.std() > 0.01
    np.testing.assert_allclose(depth, same, atol=1e-5)
    for kind in ("macs", "params"):
        assert set(answer[kind]) == {"encoder", "unet", "decoder"}
        assert answer[kind]["unet"] < unfolded[kind]["unet"]
    monkeypatch.setattr(fold, "fold", lambda *_: pytest.fail("the pipeline has folded them"))
    assert all(ours.part(part)["seconds"] > 0 for part in answer["macs"])
    assert ours.memory()["bytes"] > 2**20
    assert ours.matmul("float32")["flops"] > 1e6


def test_several_steps_from_zero_are_folded_as_the_pipeline_folds_them(tmp_path):
    model = small_model(STUDENT, denoising_steps=3, starts_at_zero=True)
    hub.save_model(tmp_path / "model", model, init_params(model, 0))
    ours = bench.Ours()
    assert ours.open(str(tmp_path / "model"), [32, 48], 1, "float32", True)["steps"] == 3
    assert ours.part("unet")["seconds"] > 0
    folded = macs.folded(model, ("prompt", "upsampling", "mean"))
    expected = macs.of_model(*folded, (32, 48), steps=3)
    assert ours.count()["macs"] == {part: found.dense for part, found in expected.items()}


@pytest.mark.parametrize(
    ("stage", "model", "trained", "micro"),
    [
        ("stage2", "d3_light", ("unet", "decoder"), 0),  # light decoders train in stage 2,
        pytest.param("stage1", "d3_light", ("unet",), 0, marks=pytest.mark.slow),
        ("stage1", "d3_turbo", ("unet", "encoder"), 0),  # and encoders unlike the teacher's here
        pytest.param("stage2", "d3_light", ("unet", "decoder"), 2, marks=pytest.mark.slow),
    ],
)
def test_training_steps_are_measured_alone_and_accumulated(
    small_presets, stage, model, trained, micro
):
    settings = {"size": [32, 48], "dtype": "float32", "remat": False}
    training = bench_train.Training()
    found = training.compile(4, micro, stage=stage, model=model, **settings)
    result = training.step(1)
    assert (result["micro"], result["accumulate"]) == ((2, 2) if micro else (1, 1))
    held = bench_train.planned(training.program)
    assert held > 16 * found["trained"], "parameters, two moments and the average"
    assert np.isfinite(result["loss"]) and len(result["seconds"]) == 1
    params = bench.read(model, "float32")[1]
    count = sum(x.size for part in trained for x in jax.tree.leaves(params[part]))
    assert count <= found["trained"] < count + 1000  # and adapters of features
    # Three times what is computed forward, which is less than unfolded.
    student = DepthModel(*presets.get(model), presets.SINGLE_STEP)
    expected = macs.of_model(*macs.folded(student, ("prompt", "upsampling")), (32, 48))
    least = 3 * sum(expected[part].dense for part in trained)
    rest = {"stage1": "unet", "stage2": "encoder"}[stage]  # the teacher's UNet is deeper
    most = least + 3 * expected[rest].dense
    assert least < result["macs"] / (4 if micro else 1) < most


@pytest.mark.parametrize(
    ("stage", "model", "config"),
    [
        ("stage2", "d2_base", d2.get_config()),
        ("stage2", "d3_turbo", stage2.get_config("turbo")),
        ("stage1", "d3_light", stage1.get_config()),
        ("stage1", "d3_turbo", stage1.get_config("turbo")),
    ],
)
def test_what_is_measured_is_what_the_configs_train(small_presets, stage, model, config):
    """The same weights of losses, trained parts, and state: hours are reckoned from it."""
    recipe = bench_train.recipe(stage, model, (32, 48), "float32", remat=False)
    beta = {name: x for name, x in config.loss.beta.items() if x}
    if "encoder/" not in config.trainable:
        beta.pop("enc", None)  # configs/common.py: it counts where the encoder trains
    assert recipe.beta == beta
    parts = {pattern.rstrip("/") for pattern in config.trainable}
    assert set(recipe.trainable) - {"adapters"} == parts
    tasks = pixel.TASKS if stage == "stage2" else ()
    tx, _ = from_config.make_optimizer(config)
    weights = from_config.make_weighting(config, len(tasks))
    states = [
        jax.eval_shape(make, recipe.trainable)
        for make in (recipe.init_state, lambda x: init_train_state(x, tx, weights))
    ]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    assert jax.tree.leaves(states[0]) == jax.tree.leaves(states[1])


def test_training_is_counted_as_it_computes(small_presets):
    model, params = bench.read("d3_light", "float32")
    whole = macs.of_model(model, params, (32, 48))
    counted = bench_train._forward(model, params, (32, 48))
    assert counted["unet"] < whole["unet"].dense and counted["decoder"] < whole["decoder"].dense
    assert counted["encoder"] == whole["encoder"].dense
    once = bench_train._forward(*fold.fold(model, params), (32, 48))  # what is folded already
    assert once["unet"] < counted["unet"]


def test_a_device_that_jax_cannot_use_is_told_in_words(monkeypatch):
    with (
        Worker("d3epth_jax.bench.predict", {"JAX_PLATFORMS": "abacus"}) as worker,
        pytest.raises(WorkerError, match="no device for JAX_PLATFORMS=abacus: install"),
    ):
        worker.ask("device")

    def devices():  # as JAX does without the plugin for cuda
        raise AssertionError

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(ValueError, match=r"for JAX_PLATFORMS=cuda: install .*or unset"):
        sharding.require_devices()


def test_another_attention_reaches_the_networks(small_presets, monkeypatch):
    ours = bench.Ours()
    ours.open("d2_base", [32, 48], 1, "float32", folded=True, attention="chunked")
    assert ours.pipe.model.attention == "chunked"
    read, seen = bench_train.read, []

    def spy(*args, **settings):
        seen.append(read(*args, **settings))
        return seen[-1]

    monkeypatch.setattr(bench_train, "read", spy)
    bench_train.recipe("stage1", "d3_light", (32, 48), "float32", False, attention="chunked")
    assert [model.attention for model, _ in seen] == ["chunked", "chunked"]  # student and teacher
