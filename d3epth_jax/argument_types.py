"""Types of argparse's arguments that refuse what makes no sense, in a sentence."""

import argparse
import math
import os
import pathlib
from collections.abc import Callable


def a_path(text: str) -> pathlib.Path:
    """`type=` of a file or folder. An empty one, of an unset variable, is not where you are.

    `~` is the home folder, as the shell has it: after --out= it leaves that to the program.
    """
    if not text:
        raise argparse.ArgumentTypeError("an empty name; for the folder you are in say .")
    return pathlib.Path(os.path.expanduser(text))


def a_name(text: str) -> str:
    """`type=` of a model, or of what of it is wanted: an empty one does not mean the default."""
    if not text:
        raise argparse.ArgumentTypeError("an empty name; for the default leave the option out")
    return os.path.expanduser(text)


def in_range(kind: type, least: float, most: float = math.inf) -> Callable[[str], float]:
    """`type=` of an argument that is an int or float from `least` to `most`, and never infinite."""

    def parse(text: str) -> float:
        value = kind(text)
        if not least <= value <= most or value == math.inf:  # also true of NaN
            limits = f"at least {least}" if most == math.inf else f"in {least}..{most}"
            raise argparse.ArgumentTypeError(f"must be {limits}, not {text}")
        return value

    # argparse says of text that is no number: invalid integer value: 'many'
    parse.__name__ = {int: "integer", float: "number"}[kind]
    return parse
