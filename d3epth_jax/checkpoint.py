"""Orbax, all of it: checkpoints for exact resume, with the data position, and single trees."""

import contextlib
import json
import logging
import pathlib
import shutil
from collections.abc import Iterator

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict

from d3epth_jax import hosts
from d3epth_jax.typing import Params

log = logging.getLogger(__name__)


class _Manager(ocp.CheckpointManager):
    """Leaves it to `hosts.asked_to_end` to ask whether a signal came.

    JAX's service ends all processes at one count, which it takes from the last that it was asked
    with: Orbax's, of the step, would move it to where ours has been or never gets.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpoints:
    """The checkpoints of one run; as a context manager it waits for pending saves.

    keep: how many of the newest stay; None for a reader, which changes nothing, as the run may be
    alive. What saves must be the only one that does: it deletes what a killed save left.
    """

    def __init__(self, directory: str | pathlib.Path, *, keep: int | None = None):
        self._directory = pathlib.Path(directory).absolute()
        if keep is not None and hosts.is_first():
            # Orbax would do so in a thread, which trips over the end of a run that saves nothing.
            for left in self._directory.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(left)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=keep is not None)
        self._manager = _Manager(self._directory, options=options)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        try:
            with self._telling():
                self._manager.wait_until_finished()
        finally:
            self._manager.close()

    @property
    def latest(self) -> int | None:
        """The newest complete checkpoint's step, None where there is none."""
        found = newest(self._directory)
        return None if found is None else int(found.name)

    def save(self, step: int, state, data_position: dict) -> None:
        """Saves in the background; a killed save leaves no half checkpoint behind.

        A save that failed in the background is told in the log by the next one, which is made all
        the same; OSError where that cannot begin, and at the end of the context.
        """
        try:
            with self._telling():
                self._manager.wait_until_finished()
        except OSError as error:
            log.warning("%s; trying again with step %d", error, step)
        with self._telling():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data_position)
                ),
            )

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """Makes an OSError of whatever Orbax raises where it cannot write."""
        try:
            yield
        except (AssertionError, AttributeError, TypeError):
            raise  # a mistake in the program
        except Exception as error:
            raise OSError(
                f"a checkpoint in {self._directory} could not be written: {error}"
            ) from error

    def restore(self, abstract_state):
        """The newest checkpoint as (state, data position), placed as `abstract_state` says.

        Raises:
          ValueError: the checkpoint is damaged, or holds another tree than the run expects: another
            model, optimiser, weighting or set of trainable parameters.
        """
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract_state), data=ocp.args.JsonRestore()
        )
        with _told(
            f"the checkpoint of step {self.latest} in {self._directory} does not fit this"
            " run's model, optimiser or trainable parameters, or is damaged; train into a new"
            " workdir or restore the old settings. Orbax says"
        ):
            restored = self._manager.restore(self.latest, args=args)
        return restored.state, restored.data


def newest(directory: pathlib.Path) -> pathlib.Path | None:
    """The folder of a run's newest checkpoint, None where there is none."""
    there = directory.iterdir() if directory.is_dir() else ()
    steps = (path for path in there if path.name.isdigit())
    return max(steps, key=lambda path: int(path.name), default=None)


def saved_at(step: pathlib.Path) -> int | None:
    """When a checkpoint was complete, in nanoseconds, by which two of one step are told apart."""
    path = step / "_CHECKPOINT_METADATA"
    return json.loads(path.read_text())["commit_timestamp_nsecs"] if path.exists() else None


def abstract(tree, sharding=None):
    """Shapes and types of a tree of arrays, and its own shardings or this one."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding), tree
    )


def save_tree(directory: str | pathlib.Path, tree) -> None:
    """Writes a tree of arrays to a directory that is not there yet."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(pathlib.Path(directory).absolute(), tree)


def read_tree(directory: str | pathlib.Path, wanted: Params, part: str = "") -> Params:
    """The parameters in a directory as NumPy arrays, as they were saved, read on any machine.

    Of a training state, which has an optimiser's moments too, no more than a `part` is read: "ema".

    Raises ValueError for a directory that is no complete checkpoint of Orbax, and with all
    parameters whose name or shape is not that of `wanted`.
    """
    directory = pathlib.Path(directory).absolute()
    told = f"{directory} is not a complete checkpoint of Orbax"
    with ocp.PyTreeCheckpointer() as checkpointer:
        with _told(told):
            stored = checkpointer.metadata(directory).item_metadata.tree
            stored = {part: stored[part]} if part else stored
        _require_same(directory, stored[part] if part else stored, wanted)
        with _told(told):
            tree = abstract(stored, jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))
            how = ocp.checkpoint_utils.construct_restore_args(tree)
            args = ocp.args.PyTreeRestore(tree, restore_args=how, partial_restore=True)
            tree = jax.tree.map(np.asarray, checkpointer.restore(directory, args=args))
    return tree[part] if part else tree


def _require_same(directory: pathlib.Path, stored, wanted: Params) -> None:
    """Raises ValueError with every name and shape that differs."""
    stored, wanted = (flatten_dict(tree, sep="/") for tree in (stored, wanted))
    problems = [f"missing: {path}" for path in wanted.keys() - stored.keys()]
    problems += [f"unexpected: {path}" for path in stored.keys() - wanted.keys()]
    problems += [
        f"wrong shape: {path} is {stored[path].shape}, the model has {wanted[path].shape}"
        for path in stored.keys() & wanted.keys()
        if stored[path].shape != wanted[path].shape
    ]
    if problems:
        told = f"the weights in {directory} do not fit the model:"
        raise ValueError("\n  ".join([told, *sorted(problems)]))


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """Makes a ValueError that begins with `what` of what Orbax raises where it cannot read."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{what}: {error}") from error
    except Exception as error:
        # For bytes of an array it raises just this class, and tells only how the array is stored.
        if type(error) is not Exception or not isinstance(error.__cause__, Exception):
            raise
        raise ValueError(f"{what}: {error.__cause__}") from error
