"""Momentum in bfloat16 that does not stand still: rounded up or down by chance, and right on average.

An average that moves by less than half of its last bit (1/512 of itself) stays where it is under rounding to nearest.
The chance is drawn from the bits of average and gradient, so that there is no generator to save, to resume or to keep
equal between ranks: equal gradients give equal states, however the matrices are sharded.
"""

import torch
from torch import Tensor


MULTIPLIERS = (-1640531535, 668265263)  # odd; 2^32 over the golden ratio, and a prime: products spread a bit upwards


def round_stochastically(x: Tensor, noise: Tensor) -> Tensor:
    """Return `x` in bfloat16, rounded away from zero with the probability by which it is past the lower neighbor.

    Args:
        x: float32.
        noise: float32 of the same shape, whose bits are hashed, with those of `x`. Equal inputs give equal results.
    """
    bits = (x.view(torch.int32) * MULTIPLIERS[1]).bitwise_xor_(noise.view(torch.int32))
    for multiplier in MULTIPLIERS:
        bits = (bits >> 15).bitwise_xor_(bits).mul_(multiplier)
    low = (bits >> 16).bitwise_and_(0xFFFF)  # uniform below the last bit that bfloat16 keeps
    kept = low.add_(x.view(torch.int32)).bitwise_and_(-0x10000)  # sign and magnitude: the same for both signs
    return torch.where(x.isnan(), x, kept.view(torch.float32)).to(torch.bfloat16)  # or a NaN may become 0
