"""ERPD, extreme region policy distillation (arXiv 2605.25582): a reconstruction.

No equation of the paper was available. Two stages, teachers that are over-trained on purpose and off-policy, and
weak teachers that need a signal of their own are confirmed by the abstract; frozen rollouts and the set-up of the
released models by the authors' model cards. Every formula and every default below is a reading of them, and the
paper's numbers must not be expected from it. See docs/erpd.md.

Stage 1 trains a teacher off-policy on one frozen set of rollouts of a policy `base`, with no clip, far beyond where
its reward stops growing. Stage 2 goes back to `base` and follows only the teacher's token signal `s`, inside a trust
region around `old`, the student as it was a few steps ago:

    s     = log num(token) - log den(token)          teacher and old, teacher and base, or teacher and unlearned
    h     = clip(s / scale, -c, c)
    ratio = student / old
    loss  = -min(ratio h, clip(ratio, 1 - eps_low, 1 + eps_high) h) + beta KL(student || base)

All log-probabilities are of sampled tokens, so the vocabulary is never held. The data are frozen, so a teacher is read
once, before training, and never in memory together with the student's gradients.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from trl.experimental.gkd import GKDConfig
from trl.trainer.utils import get_config_model_id

from ..cards import paper
from ..frozen.trainer import FrozenRolloutsTrainer
from ..policy.terms import LOG_RATIO_LIMIT, PolicyBatch, PolicyLoss, clipped_surrogate, sequence_mean
from ..settings import (
    BelowOne,
    Count,
    NonNegative,
    Number,
    OpenFraction,
    Positive,
    Settings,
    Width,
    check,
    read_kind,
    refuse_unread,
    setting,
)


# preset -> (num, den, weight); a signal is the weighted sum of log num - log den
SIGNALS = {
    "strong": (("teacher", "old", 1.0),),  # what on-policy distillation follows
    "base_contrast": (("teacher", "base", 1.0),),  # the implicit reward of a token
    "weak": (("teacher", "unlearned", 1.0),),  # the drift that teacher and twin share cancels
}
RECONSTRUCTION = (
    "*A reconstruction of ERPD (arXiv 2605.25582): no equation of the paper was available. Formulas and settings are "
    "a reading of its abstract and of its authors' model cards, and its numbers are not reproduced.*"
)
NO_SIGNAL = 1e-8  # a scale below it is rounding, not signal


# --------------------------------------------------------------------------------------------------------------------
# The losses: pure functions
# --------------------------------------------------------------------------------------------------------------------


def frozen_kl(logps: Tensor, other_logps: Tensor, base_logps: Tensor) -> Tensor:
    """KL(policy || other) at each token, estimated on responses of `base`: `x log(x/y) - x + y`.

    With `x = policy/base` and `y = other/base`, the expectation over tokens of `base` is the divergence of the two
    next-token distributions, since x and y have mean 1; every entry is >= 0. The prefixes stay those of `base`.

    Args:
        logps, other_logps, base_logps: (B, T) log-probabilities of the sampled tokens.
    """
    x = torch.exp((logps - base_logps).clamp(max=LOG_RATIO_LIMIT))
    y = torch.exp((other_logps - base_logps).clamp(max=LOG_RATIO_LIMIT))
    return x * (logps - other_logps) - x + y


def erpd_teacher_loss(
    batch: PolicyBatch,
    *,
    teacher_loss: str = "mse",
    teacher_beta: float = 0.1,
    teacher_target: str = "advantage",
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    teacher_kl_coef: float = 0.0,
    unlearn: bool = False,
) -> PolicyLoss:
    """Stage 1: what turns `base` into the teacher (a reconstruction; SAPO's term is that of arXiv 2511.20347).

    With `rho = teacher / base` at a token, S the sum of log rho over the response and b = `teacher_beta`:

    - `sapo`: `-f(rho) A` a token, `f(rho) = 4/tau sigmoid(tau (rho - 1))`, tau by the sign of A;
    - `ce`: `-R log sigmoid(bS) - (1 - R) log sigmoid(-bS)` a response;
    - `mse`: `(bS - target)^2` a response.

    Args:
        batch: `logps` of the teacher; `old_logps` of `base`, stored with the rollouts; `advantages` (B, 1); `rewards`
            (B,) in [0, 1] for `ce`.
        teacher_loss: `"mse"`, `"sapo"` or `"ce"`.
        teacher_beta: b, > 0.
        teacher_target: target of `mse`: `"advantage"`, or its `"sign"`.
        sapo_temperature_pos, sapo_temperature_neg: tau for A > 0 and otherwise, > 0.
        teacher_kl_coef: coefficient of KL(teacher || base), >= 0.
        unlearn: train the twin: A or the target with the other sign, R as 1 - R.

    Returns:
        (B, T) loss for `sapo`, else (B, 1), where the KL is averaged over each response. Metrics:
        `erpd/teacher_reward_acc` (sign of S is that of A), `erpd/implicit_reward_pos`, `erpd/implicit_reward_neg` (bS
        where A > 0, A < 0), `erpd/rho_max`, `erpd/kl_base` (see [`frozen_kl`]), `erpd/length`.
    """
    log_rho = batch.logps - batch.old_logps  # (B, T)
    rho = torch.exp(log_rho.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
    margin = (log_rho * batch.mask).sum(-1, keepdim=True)  # (B, 1), S
    sign = -1.0 if unlearn else 1.0

    if teacher_loss == "sapo":
        advantages = sign * batch.advantages
        tau = torch.full_like(advantages, sapo_temperature_neg).masked_fill(advantages > 0, sapo_temperature_pos)
        loss = -4 / tau * torch.sigmoid(tau * (rho - 1)) * advantages  # (B, T)
    elif teacher_loss == "ce":
        rewards = batch.rewards.unsqueeze(1)  # (B, 1)
        rewards = 1 - rewards if unlearn else rewards
        z = teacher_beta * margin
        loss = -rewards * torch.nn.functional.logsigmoid(z) - (1 - rewards) * torch.nn.functional.logsigmoid(-z)
    else:
        target = sign * (batch.advantages.sign() if teacher_target == "sign" else batch.advantages)
        loss = (teacher_beta * margin - target).square()

    kl = frozen_kl(batch.logps, batch.old_logps, batch.old_logps)
    with torch.no_grad():
        implicit = teacher_beta * margin
        metrics = {
            "erpd/teacher_reward_acc": ((margin > 0) == (batch.advantages > 0)).float(),
            "erpd/implicit_reward_pos": implicit.masked_fill(batch.advantages <= 0, torch.nan),
            "erpd/implicit_reward_neg": implicit.masked_fill(batch.advantages >= 0, torch.nan),
            "erpd/rho_max": rho,
            "erpd/kl_base": kl,
            "erpd/length": batch.mask.sum(-1, keepdim=True),
        }
    if teacher_kl_coef != 0.0:
        loss = loss + teacher_kl_coef * (kl if loss.shape == kl.shape else sequence_mean(kl, batch.mask))
    return PolicyLoss(loss, metrics)


def erpd_signal(
    logps: Mapping[str, Tensor], signal: str | Sequence[tuple[str, str, float]], *, signal_bound: float | None = None
) -> Tensor:
    """The token signal `s = sum_k w_k (log num_k - log den_k)`, (B, T), detached (a reconstruction).

    Args:
        logps: name of a policy to its log-probabilities of the sampled tokens, (B, T).
        signal: a key of [`SIGNALS`], or a list of (num, den, weight).
        signal_bound: a in (0, 1): each log-ratio r becomes `log(a exp(r) + 1 - a)`, the contrast of a mixture of num
            and den, which log(1 - a) bounds from below (TOP-D, arXiv 2607.04751).
    """
    total = 0.0
    for num, den, weight in signal_terms(signal):
        log_ratio = logps[num].detach() - logps[den].detach()
        if signal_bound is not None:
            log_ratio = torch.logaddexp(
                log_ratio + math.log(signal_bound), torch.full_like(log_ratio, math.log1p(-signal_bound))
            )
        total = total + weight * log_ratio
    return total


def signal_terms(signal: str | Sequence[tuple[str, str, float]]) -> Sequence[tuple[str, str, float]]:
    """The (num, den, weight) of a preset, or of a list as it is."""
    return SIGNALS[signal] if isinstance(signal, str) else signal


def read_signal(signal: Any) -> str | list[tuple[str, str, float]]:
    """The setting `signal`: a preset as it is; a list, from a command line in JSON, as (num, den, weight).

    Raises:
        ValueError: if it is neither.
    """
    if isinstance(signal, str) and signal in SIGNALS:
        return signal
    terms = signal
    if isinstance(signal, str) and signal.lstrip().startswith("["):
        try:
            terms = json.loads(signal)
        except json.JSONDecodeError as error:
            raise ValueError(f"signal={signal!r} is not a list in JSON: {error}.") from error
    terms = [tuple(term) if isinstance(term, (list, tuple)) else term for term in terms or ()]
    ok = all(
        isinstance(term, tuple)
        and len(term) == 3
        and all(isinstance(name, str) and name.isidentifier() for name in term[:2])
        and term[0] != term[1]
        and read_kind("weight", Number).allows(term[2])
        for term in terms
    )
    if not (terms and ok):
        raise ValueError(
            f"signal={signal!r} must be one of {', '.join(SIGNALS)}, or a list of (num, den, weight): two different "
            f"policies, such as teacher, unlearned, old, base, and a finite number."
        )
    return terms


def signal_statistics(signal: Tensor, mask: Tensor) -> Tensor:
    """(3,) in float64: number of live tokens, sum and sum of squares of the signal. They add up over batches."""
    live = mask.double()
    return torch.stack([live.sum(), (signal.double() * live).sum(), (signal.double().square() * live).sum()])


def signal_scale_of(statistics: Tensor, kind: str) -> Tensor:
    """0-d: what a signal is divided by, from the [`signal_statistics`] of the whole batch.

    `"std"` is the (biased) standard deviation, `"rms"` the root mean square, `"none"` 1. No mean is subtracted from
    the signal itself: a token on which num and den agree must stay at 0.
    """
    count, total, squares = statistics / statistics[0].clamp(min=1.0)
    if kind == "none":
        return torch.ones_like(count)
    return (squares - (total.square() if kind == "std" else 0.0)).clamp(min=0.0).sqrt()


def erpd_student_loss(
    batch: PolicyBatch,
    signal: Tensor,
    scale: Tensor | float = 1.0,
    *,
    epsilon: float = 0.2,
    epsilon_high: float = 0.28,
    beta: float = 0.0,
    signal_clip: float | None = 5.0,
    outcome_gate: bool = False,
    staleness_clip: float | None = 2.0,
) -> PolicyLoss:
    """Stage 2: PPO's clipped term with the token signal in the place of the advantage (a reconstruction).

        h    = clip(signal / scale, -signal_clip, signal_clip)
        loss = -min(ratio h, clip(ratio, 1 - epsilon, 1 + epsilon_high) h) + beta KL(student || base)

    Args:
        batch: `logps` of the student, `old_logps` at the anchor, `ref_logps` of `base`, `advantages` (B, 1).
        signal: (B, T), see [`erpd_signal`].
        scale: 0-d, see [`signal_scale_of`]; below 1e-8 the signal counts as 0.
        epsilon, epsilon_high: widths of the trust region below and above 1.
        beta: coefficient of the KL, see [`frozen_kl`].
        signal_clip: bound of |h|; `None` for none.
        outcome_gate: keep a signal only where it has the sign of the advantage.
        staleness_clip: weight h by `min(old / base, staleness_clip)`; `None` for no weight. Ours, and on by default:
            without it a constant part of the signal pushes away from base, once the student has left it.

    Returns:
        (B, T) loss. Metrics: `erpd/signal_mean`, `erpd/signal_clipped`, `erpd/signal_adv_agreement` (of the tokens
        with a signal and an advantage), `erpd/kl_base`, `clip_ratio/{low,high,region}_mean`.
    """
    scale = torch.as_tensor(scale, dtype=signal.dtype, device=signal.device)
    silent = scale < NO_SIGNAL
    scaled = torch.where(silent, 0.0, signal / torch.where(silent, 1.0, scale))  # (B, T)
    h = scaled if signal_clip is None else scaled.clamp(-signal_clip, signal_clip)
    agrees = signal.sign() == batch.advantages.sign()
    if outcome_gate:
        h = h * agrees
    if staleness_clip is not None:
        h = h * torch.exp(batch.old_logps - batch.ref_logps).clamp(max=staleness_clip)

    ratio = torch.exp((batch.logps - batch.old_logps).clamp(max=LOG_RATIO_LIMIT))
    loss = clipped_surrogate(ratio, h, epsilon, epsilon_high)
    kl = frozen_kl(batch.logps, batch.ref_logps, batch.ref_logps)
    low = ((ratio < 1 - epsilon) & (h < 0)).float()
    high = ((ratio > 1 + epsilon_high) & (h > 0)).float()
    opinionated = (signal != 0) & (batch.advantages != 0)
    metrics = {
        "erpd/signal_mean": signal,
        "erpd/signal_clipped": (scaled.abs() > (math.inf if signal_clip is None else signal_clip)).float(),
        "erpd/signal_adv_agreement": agrees.float().masked_fill(~opinionated, torch.nan),
        "erpd/kl_base": kl,
        "clip_ratio/low_mean": low,
        "clip_ratio/high_mean": high,
        "clip_ratio/region_mean": low + high,
    }
    return PolicyLoss(loss + beta * kl if beta != 0.0 else loss, metrics)


# --------------------------------------------------------------------------------------------------------------------
# Config
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class ERPDConfig(Settings, GKDConfig):
    r"""
    Configuration of [`ERPDTeacherTrainer`] and [`ERPDTrainer`]. A reconstruction: no default below comes from the
    paper; `teacher_loss` and `signal` are what its released models are said to use.

    Every field of [`trl.experimental.gkd.GKDConfig`] is known. What needs live samples or whole distributions
    (`lmbda`, `seq_kd`, `max_new_tokens`) and what would change the frozen tokens is refused.

    Raises:
        ValueError: at construction, naming field, value and mend.
    """

    unread_fields: ClassVar[dict[str, str]] = {
        "seq_kd": "the rollouts are frozen; the teacher does not generate",
        "max_new_tokens": "lengths are those of the rollouts",
        "max_length": "rollouts are never truncated",
        "packing": "a response is scored as it was sampled",
        "padding_free": "a response is scored as it was sampled",
        "completion_only_loss": "only completions are ever scored",
        "assistant_only_loss": "only completions are ever scored",
        "loss_type": "the loss is `teacher_loss` in stage 1 and fixed in stage 2",
        "label_smoothing_factor": "there are no labels to smooth",
        "disable_dropout": "a ratio to stored log-probabilities means nothing under dropout",
        "neftune_noise_alpha": "a ratio to stored log-probabilities means nothing under noise",
    }

    lmbda: float = setting(0.0, "Not read: the rollouts are frozen. Leave it at 0.")
    temperature: Positive = setting(1.0, "Temperature at which the rollouts were sampled.")
    beta: NonNegative = setting(0.0, "Stage 2: coefficient of KL(student || base).")
    stage: Literal["teacher", "student"] = setting(
        None, "Which stage this trainer trains, teacher or student; `trl-trust erpd` trains both and sets it."
    )
    teacher_loss: Literal["mse", "sapo", "ce"] = setting(
        "mse", "Stage 1: mse or ce on the response's log-ratio, or sapo on each token."
    )
    teacher_beta: Positive = setting(0.1, "Stage 1, mse and ce: what the response's log-ratio is multiplied by.")
    teacher_target: Literal["advantage", "sign"] = setting(
        "advantage", "Stage 1, mse: target of a response, its advantage or only its sign."
    )
    sapo_temperature_pos: Positive = setting(1.0, "Stage 1, sapo: tau where the advantage is > 0.")
    sapo_temperature_neg: Positive = setting(1.05, "Stage 1, sapo: tau elsewhere.")
    teacher_kl_coef: NonNegative = setting(0.0, "Stage 1: coefficient of KL(teacher || base).")
    unlearn: bool = setting(False, "Stage 1: train the unlearned twin, towards the opposite of the rewards.")
    signal: list | str | None = setting(
        "weak", "Stage 2: strong, base_contrast, weak, or a list of [num, den, weight] of named policies."
    )
    signal_scale: Literal["std", "rms", "none"] = setting(
        "std", "Stage 2: what a signal is divided by: its std or rms over the batch, or none."
    )
    signal_clip: Positive | None = setting(5.0, "Stage 2: bound of the scaled signal; null: none.")
    signal_bound: OpenFraction | None = setting(
        None, "Stage 2: a in (0, 1) of the bounded signal log(a e^s + 1 - a); unset: s."
    )
    outcome_gate: bool = setting(False, "Stage 2: keep a signal only where it has the sign of the advantage.")
    staleness_clip: Positive | None = setting(
        2.0, "Stage 2: weight a token by old/base, at most this; null: no weight."
    )
    epsilon: BelowOne = setting(0.2, "Stage 2: width of the trust region below 1.")
    epsilon_high: Width = setting(0.28, "Stage 2: width of the trust region above 1.")
    steps_per_anchor: Count = setting(
        4,
        "Stage 2: optimizer steps of one batch iteration, over which `old` stays. With 1 the ratio is always 1 and "
        "the trust region does nothing.",
    )

    def __post_init__(self):
        # Past GKDConfig's own check, which confines `beta` to [0, 1]: there it interpolates between two divergences.
        super(GKDConfig, self).__post_init__()
        check(self)
        self.require(self.lmbda == 0, "lmbda", "is not read: the rollouts are frozen. Leave it at 0.0")
        if self.teacher_loss == "sapo":
            refuse_unread(self, {"teacher_beta": "teacher_loss='sapo' has tau in its place"})
        self.signal = read_signal(self.signal)

    @property
    def policies(self) -> list[str]:
        """Names of the frozen policies whose log-probabilities the stage reads."""
        names = {"base"}
        if self.stage == "student":
            names |= {name for num, den, _ in signal_terms(self.signal) for name in (num, den)}
        return sorted(names - {"old"})


# --------------------------------------------------------------------------------------------------------------------
# Trainers
# --------------------------------------------------------------------------------------------------------------------


class ERPDStageTrainer(FrozenRolloutsTrainer):
    """What the two stages of ERPD share: its config, of which one `stage` is theirs, and its model card."""

    config_class = ERPDConfig
    policies_field = "signal"
    stage: ClassVar[str]

    _tag_names = ["trl", "trl-trust", "erpd"]
    _name = "ERPD (a reconstruction)"
    _paper = paper(
        "Extreme Region Policy Distillation",
        "2605.25582",
        "Changyu Chen and Xiting Wang and Rui Yan",
    )

    def __init__(self, model, teacher_model=None, args=None, **kwargs):
        if args is None:
            model_id = model if isinstance(model, str) else get_config_model_id(model.config)
            args = ERPDConfig(f"{model_id.split('/')[-1]}-ERPD", stage=self.stage)
        stage = getattr(args, "stage", self.stage)
        if stage != self.stage:
            raise ValueError(f"stage={stage!r}: {type(self).__name__} trains the {self.stage}.")
        super().__init__(model, teacher_model, args, **kwargs)

    def create_model_card(self, *args, **kwargs) -> None:
        super().create_model_card(*args, **kwargs)
        card = Path(self.args.output_dir) / "README.md"
        if self.is_world_process_zero():
            text = card.read_text("utf-8")
            card.write_text(text.replace("\n# ", f"\n{RECONSTRUCTION}\n\n# ", 1), "utf-8")


class ERPDTeacherTrainer(ERPDStageTrainer):
    """
    Stage 1 of ERPD, a reconstruction (see [`erpd_teacher_loss`]): over-train a policy on its own frozen rollouts.

    The teacher is meant to degenerate. With `unlearn=True` it trains the twin that the signal `weak` compares it with.

    Args:
        model: `base`, as an id or a model.
        args: [`ERPDConfig`] with `stage="teacher"`.
        train_dataset, eval_dataset: rollouts, see [`~trl_trust.frozen.store.load_rollouts`]. Log-probabilities of
            `base` that are not stored with them are read at construction.
        kwargs: as for [`trl.experimental.gkd.GKDTrainer`]: `processing_class`, `peft_config`, `callbacks`, ...

    Raises:
        ValueError: for rollouts without a difference in rewards or at another temperature, rewards outside [0, 1] with
            `teacher_loss="ce"`, or several sets to evaluate on.
    """

    stage = "teacher"
    _name = "ERPD, stage 1 (a reconstruction)"

    def __init__(self, model, args=None, **kwargs):
        super().__init__(model, None, args, **kwargs)

    def check_rollouts(self, dataset, args):
        low, high = min(dataset["reward"]), max(dataset["reward"])
        if args.teacher_loss == "ce" and (low < 0 or high > 1):
            raise ValueError(f"teacher_loss='ce' takes rewards in [0, 1], but they lie in [{low}, {high}]; use 'mse'.")

    def policy_loss(self, batch, inputs):
        return erpd_teacher_loss(batch, **self.settings(erpd_teacher_loss))


class ERPDTrainer(ERPDStageTrainer):
    """
    Stage 2 of ERPD, a reconstruction (see [`erpd_student_loss`]): distil a teacher's token signal into `base`.

    Args:
        model: `base`, as an id or a model; the student starts from it.
        teacher_model: what stage 1 made, unless the rollouts have a column `teacher_logps`;
            `args.teacher_model_name_or_path` by default.
        args: [`ERPDConfig`] with `stage="student"`.
        train_dataset, eval_dataset: the rollouts of stage 1.
        policies: name to model, for the other names in `signal`, such as `unlearned`, that are no column either.
            Where there is a teacher, `erpd/kl_teacher` is logged whether or not the signal reads it.
        kwargs: as for [`trl.experimental.gkd.GKDTrainer`]: `processing_class`, `peft_config`, `callbacks`, ...

    A model given here is read once, at construction, and may be deleted then.

    Raises:
        ValueError: for a policy in `signal` of which neither a column nor a model is there, a model with other token
            ids, rollouts at another temperature, or several sets to evaluate on.
    """

    stage = "student"
    _name = "ERPD, stage 2 (a reconstruction)"

    @property
    def steps_per_anchor(self) -> int:
        return self.args.steps_per_anchor

    @torch.no_grad()
    def anchor(self, batches):
        for inputs in batches:
            inputs["old_logps"] = self.forward(self.model, inputs).log_probs.float()
            logps = {name.removeprefix("logps/"): x for name, x in inputs.items() if name.startswith("logps/")}
            logps["old"] = inputs["old_logps"]
            inputs["signal"] = erpd_signal(logps, self.args.signal, signal_bound=self.args.signal_bound)
        # One wait for the device a batch iteration; the stored log-probabilities were checked when they were read
        if batches and not torch.stack([inputs["signal"].isfinite().all() for inputs in batches]).all():
            raise ValueError("the student gives a completion token a log-probability that is not finite")

    def statistics(self, inputs):
        mask = inputs["labels"][:, 1:] != -100
        return torch.cat([super().statistics(inputs), signal_statistics(inputs["signal"], mask)[1:]])

    def policy_loss(self, batch, inputs):
        tokens, _, *sums = inputs["step"]  # of the signal and its square
        statistics = torch.stack([tokens, *sums])
        scale = signal_scale_of(statistics, self.args.signal_scale).float()
        policy = erpd_student_loss(batch, inputs["signal"], scale, **self.settings(erpd_student_loss))
        metrics = {**policy.metrics, "erpd/signal_std": signal_scale_of(statistics, "std")}
        if "logps/teacher" in inputs:
            metrics["erpd/kl_teacher"] = frozen_kl(batch.logps.detach(), inputs["logps/teacher"], batch.ref_logps)
        return replace(policy, metrics=metrics)
