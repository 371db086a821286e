"""What a command answers, on standard output; progress and problems go to standard error."""

import os
import pathlib
import sys

# Exit codes of all commands. UNUSABLE: nothing could be done with the arguments, as argparse's own.
OK, SOME_FAILED, UNUSABLE, INTERRUPTED = 0, 1, 2, 130


def show(text: str) -> None:
    """Prints it. Where nobody reads any more (`| head`), goes on: what follows must not be lost."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Else what is still buffered fails again at the exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def cannot_be_made(folder: pathlib.Path) -> str:
    """Why a folder for results cannot be made, as far as can be told before; "" if it can."""
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if os.path.isdir(there) and os.access(there, os.W_OK):
        return ""
    return f"{folder} cannot be made: {there} is no folder that can be written to"


def cannot_be_written(file: pathlib.Path) -> str:
    """Why a file of results cannot be written, as `cannot_be_made`; devices and pipes can."""
    if file.exists() and not (file.is_file() or file.is_dir()):
        return ""
    return f"{file} is a folder: name a file" if file.is_dir() else cannot_be_made(file.parent)
