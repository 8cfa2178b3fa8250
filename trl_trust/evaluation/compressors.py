"""How a weight is quantized or pruned: pure functions of a matrix and, for most, of its inputs.

Conventions: W (out, in), as `nn.Linear` keeps it; a group is `group_size` neighbors along `in` of one row, of
which the last may be short; what comes back has W's shape and dtype and holds the values that the small format stands
for (nothing is packed).
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from ..lookup import near


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


# --------------------------------------------------------------------------------------------------------------------
# Pruning
# --------------------------------------------------------------------------------------------------------------------


def kept(scores: Tensor, keep: int) -> Tensor:
    """(..., g) bool: the `keep` largest of each group of scores, of equal ones those of the lower index."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :keep]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)


def prune(weight: Tensor, scores: Tensor, keep: int, of: int | None = None) -> Tensor:
    """W with all but the `keep` best-scored of every `of` neighbors of a row at 0 (of the whole row by default).

    Raises:
        ValueError: if a row does not divide into groups of `of`.
    """
    of = check_pattern(weight.shape[-1], keep, of)
    mask = kept(scores.reshape(len(weight), -1, of), keep).reshape_as(weight)
    return torch.where(mask, weight, torch.zeros_like(weight))


def magnitude(weight: Tensor, keep: int, of: int | None = None) -> Tensor:
    """Prune by `|W|`."""
    return prune(weight, weight.abs(), keep, of)


def wanda(weight: Tensor, norms: Tensor, keep: int, of: int | None = None) -> Tensor:
    """Prune by `|W| ||x||_2` (arXiv 2306.11695): `norms` (in,), of each input over the calibration tokens."""
    return prune(weight, weight.abs() * norms.to(weight), keep, of)


def check_pattern(width: int, keep: int, of: int | None) -> int:
    """The group that `of` means in a row of `width`; ValueError unless the row divides into such groups."""
    of = width if of is None else of
    if not 0 < keep < of or width % of:
        raise ValueError(f"{keep}:{of} cannot be kept of rows of {width}: groups must divide it, and 0 < n < m")
    return of


# --------------------------------------------------------------------------------------------------------------------
# What follows the inputs: an error made in one column is made good in those to its right
# --------------------------------------------------------------------------------------------------------------------


def gptq(weight: Tensor, hessian: Tensor, bits: int, group_size: int = 128) -> Tensor:
    """GPTQ (arXiv 2210.17323): round-to-nearest column by column, each error spread over the columns to come.

    Args:
        hessian: H = X'X (in, in) of the calibration inputs X (tokens, in). With H = I it is [`rtn`].
        bits, group_size: as in [`rtn`]; the grid of a group comes from its weights as updated when it is reached.
    """
    check_grid(bits, group_size)
    width = weight.shape[-1] if group_size == -1 else group_size

    def begin(group: Tensor, _: Tensor):
        grid = quantization_grid(group, bits)
        return lambda column, values: snap(values[:, None], *grid, bits)[:, 0]

    return _column_by_column(weight, hessian, width, begin)


def sparsegpt(weight: Tensor, hessian: Tensor, keep: int, of: int | None = None) -> Tensor:
    """SparseGPT (arXiv 2301.00774): prune by `w^2 / U_jj^2`, each error spread over the columns to come.

    The mask of a group of `of` columns is chosen when it is reached, from the weights as updated then. Without `of`
    the group is the whole row, so the mask is chosen once, before any update; the paper's own code chooses it in
    blocks of 128 columns. With H = I it is [`magnitude`].
    """
    of = check_pattern(weight.shape[-1], keep, of)

    def begin(group: Tensor, diagonal: Tensor):
        mask = kept((group / diagonal).square(), keep)  # (out, of)
        return lambda column, values: values * mask[:, column]

    return _column_by_column(weight, hessian, of, begin)


