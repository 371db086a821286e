"""HDF5 files as sources open them: damage of any kind is told by file."""

import contextlib
from pathlib import Path

import h5py


@contextlib.contextmanager
def open_hdf5(path: Path, what: str = ""):
    """An open HDF5 file. Whatever ails it is a ValueError that names it and what was read."""
    try:
        with h5py.File(path, "r") as file:
            yield file
    except FileNotFoundError:
        raise
    except (OSError, LookupError, RuntimeError, TypeError, ValueError) as error:
        where = f"{path}: {what}" if what else path
        raise ValueError(f"{where}: unreadable; if damaged, fetch it again: {error}") from error
