"""Trust-region post-training for Hugging Face TRL.

Names are imported on first use: `import trl_trust` loads neither torch nor TRL.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .methods import ASYNCHRONOUS, METHODS


__version__ = "0.1.0.dev0"

# public name -> module that defines it
_EXPORTS = {
    "PolicyBatch": "trl_trust.policy.base",
    "PolicyLoss": "trl_trust.policy.base",
    "Rollouts": "trl_trust.policy.base",
    "GenerationBatch": "trl_trust.policy.base",
    "TrustGRPOConfig": "trl_trust.policy.base",
    "TrustGRPOTrainer": "trl_trust.policy.base",
    "TrustMonitor": "trl_trust.monitor",
    "ERPDTeacherTrainer": "trl_trust.distill.erpd",
    "erpd_signal": "trl_trust.distill.erpd",
    "erpd_teacher_loss": "trl_trust.distill.erpd",
    "causal_ladder": "trl_trust.robust.ladder",
    "consistency_reward": "trl_trust.robust.consistency",
    "RolloutsConfig": "trl_trust.frozen.sampling",
    "load_rollouts": "trl_trust.frozen.store",
    "score_rollouts": "trl_trust.frozen.logps",
    "write_rollouts": "trl_trust.frozen.sampling",
}
_EXPORTS |= dict.fromkeys(("AsyncTrustGRPOConfig", "AsyncTrustGRPOTrainer"), "trl_trust.asynchronous.base")
_EXPORTS |= dict.fromkeys(("coopetition_dataset", "coopetition_env_factory"), "trl_trust.tasks.coopetition")
_EXPORTS |= dict.fromkeys(
    ("FactSource", "TrustEvalCallback", "TrustReport", "TrustSuite", "compression_report", "run_trust_suite"),
    "trl_trust.evaluation",
)
_EXPORTS |= dict.fromkeys(("AuON", "FISMO", "HybridAuON", "Muon", "TRAM"), "trl_trust.optim")
for _method in METHODS:
    for _name in filter(None, (_method.trainer, _method.config, _method.loss)):
        _EXPORTS[_name] = _method.module
for _method in ASYNCHRONOUS:
    _EXPORTS |= dict.fromkeys((_method.trainer, _method.config), _method.module)

if TYPE_CHECKING:
    from .asynchronous.base import AsyncTrustGRPOConfig, AsyncTrustGRPOTrainer
    from .asynchronous.trainers import (
        AsyncDHPOConfig,
        AsyncDHPOTrainer,
        AsyncDISPOConfig,
        AsyncDISPOTrainer,
        AsyncDPPOConfig,
        AsyncDPPOTrainer,
        AsyncETRConfig,
        AsyncETRTrainer,
        AsyncMDPOConfig,
        AsyncMDPOTrainer,
    )
    from .distill.erpd import (
        ERPDConfig,
        ERPDTeacherTrainer,
        ERPDTrainer,
        erpd_signal,
        erpd_student_loss,
        erpd_teacher_loss,
    )
    from .distill.rlad import RLADConfig, RLADTrainer, rlad_loss
    from .distill.vpd import VPDConfig, VPDTrainer, vpd_loss
    from .evaluation import (
        FactSource,
        TrustEvalCallback,
        TrustReport,
        TrustSuite,
        compression_report,
        run_trust_suite,
    )
    from .flow.sage import SAGEGRPOConfig, SAGEGRPOTrainer, sage_loss
    from .frozen.logps import score_rollouts
    from .frozen.sampling import RolloutsConfig, write_rollouts
    from .frozen.store import load_rollouts
    from .monitor import TrustMonitor
    from .optim import FISMO, TRAM, AuON, HybridAuON, Muon
    from .policy.alp import ALPConfig, ALPTrainer, alp_loss
    from .policy.base import GenerationBatch, PolicyBatch, PolicyLoss, Rollouts, TrustGRPOConfig, TrustGRPOTrainer
    from .policy.dhpo import DHPOConfig, DHPOTrainer, dhpo_loss
    from .policy.dispo import DISPOConfig, DISPOTrainer, dispo_loss
    from .policy.dppo import DPPOConfig, DPPOTrainer, dppo_loss
    from .policy.etr import ETRConfig, ETRTrainer, etr_loss
    from .policy.mdpo import MDPOConfig, MDPOTrainer, mdpo_loss
    from .policy.opmd import OPMDConfig, OPMDTrainer, opmd_loss
    from .policy.trpa import TRPAConfig, TRPATrainer, trpa_loss
    from .robust.consistency import consistency_reward
    from .robust.ladder import causal_ladder
    from .robust.rl import RobustGRPOConfig, RobustGRPOTrainer
    from .robust.sft import RobustRewardConfig, RobustRewardTrainer, RobustSFTConfig, RobustSFTTrainer
    from .tasks.coopetition.environment import coopetition_dataset, coopetition_env_factory
    from .unlearn.gu import GUConfig, GUTrainer

__all__ = ["METHODS", "__version__", *_EXPORTS]


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_EXPORTS[name]), name)
    globals()[name] = value  # the next access is an ordinary attribute
    return value


def __dir__():
    return sorted(__all__)
