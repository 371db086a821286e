"""The light students d3_fast and d3_turbo: their cost, and both stages from a full teacher."""

import dataclasses

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict

from configs import cache as cache_config
from configs import common, stage1, stage2
from d3epth_jax import atomic, inference, losses, macs, sharding
from d3epth_jax.metric_writer import read_metrics
from d3epth_jax.models import presets
from d3epth_jax.models.config import AutoencoderKLConfig
from d3epth_jax.models.depth_model import DepthModel, abstract_params, count_params
from d3epth_jax.training import cache, from_config, model_setup, train, training_data
from d3epth_jax.training.stages import latent
from d3epth_jax.weights import files, fold, hub, keys
from tests import unet_oracle as oracle
from tests.conftest import scenes, write_pairs

# Stable Diffusion 2, narrow and without its second level, and TAESD, narrow.
UNET = dataclasses.replace(
    presets.SD2_UNET,
    in_channels=8,
    block_out_channels=(8, 16, 16),
    down_block_types=presets.SD2_UNET.down_block_types[1:],
    up_block_types=presets.SD2_UNET.up_block_types[:-1],
    attention_head_dim=(2, 4, 4),
    cross_attention_dim=8,
    norm_num_groups=4,
)
KL = AutoencoderKLConfig(block_out_channels=(4, 4, 4, 8), norm_num_groups=4)
TEACHER = DepthModel(UNET, KL, presets.SINGLE_STEP)
NARROW = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
TAESD = dataclasses.replace(presets.TAESD, **NARROW)
STUDENTS = {
    "fast": (presets.bk_sdm(UNET, "tiny"), TAESD),
    "turbo": (presets.turbo(UNET), dataclasses.replace(presets.TAESD_TURBO, **NARROW)),
}


# Cost


def full_size(name: str) -> tuple[int, int]:
    """(dense MACs at 576x768 with 77 tokens, number of parameters)"""
    model = DepthModel(*presets.get(name), presets.SINGLE_STEP)
    params = abstract_params(model)
    prompt = params.pop("prompt")
    parameters = count_params(params)
    params["prompt"] = jax.ShapeDtypeStruct((1, 77, prompt.shape[-1]), prompt.dtype)
    parts = macs.of_model(model, params, (576, 768))
    return sum(part.dense for part in parts.values()), parameters


def test_light_students_keep_their_budget():
    base, _ = full_size("d2_base")
    for name, fewer, billions in (("d3_fast", 5, 675), ("d3_turbo", 10, 377)):
        total, parameters = full_size(name)
        assert fewer * total <= base
        assert round(total / 1e9) == billions  # what models/presets.py says
        assert parameters < 335e6


@pytest.mark.parametrize("name", ["d3_fast", "d3_turbo"])
def test_diffusers_builds_the_same_tensors_at_full_size(name):
    unet, autoencoder = presets.get(name)
    ours = abstract_params(DepthModel(unet, autoencoder, presets.SINGLE_STEP))
    with torch.device("meta"):
        nets = (
            diffusers.UNet2DConditionModel.from_config(unet.to_dict()),
            diffusers.AutoencoderTiny.from_config(autoencoder.to_dict()),
        )
    trees = (ours["unet"], {part: ours[part] for part in ("encoder", "decoder")})
    for net, tree in zip(nets, trees, strict=True):
        theirs = {key: x.numel() for key, x in net.state_dict().items()}
        assert {keys.torch_key(p): x.size for p, x in flatten_dict(tree).items()} == theirs


@pytest.mark.parametrize("name", ["d3_fast", "d3_turbo"])
def test_features_face_the_full_teachers_without_adapters(name):
    student, teacher = (DepthModel(*presets.get(n), presets.SINGLE_STEP) for n in (name, "d2_base"))
    pairs = latent.feature_pairs(student.unet, teacher.unet)
    assert pairs == [
        ("down_blocks_0", "down_blocks_0"),
        ("down_blocks_1", "down_blocks_1"),
        ("down_blocks_2.attentions_0.proj_out", "down_blocks_2.attentions_1.proj_out"),
        *((f"up_blocks_{i}", f"up_blocks_{i + 1}") for i in range(3)),
    ]
    assert latent.init_adapters(student, teacher, jax.random.key(0), 64, 96) == {}


# Training


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"), 8)


