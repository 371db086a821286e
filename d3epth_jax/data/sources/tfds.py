"""Any data set of TFDS with pictures and depth, and what `d3epth data build` wrote.

Licence and download are the data set's own (https://www.tensorflow.org/datasets). It has to be
prepared as ArrayRecord, which TensorFlow does once, in an environment of its own:
    tfds build nyu_depth_v2 --file_format=array_record --data_dir=DATA
Reading needs no TensorFlow. Expected: DATA/NAME[/CONFIG]/VERSION/ with dataset_info.json,
features.json and NAME-SPLIT.array_record-*; sets of `d3epth data build` look the same and have a
manifest, by which they are checked.
"""

import functools
import io
import re
import threading
from pathlib import Path

import numpy as np
import tensorflow_datasets
from PIL import Image

from d3epth_jax import image as image_lib
from d3epth_jax.data import manifest
from d3epth_jax.data.sources import files
from d3epth_jax.data.sources.files import FileSource, Item, SourceError

FEATURES = tensorflow_datasets.features
PREPARE = "`tfds build NAME --file_format=array_record --data_dir=DATA` (needs TensorFlow)"


def tfds(
    path,
    *,
    dataset: str = "",
    split: str = "train",
    image: str = "image",
    depth: str = "depth",
    depth_scale: float = 1.0,
    filename_list: str = "",
    min_valid: int = 16,
) -> FileSource:
    """Random access to a split; workers open the shards themselves.

    Args:
      path: TFDS' data_dir, or with no `dataset` the folder of one data set or of one version.
      dataset: "nyu_depth_v2", "name/config", with ":1.0.0" where it is not the newest version.
      split: as in TFDS, also "train[:10%]" and "train+validation".
      image, depth: names of the features; "left/depth" is a feature in another.
      depth_scale: counts per metre; 1 where the feature has metres.
      filename_list, min_valid: as FileSource. Samples are called as in their manifest, without
        one "train/000123".

    Raises SourceError: nothing there, not ArrayRecord, no such split or feature, an unfinished or
    damaged build.
    """
    if files.positive(depth_scale) is None:
        raise ValueError(f"depth_scale must be a positive number, got {depth_scale!r}")
    folder = find_folder(files.require_folder(path), dataset)
    builder = _builder(folder)
    _require_split(folder, builder, split)
    keys = {"image": image, "depth": depth}
    if problems := _feature_problems(builder.info.features, keys):
        raise SourceError(folder, problems)
    instructions = builder.info.splits[split].file_instructions
    try:
        entries = _entries(folder, {Path(i.filename).name for i in instructions})
    except ValueError as error:
        raise SourceError(folder, [str(error)]) from error
    if problems := manifest.damage(folder, entries, checksums=False):
        raise SourceError(folder, problems)
    shape = _at(builder.info.features, image).shape[:2]
    reader = Reader(folder, split, image, depth)
    return FileSource(
        folder,
        _items(builder, instructions, entries, {"depth_scale": float(depth_scale)}),
        reader,
        shape=reader.shape if None in shape else shape,
        filename_list=filename_list,
        min_valid=min_valid,
    )


def find_folder(root: Path, dataset: str = "") -> Path:
    """The folder with dataset_info.json: `root`, or the newest version of the data set below it.

    Raises SourceError that says what is there instead.
    """
    name, _, version = dataset.partition(":")
    if not files.is_below(dataset):
        raise SourceError(root, [f"{dataset!r} is no name of a data set"])
    folder = root / name
    versions = sorted(
        (tuple(map(int, p.name.split("."))), p)
        for p in (folder.iterdir() if folder.is_dir() else ())
        if re.fullmatch(r"\d+\.\d+\.\d+", p.name)
    )
    candidates = [folder] if not version else []
    candidates += [p for _, p in reversed(versions) if version in ("", p.name)]
    for candidate in candidates:
        if (candidate / "dataset_info.json").is_file():
            return candidate
    for candidate in candidates:
        if splits := manifest.started(candidate):
            what = f"an unfinished build of {', '.join(splits)}"
            raise SourceError(candidate, [f"{what}; {manifest.AGAIN}"])
    there = sorted(p.parent for p in root.glob("*/*/dataset_info.json"))
    there = f"; there are {', '.join(str(p.relative_to(root)) for p in there)}" if there else ""
    wanted = f"{dataset!r} is not in it" if dataset else "it has no dataset_info.json"
    raise SourceError(root, [f"{wanted}{there}. Prepare a data set by {PREPARE}"])


