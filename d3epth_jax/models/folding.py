"""What a network's parameters may have folded into them (weights/fold.py makes such parameters)."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Folding:
    """Which constants are in the parameters of a network instead of its inputs.

    Attributes:
      time: the timestep; its embedding is a bias in every ResNet.
      prompt_tokens: of the prompt, where attention to it is cheaper so (`layers.collapses`); 0:
        the prompt is an input.
      upsampling: the upsampling before a convolution (`convolution.PhaseConv`), in these of the
        networks "unet" and "decoder".
    """

    time: bool = False
    prompt_tokens: int = 0
    upsampling: tuple[str, ...] = ()


NOT_FOLDED = Folding()
