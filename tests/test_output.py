"""What commands answer."""

import os
import subprocess
import sys


def test_a_reader_that_is_gone_stops_nothing():
    reader, writer = os.pipe()
    os.close(reader)
    code = (
        "import sys\n"
        "from d3epth_jax.output import show\n"
        "show('table'); show('where it is'); print('more')\n"
        "print('saved', file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "saved\n")
