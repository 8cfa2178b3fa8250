"""The policy of the quickstart, by the names it has had here: [`trl_trust.tasks.start`]."""

from trl_trust.tasks.start import build_model, build_start, warm_start


__all__ = ["build_model", "build_start", "warm_start"]
