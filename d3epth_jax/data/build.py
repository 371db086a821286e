"""`d3epth data build`: any source as sharded ArrayRecord in TFDS' layout, written once.

A shard is an interval of the source's samples, and its bytes depend on nothing else. It is written
under another name, entered into the build's books with its checksum, and only then renamed. So a
killed build goes on with the shards that are missing, and ends as if it had never been disturbed.
"""

import contextlib
import hashlib
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

from d3epth_jax import atomic
from d3epth_jax.data import apart, manifest
from d3epth_jax.data.filters import rejection
from d3epth_jax.data.sources.files import Sample, SourceError
from d3epth_jax.data.transforms import CROPS, fit_to

VERSION = "1.0.0"
SHARD_SAMPLES = 256  # what a kill costs at most, for each worker
# One record each, for random access; they are compressed apart.
WRITER = "group_size:1,zstd:3"


@dataclass(frozen=True)
class Job:
    """What every shard has to know; workers get it once, pickled.

    Attributes:
      source: the samples, as FileSource.
      folder: of the set that is written.
      dataset, split, shards: name, split and number of shards.
      size: (H, W) all samples are scaled and cropped to, as in training; None: as they are.
      crop: "center", "kitti" or "stretch", of `transforms.fit_to`.
      filters: arguments of `filters.rejection`.
      skip: whether unreadable samples are left out; else their shard stays unwritten.
    """

    source: Any
    folder: Path
    dataset: str
    split: str
    shards: int
    size: tuple[int, int] | None
    crop: str
    filters: Mapping[str, float]
    skip: bool


def build(
    source,
    out,
    *,
    dataset: str,
    split: str = "train",
    origin: Mapping[str, Any],
    size: tuple[int, int] | None = None,
    crop: str = "center",
    shards: int | None = None,
    filters: Mapping[str, float] | None = None,
    on_error: str = "raise",
    unlisted: Sequence[str] = (),
    workers: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> dict:
    """Writes OUT/DATASET/1.0.0, or what is missing of it, and returns the split's manifest.

    Args:
      source, size, crop, filters: as Job.
      origin: the source's name and settings (JSON), to be recorded and compared.
      shards: default: one for every 256 samples.
      on_error: "raise" reports all unreadable samples at the end, and leaves the build unfinished;
        "skip" leaves them out, and lists them in the manifest.
      unlisted: problems for which samples are missing from the source, to be recorded.
      workers: processes; 0 is this one.
      progress: called with the number of samples done.

    Raises SourceError: unreadable samples, none left, another build's folder.
    """
    for what, name in (("dataset", dataset), ("split", split)):
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise ValueError(f"{what} {name!r}: TFDS takes lower case, digits and _ only")
    fixed = [name for name in CROPS if name != "random"]  # it would be cut once for ever
    if crop not in fixed:
        raise ValueError(f"crop must be one of {fixed}, got {crop!r}")
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}")
    total = len(source)
    if shards is None:
        shards = math.ceil(total / SHARD_SAMPLES)
    if not 1 <= shards <= max(total, 1):
        raise ValueError(f"shards must be from 1 to the number of samples {total}, got {shards}")
    folder = Path(out) / dataset / VERSION
    filters = dict(filters or {})
    job = Job(source, folder, dataset, split, shards, size, crop, filters, on_error == "skip")
    plan = {
        **{"dataset": dataset, "split": split, "source": dict(origin), "shards": shards},
        **{"size": size and list(size), "crop": size and crop, "filters": filters},
        **{"source_samples": total, "source_names": _digest(source)},
    }
    with _books(folder, split, plan) as work:
        entries, done = [], 0
        for entry in _write_shards(job, workers):
            entries.append(entry)
            done += entry["end"] - entry["start"]
            progress(done)
        return _finish(job, plan, unlisted, sorted(entries, key=lambda e: e["start"]), work)


@contextlib.contextmanager
def _books(folder: Path, split: str, plan: dict) -> Iterator[Path]:
    """The folder of the build's books, for one build at a time and one plan for ever."""
    work = manifest.work_folder(folder, split)
    finished = manifest.read_json(manifest.manifest_file(folder, split))
    _refuse_other(folder, plan, finished and finished["plan"])
    work.mkdir(parents=True, exist_ok=True)
    refusal = SourceError(folder, ["another process is building it now"])
    with atomic.locked(work / "lock", refusal):
        _refuse_other(folder, plan, manifest.read_json(work / "plan.json"))
        for left in work.glob("*.partial"):
            left.unlink()
        manifest.write_json(work / "plan.json", plan, work)
        yield work


