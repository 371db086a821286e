"""Files that are whole or not there at all, and folders for one process at a time."""

import contextlib
import fcntl
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path


@contextlib.contextmanager
def locked(path: str | os.PathLike, refusal: Exception) -> Iterator[None]:
    """Holds the lock file `path`, which stays; raises `refusal` where another process holds it."""
    with open(path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise refusal from error
        yield


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A hidden name beside `path`; the file written there takes the place of `path` in the end.

    A reader sees the old file or the new one, never half of it. If writing fails, the old one
    stays and nothing is left behind. Folders are made as needed; the new file has mode 0644.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        yield partial
        partial.chmod(0o644)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, content: Mapping) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")