def _builder(folder: Path):
    try:
        builder = tensorflow_datasets.builder_from_directory(folder)
        formats = {f.value for f in builder.info.available_file_formats()}
    except Exception as error:  # protobuf's and TFDS' own, of any kind
        raise SourceError(folder, [f"not a data set that TFDS reads: {error}"]) from error
    if "array_record" not in formats:
        name, config = builder.info.name, builder.info.config_name
        name = f"{name}/{config}" if config else name
        raise SourceError(
            folder,
            [
                f"stored as {' and '.join(sorted(formats))}, which has no random access. Prepare"
                f" it once more, elsewhere: `tfds build {name} --file_format=array_record"
                " --data_dir=DATA` (needs TensorFlow)"
            ],
        )
    builder.info.set_file_format("array_record", override=True, override_if_initialized=True)
    return builder


def _require_split(folder: Path, builder, split: str) -> None:
    asked = set(re.findall(r"\w+", split)) - set(builder.info.splits)
    if unfinished := asked & set(manifest.started(folder)):
        problem = f"the build of {', '.join(sorted(unfinished))} is not finished; {manifest.AGAIN}"
        raise SourceError(folder, [problem])
    try:
        builder.info.splits[split]
    except (KeyError, ValueError) as error:
        known = ", ".join(builder.info.splits)
        raise SourceError(folder, [f"no split {split!r}; it has {known or 'none'}"]) from error


def _entries(folder: Path, shards: set[str]) -> dict[str, dict]:
    """{shard: its entry in a manifest}; none for a set that is not ours."""
    manifests = manifest.read_manifests(folder)
    listed = {name: entry for m in manifests.values() for name, entry in m["shards"].items()}
    if listed and (strange := sorted(shards - listed.keys())):
        raise ValueError(f"no manifest lists {', '.join(strange)}; {manifest.AGAIN}")
    return {name: listed[name] for name in sorted(shards) if listed}


def _items(builder, instructions, entries: dict[str, dict], settings: dict):
    """Records in the order of the split; `record` counts in the shard, `index` in the split."""
    starts, index = {}, 0
    for name in builder.info.splits:
        start = 0
        for shard in builder.info.splits[name].file_instructions:
            starts[shard.filename] = name, start
            start += shard.examples_in_shard
    for shard in instructions:
        path = Path(shard.filename)
        held = {"image": path, "depth": path}
        split, start = starts[shard.filename]
        for record in range(shard.skip, shard.skip + shard.take):
            name, group, shape = f"{split}/{start + record:06d}", builder.info.name, None
            if path.name in entries:
                name, group, *shape = entries[path.name]["samples"][record]
            place = {"record": record, "index": index, "shape": shape and tuple(shape)}
            yield Item(name, group, held, settings | place)
            index += 1


