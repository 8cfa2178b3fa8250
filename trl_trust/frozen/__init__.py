"""Rollouts that do not change: written once, read by many runs."""

from .. import optim  # noqa: F401  makes `optim="auon"` known to transformers
from ..support import check_trl


check_trl()  # before the modules here import what another TRL may lack
