"""How far two right float32 computations may lie apart: bounds from the dtype and the lengths of the sums.

Sums of the same numbers in another order, as other packings, threads, vector widths and processes give them,
differ by rounding alone. Every bound on a float in these tests is exact arithmetic's zero, one of the bounds
below, or says beside it where it comes from.
"""

import math

U = 2.0**-24  # unit roundoff of float32: half the distance of two neighbours, relative
U64 = 2.0**-53  # of float64
SAFETY = 10


def rounding(*lengths: int, u: float = U) -> float:
    """Relative bound on a chain of sums of so many terms each.

    A sum of n terms errs by about sqrt(n) u of the size of its terms, since roundings are as often up as down
    (n u is the worst case, which would take all to point one way). Errors of stages that follow each other
    add in squares. Ten times that is beyond any chance, and far below what a wrong sign, mask or scale does.
    """
    return SAFETY * u * math.sqrt(sum(lengths))


def forward_sums(config, tokens: int) -> list[int]:
    """Lengths of the sums behind one log-prob of a Qwen-VL: tower, layers, head, softmax.

    Args: tokens: the most keys that a token attends to, in text or image.
    """
    text, vision = config.text_config, config.vision_config
    layer = [text.hidden_size] * 3 + [tokens, text.intermediate_size]  # q/k/v, out, up; attention; down
    width = getattr(vision, "embed_dim", vision.hidden_size)  # Qwen2-VL's name for it
    block = [width] * 3 + [tokens, getattr(vision, "intermediate_size", 4 * width)]
    return layer * text.num_hidden_layers + block * vision.depth + [text.hidden_size, text.vocab_size]


def logp_bound(config, tokens: int) -> float:
    """Bound on a log-prob (nats, absolute): logits of these untrained or tiny models are of size 1 to 10."""
    return rounding(*forward_sums(config, tokens))


def gradient_bound(config, tokens: int) -> float:
    """Relative bound on a gradient, in the norm over all parameters: forward, backward, sums over tokens."""
    return rounding(*2 * forward_sums(config, tokens), tokens)
