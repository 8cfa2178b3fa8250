"""Run what is missing of the comparison. See README.md beside this file.

    python benchmarks/compare/run.py --regime reuse --budget-minutes 60

Each cell (a task, a regime, an entry) is tuned on starts of its own and then run from the 12 starts that all entries
share. Records are written as they come; the command goes on where it was stopped, however that was.
"""

import argparse
import os
import sys
import tempfile
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from multiprocessing import get_context, parent_process
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent))

from records import FIRST_TUNING_START, RESERVE, RESULTS, STARTS, TUNING, Job, close_rates, read, tuned_rate, write
from work import entries, find, missing_fields, regimes, run_one


# The order of the work: what matters most comes first, and what time runs out for is at the end.
TASKS = ("addition", "sudoku")
WHOLE = ("reuse", "mini_batches", "lag_32", "mismatch_1")
OTHERS = ("on_policy", "lag_2", "lag_8", "mismatch_02", "mismatch_int8", "flipped", "long_reuse")
ORDER = (
    *("dapo", "no_trust_region", "gspo", "dppo", "dhpo", "cispo", "dispo", "etr", "mdpo", "dppo_kl", "alp", "grpo"),
    *("sapo", "vespo", "gmpo", "trpa", "opmd", "dr_grpo", "dapo_corrected", "dapo_step_control", "opmd_tau_05"),
    *("dhpo_step_control", "etr_step_control", "rlad", "vpd"),
)
OPTIMIZERS = tuple(
    f"{name}{more}" for name in ("muon", "auon", "hybrid_auon", "fismo", "tram") for more in ("", "_step_control")
)
# Where an entry is the reference under another name, it is not run
ONLY_IN = {"dapo_corrected": ("mismatch_02", "mismatch_1", "mismatch_int8")}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", default=["addition"], help="addition, sudoku (default: addition)")
    parser.add_argument("--regime", nargs="+", default=list(WHOLE), help=f"default: {' '.join(WHOLE)}")
    parser.add_argument("--entry", nargs="+", default=list(ORDER), help="default: all, in the order of the work")
    parser.add_argument(
        "--stage",
        nargs="+",
        choices=["tune", "main", "reserve"],
        default=["tune", "main"],
        help="tune: rates on tuning starts; main: the 12 starts at the tuned rate; reserve: the 12 others likewise "
        "(default: tune main)",
    )
    parser.add_argument(
        "--learning-rate",
        nargs="+",
        type=float,
        help="run the starts at these rates, the same for every entry, and tune nothing; the first rate first",
    )
    parser.add_argument("--seeds", type=int, default=len(STARTS), help="how many of the starts (default: 12)")
    parser.add_argument(
        "--tuning-seeds",
        type=int,
        default=2,
        help="starts a rate in tuning, and as many again where rates are close (default: 2)",
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time (default: 1)")
    parser.add_argument("--budget-minutes", type=float, help="start no run after so many minutes")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--list", action="store_true", help="say what is done and what is left, and do nothing")
    parser.add_argument("--smoke", action="store_true", help="toy sizes, one regime, in a folder of its own; a report")
    args = parser.parse_args(argv)
    for what, table, names in (("regime", regimes(), args.regime), ("entry", entries(), args.entry)):
        for name in names:
            try:
                find(table, what, name)
            except KeyError as error:
                parser.error(error.args[0])
    for name in ("seeds", "tuning_seeds", "jobs"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}={getattr(args, name)} must be at least 1")
    return args


class Plan:
    """What is to be run, given what was: tuning decides the rates of the rest, so it is asked again after each run."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.scores = {}  # Job -> score
        for record in read(args.output):
            self.add(record)

    def add(self, record: dict) -> None:
        names = ("task", "regime", "entry", "start", "learning_rate")
        self.scores[Job(*(record[name] for name in names))] = record["score"]

    def cells(self):
        for task in self.args.task:
            for regime in self.args.regime:
                for entry in self.args.entry:
                    if regime in ONLY_IN.get(entry, (regime,)):
                        yield task, regime, entry

    def pending(self) -> tuple[list[Job], int]:
        """Jobs that can be run now, in order, and about how many are left in all."""
        ready, later = [], 0
        for cell in self.cells():
            jobs, blocked = self.pending_in(cell)
            ready += jobs
            later += blocked
        if self.args.learning_rate:  # a whole table, then the next
            ready.sort(key=lambda job: self.args.learning_rate.index(job.learning_rate))
        return ready, len(ready) + later

    def pending_in(self, cell) -> tuple[list[Job], int]:
        if self.args.learning_rate:
            jobs = [Job(*cell, s, rate) for rate in self.args.learning_rate for s in STARTS[: self.args.seeds]]
            return [job for job in jobs if job not in self.scores], 0
        stages, rates, jobs = self.args.stage, {}, []
        n = self.args.tuning_seeds
        runs = [*("main" in stages) * STARTS[: self.args.seeds], *("reserve" in stages) * RESERVE]
        wanted = [(rate, n) for rate in TUNING]
        while wanted:
            rate, many = wanted.pop()
            tuning = [Job(*cell, FIRST_TUNING_START + i, rate) for i in range(many)]
            missing = [job for job in tuning if job not in self.scores]
            jobs += missing
            if not missing:
                rates[rate] = [self.scores[job] for job in tuning]
            if not wanted and not jobs:
                best, beyond = tuned_rate(rates)
                close = close_rates(rates)
                if beyond is not None and beyond not in rates:  # edges are extended as long as the best is one
                    wanted.append((beyond, n))
                elif len(close) > 1:  # and close rates get as many starts again
                    wanted += [(rate, 2 * n) for rate in close if len(rates[rate]) < 2 * n]
        if jobs:  # tuning is missing: where it is not asked for, nothing can be run
            return jobs if "tune" in stages else [], len(runs)
        main = [Job(*cell, start, best) for start in runs]
        return [job for job in main if job not in self.scores], 0


def end_with_parent() -> None:
    """In a worker: leave as soon as the runner is gone, even by kill -9."""
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


def work(job: Job, smoke: bool) -> dict:
    """Run a job in this process."""
    from trl_trust.quickstart.run import quiet

    with quiet():
        return run_one(job.task, job.regime, job.entry, job.start, job.learning_rate, smoke=smoke)


def run(args: argparse.Namespace) -> int:
    """Run what is pending until nothing is, or the budget is spent."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console()
    available = [name for name in args.entry if not missing_fields(entries()[name])]
    for name in set(args.entry) - set(available):
        fields = ", ".join(missing_fields(entries()[name]))
        console.print(f"{name}: left out, its config has no field {fields}", highlight=False)
    args.entry = available
    plan, began, running, cpu, broken = Plan(args), time.monotonic(), {}, [], []
    columns = (
        "{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    spent = lambda: args.budget_minutes is not None and time.monotonic() - began > 60 * args.budget_minutes
    with (
        Progress(*columns, console=console, disable=not console.is_terminal) as bar,
        # a process that has run many trainers is no slower than a new one, so workers stay
        ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn"), initializer=end_with_parent) as pool,
    ):
        shown = bar.add_task("runs", note="")
        while True:
            ready, left = plan.pending()
            ready = [job for job in ready if job not in running.values() and job not in broken]
            while ready and len(running) < args.jobs and not spent():
                job = ready.pop(0)
                running[pool.submit(work, job, args.smoke)] = job
            if not running:
                break
            hours = left * sum(cpu) / max(1, len(cpu)) / 3600 / args.jobs
            note = f"about {left} left, {hours:.1f} h" if cpu else f"about {left} left"
            bar.update(shown, completed=len(cpu), total=len(cpu) + left, note=note)
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                if future.exception() is not None:  # not what training ended in: a mistake of ours or of the entry
                    broken.append(job)
                    console.print(f"{job} broke: {future.exception()!r}", highlight=False, soft_wrap=True)
                    continue
                record = future.result()
                write(args.output, job, record)
                plan.add(record)
                cpu.append(record["cpu_seconds"] + record["measuring_cpu_seconds"])
                if bar.disable:
                    failed = f" FAILED: {record['error']}" if "error" in record else ""
                    console.print(
                        f"{job.task} {job.regime} {job.entry} {job.learning_rate:g} start {job.start}: score "
                        f"{record['score']:.3f}, {cpu[-1]:.0f} CPU s, {note}{failed}",
                        highlight=False,
                        soft_wrap=True,
                    )
    console.print(f"{len(cpu)} runs added; about {plan.pending()[1]} left of what was asked for", highlight=False)
    return 1 if broken else 0


def status(args: argparse.Namespace) -> int:
    """Print, cell by cell, how many runs are there."""
    plan = Plan(args)
    for cell in plan.cells():
        done = [job for job in plan.scores if (job.task, job.regime, job.entry) == cell]
        tuning = sum(job.start >= FIRST_TUNING_START for job in done)
        jobs, blocked = plan.pending_in(cell)
        left = len(jobs) + blocked
        print(f"{' '.join(cell):<40} tuning {tuning:>2}, runs {len(done) - tuning:>3}, left {left:>3}")
    return 0


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.list:
        return status(args)
    if not args.smoke:
        return run(args)
    if args.entry == list(ORDER):
        args.entry = ["dapo", "dppo"]  # a trainer of TRL, one of ours
    # a start of 20 steps solves nothing: flipped rewards give it something to learn
    args.regime = ["flipped"] if args.regime == list(WHOLE) else args.regime[:1]
    args.seeds, args.tuning_seeds, args.stage, args.learning_rate = 2, 1, ["tune", "main"], None
    if args.output == RESULTS:
        args.output = Path(tempfile.mkdtemp(prefix="compare-smoke-"))
    import report

    return run(args) or report.main(["--input", str(args.output), "--starts", str(args.seeds)])


if __name__ == "__main__":
    raise SystemExit(main())
