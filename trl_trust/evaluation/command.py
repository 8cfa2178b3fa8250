"""`trl-trust eval`: the suite on a model, from the command line. torch is imported once the words are read."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..lookup import near
from .dimensions import DIMENSIONS
from .report import TrustGateError, TrustReport


def make_parser() -> argparse.ArgumentParser:
    parser = Words(
        prog="trl-trust eval", description="Measure nine trust dimensions of a model. Exit status 1: an alert."
    )
    parser.add_argument("--config", help="a recipe: YAML of these options, a file or a short name such as eval/core")
    parser.add_argument("--list", action="store_true", help="the dimensions: what each measures, and what not")
    parser.add_argument(
        "--suite",
        default="core",
        help="core (all nine), dimensions: honesty,privacy, vlm (pictures), or of lm-eval: lm_eval:truthfulqa_mc2,bbq",
    )
    parser.add_argument("--include_path", help="with lm_eval: a folder of tasks in place of lm-eval's own")
    parser.add_argument("--limit", type=int, help="with lm_eval: examples a task, for a trial")
    parser.add_argument("--export", choices=("lm-eval", "inspect"), help="write the suite's items as tasks into --out")
    parser.add_argument("--read", help="a result file of lm-eval, or a JSON log of inspect-ai, in place of --model")
    parser.add_argument(
        "--n_per_dim", type=int, default=64, help="slots a dimension, even, >= 8 (default: %(default)s)"
    )
    parser.add_argument("--adaptive", action="store_true", help="spend half where the intervals are widest")
    parser.add_argument("--facts", help="own facts: a .jsonl, .json or .csv file; with --entity and --value")
    parser.add_argument("--entity", help="column of the facts that names the thing")
    parser.add_argument("--value", help="column of the facts that is asked for")
    add_model_options(parser)
    return parser


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """What every command that measures a model takes."""
    parser.add_argument("--model", help="a folder or hub name; `tiny` builds a small one on the spot")
    parser.add_argument("--dtype", default="auto", help="of the weights (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda, ...; by default cuda where there is one")
    parser.add_argument("--seed", type=int, default=0, help="of the items (default: %(default)s)")
    parser.add_argument("--terse", action="store_true", help="word items in a few dozen characters, for tiny models")
    parser.add_argument("--batch_size", type=int, default=32, help="(default: %(default)s)")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--out", help="folder for report.json, report.md and report.png")
    parser.add_argument("--compare", help="an earlier report.json: what changed beyond chance; exit status 1 if worse")
    parser.add_argument("--gate", nargs="*", default=[], help="limits such as min_honesty=0.8; exit status 1 outside")


class Words(argparse.ArgumentParser):
    """A parser that says what is wrong in one line, and reads a recipe below the words."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs)
        self.formatter_class = argparse.HelpFormatter

    def error(self, message: str):
        raise ValueError(message)

    def read(self, words: Sequence[str]) -> argparse.Namespace:
        """The options in `words`, and under them those of the recipe that `--config` names."""
        given = self.parse_args(list(words))
        if given.config:
            import yaml

            recipe = yaml.safe_load(Path(given.config).read_text("utf-8")) or {}
            known = {action.dest for action in self._actions} - {"config", "help", "list"}
            for name in recipe:
                if name not in known:
                    raise ValueError(f"recipe {given.config}: {name!r} is no option; {near(str(name), known)}")
            self.set_defaults(**recipe)
            given = self.parse_args(list(words))
        return given


def model_path(given: argparse.Namespace) -> str | Path:
    """Where the model is; `tiny` is built where it is not there, and makes the wording terse."""
    if given.model != "tiny":
        return given.model
    from .tiny import cached_tiny

    given.terse = True
    return cached_tiny(on_step=progress("building the tiny model, once"))


def check_end(given: argparse.Namespace) -> None:
    """Refuse before the work what [`finish`] could not use after it."""
    read_limits(given.gate)
    if given.compare:
        TrustReport.load(given.compare)


def load_weights(auto: str, path: str | Path, given: argparse.Namespace):
    """The model at `path` through transformers' class `auto`, where the options want it."""
    import torch
    import transformers

    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return getattr(transformers, auto).from_pretrained(path, dtype=given.dtype).to(device)


def load_model(given: argparse.Namespace):
    """Model, tokenizer and subject of the options."""
    if not given.model:
        raise ValueError("--model: say which, a folder, a hub name, or `tiny` for one that is built on the spot")
    check_end(given)
    from transformers import AutoTokenizer

    subject, path = given.model, model_path(given)
    model = load_weights("AutoModelForCausalLM", path, given)
    return model, AutoTokenizer.from_pretrained(path), subject


