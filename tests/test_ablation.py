"""The ablation: its arms, its arithmetic beside numbers by hand, and the whole of it in small."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from configs import common
from configs.nano import ablation as ablation_config
from d3epth_jax import data, macs, main
from d3epth_jax.evaluation import evaluate
from d3epth_jax.models import presets
from d3epth_jax.models.depth_model import DepthModel, init_params
from d3epth_jax.training import ablation, ablation_report, train
from d3epth_jax.weights import hub
from tests.conftest import small_model, small_unet, write_pairs

nano = ablation_config.nano


@pytest.fixture
def small(monkeypatch):
    """The config's presets stand for models of some thousand parameters, and pictures of 24x32.

    Returns the teacher.
    """
    teacher = small_model(small_unet((8, 16)), prediction_type="sqrt_disparity")  # as nano
    student = small_model(small_unet((4, 8), mid=None))
    for name, model in (("d2_nano", teacher), ("d3_nano", student)):
        monkeypatch.setitem(presets.PRESETS, name, (model.unet, model.autoencoder))
    monkeypatch.setattr(nano, "HEIGHT", 24)
    monkeypatch.setattr(nano, "WIDTH", 32)
    return teacher


def test_the_chart_spreads_arms_that_are_compared_over_an_axis_of_their_own():
    seeds = {"a": [0.1, 0.1001, 0.1002], "b": [0.1001, 0.1002, 0.1003], "alone": [0.9]}
    seeds["c"] = [0.1002, 0.1003, 0.1011]
    arms = {
        name: {"title": name, "scores": {"abs_rel": dict(enumerate(values))}}
        for name, values in seeds.items()
    }
    pair = {"arm": "b", "against": "a", "measure": "abs_rel", "n": 3}
    content = {"arms": arms, "comparisons": [pair], "reference": {"teacher": {"abs_rel": 0.2}}}
    widths = []
    through = {**pair, "arm": "c", "against": "b"}
    for comparisons in ([pair], [pair, through], [{**pair, "n": 1}], []):
        drawn = np.asarray(ablation_report.chart({**content, "comparisons": comparisons}))
        marks = (drawn == ablation_report.SEED).all(-1)
        row = marks[marks.any(1).argmax() :][: ablation_report.ROW]
        columns = np.flatnonzero(row.any(0))
        widths.append(columns[-1] - columns[0])
    assert widths[0] > ablation_report.PANEL / 2 > widths[1] > 30 > widths[2] == widths[3]


def test_mean_and_deviation_by_hand():
    assert ablation_report.mean_and_deviation([1, 2, 6]) == (3, pytest.approx(math.sqrt(7)))
    assert math.isnan(ablation_report.mean_and_deviation([5])[1])


@pytest.mark.parametrize(
    ("ours", "theirs", "sign", "difference", "error", "verdict", "firm"),
    [
        # Differences -1, -2, -3: deviation 1, standard error 1 / sqrt(3).
        ((1, 2, 3), (2, 4, 6), -1, -2, 3**-0.5, "better", False),
        ((1, 2, 3), (2, 4, 6), 1, -2, 3**-0.5, "worse", False),
        # Far apart as arms, and each seed alike: what pairing is for.
        ((10, 20, 30), (9, 19, 29), 1, 1, 0, "better", True),
        # Differences -9, -10, -11: 17 errors. Student's bar for three is 4.3.
        ((1, 2, 3), (10, 12, 14), -1, -10, 3**-0.5, "better", True),
        # Differences 0, 1, 2: mean 1, error 0.577: not beyond two.
        ((0, 1, 2), (0, 0, 0), 1, 1, 3**-0.5, "no difference shown", False),
        ((1, 1, 1), (1, 1, 1), 1, 0, 0, "no difference shown", False),
        ((1,), (2, 4, 6), -1, -1, math.nan, "one seed", False),
    ],
)
def test_difference_is_claimed_beyond_two_standard_errors(
    ours, theirs, sign, difference, error, verdict, firm
):
    found = ablation_report.compare(dict(enumerate(ours)), dict(enumerate(theirs)), sign)
    assert found.difference == pytest.approx(difference)
    assert found.error == pytest.approx(error, nan_ok=True)
    assert (found.n, found.verdict, found.firm) == (len(ours), verdict, firm)


def test_only_common_seeds_are_compared():
    found = ablation_report.compare({1: 5.0, 2: 7.0, 3: 1.0}, {2: 6.0, 3: 0.0, 4: 100.0}, 1)
    assert (found.difference, found.error, found.n) == (1, 0, 2)
    assert ablation_report.compare({1: 5.0}, {2: 6.0}, 1).verdict == "no common seed"


def test_files_of_evaluations_become_pairs_and_tables(tmp_path):
    """Two arms, two seeds: every number of the report from numbers that were written by hand."""
    written = {"first": (0.5, 0.25), "second": (0.25, 0.125)}
    for name, values in written.items():
        for seed, value in enumerate(values):
            for kind in ("scenes", "real"):
                folder = tmp_path / f"seed{seed}" / name / kind
                folder.mkdir(parents=True)
                shuffled = {"abs_rel": 1.0, "boundary_f1": 0.5}
                content = {
                    "mean": {
                        "model": {"abs_rel": value, "boundary_f1": None},
                        "model, pictures shuffled": shuffled,
                    },
                    "abs_rel_by_group": {"model": {"desk": value, "hall": value / 2}},
                }
                (folder / "evaluation.json").write_text(json.dumps(content))
    arms = {name: ablation_report.Arm(f"the {name}", (0, 1), 10, 2, 20) for name in written}
    content = ablation_report.collect(tmp_path, arms, [("second", "first"), ("second", "third")])
    found = {pair["measure"]: pair for pair in content["comparisons"]}
    assert set(found) == {"abs_rel", "real"}  # F1 has no number
    # -0.25 and -0.125: deviation 0.125 / sqrt(2), of which the error is the half times sqrt(2).
    assert found["abs_rel"]["difference"] == pytest.approx(-0.1875)
    assert found["abs_rel"]["error"] == pytest.approx(0.0625)
    assert found["abs_rel"]["verdict"] == "better"
    assert found["real"]["difference"] == pytest.approx(-0.1875 * 0.75)
    table = ablation_report.markdown(content)
    assert "| -0.1875 ± 0.0625 better |" in table  # three errors, of two seeds
    assert "| 0.3750 ± 0.1768 |" in table and "| 0.188 ± 0.088 |" in table  # AbsRel, of the hall


def test_equal_macs_mean_as_many_steps_as_the_whole_chain_pays_for():
    config = ablation_config.get_config()
    config.steps.student = 100
    costs = {"stage1_half": 2, "both": 6, "stage1_macs": 2, "stage2_macs": 6}
    arms = config.copy_and_resolve_references().arms
    assert ablation.chain(arms, "both") == ["stage1_half", "both"]
    assert ablation.total_macs(arms, costs, "both") == 50 * 2 + 50 * 6
    assert ablation.steps_of(arms, costs, "stage1_macs") == 200
    assert ablation.steps_of(arms, costs, "stage2_macs") == 67


SUITES = ("edges", "refined")


@pytest.mark.parametrize("word", [None, "tiny", *SUITES])
def test_config_holds_together(word):
    config = ablation_config.get_config(word)
    ablation.check(config)
    assert set(config.order) == set(config.arms)
    assert {name for pair in config.comparisons for name in pair} <= set(config.order)
    seeds = {config.evaluations.scenes.eval.source.seed}
    seeds |= {arm.train.eval.source.seed for arm in config.arms.values()}
    trained = {
        arm.train.data.source.seed + ablation.SEEDS_APART * (seed + 1)
        for arm in config.arms.values()
        if arm.train.data.source.name == "procedural"
        for seed in config.seeds
    }
    assert not seeds & {*trained, config.files.seed}, "trained and evaluated on the same scenes"
    with pytest.raises(ValueError, match="unknown word 'tony'"):
        ablation_config.get_config("tony")


def test_flags_reach_every_arm():
    config = ablation_config.get_config()
    assert main.fill_in(config, "C").arms.stage2.train.autoencoder.path == "nano-teacher"
    config.steps.update(space=8, student=6)
    config.update(teacher="A", real="B")
    config = main.fill_in(config, "C")
    steps = {name: config.arms[name].train.train.steps for name in config.order}
    assert [steps[name] for name in ("depth", "stage1", "stage1_half", "both")] == [8, 6, 3, 3]
    assert config.arms.full_ssi.train.init == "A"
    assert config.arms.stage1.train.teacher.path == config.cache.teacher.path == "A"
    assert config.arms.stage2.train.autoencoder.path == "A"
    assert config.evaluations.real.eval.source.path == "B"
    assert config.evaluations.real.eval.processing_resolution == -1
    assert config.arms.cached.train.teacher.cache == "C/cache"
    assert config.arms.scratch.train.autoencoder.path == ""


def test_what_needs_an_arm_that_failed_is_left_out(tmp_path, monkeypatch):
    config = ablation_config.get_config("tiny")
    config.order = ("stage1_half", "both", "stage1_macs", "stage1")
    ran = []

    def run_arm(config, workdir, name, seed):
        if (name, seed) == ("stage1_half", 0):
            raise train.TrainingError("diverged")
        ran.append((name, seed))

    monkeypatch.setattr(ablation, "run_arm", run_arm)
    monkeypatch.setattr(ablation, "evaluate_once", lambda *_, **__: None)
    monkeypatch.setattr(ablation_report, "write", lambda *_: None)
    with pytest.raises(train.TrainingError, match=r"(?s)failed.*stage1_half, seed 0: diverged$"):
        ablation.run(config, tmp_path)
    second = [(name, 1) for name in config.order]
    assert ran == [("stage1", 0), *second]


def test_settings_that_make_no_sense_are_told_at_once():
    config = ablation_config.get_config("tiny")
    config.order = ()
    with pytest.raises(ValueError, match="no arm to run"):
        ablation.check(config)
    config.order = ("both", "nobody", "stage2_macs", "stage1_half", "frozen_decoder")
    config.arms.stage1_half.seeds, config.arms.frozen_decoder.seeds = 1, 0
    config.seeds = (1, 1, 2)
    config.arms.both.train.schedule.schedule = "linear"
    with pytest.raises(ValueError) as raised:
        ablation.check(config)
    for words in (
        "seeds: ",
        "['nobody']",
        "'stage1_half' before it",
        "arms.frozen_decoder has seeds that 'stage1_half' lacks",
        "arms.both: unknown schedule",
    ):
        assert words in str(raised.value)


@pytest.mark.parametrize("suite", ["full", *SUITES])
def test_arms_of_the_losses_differ_in_these_alone(suite):
    arms = ablation_config.get_config(suite if suite in SUITES else None).arms
    jobs = {
        name.removeprefix(f"{suite}_"): arm.train.copy_and_resolve_references()
        for name, arm in arms.items()
        if name.startswith(f"{suite}_")
    }
    edge = {word: job.loss.beta.edge for word, job in jobs.items()}
    assert edge == {word: 0.0 if word.startswith("ssi") else 0.5 for word in jobs}
    moves = {word for word, job in jobs.items() if job.weighting.name == "dwa"}
    still = {word for word in moves if jobs[word].weighting.dwa.ratio_clip == (1, 1)}
    assert (moves, still) == (set(jobs) - {"ssi", "static"}, {w for w in jobs if "normal" in w})
    assert {bool(job.init) for job in jobs.values()} == {suite != "edges"}
    for job in jobs.values():  # everything else is the same
        job.loss.beta.edge, job.weighting.name, job.weighting.dwa.ratio_clip = 0.0, "", None
    assert len({job.to_json_best_effort() for job in jobs.values()}) == 1


def test_arms_differ_in_what_they_are_about():
    arms = ablation_config.get_config().arms
    # Stage 2 alone begins as stage 1 does.
    for part in ("model", "autoencoder"):
        assert arms.stage2.train[part] == arms.stage1.train[part]
    online, cached = arms.online.train, arms.cached.train
    cached.teacher.cache = ""
    assert online.to_json_best_effort() == cached.to_json_best_effort()


@pytest.mark.parametrize("trained", [("unet", "encoder", "decoder"), ("unet",)])
def test_step_costs_what_its_parts_cost(trained):
    job = ablation_config.get_config("tiny").arms.scratch.train.copy_and_resolve_references()
    job.trainable = tuple(f"{part}/" for part in trained)
    # In training too what can be folded is.
    model, params = macs.folded(DepthModel(*presets.get("d3_nano"), presets.SINGLE_STEP))
    size = (job.data.height, job.data.width)
    forward = macs.of_model(model, params, size, job.data.batch_size)
    forward = {part: found.valid for part, found in forward.items()}
    formula = macs.of_training(forward, trained, ["decoder"])
    assert ablation.step_macs(job) == pytest.approx(formula, rel=0.03)


def test_scenes_are_written_once_and_as_rendered(tmp_path):
    settings = common.procedural(3, 20, height=16, width=24)
    for _ in range(2):
        ablation.write_files(settings, tmp_path)
    written = data.make_source("tfds", path=str(tmp_path), dataset="scenes", split="train")
    rendered = data.read_samples(data.make_source(**settings), range(16))
    assert len(written) == 20
    for index, theirs in enumerate(rendered):
        ours = written[index]
        np.testing.assert_array_equal(ours["image"], theirs["image"])
        np.testing.assert_array_equal(ours["depth"], np.where(theirs["mask"], theirs["depth"], 0))
    assert (written[19]["image"] != rendered[3]["image"]).any()


@pytest.mark.parametrize("cached", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_ablation_runs_from_nothing_to_the_tables_and_goes_on(
    cached, small, tmp_path, monkeypatch, capsys
):
    config = ablation_config.get_config("tiny")
    config.real = str(write_pairs(tmp_path / "pairs", 2))
    config.teacher = str(tmp_path / "teacher")
    config.evaluations.scenes.shuffled = "model"
    hub.save_model(config.teacher, small, init_params(small, 0))
    config.order = ("full_ssi", "stage1_half", "both", "stage1_macs", *["cached"] * cached)
    for name in config.order[1:]:
        config.arms[name].seeds = 1
    workdir = tmp_path / "out"
    run = main.fill_in(config, workdir)
    main.check_jobs({"": run})

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ablation_report, "write", killed)  # after the first arm
        with pytest.raises(KeyboardInterrupt):
            main.run_job(run, workdir)
    main.run_job(run, workdir)
    told = capsys.readouterr().out
    content = json.loads((workdir / "ablation.json").read_text())
    trivial = [
        f"{name}{space}" for name in ("constant", "ramp") for space in ("", " in sqrt_disparity")
    ]
    assert list(content["reference"]) == [*trivial, "teacher", "teacher, pictures shuffled"]
    assert list(content["arms"]) == list(config.order)
    arms = content["arms"]
    assert [len(arm["scores"]["real"]) for arm in arms.values()] == [2, 1, 1, 1, *[1] * cached]
    written = json.loads((workdir / "seed1/full_ssi/scenes/evaluation.json").read_text())
    own, others = written["mean"]["model"], written["mean"]["model, pictures shuffled"]
    scores = arms["full_ssi"]["scores"]
    assert scores["abs_rel"]["1"] == own["abs_rel"] != others["abs_rel"]
    assert scores["f1_above_chance"]["1"] == own["boundary_f1"] - others["boundary_f1"]
    assert arms["both"]["steps"] == 4 and arms["stage1_half"]["steps"] == 2
    assert arms["stage1_macs"]["macs"] == pytest.approx(arms["both"]["macs"], rel=0.2)
    if cached:  # it spares the teacher's encoder and the latent's share of its UNet
        assert arms["cached"]["step_macs"] < arms["stage1_half"]["step_macs"]
    compared = {(pair["arm"], pair["against"]) for pair in content["comparisons"]}
    assert compared == {("both", "stage1_macs")}  # of what was run
    # Seeds are apart in scenes; what goes on from an arm sees new scenes.
    ran = [(0, "full_ssi"), (1, "full_ssi"), (0, "both")]
    configs = [json.loads((workdir / f"seed{s}/{n}/config.json").read_text()) for s, n in ran]
    assert [c["seed"] for c in configs] == [0, 1, 0]
    assert [c["data"]["source"]["seed"] for c in configs] == [10_001, 20_001, 12_501]
    assert configs[2]["init"] == str(workdir / "seed0/stage1_half/model")
    table = (workdir / "ablation.md").read_text()
    assert "| D^3, both stages " in table and "AbsRel, real" in table
    compared = table.strip().rsplit("\n\n", 1)[-1]
    assert "stage 1 only, equal MACs" in compared
    assert "better" not in compared and "worse" not in compared, "of one seed nothing is claimed"
    assert table in told
    assert Image.open(workdir / "ablation.png").width > 1000

    monkeypatch.setattr(evaluate, "run", killed)
    monkeypatch.setattr(train.Checkpoints, "save", killed)
    main.run_job(run, workdir)  # all is there: nothing is made again
    run.arms.full_ssi.train.schedule.learning_rate *= 2
    with pytest.raises(ValueError, match=r"seed0/full_ssi holds a run with other settings"):
        main.run_job(run, workdir)


def test_the_refined_arms_go_on_from_what_the_table_compares_them_with():
    config = ablation_config.get_config("refined")
    config.further = "another"
    assert {config.teacher, *(config.arms[name].train.init for name in config.order)} == {"another"}
    resolutions = {job.eval.processing_resolution for job in config.evaluations.values()}
    assert resolutions == {-1}  # each at its own size


def test_edges_from_random_weights_are_also_scored_by_chance():
    jobs = ablation.evaluations(ablation_config.get_config("edges"), "TEACHER")
    assert jobs["scenes"].shuffled == "model" and jobs["scenes"].models.model == "TEACHER"
