"""Unlearning whose updates leave the retain loss unchanged to first order. Names are imported on first use."""

from importlib import import_module


_EXPORTS = {
    "GUConfig": "gu",
    "GUTrainer": "gu",
    "ForgetRetainDataset": "data",
    "load_unlearning": "data",
    "unlearning_report": "metrics",
}

__all__ = [*_EXPORTS]


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    globals()[name] = value  # the next access is an ordinary attribute
    return value


def __dir__():
    return sorted(__all__)
