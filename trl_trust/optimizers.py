"""The one table of optimizers. The plug, the command line, the docs, the tests and the benchmarks all read it.

It lies outside of `trl_trust.optim`, whose import registers these names in transformers: the table itself loads
neither torch nor transformers, so that `trl-trust optimizers` stays instant.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from .lookup import near


@dataclass(frozen=True)
class OptimizerInfo:
    """One row of the table.

    Attributes:
        name: What a user writes, `optim: NAME` or `--optim NAME`.
        title: How the optimizer is written in prose.
        target: `module:attribute` of the callable `target(model, lr=..., **options)` that builds it.
        paper: arXiv identifier; empty where there is none.
        grade: A key of [`trl_trust.methods.GRADES`].
        summary: What it does, in one line.
        rates: The usual learning rates of its matrices, in words, where its updates have a norm of their own.
    """

    name: str
    title: str
    target: str
    paper: str
    grade: str
    summary: str
    rates: str = ""

    def load(self) -> Any:
        """Import and return the target."""
        module, _, attribute = self.target.partition(":")
        return getattr(import_module(module), attribute)


OPTIMIZERS: tuple[OptimizerInfo, ...] = (
    OptimizerInfo(
        name="auon",
        title="AuON",
        target="trl_trust.optim.auon:AuON",
        paper="2509.24320",
        grade="exact",
        summary="momentum of each matrix scaled to one norm; no orthogonalisation, one pass over the data",
        rates=".05 to .25",
    ),
    OptimizerInfo(
        name="hybrid_auon",
        title="Hybrid-AuON",
        target="trl_trust.optim.auon:HybridAuON",
        paper="2509.24320",
        grade="exact",
        summary="AuON after one Newton-Schulz step (variant=paper) or five (variant=repo)",
        rates=".02 to .1",
    ),
    OptimizerInfo(
        name="muon",
        title="Muon",
        target="trl_trust.optim.muon:Muon",
        paper="2502.16982",
        grade="exact",
        summary="orthogonalised momentum, equal shapes batched: the baseline of the matrix optimizers",
        rates=".01 to .05",
    ),
    OptimizerInfo(
        name="fismo",
        title="FISMO",
        target="trl_trust.optim.fismo:FISMO",
        paper="2601.21750",
        grade="structure confirmed",
        summary="Muon in a space whitened by a Kronecker-factored Fisher matrix",
        rates=".01 to .05",
    ),
    OptimizerInfo(
        name="tram_adamw",
        title="TRAM",
        target="trl_trust.optim.tram:TRAMAdamW",
        paper="2310.03646",
        grade="exact",
        summary="sharpness-aware ascent, its radius a measured distance to a trust-region anchor, around AdamW",
    ),
)


def get_optimizer(name: str) -> OptimizerInfo:
    """Return the row called `name`, or raise `KeyError` with the nearest name, or all of them."""
    for row in OPTIMIZERS:
        if row.name == name:
            return row
    raise KeyError(f"unknown optimizer {name!r}; {near(str(name), (row.name for row in OPTIMIZERS))}")
