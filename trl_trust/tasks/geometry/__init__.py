"""Geometry: verified problems with exact answers and proofs (after TrustGeoGen, arXiv 2504.15780).

The names load their module when they are first used, so that facts, closure and checker need no torch.
"""

from importlib import import_module


_HOMES = {
    "answer": ("parse_answer",),
    "check": ("verify_proof", "verify_row"),
    "claims": ("claims",),
    "closure": ("Closure", "Diagram"),
    "curriculum": ("GeometryCurriculum",),
    "data": ("geometry_dataset",),
    "facts": ("Fact", "Root", "parse_fact"),
    "picture": ("draw_picture",),
    "problems": ("Problem", "pose"),
    "rewards": ("geometry_reward", "geometry_step_reward", "step_reward"),
    "scene": ("Scene", "draw"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__():
    return __all__
