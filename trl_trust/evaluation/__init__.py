"""What a policy can be trusted with, measured. Names are imported on first use.

`report` and `stats` need no torch; every other room that reports a measurement writes it with them.
"""

from importlib import import_module


# public name -> module that defines it
_EXPORTS = {
    "Comparison": "report",
    "FactSource": "items",
    "Item": "items",
    "CompressionCallback": "compression",
    "TrustEvalCallback": "callback",
    "TrustSuite": "suite",
    "compression_report": "compression",
    "run_t2i_suite": "t2i",
    "run_trust_suite": "suite",
    "run_vlm_suite": "vlm",
    "Delta": "report",
    "Score": "report",
    "TrustGateError": "report",
    "TrustReport": "report",
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