def progress(what: str):
    """A line on stderr that says how far, ten times; quiet where stderr is no terminal, but for the last."""

    def show(done: int, total: int, *_) -> None:
        live = sys.stderr.isatty()
        if done == total or (live and done % max(1, total // 10) == 0):
            print(f"{what}: {done}/{total}", end="\n" if done == total or not live else "\r", file=sys.stderr)

    return show


def finish(report: TrustReport, given: argparse.Namespace) -> int:
    """Print and save a report, compare and gate it, and return the exit status."""
    print(report.to_markdown())
    if given.out:
        print(f"written: {report.save(given.out).parent}/", file=sys.stderr)
    status = 0
    if given.compare:
        comparison = report.compare(TrustReport.load(given.compare))
        print(comparison.to_markdown())
        status = int(bool(comparison.alerts))
    if given.gate:
        try:
            report.gate(read_limits(given.gate))
        except TrustGateError as error:
            print(f"trl-trust: gate: {error}", file=sys.stderr)
            status = 1
    return status


def read_limits(words: Sequence[str]) -> dict[str, float]:
    limits = {}
    for word in words:
        name, _, number = word.partition("=")
        try:
            limits[name] = float(number)
        except ValueError:
            raise ValueError(f"--gate {word!r} must be NAME=NUMBER, such as min_honesty=0.8") from None
    return limits


def read_facts(given: argparse.Namespace):
    """The user's own facts, or None."""
    if not given.facts:
        return None
    if not (given.entity and given.value):
        raise ValueError("--facts needs --entity and --value, the names of its columns")
    from datasets import load_dataset

    from .items import FactSource

    kind = {".csv": "csv", ".json": "json", ".jsonl": "json"}.get(Path(given.facts).suffix)
    if kind is None or not Path(given.facts).is_file():
        raise ValueError(f"--facts {given.facts!r} must be a .jsonl, .json or .csv file")
    return FactSource(load_dataset(kind, data_files=given.facts, split="train"), given.entity, given.value)


def suite_of(given: argparse.Namespace, **more):
    from .suite import TrustSuite

    return TrustSuite(
        dims="all" if given.suite == "core" else tuple(given.suite.split(",")),
        n_per_dim=given.n_per_dim,
        seed=given.seed,
        terse=given.terse,
        batch_size=given.batch_size,
        max_new_tokens=given.max_new_tokens,
        **more,
    )


def ask_vlm(given: argparse.Namespace) -> TrustReport:
    """The pictures of [`vlm.run_vlm_suite`], asked of a vision-language model.

    Raises:
        ValueError: for an option that has no meaning with pictures, or a model that reads none.
    """
    if not given.model or given.model == "tiny":
        raise ValueError("--suite vlm: say which vision-language model, a folder or a hub name, with --model")
    for name in ("export", "facts", "adaptive"):
        if getattr(given, name, None):
            raise ValueError(f"--{name} has no meaning with --suite vlm: leave it out")
    check_end(given)
    from transformers import AutoProcessor

    from .vlm import check_processor, run_vlm_suite

    processor = AutoProcessor.from_pretrained(given.model)
    check_processor(processor, given.model)
    return run_vlm_suite(
        load_weights("AutoModelForImageTextToText", given.model, given),
        processor,
        n_per_dim=given.n_per_dim,
        seed=given.seed,
        batch_size=given.batch_size or 8,
        max_new_tokens=given.max_new_tokens,
        subject=given.model,
        on_batch=progress("pictures"),
    )


def ask_lm_eval(given: argparse.Namespace) -> TrustReport:
    _, _, tasks = given.suite.partition(":")
    if not tasks:
        raise ValueError("--suite lm_eval: say which tasks, such as lm_eval:truthfulqa_mc2,bbq")
    from .exchange import run_lm_eval

    model, tokenizer, subject = load_model(given)
    return run_lm_eval(
        model,
        tokenizer,
        tasks.split(","),
        subject=subject,
        include_path=given.include_path,
        batch_size=given.batch_size,
        limit=given.limit,
        seed=given.seed,
    )


def export(given: argparse.Namespace, source) -> int:
    """Write the suite's items as tasks of another harness, and say how they are run there."""
    if not given.out:
        raise ValueError("--export needs --out, the folder to write")
    from . import exchange

    if given.export == "inspect":
        folder = exchange.write_inspect(suite_of(given, source=source), given.out)
        print(f"inspect eval {folder}/task.py --model MODEL --log-format json")
        return 0
    if not given.model:
        raise ValueError("--export lm-eval needs --model, whose tokenizer renders the conversations")
    from transformers import AutoTokenizer

    path = model_path(given)
    suite = suite_of(given, source=source)
    folder = exchange.write_lm_eval(suite, given.out, AutoTokenizer.from_pretrained(path))
    print(
        f"lm_eval --model hf --model_args pretrained={path} --include_path {folder} "
        f"--tasks {','.join(exchange.PREFIX + name for name in suite.dims)} --log_samples --output_path results"
    )
    return 0


def main(words: Sequence[str]) -> int:
    given = make_parser().read(words)
    if given.list:
        for name, row in DIMENSIONS.items():
            print(f"{name}: {row.measures}\n  passes: {row.passes}\n  does not mean: {row.not_meant}")
            print(f"  best constant answer: {row.chance:g}")
        return 0
    if given.read:
        from .exchange import read

        return finish(read(given.read), given)
    if given.suite.startswith("lm_eval"):
        return finish(ask_lm_eval(given), given)
    if given.suite == "vlm":
        return finish(ask_vlm(given), given)
    source = read_facts(given)
    suite_of(given, adaptive=given.adaptive, source=source)  # what cannot work is refused before the model is loaded
    if given.export:
        return export(given, source)
    model, tokenizer, subject = load_model(given)
    suite = suite_of(given, adaptive=given.adaptive, source=source)  # `tiny` reads terse wording only
    from .suite import run_trust_suite

    report = run_trust_suite(model, tokenizer, suite, subject=subject, on_batch=progress("items"))
    return finish(report, given)