def _column_by_column(weight: Tensor, hessian: Tensor, width: int, begin) -> Tensor:
    """The loop of both: `begin(group (out, width), U's diagonal)` gives `(column, values (out,)) -> what is kept`.

    `U` is the upper Cholesky factor of the inverse of `H + 0.01 mean(diag H) I`. An input that was never there
    (`H_jj = 0`) gets weight 0. All in float64.
    """
    work, hessian = weight.double().clone(), hessian.double().clone()
    if hessian.shape != (weight.shape[-1],) * 2:
        raise ValueError(f"hessian is {tuple(hessian.shape)}, and the weight has {weight.shape[-1]} inputs")
    dead = hessian.diagonal() == 0
    work[:, dead] = 0.0
    hessian.diagonal()[dead] = 1.0
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True)
    # errors reach the end of a stride at once, and what is beyond it in one product: the same sums, fewer of them
    stride = width * max(1, 128 // width)
    for first in range(0, work.shape[1], stride):
        last = min(first + stride, work.shape[1])
        errors = torch.empty_like(work[:, first:last])
        for j in range(first, last):
            if (j - first) % width == 0:
                stop = min(j + width, last)
                keep_of = begin(work[:, j:stop].clone(), upper.diagonal()[j:stop])
            value = keep_of((j - first) % width, work[:, j])
            error = (work[:, j] - value) / upper[j, j]  # (out,)
            work[:, j] = value
            work[:, j + 1 : last] -= error[:, None] * upper[j, j + 1 : last]
            errors[:, j - first] = error
        work[:, last:] -= errors @ upper[first:last, last:]
    return work.to(weight.dtype)


# --------------------------------------------------------------------------------------------------------------------
# Scaling before rounding
# --------------------------------------------------------------------------------------------------------------------


def awq(weight: Tensor, mean_abs: Tensor, hessian: Tensor, bits: int, group_size: int = 128) -> Tensor:
    """AWQ (arXiv 2306.00978): `rtn(W s) / s`, `s = mean|x|^alpha` of mean 1, alpha in {0, .05, .., .95}.

    The alpha with the least output error `||X W' - X W_c'||` wins; alpha = 0 is [`rtn`].

    Args:
        mean_abs: mean of |x| of each input over the calibration tokens (in,).
        hessian: X'X (in, in), which gives the output error.
    """
    exact, hessian, mean_abs = weight.double(), hessian.double(), mean_abs.double()
    best, least = None, torch.inf
    for step in range(20):
        scale = mean_abs ** (0.05 * step)
        scale = (scale / scale.mean().clamp(min=1e-12)).clamp(min=1e-4)  # an input that was never there keeps a scale
        found = rtn(exact * scale, bits, group_size) / scale if step else rtn(weight, bits, group_size).double()
        error = output_error(exact, found, hessian)
        if error < least:
            best, least = found, error
    return best.to(weight.dtype)


def output_error(weight: Tensor, other: Tensor, hessian: Tensor) -> float:
    """`||X W' - X W_c'||` (Frobenius) from H = X'X."""
    gap = weight.double() - other.double()
    return ((gap @ hessian.double()) * gap).sum().clamp(min=0).sqrt().item()


# --------------------------------------------------------------------------------------------------------------------
# Methods by name
# --------------------------------------------------------------------------------------------------------------------

KINDS = ("rtn", "gptq", "awq", "mag", "wanda", "sparsegpt")
QUANTIZERS = ("rtn", "gptq", "awq")


@dataclass(frozen=True)
class Method:
    """A method by its token: `rtn4`, `gptq3`, `awq4`, `mag2:4` (keep 2 of 4), `wanda50` (half of a row at 0).

    Attributes:
        token, kind: as written, and one of [`KINDS`].
        bits: of a quantizer, else None.
        keep, of: of n:m, else None.
        percent: pruned of each row, else None.
    """

    token: str
    kind: str
    bits: int | None = None
    keep: int | None = None
    of: int | None = None
    percent: int | None = None

    @classmethod
    def parse(cls, token: str) -> "Method":
        """Raises ValueError naming an unknown token and its nearest."""
        found = re.fullmatch(r"([a-z]+)(?:(\d+):(\d+)|(\d+))", token)
        kind, n, m, number = found.groups() if found else (None,) * 4
        if kind in QUANTIZERS and number and 2 <= int(number) <= 8:
            return cls(token, kind, bits=int(number))
        if kind in KINDS and kind not in QUANTIZERS:
            if n and 0 < int(n) < int(m) <= 16:
                return cls(token, kind, keep=int(n), of=int(m))
            if number and 10 <= int(number) <= 90:
                return cls(token, kind, percent=int(number))
        known = [f"{kind}{bits}" for kind in QUANTIZERS for bits in range(2, 9)]
        known += [f"{kind}{end}" for kind in KINDS if kind not in QUANTIZERS for end in ("2:4", "4:8", "50")]
        say = "there are rtn, gptq, awq with 2 to 8 and mag, wanda, sparsegpt with n:m (m <= 16) or 10 to 90"
        raise ValueError(f"methods: {token!r} is unknown; {near(token, known, say)}")

    @property
    def calibrated(self) -> bool:
        """Whether it needs the layer's inputs."""
        return self.kind not in ("rtn", "mag")

    @property
    def sparsity(self) -> float:
        """Share of weights at 0."""
        return 0.0 if self.bits else 1 - self.keep / self.of if self.of else self.percent / 100

    def bits_per_weight(self, group_size: int, width: int) -> float:
        """What a packed format takes: codes with a 16-bit step and a zero point a group; for n:m half-precision values
        with their places in the group, ceil(log2 m) bits each; without a pattern a bit mask."""
        if self.bits:
            return self.bits + (16 + self.bits) / (width if group_size == -1 else min(group_size, width))
        return (1 - self.sparsity) * (16 + ((self.of - 1).bit_length())) if self.of else (1 - self.sparsity) * 16 + 1

    def fits(self, width: int) -> bool:
        """Whether rows of `width` divide into the method's groups."""
        return not self.of or width % self.of == 0

    def __call__(self, weight: Tensor, inputs: "Inputs | None" = None, group_size: int = 128) -> Tensor:
        """W compressed; `inputs` is needed by what is calibrated."""
        keep = weight.shape[-1] - weight.shape[-1] * self.percent // 100 if self.percent else self.keep
        match self.kind:
            case "rtn":
                return rtn(weight, self.bits, group_size)
            case "gptq":
                return gptq(weight, inputs.hessian, self.bits, group_size)
            case "awq":
                return awq(weight, inputs.mean_abs, inputs.hessian, self.bits, group_size)
            case "mag":
                return magnitude(weight, keep, self.of)
            case "wanda":
                return wanda(weight, inputs.norms, keep, self.of)
            case "sparsegpt":
                return sparsegpt(weight, inputs.hessian, keep, self.of)


class Inputs:
    """What is kept of a layer's calibration inputs X (tokens, in), added up batch by batch in float64.

    Attributes:
        hessian: X'X (in, in).
        tokens: how many.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu"):
        self.hessian = torch.zeros(width, width, dtype=torch.float64, device=device)
        self._sum_abs = torch.zeros(width, dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """`x` (tokens, in)."""
        x = x.double()
        self.hessian += x.T @ x
        self._sum_abs += x.abs().sum(0)
        self.tokens += len(x)

    @property
    def norms(self) -> Tensor:
        """||x||_2 of each input (in,)."""
        return self.hessian.diagonal().clamp(min=0).sqrt()

    @property
    def mean_abs(self) -> Tensor:
        """mean |x| of each input (in,)."""
        return self._sum_abs / max(self.tokens, 1)
