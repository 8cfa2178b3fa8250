"""Coopetition: a repeated investment game whose agents trust, forgive and remember (arXiv 2510.24909).

"Trust" here is trust between agents; it has nothing to do with trust regions. The names load their module when they
are first used, so that the dynamics need NumPy alone.
"""

from importlib import import_module


_HOMES = {
    "dynamics": ("TrustDynamics", "TrustParams"),
    "environment": (
        "CoopetitionEnv",
        "coopetition_dataset",
        "coopetition_env_factory",
        "coopetition_metrics",
        "invest_reward",
    ),
    "game": ("Game", "View", "best_plan", "myopic", "play"),
    "istar": ("IStarNetwork", "load_istar"),
    "payoffs": ("Payoff", "equilibrium"),
    "plots": ("plot_case", "plot_sweep"),
    "study": ("case_study", "companion", "reproduce", "score", "sweep"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__():
    return __all__
