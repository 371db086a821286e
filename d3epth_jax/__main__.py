"""python -m d3epth_jax predict ... is d3epth predict ..."""

import sys

from d3epth_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