@pytest.fixture(scope="module")
def origins(tmp_path_factory):
    """A folder with a teacher/ and a taesd/, of random weights."""
    folder = tmp_path_factory.mktemp("origins")
    hub.save_model(folder / "teacher", TEACHER, oracle.random_like(abstract_params(TEACHER)))
    (folder / "taesd").mkdir()
    atomic.write_json(folder / "taesd/config.json", TAESD.to_dict())
    vae = oracle.torch_tiny(TAESD)
    files.write(folder / f"taesd/{hub.STEM}.safetensors", oracle.tensors_of(vae))
    return folder


@pytest.fixture
def narrow(monkeypatch):
    """The presets stand for narrow shapes, and training does not stop to evaluate."""
    for word, shapes in STUDENTS.items():
        monkeypatch.setitem(presets.PRESETS, f"d3_{word}", shapes)
    monkeypatch.setattr(train, "score", lambda *_, **__: 0.0)
    monkeypatch.setattr(train, "tell_scores", lambda *_: None)


def small(config, pairs, origins):
    config.teacher.path = str(origins / "teacher")
    config.data.source = common.folder(str(pairs), split="train")
    config.data.update(height=32, width=48, batch_size=2, crop="center", flip=0.0)
    config.eval.source = common.folder(str(pairs), split="validation")
    config.model.update(dtype="float32", remat=False, processing_resolution=48)
    config.train.update(steps=2, log_every=1, checkpoint_every=2, accumulate=1)
    return config


def distilling(word, pairs, origins):
    config = small(stage1.get_config(word), pairs, origins)
    config.autoencoder.path = str(origins / "taesd")
    return config