def _refuse_other(folder: Path, plan: dict, started: dict | None) -> None:
    """Raises SourceError that says in what a build differs from the one in its folder."""
    if started is None:
        return
    plan = json.loads(json.dumps(plan))
    problems = [
        f"{key} is {plan.get(key)!r} now, was {started.get(key)!r}"
        for key in sorted(plan.keys() | started.keys())
        if plan.get(key) != started.get(key)
    ]
    if problems:
        advice = "take another --out or --name, or delete the folder"
        raise SourceError(folder, [*problems, f"a build with other settings lies here; {advice}"])


def _digest(source) -> str:
    """Tells whether the samples of a source are the same by name, and in the same order."""
    digest = hashlib.sha256()
    for i in range(len(source)):
        digest.update(f"{source.group(i)}\t{source.name(i)}\n".encode())
    return digest.hexdigest()


def _write_shards(job: Job, workers: int) -> Iterator[dict]:
    """The entries of all shards, in any order."""
    if workers <= 0:
        yield from (write_shard(job, number) for number in range(job.shards))
        return
    with ProcessPoolExecutor(
        min(workers, job.shards),
        # Not forked: threads of the sources' libraries do not survive that.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(job,),
    ) as pool:
        try:
            futures = [pool.submit(_write_shard, number) for number in range(job.shards)]
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            problem = "a worker died, perhaps for want of memory; finished shards are kept: run"
            problem += " the build again, with fewer --workers"
            raise SourceError(job.folder, [problem]) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker(job: Job) -> None:
    global _job
    _job = job
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends workers without a word
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed build leaves no worker behind."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _write_shard(number: int) -> dict:
    return write_shard(_job, number)


