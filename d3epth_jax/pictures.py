"""Which pictures `d3epth predict` reads, and what their results are called."""

import dataclasses
import itertools
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence

HARDLY_READ = (".heic", ".heif")  # by Pillow, without help: told rather than passed over
SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff"),
    *(".bmp", ".gif", ".ppm", ".pgm", ".jp2", ".avif"),
    *HARDLY_READ,
)
OUTPUTS = ("_depth.png", "_color.png", ".npy", "_uncertainty.npy")

EXPECTED = (OSError, ValueError, RuntimeError, MemoryError)  # JAX's own are RuntimeErrors


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture to predict, and what its results are called: `output` and a suffix of OUTPUTS."""

    path: pathlib.Path
    output: pathlib.Path

    def file(self, suffix: str) -> pathlib.Path:
        return self.output.with_name(self.output.name + suffix)


def find_pictures(
    inputs: Sequence[pathlib.Path], failed: dict[pathlib.Path, str]
) -> list[tuple[pathlib.Path, pathlib.Path]]:
    """(path, path below the folder that was named) of every picture, each once, in a fixed order.

    Pictures named directly are taken whatever their suffix. What cannot be used goes into `failed`.
    """
    found = {}
    for given in inputs:
        if os.path.isdir(given):
            inside = list(_walk(given, failed))
            if not inside:
                failed.setdefault(given, f"no picture in this folder ({' '.join(SUFFIXES)})")
        elif os.path.exists(given):
            inside = [given]
        else:
            inside = []
            failed[given] = "no such file or folder"
        for path in inside:
            below = path.relative_to(given) if path != given else pathlib.Path(path.name)
            key = os.path.realpath(path)  # resolve() raises where links lead in a circle
            # Under its own name, where links lead to it too.
            if key not in found or (found[key][0].is_symlink() and not path.is_symlink()):
                found[key] = path, below
    return list(found.values())


def _walk(root: pathlib.Path, failed) -> Iterator[pathlib.Path]:
    """Pictures in a folder, without hidden ones and without results of this or an earlier run."""

    def unreadable(error: OSError):
        failed[pathlib.Path(error.filename)] = reason(error)

    for name, folders, files in os.walk(root, onerror=unreadable):
        folder = pathlib.Path(name)
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for file in sorted(files):
            path = folder / file
            if (
                path.suffix.lower() in SUFFIXES
                and not file.startswith(".")
                and not _is_result(path)
            ):
                yield path


def _is_result(path: pathlib.Path) -> bool:
    """NAME_depth.png or NAME_color.png that we wrote."""
    from d3epth_jax import image

    return path.name.endswith(OUTPUTS[:2]) and image.is_ours(path)


def name_outputs(
    found: Sequence[tuple[pathlib.Path, pathlib.Path]], out: pathlib.Path
) -> list[Picture]:
    """Results go to `out`, in the subfolder and under the name of their picture.

    Where two pictures would share a file, the later one is NAME_jpg, NAME_jpg_2 and so on. No
    result takes the place of a picture that is read, or of a file that is no earlier result, such
    as a depth map that was measured.
    """
    # Without case: some file systems do not know it.
    taken = {os.path.realpath(path).casefold() for path, _ in found}
    pictures = []
    # What will hardly be read gets its name last.
    for path, below in sorted(found, key=lambda x: x[0].suffix.lower() in HARDLY_READ):
        plain = out / below.with_suffix("")
        other = plain.with_name(f"{plain.name}_{below.suffix[1:]}")
        more = (other.with_name(f"{other.name}_{number}") for number in itertools.count(2))
        for output in itertools.chain((plain, other), more):
            picture = Picture(path, output)
            files = {os.path.realpath(picture.file(end)).casefold() for end in OUTPUTS}
            others = _holds_others(picture)
            if others:
                told = (
                    f"d3epth: {picture.file('.npy')} or the like is no result of {path}: it stays"
                )
                print(told, file=sys.stderr)
            if not files & taken and not others:
                if output != plain:
                    print(f"d3epth: the results of {path} are {output}*", file=sys.stderr)
                break
        taken |= files
        pictures.append(picture)
    return pictures


def _holds_others(picture: Picture) -> bool:
    """Whether files are called as its results without being some: by its PNGs, the coloured one."""
    from d3epth_jax import image

    there = [end for end in OUTPUTS if os.path.lexists(picture.file(end))]
    pictures = [end for end in there if end in OUTPUTS[:2]]
    ours = "_color.png" in there and all(image.is_ours(picture.file(end)) for end in pictures)
    return bool(there) and not ours


def reason(error: Exception, path: pathlib.Path | None = None) -> str:
    """One line, without the path that stands before it."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = " ".join(text.removeprefix(f"{path}: ").split()) or type(error).__name__
    if not isinstance(error, EXPECTED):  # its words alone, such as a key, say little
        text = f"cannot be read ({type(error).__name__}: {text})"
    return text if len(text) <= 300 else f"{text[:300]} ..."
