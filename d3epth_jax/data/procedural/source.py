"""The embedded data source: rendered scenes behind the interface of every other source."""

import jax.numpy as jnp
import numpy as np

from d3epth_jax.data.procedural.render import render

VERSION = 5  # one more whenever a scene of the same settings comes out differently


class ProceduralSource:
    """`length` scenes of one seed, numbered from 0; nothing is stored or downloaded.

    pixel_aspects: range of a pixel's width over height (`render`). Raises ValueError for one that
    is none, and for another version of the scenes than this package renders.
    """

    def __init__(
        self,
        seed: int,
        height: int,
        width: int,
        length: int,
        pixel_aspects: tuple[float, float] = (1.0, 1.0),
        version: int = VERSION,
    ):
        if len(pixel_aspects) != 2 or not 0 < pixel_aspects[0] <= pixel_aspects[1]:
            raise ValueError(f"pixel_aspects {pixel_aspects}: two positive numbers, lower first")
        if version != VERSION:
            raise ValueError(
                f"scenes of version {version} are asked for, this package renders {VERSION}"
            )
        self.seed, self.height, self.width, self.length = seed, height, width, length
        self.pixel_aspects = tuple(pixel_aspects)

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
        return render(
            self.seed,
            indices,
            height=self.height,
            width=self.width,
            pixel_aspects=self.pixel_aspects,
        )
