"""What is wrong with the arguments of d3epth_jax.main, and with what they ask for, in sentences."""

import argparse
import contextlib
import difflib
import importlib.machinery
import importlib.util
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Iterator, Sequence

from absl import flags
from absl import logging as absl_logging

from d3epth_jax.output import UNUSABLE

OURS = ("__main__", "configs", "d3epth_jax")  # modules, with all below them


@contextlib.contextmanager
def in_a_sentence() -> Iterator[None]:
    """An error that a person can mend ends the program with its words alone, and exit code 2.

    These are what files and folders raise (OSError) and this project's ValueErrors and
    RuntimeErrors, which are sentences for people. Whatever else, such as a ValueError of JAX in the
    middle of a training, is no user's mistake and keeps its traceback; with --verbosity=1 all do.
    """
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        if absl_logging.level_debug() or not (isinstance(error, OSError) or _is_ours(error)):
            raise
        print(f"d3epth_jax: {error}", file=sys.stderr)
        sys.exit(UNUSABLE)


def _is_ours(error: Exception) -> bool:
    """Whether it was raised in this project, rather than in a library that it calls."""
    if isinstance(error, RuntimeError):  # JAX raises its own from no frame of Python's
        return type(error).__module__.partition(".")[0] in OURS
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "").partition(".")[0] in OURS


def parse(argv: Sequence[str]) -> list[str]:
    """absl's parsing of the flags (`app.run` calls it), with errors that say what to do."""
    with in_a_sentence():
        _find_configs(argv)
        try:
            rest = flags.FLAGS(argv)
            flags.FLAGS.config.keys()  # raises what kept the file from being read
            return rest
        except BrokenPipeError:  # of --help | head
            raise
        except (flags.Error, AttributeError, LookupError, OSError, ValueError) as error:
            # ml_collections' words on a wrong key or word say little. If the config can be read,
            # and has the keys, it is something else.
            argv = flags.FLAGS.read_flags_from_files(argv, force_gnu=False)
            if problems := wrong_keys(load_config(argv), argv):
                raise ValueError("\n".join(problems)) from error
            if isinstance(error, flags.Error):
                raise ValueError(str(error)) from error
            raise


def _name_of_config(argv: Sequence[str]) -> str:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", "-config")
    return parser.parse_known_args(argv[1:])[0].config or ""


def _find_configs(argv: Sequence[str]) -> None:
    """Makes the files beside a config importable for it, wherever the command is given."""
    folder = pathlib.Path(_name_of_config(argv).split(":", 1)[0]).resolve().parent
    above = [place.parent for place in (folder, *folder.parents) if place.name == "configs"]
    if above and importlib.util.find_spec("configs") is None:
        sys.path.append(str(above[0]))


def load_config(argv: Sequence[str]):
    """The config that --config names, as it is without other arguments.

    Raises what its file raises, FileNotFoundError if there is none, ValueError if none is named.
    """
    name = _name_of_config(argv)
    if not name:
        raise ValueError("say what to run, such as --config=configs/quickstart.py")
    path, *word = name.split(":", 1)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"--config={name}: there is no file {path}")
    loader = importlib.machinery.SourceFileLoader("configs.given", path)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module.get_config(*word)


def wrong_keys(config, argv: Sequence[str]) -> list[str]:
    """A sentence for each argument --config.KEY=VALUE whose key the config does not have."""
    problems = []
    for argument in argv[1:]:
        override = re.match(r"--?(?:no)?config([.][^=]+)", argument)
        keys = re.findall(r"""\.([^.[]+)|\[["']?(.+?)["']?\]""", override[1]) if override else []
        place, here = "config", config
        for key in map("".join, keys):  # of .KEY and ["KEY"] one is empty
            if isinstance(here, (list, tuple)):
                break  # an item of it is set
            if not hasattr(here, "keys"):
                problems.append(f"{argument}: {place} is {here!r}, without settings of its own")
                break
            if key not in here:
                near = difflib.get_close_matches(key, here, 1)
                hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(here)}"
                problems.append(f"{argument}: {place} has no setting {key!r}; {hint}")
                break
            place, here = f"{place}.{key}", here[key]
    return problems