def assert_equal(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def changed(tree, other) -> bool:
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    return all(np.any(a != b) for a, b in pairs)


@pytest.mark.parametrize("word", STUDENTS)
def test_what_a_light_student_begins_as_is_told(word, pairs, origins, narrow, caplog):
    config = distilling(word, pairs, origins)
    with caplog.at_level("INFO", logger="d3epth_jax"):
        teacher = model_setup.read_teacher(config)
        student = model_setup.make_student(config, teacher)
    told = "\n".join(caplog.messages)
    assert "UNet, from the teacher: conv_in, conv_norm_out, conv_out, down_blocks_0/" in told
    left = "down_blocks_0/attentions_0, " if word == "turbo" else ""
    assert f"left out: {left}down_blocks_0/attentions_1" in told and "mid_block/" in told
    assert "random" not in told
    assert f"num_encoder_blocks={STUDENTS[word][1].num_encoder_blocks}" in told
    assert (student.model.unet, student.model.autoencoder) == STUDENTS[word]
    np.testing.assert_array_equal(student.params["prompt"], teacher.params["prompt"])


def test_both_stages_train_turbo_from_a_teacher_with_a_kl_autoencoder(
    pairs, origins, narrow, tmp_path
):
    config = distilling("turbo", pairs, origins)
    config.train.save_start = True
    distilled = hub.load_model(train.run(config, tmp_path / "stage1"))
    start = hub.load_model(tmp_path / "stage1/model_start")
    assert changed(distilled.params["encoder"], start.params["encoder"])
    assert_equal(distilled.params["decoder"], start.params["decoder"])
    row = next(r for r in read_metrics(tmp_path / "stage1/metrics.jsonl") if "train/loss" in r)
    assert {f"train/loss/{term}" for term in ("gt", "out", "feat", "enc")} < row.keys()

    config = small(stage2.get_config("turbo"), pairs, origins)
    config.teacher.path = ""
    config.init = str(tmp_path / "stage1/model")
    output = train.run(config, tmp_path / "stage2")
    refined = hub.load_model(output)
    assert changed(refined.params["decoder"], distilled.params["decoder"])
    assert_equal(refined.params["encoder"], distilled.params["encoder"])
    assert_diffusers_computes_the_same(output, refined.model, refined.params)


def assert_diffusers_computes_the_same(directory, model, params):
    unet = diffusers.UNet2DConditionModel.from_pretrained(directory, subfolder="unet")
    vae = diffusers.AutoencoderTiny.from_pretrained(directory, subfolder="vae")
    image, sample = oracle.normal(1, 1, 32, 48, 3), oracle.normal(2, 1, 4, 6, 8)
    with torch.no_grad():
        theirs = {
            "unet": oracle.run_torch_unet(unet, sample, 999, params["prompt"])[0],
            "encoder": oracle.nhwc(vae.encode(oracle.nchw(image)).latents),
            "decoder": oracle.nhwc(vae.decode(oracle.nchw(sample[..., :4])).sample),
        }
    inputs = {
        "unet": (sample, 999, params["prompt"]),
        "encoder": (image,),
        "decoder": (sample[..., :4],),
    }
    for part, module in model.modules.items():
        ours = oracle.run(module.apply, {"params": params[part]}, *inputs[part])
        ours = ours[0] if part == "unet" else ours
        assert oracle.relative_error(ours, theirs[part]) <= oracle.TOLERANCE, part


def losses_of(config):
    """(a stage's loss function, parameters of student and teacher, beta)"""
    teacher, student, trainable, _ = model_setup.make_models(config)
    of_student = student.model, student.params
    loss_fn, beta = from_config.make_loss(config, *of_student, trainable, teacher)
    return loss_fn, student.params, teacher.params, beta


@pytest.mark.parametrize(("stage", "term"), [("latent", "enc"), ("pixel", "edge")])
def test_every_weight_of_the_light_part_has_a_gradient_of_the_loss(
    stage, term, pairs, origins, narrow
):
    config = distilling("turbo", pairs, origins)
    part = "encoder" if stage == "latent" else "decoder"
    if stage == "pixel":
        config = small(stage2.get_config("turbo"), pairs, origins)
        config.model.update(preset="d3_turbo", unet="teacher")
        config.update(init="", teacher=distilling("turbo", pairs, origins).teacher)
        config.autoencoder.path = str(origins / "taesd")
    config.loss.beta = {name: float(name == term) for name in config.loss.beta}
    loss_fn, params, of_teacher, beta = losses_of(config)
    assert list(beta) == [term]

    def loss(trained, params, of_teacher):
        values, weights, _ = loss_fn({**params, part: trained}, {"teacher": of_teacher}, scenes(2))
        return losses.batch_mean(values[term], weights[term])

    slopes = jax.jit(jax.grad(loss))(params[part], params, of_teacher)
    for path, slope in flatten_dict(slopes).items():
        assert np.any(slope != 0), path


@pytest.mark.slow
def test_a_teacher_cache_gives_a_light_student_the_same_lessons(pairs, origins, narrow, tmp_path):
    making = cache_config.get_config()
    making.teacher.path = str(origins / "teacher")
    making.data.source = common.folder(str(pairs), split="train")
    making.data.update(height=32, width=48, batch_size=2, flip=0.0)
    making.cache.shard_size = 4
    cache.run(making, tmp_path / "cache")
    results = []
    for folder in ("", str(tmp_path / "cache")):
        config = distilling("turbo", pairs, origins)
        config.teacher.cache = folder
        training, _ = training_data.make_sources(config)
        batch = next(training_data.make_batches(config, sharding.make_mesh(), training))
        loss_fn, params, of_teacher, beta = losses_of(config)
        assert set(beta) == {"gt", "out", "feat", "enc"}
        results.append(jax.jit(loss_fn)(params, {"teacher": of_teacher}, batch)[0])
    online, cached = results
    for term in beta:
        np.testing.assert_allclose(cached[term], online[term], rtol=2e-3, err_msg=term)


def test_folding_a_turbo_student_changes_nothing():
    model = DepthModel(*STUDENTS["turbo"], presets.SINGLE_STEP)
    params = oracle.random_like(abstract_params(model))
    image = oracle.normal(3, 1, 40, 48, 3)

    def depth(model):
        def run(params):
            rgb = inference.encode_image(model, params, image)
            z0 = inference.denoise(model, params, rgb, jnp.zeros_like(rgb), 1)
            return model.modules["decoder"].apply({"params": params["decoder"]}, z0).mean(-1)

        return jax.jit(run)

    folded, of_folded = fold.fold(model, params)
    assert folded != model
    error = oracle.relative_error(depth(folded)(of_folded), depth(model)(params))
    assert error <= oracle.TOLERANCE


# Words


def test_words_of_students_and_data_combine():
    config = stage1.get_config("marigold,turbo")
    assert (config.model.preset, config.data.source.name) == ("d3_turbo", "hypersim")
    assert [stage2.get_config(word).trainable for word in ("turbo", None)] == [
        ("unet/", "decoder/"),
        ("unet/",),  # METHOD 8: Stable Diffusion's decoder, which it may be, stays
    ]
    assert stage1.get_config().model.processing_resolution == 768
    assert stage2.get_config("turbo,tfds").init == stage1.get_config("turbo").workdir + "/model"
    for argument, message in (
        ("fast,turbo", "exclude each other"),
        ("tiny,marigold", "exclude each other"),
        ("turbo,marrigold", "unknown word 'marrigold'"),
    ):
        with pytest.raises(ValueError, match=message):
            stage1.get_config(argument)