class Reader:
    """Reads items of a split: a function that opens the shards when a process first calls it."""

    def __init__(self, folder: Path, split: str, image: str, depth: str):
        self._folder, self._split, self._image, self._depth = folder, split, image, depth
        self._lock = threading.Lock()

    def __reduce__(self):
        return type(self), (self._folder, self._split, self._image, self._depth)

    def __call__(self, item: Item) -> files.Sample:
        where = f"{item.files['image']}, record {item.settings['record']}"
        with self._lock:  # threads share what the first of them opens
            features, decoders, records = self._opened
        try:
            record = records[item.settings["index"]]
            example = features.deserialize_example_np(record, decoders=decoders)
            image = _picture(_at(example, self._image))
            depth = _counts(_at(example, self._depth))
        except Exception as error:  # riegeli's, protobuf's, Pillow's, zlib's, NumPy's
            raise ValueError(f"{where}: unreadable: {error}") from error
        scale = np.float32(item.settings["depth_scale"])
        return files.as_sample(image, depth if scale == 1 else depth / scale)

    def shape(self, item: Item) -> tuple[int, int]:
        """(H, W) of a sample, which is decoded only if neither manifest nor feature tells."""
        return item.settings["shape"] or self(item)["image"].shape[:2]

    @functools.cached_property
    def _opened(self):
        """The two features, how they are decoded, and all records of the split as bytes.

        Pictures stay bytes: TFDS would want OpenCV for those of 16 bits.
        """
        builder = _builder(self._folder)
        features, decoders = {}, {}
        for key in (self._image, self._depth):
            feature = _at(builder.info.features, key)
            is_picture = isinstance(feature, FEATURES.Image) and feature.np_dtype != np.float32
            _put(features, key, feature)
            if is_picture:
                _put(decoders, key, tensorflow_datasets.decode.SkipDecoding())
        raw = tensorflow_datasets.decode.DeserializeMethod.RAW_BYTES
        records = builder.as_data_source(self._split, deserialize_method=raw)
        return FEATURES.FeaturesDict(features), decoders, records


def _picture(value) -> np.ndarray:
    """uint8 [H,W,3] of a picture's bytes or an array [H,W,1, 3 or 4], whose alpha is left out."""
    if not isinstance(value, bytes):
        return np.repeat(value, 3, axis=-1) if value.shape[-1] == 1 else value[..., :3]
    with Image.open(io.BytesIO(value)) as picture:
        # Nearly all are RGB; `from_pil` turns and copies.
        return np.array(picture) if picture.mode == "RGB" else image_lib.from_pil(picture)


def _counts(value) -> np.ndarray:
    """float32 [H,W] or [H,W,1] of a picture's bytes or an array."""
    if isinstance(value, bytes):
        with Image.open(io.BytesIO(value)) as picture:
            value = np.asarray(picture)
    return np.asarray(value, np.float32)


def _feature_problems(features, keys: dict[str, str]) -> list[str]:
    """Features that are not there, or cannot be a picture or depth."""
    problems = []
    for kind, key in keys.items():
        try:
            feature = _at(features, key)
            shape = tuple(feature.shape)
        except (KeyError, TypeError, AttributeError):
            problems.append(
                f"no feature {key!r}; set `{kind}` to one of {', '.join(sorted(features))}"
            )
            continue
        channels = {"image": (1, 3, 4), "depth": (1,)}[kind]
        flat = kind == "depth" and len(shape) == 2
        if not flat and not (len(shape) == 3 and shape[-1] in channels):
            problems.append(f"feature {key!r} of shape {list(shape)} is no {kind}")
        elif problem := _type_problem(feature, kind):
            problems.append(f"feature {key!r} of {np.dtype(feature.np_dtype)} {problem}")
    return problems


def _type_problem(feature, kind: str) -> str:
    """Why a feature of this type is no picture, or no depth; "" if it may be one."""
    dtype = np.dtype(feature.np_dtype)
    if kind == "image":
        # Encoded ones say themselves what their numbers mean, but for TFDS' float32 in a PNG.
        encoded = isinstance(feature, FEATURES.Image) and dtype != np.float32
        known = encoded or dtype == np.uint8
        return "" if known else "is no image: set `image` to uint8 (0..255) or an encoded image"
    if dtype.itemsize == 1:
        return "is no depth: 8 bits are a visualisation; set `depth` to metres or 16-bit counts"
    return "is no depth: set `depth` to numbers" if dtype.kind in "OSU" else ""


def _at(nest, key: str):
    return functools.reduce(lambda node, name: node[name], key.split("/"), nest)


def _put(nest: dict, key: str, value) -> None:
    *outer, last = key.split("/")
    functools.reduce(lambda node, name: node.setdefault(name, {}), outer, nest)[last] = value
