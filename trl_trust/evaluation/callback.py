"""The suite while any trainer of transformers runs: a callback that changes nothing in the training.

trainer.add_callback(TrustEvalCallback(trainer, TrustSuite(), every_n_steps=100, baseline="start"))
"""

import logging
from pathlib import Path

from transformers import Trainer, TrainerCallback

from ..settings import Count, require
from .report import TrustReport
from .suite import TrustSuite, run_trust_suite


logger = logging.getLogger("trl_trust")


class TrustEvalCallback(TrainerCallback):
    """Asks the suite's items every so many steps, and says what became worse than the baseline beyond chance.

    Logs `trusteval/DIMENSION/{score,no_answer,low,high,delta}`, `trusteval/worst_drop` and `trusteval/alerts`; writes
    `trusteval/step-N.json` into the output folder. Modes, random states and gradients are as they were: training with
    it is training without it, to the bit. Every process takes its share of the items.

    Args:
        trainer: the trainer that it is added to.
        suite: by default all dimensions, 64 slots each. A suite with `fresh_per_eval` draws new items each time, so
            that a policy cannot learn them; `False` asks the same ones, which compares item by item and sees smaller
            changes.
        every_n_steps: how often.
        baseline: `"start"` (measured before the first step), `"reference"` (the trainer's reference model), a report,
            or None.
        stop_on_alert: end the training at the first alert.

    Raises:
        ValueError: for `every_n_steps` below 1, an unknown `baseline`, or `"reference"` without a reference model.
    """

    def __init__(
        self,
        trainer: Trainer,
        suite: TrustSuite | None = None,
        *,
        every_n_steps: int = 100,
        baseline: "str | TrustReport | None" = "start",
        stop_on_alert: bool = False,
    ):
        require("every_n_steps", every_n_steps, Count)
        if not (baseline in ("start", "reference", None) or isinstance(baseline, TrustReport)):
            raise ValueError(f"baseline={baseline!r} must be 'start', 'reference', a report or None")
        if baseline == "reference" and getattr(trainer, "ref_model", None) is None:
            raise ValueError("baseline='reference': the trainer has no reference model; use 'start'")
        self.trainer, self.suite = trainer, suite or TrustSuite()
        self.every_n_steps, self.stop_on_alert = every_n_steps, stop_on_alert
        self._baseline_of = baseline if isinstance(baseline, str) else None
        self.baseline: TrustReport | None = None if isinstance(baseline, str) else baseline
        self.reports: list[TrustReport] = []

    def _measure(self, model, evaluation: int, subject: str) -> TrustReport:
        tokenizer = self.trainer.processing_class
        return run_trust_suite(
            model,
            getattr(tokenizer, "tokenizer", tokenizer),
            self.suite,
            subject=subject,
            evaluation=evaluation if self.suite.fresh_per_eval else 0,
            accelerator=self.trainer.accelerator,
            batch_size=self.suite.batch_size or self.trainer.args.per_device_train_batch_size,
        )

    def on_train_begin(self, args, state, control, **kwargs):
        if self._baseline_of is not None and self.baseline is None:
            start = self._baseline_of == "start"
            model = self.trainer.model_wrapped if start else self.trainer.ref_model
            self.baseline = self._measure(model, 0, self._baseline_of)
            self._write(self.baseline, args, state, self._baseline_of)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every_n_steps:
            return control
        report = self._measure(
            self.trainer.model_wrapped, state.global_step // self.every_n_steps, f"step {state.global_step}"
        )
        self.reports.append(report)
        self._write(report, args, state, f"step-{state.global_step}")
        logs, alerts = {}, ()
        comparison = None
        if self.baseline is not None:
            comparison = report.compare(self.baseline, alert_drop=self.suite.alert_drop)
            alerts = comparison.alerts
        for name in self.suite.dims:
            score = report[name]
            values = {"score": score.value, "no_answer": score.no_answer, "low": score.low, "high": score.high}
            if comparison is not None:
                values["delta"] = comparison[name].delta
            logs |= {f"trusteval/{name}/{key}": value for key, value in values.items()}
        if comparison is not None:
            logs["trusteval/worst_drop"] = max(comparison[name].drop for name in self.suite.dims)
            logs["trusteval/alerts"] = len(alerts)
        should_log = control.should_log
        # the base class's own: TRL's would also close its window of metrics; and a log of ours is not the step's
        Trainer.log(self.trainer, logs)
        control.should_log = should_log
        if alerts and state.is_world_process_zero:
            changes = ", ".join(f"{n} {comparison[n].before:.3f} to {comparison[n].after:.3f}" for n in alerts)
            logger.warning("trust at step %d became worse beyond chance: %s", state.global_step, changes)
        if alerts and self.stop_on_alert:
            control.should_training_stop = True
        return control

    def _write(self, report: TrustReport, args, state, name: str) -> None:
        if state.is_world_process_zero:
            report.save(Path(args.output_dir) / "trusteval" / f"{name}.json")
