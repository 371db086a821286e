"""The embedded data source: rendered scenes behind the interface of every other source."""

import jax.numpy as jnp
import numpy as np

from d3epth_jax.data.procedural.render import render

VERSION = 2  # one more whenever a scene comes out differently: 2 has pixels that are not square


class ProceduralSource:
    """`length` scenes of one seed, numbered from 0; nothing is stored or downloaded.

    Raises ValueError for another version of the scenes than this package renders.
    """

    def __init__(self, seed: int, height: int, width: int, length: int, version: int = VERSION):
        if version != VERSION:
            raise ValueError(
                f"scenes of version {version} are asked for, this package renders {VERSION}"
            )
        self.seed, self.height, self.width, self.length = seed, height, width, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """{"image" uint8 [H,W,3], "depth" float32 [H,W,1] metres, "mask" bool [H,W,1]}, numpy."""
        if not -self.length <= index < self.length:
            raise IndexError(f"scene {index} of a source with {self.length} scenes")
        return {k: np.asarray(v[0]) for k, v in self.batch([index % self.length]).items()}

    def batch(self, indices):
        """Scenes [B] at once, as jax arrays on the device: much faster than one by one."""
        indices = jnp.asarray(indices, jnp.int32)
        return render(self.seed, indices, height=self.height, width=self.width)
