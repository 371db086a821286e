"""What the sources of the public evaluation sets share: lists as papers ship them, whole reads."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import scipy.io

from d3epth_jax.data.sources.files import Item


def narrow(
    items: list[Item], filename_list, name_of: Callable[[str], str | None]
) -> tuple[list[Item], list[str]]:
    """The items a list names, in its order, and what it names in vain; all if there is no list.

    A line is an item's name, or starts with the path of its picture, as in the lists of Marigold's
    evaluation ("rgb depth ..."). name_of: such a path -> name; None if it is no path of the set.
    """
    if not filename_list:
        return items, []
    try:
        lines = Path(filename_list).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        return [], [f"{filename_list}: no readable list of names: {error}"]
    known = {item.name: item for item in items}
    chosen, problems = {}, []
    for number, line in enumerate(lines, start=1):
        if not (line := line.strip()):
            continue
        first = line.split()[0]
        name = line if line in known else name_of(first)
        if name in known:
            chosen[name] = known[name]
        else:
            problems.append(f"{filename_list}, line {number}: no sample is called {first!r}")
    return list(chosen.values()), problems


def read_files(item: Item, readers: Mapping[str, Callable[[Path], np.ndarray]]) -> dict:
    """{kind: what its reader makes of the item's file}, all of one height and width.

    Raises ValueError with everything that is wrong with any of the files.
    """
    parts, problems = {}, []
    for kind, reader in readers.items():
        try:
            parts[kind] = reader(item.files[kind])
        except (OSError, ValueError) as error:
            problems.append(str(error))
    if not problems and (different := unequal(item.files["image"], parts)):
        problems.append(different)
    if problems:
        raise ValueError("\n".join(problems))
    return parts


def unequal(path: Path, parts: Mapping[str, np.ndarray]) -> str:
    """What to say of a sample whose arrays differ in height or width; "" if they do not."""
    if len({part.shape[:2] for part in parts.values()}) == 1:
        return ""
    sizes = ", ".join(f"{kind} {part.shape[1]}x{part.shape[0]}" for kind, part in parts.items())
    return f"{path}: its files differ in size: {sizes}"


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
