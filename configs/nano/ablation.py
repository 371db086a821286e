"""The ablation: what the pixel losses, the two stages and single choices do (METHOD 5, 7, 8).

    python -m d3epth_jax.main --config=configs/nano/ablation.py       # hours on 2 CPU cores
    python -m d3epth_jax.main --config=configs/nano/ablation.py:edges # 4 below: 5.5 hours, or a GPU
    python -m d3epth_jax.main --config=configs/nano/ablation.py:refined # 5 below: about 2 hours
    python -m d3epth_jax.main --config=configs/nano/ablation.py:tiny  # does it run at all?

Every arm is a training with a seed, evaluated on held-out scenes and, with --config.real=DIR, on
real pictures; `comparisons` says which are compared, paired by seed. Writes ablation.{md,json,png}
anew after every arm; interrupted, it goes on where it was.

1. The full model (D^2). All arms go on from the teacher that comes with the package, which stands
   for the pretrained weights of elsewhere, with the loss that the arm names and no other, as
   configs/d2.py. DWA also divides each loss by its mean in the first window (METHOD 5), which makes
   more of the edge term: an arm with that alone tells the two apart. Gradients are not clipped:
   weights of another size would be clipped more. A seed draws the scenes; all begin with the same
   weights, which had edge and DWA in their own training.
2. The student (D^3), of the teacher that comes with the package: either stage alone against both,
   with as many steps, and with as many MACs. Stage 2 alone starts as stage 1 does, a random UNet
   with blocks of the teacher's encoder and decoder. Stage 1 never trains the decoder, and the
   student's lacks blocks: it is also read by the teacher's whole one.
   A seed draws first weights and scenes.
3. Single choices, of the first seed alone: nothing is claimed of them. The target's space is
   compared from scratch, with the SSI loss and the range and sign that scratch needs beside it;
   each is fitted in its own space, which by itself favours disparity's root.
4. `edges`: what the edge term does from random weights; the teacher of 1 had it already. Pictures
   are of 48x64, a quarter of nano's: two cores show 12 trainings 154,000 of them each, and at
   nano's size too few for outlines. A seed draws first weights and scenes, and as in 1 gradients
   are not clipped. All arms have the `range` loss, which training from scratch needs. DWA does not
   divide it, and so makes three times less of it beside SSI: an arm without the edge term divides
   SSI alike. Each model is also shown other scenes' pictures: F1 is partly chance.
5. `refined`: the same asked of what sees outlines already: the student that comes with the package
   goes on, at stage 2's own learning rate, with the edge term, which it was trained with, or
   without. Gradients are not clipped, as in 1.

--config.teacher=DIR takes another teacher (in 4 that is a row of the table alone), --config.further
another student to go on from in 5. --config.seeds, --config.batch_size (a divisor of 256 if the
cache is used), --config.steps.full and so on set the size,
--config.order="('full_ssi','full_dwa')" the arms.
"""

from collections.abc import Callable, Sequence

from ml_collections import ConfigDict

from configs import cache, common
from configs.nano import train as nano

FILES = common.PROCEDURAL_TEST + 2  # seed of the rendered scenes that are written to files
AFTER = 500  # added to the scenes' seed of what goes on from another arm: it sees new ones

WARMUP = 50  # steps: every arm has one, and two stages have two
WINDOW = 50  # steps of DWA's: its weights move after two of them
SMALL = 48, 64  # pictures of 4

COMPARISONS = (  # (arm, the one that it is held against)
    ("full_static", "full_ssi"),
    ("full_dwa", "full_ssi"),
    ("full_normalized", "full_static"),
    ("full_dwa", "full_static"),
    ("full_dwa", "full_normalized"),
    ("both", "stage1"),
    ("both", "stage1_decoder"),
    ("both", "stage2"),
    ("both", "stage1_macs"),
    ("both", "stage1_decoder_macs"),
    ("both", "stage2_macs"),
    ("scratch", "stage2"),
    ("scratch", "both"),
    ("cached", "online"),
    ("depth", "sqrt_disparity"),
    ("frozen_decoder", "both"),
)
EDGES = (
    ("edges_static", "edges_ssi"),  # the edge term alone
    ("edges_dwa", "edges_ssi_normalized"),  # the edge term alone, both divided by DWA
    ("edges_ssi_normalized", "edges_ssi"),  # less of the range loss alone
    ("edges_dwa", "edges_ssi"),  # both together
    ("edges_dwa", "edges_static"),
)
REFINED = (
    ("refined_static", "refined_ssi"),
    ("refined_dwa", "refined_ssi"),
    ("refined_dwa", "refined_static"),
)
LOSSES = {  # word: (title, with the edge term, weighting)
    "ssi": ("SSI", False, "static"),
    "static": ("SSI + edge", True, "static"),
    "ssi_normalized": ("SSI, normalised", False, "normalized"),
    "normalized": ("SSI + edge, normalised", True, "normalized"),
    "dwa": ("SSI + edge, DWA", True, "dwa"),
}


