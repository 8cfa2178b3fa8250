"""Optimizers for trust-region post-training, usable in any Hugging Face trainer.

Importing this package makes their names known to transformers: `optim="auon"` then works in every `TrainingArguments`.
The table of names is [`trl_trust.optimizers.OPTIMIZERS`].
"""

from importlib import import_module
from typing import TYPE_CHECKING

from ..optimizers import OPTIMIZERS
from .auon import AuON, HybridAuON
from .matrix import MatrixOptimizer
from .muon import Muon
from .plug import register


# FISMO and TRAM are imported at first use.
_EXPORTS = {"FISMO": "fismo", "TRAM": "tram"}

if TYPE_CHECKING:
    from .fismo import FISMO
    from .tram import TRAM

__all__ = ["FISMO", "OPTIMIZERS", "TRAM", "AuON", "HybridAuON", "MatrixOptimizer", "Muon", "register"]

register()


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
    globals()[name] = value
    return value
