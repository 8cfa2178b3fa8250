"""Group-relative training of flow-matching image and video models: SAGE-GRPO. Names are imported on first use."""

from importlib import import_module


_EXPORTS = {
    "SAGEGRPOConfig": "sage",
    "SAGEGRPOTrainer": "sage",
    "sage_loss": "sage",
    "FlowAdapter": "adapters",
    "brightness_reward": "rewards",
    "clip_score_reward": "rewards",
    "pick_score_reward": "rewards",
    "videoalign_reward": "rewards",
    "equalizer": "steps",
    "log_prob": "steps",
    "step_stats": "steps",
}

__all__ = [*_EXPORTS]


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
