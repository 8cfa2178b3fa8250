"""How a weight is quantized or pruned: pure functions of a matrix and, for most, of its inputs.

Conventions: W (out, in), as `nn.Linear` keeps it; a group is `group_size` neighbors along `in` of one row, of
which the last may be short; what comes back has W's shape and dtype and holds the values that the small format stands
for (nothing is packed).
"""

import torch
from torch import Tensor


def quantization_grid(groups: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Step D and zero point of asymmetric `bits`-bit groups: (..., g) -> two (..., 1).

    `hi = max(w, 0)`, `lo = min(w, 0)` over a group, `D = (hi - lo) / (2^bits - 1)` (1 where that is 0), zero point
    `round(-lo / D)`: 0 is always on the grid.
    """
    high, low = groups.amax(-1, keepdim=True).clamp(min=0), groups.amin(-1, keepdim=True).clamp(max=0)
    step = (high - low) / (2**bits - 1)
    step = torch.where(step == 0, torch.ones_like(step), step)
    return step, torch.round(-low / step)


def snap(values: Tensor, step: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Nearest points of a grid: `(clip(round(w / D) + z, 0, 2^bits - 1) - z) D`."""
    # times 1/D, not divided by D: so does torchao, with which this agrees to the bit
    codes = (torch.round(values * (1.0 / step)) + zero_point).clamp(0, 2**bits - 1)
    return (codes - zero_point) * step


def rtn(weight: Tensor, bits: int, group_size: int = 128) -> Tensor:
    """Round-to-nearest quantization of W (out, in), and back.

    Args:
        bits: 2 to 8.
        group_size: weights that share a grid, >= 1; -1 for a whole row.

    Raises:
        ValueError: for `bits` or a `group_size` outside.
    """
    check_grid(bits, group_size)
    size = weight.shape[-1] if group_size == -1 else group_size
    out = torch.empty_like(weight)
    whole = weight.shape[-1] // size * size
    for start, stop in ((0, whole), (whole, weight.shape[-1])):
        if stop > start:
            groups = weight[:, start:stop].reshape(len(weight), -1, min(size, stop - start))  # (out, groups, g)
            out[:, start:stop] = snap(groups, *quantization_grid(groups, bits), bits).reshape(len(weight), -1)
    return out


def check_grid(bits: int, group_size: int) -> None:
    """Raise ValueError for `bits` outside 2..8, or a `group_size` that is neither -1 nor >= 1."""
    if bits not in range(2, 9):
        raise ValueError(f"bits={bits} must be 2 to 8")
    if not (group_size == -1 or group_size >= 1):
        raise ValueError(f"group_size={group_size} must be >= 1, or -1 for a whole row")
