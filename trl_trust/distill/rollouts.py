"""Where frozen rollouts were before they had a room of their own, [`trl_trust.frozen`]; the names stay."""

from ..frozen.logps import collate_rollouts, completion_logps, score_rollouts
from ..frozen.sampling import RolloutsConfig, write_rollouts
from ..frozen.store import COLUMNS, load_rollouts, prepare_rollouts


__all__ = [
    "COLUMNS",
    "RolloutsConfig",
    "collate_rollouts",
    "completion_logps",
    "load_rollouts",
    "prepare_rollouts",
    "score_rollouts",
    "write_rollouts",
]