def get_config(argument: str | None = None) -> ConfigDict:
    word = common.word(argument, "tiny", "edges", "refined")
    tiny = word == "tiny"
    config = ConfigDict()
    config.job = "ablation"
    config.workdir = f"runs/ablation_{word}" if word else "runs/ablation"
    config.cpu_devices = 2
    config.seeds = (0, 1) if tiny else (0, 1, 2)
    config.batch_size = {"edges": 64, "refined": 16}.get(word, 8)
    steps = {"full": 400, "student": 800, "space": 800, "edges": 2400, "refined": 1000}
    config.steps = ConfigDict(dict.fromkeys(steps, 4) if tiny else steps)
    config.teacher = "nano-teacher"
    config.further = "nano"  # of the arms of 5
    config.real = ""  # a folder of RGB-D pairs with an index
    size = {"edges": SMALL, "refined": nano.LARGER}.get(word, (nano.HEIGHT, nano.WIDTH))
    config.evaluations = ConfigDict(
        {
            "scenes": evaluation(nano.scenes(common.PROCEDURAL_TEST, 16 if tiny else 256, size)),
            "real": evaluation(common.folder("DIR")),
        }
    )
    config.evaluations.real.eval.source.path = config.get_ref("real")
    config.evaluations.real.eval.processing_resolution = -1  # the models' own
    # Read by the arms `online` and `cached`; a cache needs pictures that come again.
    config.files = nano.scenes(FILES, 32 if tiny else 4096)
    first = full_arms(config, tiny) | student_arms(config, tiny) | single_arms(config, tiny)
    config.cache = cache.get_config()
    config.cache.teacher = first["cached"].train.teacher.copy_and_resolve_references()
    config.cache.teacher.update(path=config.get_ref("teacher"), cache="")
    config.cache.data = first["cached"].train.data
    config.cache.cache.target = False  # as the loss of nano.stage1
    suites = {
        "edges": (edge_arms(config, tiny), EDGES),
        "refined": (refined_arms(config, tiny), REFINED),
    }
    arms, config.comparisons = suites.get(word, (first, COMPARISONS))
    config.arms, config.order = ConfigDict(arms), tuple(arms)  # what `order` leaves out is not run
    if word == "edges":
        config.evaluations.scenes.shuffled = "model"  # rough maps meet edges by chance
    if word == "refined":
        config.teacher = config.get_oneway_ref("further")  # the table's row to compare with
    if word in suites:
        config.evaluations.scenes.eval.processing_resolution = -1  # as real: the models' own
    return config


def arm(
    title: str, train: ConfigDict, *, after: str = "", macs_of: str = "", seeds: int = 0
) -> ConfigDict:
    """A training and its place among the others.

    after: the arm whose model it starts from; macs_of: train for as many steps as cost what that
    arm does, with all before it; seeds: only so many of the seeds, 0 all.
    """
    return ConfigDict(
        {"title": title, "train": train, "after": after, "macs_of": macs_of, "seeds": seeds}
    )


def train(config: ConfigDict, job: ConfigDict, steps: str, half: bool = False) -> ConfigDict:
    """A training of as many steps as `config.steps` says by then, evaluated at its end."""
    count = config.steps.get_ref(steps)
    job.train.steps = count // 2 if half else count
    job.schedule.warmup_steps = WARMUP
    job.data.batch_size = config.get_ref("batch_size")
    job.eval.every = (job.train.get_ref("steps") + 3) // 4  # a learning curve
    for part in (job.teacher, job.autoencoder):
        if part.path:
            part.path = config.get_ref("teacher")
    return job


def evaluation(source: ConfigDict) -> ConfigDict:
    """An evaluation of one model, which the job fills in, as configs/eval.py."""
    return common.evaluation_job(common.evaluation(source), {"model": ""})


def by_losses(
    suite: str, title: str, make: Callable[[], ConfigDict], losses: Sequence[str]
) -> dict[str, ConfigDict]:
    """An arm for each of these `LOSSES`, which differ in nothing else."""
    arms = {}
    for word in losses:
        name, edge, weighting = LOSSES[word]
        job = make()
        job.loss.beta.edge = nano.teacher().loss.beta.edge if edge else 0.0
        job.weighting.name = "static" if weighting == "static" else "dwa"
        if weighting == "normalized":
            job.weighting.dwa.ratio_clip = (1.0, 1.0)
        arms[f"{suite}_{word}"] = arm(f"{title} {name}", job)
    return arms


