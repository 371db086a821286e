"""What a command answers, on standard output; progress and problems go to standard error."""

import os
import sys


def show(text: str) -> None:
    """Prints it. Where nobody reads any more (`| head`), goes on: what follows must not be lost."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Else what is still buffered fails again at the exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
