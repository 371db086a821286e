"""What a network's parameters may have folded into them (weights/fold.py makes such parameters)."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Folding:
    """Which constants are in the parameters of a network instead of its inputs.

    Attributes:
      time: the timestep; its embedding is a bias in every ResNet.
      latent: the depth latent, which is zero.
      head: the step from there: the UNet gives the clean depth latent.
      prompt_tokens: of the prompt, where attention to it is cheaper so (`layers.collapses`); 0:
        the prompt is an input.
      upsampling: the upsampling before a convolution (`convolution.PhaseConv`), in these of the
        networks "unet" and "decoder".
      mean: the mean of the decoder's channels.
    """

    time: bool = False
    latent: bool = False
    head: bool = False
    prompt_tokens: int = 0
    upsampling: tuple[str, ...] = ()
    mean: bool = False

    @property
    def of_one_step(self) -> bool:
        """Whether the networks only hold for one step of inference from a zero latent."""
        return self.time or self.latent or self.head


NOT_FOLDED = Folding()