def full_arms(config: ConfigDict, tiny: bool) -> dict[str, ConfigDict]:
    def further() -> ConfigDict:
        job = train(config, nano.teacher(tiny), "full")
        job.init = config.get_ref("teacher")
        job.schedule.learning_rate = 3e-5  # it is trained already: more undoes what it knows
        job.optim.clip = 0
        job.weighting.dwa.window = WINDOW
        job.loss.beta.range = 0.0
        job.loss.options.upright = False
        return job

    return by_losses("full", "D^2,", further, ("ssi", "static", "normalized", "dwa"))


def edge_arms(config: ConfigDict, tiny: bool) -> dict[str, ConfigDict]:
    def scratch() -> ConfigDict:
        job = train(config, nano.teacher(tiny), "edges")
        nano.resize(job, *SMALL)
        job.schedule.warmup_steps = nano.teacher().schedule.warmup_steps
        job.optim.clip = 0
        return job

    losses = "ssi", "static", "dwa", "ssi_normalized"
    return by_losses("edges", "D^2 from random weights,", scratch, losses)


def refined_arms(config: ConfigDict, tiny: bool) -> dict[str, ConfigDict]:
    def refined() -> ConfigDict:
        job = train(config, nano.stage2(tiny), "refined")
        job.init = config.get_ref("further")
        nano.resize(job, *nano.LARGER)  # the shipped student's size
        job.optim.clip = 0
        job.weighting.dwa.window = WINDOW
        return job

    return by_losses("refined", "D^3 further,", refined, ("ssi", "static", "dwa"))


def stage2_alone(config: ConfigDict, tiny: bool, *, scratch: bool = False) -> ConfigDict:
    """Stage 2 of what stage 1 starts from; from scratch the autoencoder is random too."""
    job, first = nano.stage2(tiny), nano.stage1(tiny)
    job.init, job.model = "", first.model
    if not scratch:
        job.autoencoder = first.autoencoder
    job.loss.options.upright = True  # the sign is open
    return train(config, job, "student")


def student_arms(config: ConfigDict, tiny: bool) -> dict[str, ConfigDict]:
    def stage1(half: bool = False) -> ConfigDict:
        return train(config, nano.stage1(tiny), "student", half)

    def whole_decoder() -> ConfigDict:
        job = stage1()
        job.model.decoder = "teacher"
        return job

    return {
        "stage1_half": arm("D^3, stage 1, half of the steps", stage1(half=True)),
        "both": arm("D^3, both stages", refinement(config, tiny), after="stage1_half"),
        "stage1": arm("D^3, stage 1 only", stage1()),
        "stage1_decoder": arm("D^3, stage 1 only, teacher's whole decoder", whole_decoder()),
        "stage2": arm("D^3, stage 2 only", stage2_alone(config, tiny)),
        "stage1_macs": arm("D^3, stage 1 only, equal MACs", stage1(), macs_of="both"),
        "stage1_decoder_macs": arm(
            "D^3, stage 1 only, teacher's whole decoder, equal MACs",
            whole_decoder(),
            macs_of="both",
        ),
        "stage2_macs": arm(
            "D^3, stage 2 only, equal MACs", stage2_alone(config, tiny), macs_of="both"
        ),
    }


def refinement(config: ConfigDict, tiny: bool) -> ConfigDict:
    """Stage 2 after stage 1, each with half of the steps."""
    job = train(config, nano.stage2(tiny), "student", half=True)
    job.data.source.seed += AFTER
    return job


def single_arms(config: ConfigDict, tiny: bool) -> dict[str, ConfigDict]:
    def on_files(cached: str) -> ConfigDict:
        job = train(config, nano.stage1(tiny), "student", half=True)
        job.data.source = common.tfds("{workdir}/files", "train", "scenes")
        job.data.crop = "center"
        job.teacher.cache = cached
        return job

    def space(prediction_type: str) -> ConfigDict:
        job = train(config, nano.teacher(tiny), "space")
        job.loss.beta.edge, job.weighting.name = 0.0, "static"
        job.model.prediction_type = prediction_type
        return job

    frozen = refinement(config, tiny)
    frozen.trainable = ("unet/", "encoder/")
    return {
        "scratch": arm(
            "D^3, from scratch, pixel loss only", stage2_alone(config, tiny, scratch=True), seeds=1
        ),
        "online": arm("D^3, stage 1 on files, half of the steps", on_files(""), seeds=1),
        "cached": arm("D^3, the same from the cache", on_files("{workdir}/cache"), seeds=1),
        "sqrt_disparity": arm(
            "D^2, from scratch in sqrt_disparity", space("sqrt_disparity"), seeds=1
        ),
        "depth": arm("D^2, from scratch in depth", space("depth"), seeds=1),
        "frozen_decoder": arm(
            "D^3, both stages, decoder frozen", frozen, after="stage1_half", seeds=1
        ),
    }
