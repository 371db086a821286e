"""What a workdir says of its run: its settings, the models it started from, and its samples."""

import contextlib
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping

from flax.traverse_util import flatten_dict

from d3epth_jax import atomic, hosts
from d3epth_jax.weights import files, hub

# Ends of keys that may differ where a run goes on: nothing of what comes out depends on them, but
# for rounding. (Where a run is says its path; a config alone says where it would be.)
FREE = (
    *(".workdir", ".train.log_every", ".train.checkpoint_every", ".train.keep_checkpoints"),
    *(".model.attention", ".train.profile", ".eval.batch_size", ".eval.num_pictures"),
    *(".fsdp", ".cpu_devices", ".train.accumulate", ".model.remat"),
)


@contextlib.contextmanager
def alone(workdir: pathlib.Path) -> Iterator[None]:
    """The workdir is this run's until the context is left; ValueError if another is at work there.

    Two would write over each other's checkpoints, and neither notice.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    refusal = ValueError(
        f"{workdir}: another process is training there now; wait for it, or choose another"
        " --workdir"
    )
    with contextlib.ExitStack() as stack:
        hosts.on_first(lambda: stack.enter_context(atomic.locked(workdir / "lock", refusal)))
        yield


def _write(path: pathlib.Path, content: Mapping) -> None:
    if hosts.is_first():
        atomic.write_json(path, content)


def claim(workdir: pathlib.Path, config, *, in_use: bool) -> None:
    """Writes the config to the workdir; ValueError if it holds a run with other settings.

    A finished or interrupted run is never mistaken for, or mixed with, another one; one that died
    before its first checkpoint, of a wrong setting perhaps, left nothing to mix.
    """
    path = workdir / "config.json"
    saved = files.read_json(path) if in_use and path.exists() else {}
    now = json.loads(config.to_json_best_effort())
    if saved:
        before, wanted = _binding(saved), _binding(now)
        changed = [
            f"{key}: {before.get(key)} -> {wanted.get(key)}"
            for key in sorted(before.keys() | wanted.keys())
            if not _same(before.get(key), wanted.get(key), workdir)
        ]
        if changed:
            raise ValueError(
                f"{workdir} holds a run with other settings; choose another --workdir or delete it."
                f" Changed: {'; '.join(changed)}"
            )
    _write(path, now)


def _same(before, now, workdir: pathlib.Path) -> bool:
    """Whether a setting is what it was; a path may be spelled otherwise, or have moved with all."""
    if before == now or not (isinstance(before, str) and isinstance(now, str)):
        return before == now
    if os.path.exists(before):
        return os.path.realpath(before) == os.path.realpath(now)
    chain, place = workdir.parent, pathlib.PurePath(now)  # of jobs whose folders name each other
    if not place.is_relative_to(chain):
        return False
    return f"/{before}".endswith(f"/{chain.absolute().name}/{place.relative_to(chain)}")


def _binding(settings: dict) -> dict:
    """{dotted key: value} of the settings that a run keeps."""
    flat = flatten_dict(settings, sep=".")
    return {key: value for key, value in flat.items() if not f".{key}".endswith(FREE)}


def claim_origins(workdir: pathlib.Path, config, *, in_use: bool) -> None:
    """Writes down which models the run starts from; raises as `check_origins`."""
    origins = check_origins(workdir, config) if in_use else _origins(config)
    _write(workdir / "origins.json", origins)


def check_origins(workdir: pathlib.Path, config) -> dict[str, str]:
    """What was written down and is there; ValueError if a model that the run started from changed.

    The same path may hold another model by now, retrained with other settings, and a hub's branch
    may have moved on. Those that are gone are not asked for.
    """
    path, now = workdir / "origins.json", _origins(config)
    before = files.read_json(path) if path.exists() else {}
    if changed := [
        origin for origin, digest in now.items() if before.get(origin, digest) != digest
    ]:
        raise ValueError(
            f"{workdir} was trained from another model than is there now, of {', '.join(changed)};"
            " choose another --workdir or delete it"
        )
    return before | now


def _origins(config) -> dict[str, str]:
    """{setting and its path or hub id: what is there now} of the models that a run starts from."""
    found = {
        "teacher.path": (config.teacher.path, config.teacher),
        "init": (config.init, config.init_version),
        "autoencoder.path": (config.autoencoder.path, config.autoencoder),
    }
    return {
        f"{key}={origin}": digest
        for key, (origin, version) in found.items()
        if origin and (digest := hub.digest(origin, version.revision or None))
    }


def claim_samples(workdir: pathlib.Path, sources: Mapping, *, in_use: bool) -> None:
    """Writes down what a run is trained on; ValueError if one that goes on would see other samples.

    Its place among them is kept by number: with files added or gone it would show some twice and
    others never. sources: {name: source}; rendered scenes are told by their settings.
    """
    path = workdir / "samples.json"
    before = files.read_json(path) if in_use and path.exists() else {}
    now = {name: _samples(source) for name, source in sources.items() if hasattr(source, "name")}
    if changed := [
        f"{name}: {before[name]['count']} samples, now {each['count']}"
        + (" of other names, or in another order" if before[name]["count"] == each["count"] else "")
        for name, each in now.items()
        if before.get(name, each) != each
    ]:
        raise ValueError(
            f"{workdir} is trained on other samples than are there now ({'; '.join(changed)}):"
            " put them back as they were, or choose another --workdir; --config.init="
            f"{workdir / 'model'} goes on from a finished run's model"
        )
    _write(path, before | now)


def _samples(source) -> dict:
    names = hashlib.sha256()
    for i in range(len(source)):
        names.update(source.name(i).encode() + b"\0")
    return {"count": len(source), "names": names.hexdigest()}