def write_shard(job: Job, number: int) -> dict:
    """Writes a shard unless it is there and whole; returns its entry.

    {file, start, end (of the source), bytes, sha256, samples [[name, group, H, W]], dropped and
    unreadable [{name, reason}]}; `file` is None where unreadable samples forbid the shard.
    """
    name = manifest.shard_file(job.dataset, job.split, number, job.shards)
    path = job.folder / name
    books = manifest.work_folder(job.folder, job.split) / f"{number:05d}.json"
    known = _known_entry(job, books, name)
    wanted = known and (job.skip or not known["unreadable"])
    if wanted and not manifest.damage(job.folder, {name: known}, checksums=True):
        return known
    total = len(job.source)
    start, end = (total * n // job.shards for n in (number, number + 1))
    entry = {"file": None, "start": start, "end": end}
    partial = books.with_name(f"{number:05d}.{os.getpid()}.partial")
    try:
        try:
            entry |= _write_records(job, range(start, end), partial)
        except RuntimeError as error:  # ArrayRecord's, such as for a full disk
            raise OSError(f"{partial}: cannot be written: {error}") from error
        if entry["unreadable"] and not job.skip:
            return entry
        entry |= {
            "file": name,
            "bytes": partial.stat().st_size,
            "sha256": manifest.sha256(partial),
        }
        manifest.write_json(books, entry, books.parent)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return entry


def _known_entry(job: Job, books: Path, name: str) -> dict | None:
    """What this build, or the finished one that is repaired, noted of the shard."""
    entry = manifest.read_json(books)
    finished = manifest.read_json(manifest.manifest_file(job.folder, job.split))
    return entry or (finished and finished["shards"].get(name))


def _write_records(job: Job, indices: range, path: Path) -> dict:
    """The records of some samples of the source; what became of each."""
    samples, dropped, unreadable = [], [], []
    writer = ArrayRecordWriter(str(path), WRITER)
    try:
        for i in indices:
            name, group = job.source.name(i), job.source.group(i)
            try:
                sample = job.source[i]
                reason = rejection(sample, **job.filters)
                if not reason and job.size:
                    sample = fit_to(sample, None, size=job.size, crop=job.crop)
                record = b"" if reason else to_record(sample, name, group)
            except (OSError, ValueError) as error:
                unreadable.append({"name": name, "reason": str(error)})
                continue
            if reason:
                dropped.append({"name": name, "reason": reason})
            elif not unreadable or job.skip:
                writer.write(record)
                samples.append([name, group, *sample["image"].shape[:2]])
    finally:
        writer.close()
    return {"samples": samples, "dropped": dropped, "unreadable": unreadable}


def to_record(sample: Sample, name: str, group: str) -> bytes:
    """A tf.train.Example of the sample, as `features` says; the mask is `depth > 0`.

    Raises ValueError where the sample is none: other dtypes or shapes, unknown depth in the mask.
    """
    image, mask = sample["image"], sample["mask"]
    depth = np.where(mask, sample["depth"], np.float32(0))
    if image.dtype != np.uint8 or image.shape != (*depth.shape[:2], 3):
        raise ValueError(f"{name}: picture {image.dtype} {list(image.shape)} is not uint8 [H,W,3]")
    if depth.dtype != np.float32 or not ((depth > 0) == mask).all() or not np.isfinite(depth).all():
        raise ValueError(f"{name}: depth must be float32, finite and positive where its mask is")
    png = io.BytesIO()
    # Written once and read often: less compression would be faster here, and slower to decode.
    Image.fromarray(image).save(png, format="PNG")
    fields = {
        "image": _bytes(png.getvalue()),
        "depth/value": _bytes(np.ascontiguousarray(depth, "<f4").tobytes()),
        "depth/shape": tf_feature_pb2.Feature(
            int64_list=tf_feature_pb2.Int64List(value=depth.shape)
        ),
        "name": _bytes(name.encode()),
        "group": _bytes(group.encode()),
    }
    example = tf_example_pb2.Example(features=tf_feature_pb2.Features(feature=fields))
    return example.SerializeToString(deterministic=True)


def _bytes(value: bytes):
    return tf_feature_pb2.Feature(bytes_list=tf_feature_pb2.BytesList(value=[value]))


def features():
    """What TFDS is told: image uint8 [H,W,3], depth float32 metres [H,W,1] (0: unknown), names.

    Depth is raw bytes, so that every bit of it is kept; ArrayRecord compresses them.
    """
    kinds = tensorflow_datasets.features
    return kinds.FeaturesDict(
        {
            "image": kinds.Image(shape=(None, None, 3), encoding_format="png"),
            "depth": kinds.Tensor(shape=(None, None, 1), dtype=np.float32, encoding="bytes"),
            "name": kinds.Text(),
            "group": kinds.Text(),
        }
    )


def _finish(job: Job, plan: dict, unlisted: Sequence[str], entries: list[dict], work: Path) -> dict:
    """Manifest and dataset_info.json, if every sample was read: from then on there is a set."""
    unreadable = [bad for entry in entries for bad in entry["unreadable"]]
    if unreadable and not job.skip:
        problems = [f"{bad['name']}: {bad['reason']}" for bad in unreadable]
        advice = "mend them and run the build again, or leave them out by --on-error skip"
        raise SourceError(job.folder, [*problems, f"not finished, for these: {advice}"])
    samples = sum(len(entry["samples"]) for entry in entries)
    if not samples:
        why = [f"{d['name']}: {d['reason']}" for e in entries for d in e["dropped"]]
        raise SourceError(job.folder, [*why, "no sample is left"])
    content = {
        "format": manifest.FORMAT,
        "plan": plan,
        "root": apart.origin(job.source) or str(job.folder),  # of `require_apart`
        "samples": samples,
        "dropped": sum(len(entry["dropped"]) for entry in entries),
        "unreadable": len(unreadable),
        "unlisted": list(unlisted),
        "shards": {entry["file"]: entry for entry in entries},
    }
    manifest.write_json(job.folder / "features.json", features().to_json(), work)
    manifest.write_json(manifest.manifest_file(job.folder, job.split), content, work)
    told = None
    while told != (info := _dataset_info(job.folder, job.dataset)):  # other splits may end now
        manifest.write_json(job.folder / "dataset_info.json", info, work)
        told = info
    shutil.rmtree(work)
    return content


def _dataset_info(folder: Path, dataset: str) -> dict:
    """TFDS' description of all finished splits."""
    splits = [
        {
            "name": split,
            "shardLengths": [str(len(shard["samples"])) for shard in made["shards"].values()],
            "numBytes": str(sum(shard["bytes"] for shard in made["shards"].values())),
            "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        }
        for split, made in manifest.read_manifests(folder).items()
    ]
    return {
        "name": dataset,
        "version": VERSION,
        "description": "Pictures with depth in metres (0: unknown), by d3epth data build.",
        "fileFormat": "array_record",
        "splits": splits,
    }
