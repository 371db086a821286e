"""What the sources of the public evaluation sets share: how their files are found and read."""

from collections.abc import Iterable
from pathlib import Path

import scipy.io


def stems(folder: Path, suffix: str) -> set[str]:
    """Names of a folder's files that end so, without that end; hidden ones do not count."""
    return {path.name.removesuffix(suffix) for path in folder.glob(f"[!.]*{suffix}")}


def first_existing(paths: Iterable[Path]) -> Path:
    """The first path that exists, else the first: the one to report as missing."""
    paths = list(paths)
    return next((path for path in paths if path.exists()), paths[0])


def load_mat(path: Path) -> dict:
    """Variables of a MATLAB file of version 5 to 7.2, structs as dicts; ValueError if damaged."""
    with open(path, "rb") as file:
        try:
            return scipy.io.loadmat(file, simplify_cells=True)
        except Exception as error:  # damage surfaces anywhere in SciPy's reader, in many kinds
            raise ValueError(f"{path}: unreadable as a MATLAB file: {error!r}") from error
