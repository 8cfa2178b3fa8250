"""`trl-trust compress`: what quantizing or pruning does to a model, from the command line."""

import sys
from collections.abc import Sequence
from pathlib import Path

from .command import Words, add_model_options, finish, load_model, suite_of
from .report import TrustReport


def make_parser() -> Words:
    parser = Words(
        prog="trl-trust compress",
        description="Compress a model in each way and measure what that does to it. Exit status 1: outside a gate.",
    )
    parser.add_argument("--config", help="a recipe: YAML of these options, a file or a short name")
    parser.add_argument(
        "--published", action="store_true", help="the table of arXiv 2403.15447, aggregated as ours is"
    )
    parser.add_argument(
        "--methods", nargs="+", help="rtn8 gptq4 awq4 mag2:4 wanda2:4 sparsegpt50 ...; nine by default"
    )
    parser.add_argument("--calibration", help="a text file, one prompt a line; by default the suite's own train split")
    parser.add_argument("--export", help="torchao:int8 or torchao:int4: write that checkpoint into --out, no report")
    parser.add_argument("--candidates", nargs="*", default=[], help="NAME=FOLDER of models compressed elsewhere")
    for name, kind in _SETTINGS.items():
        parser.add_argument(f"--{name}", type=kind, help=f"see docs/compression.md, `{name}`")
    parser.add_argument("--suite", default="core", help="core (all nine), or dimensions: honesty,privacy")
    parser.add_argument("--n_per_dim", type=int, default=64, help="slots a dimension (default: %(default)s)")
    add_model_options(parser)
    return parser


_SETTINGS = dict(
    group_size=int, n_calibration_tokens=int, include=str, exclude=str, max_loss=float, max_no_answer=float,
    n_tokens=int, on_tokens=str, eps=float, n_seeds=int,
)  # fmt: skip


def calibration_of(given, suite) -> list:
    """Prompts of the user's file, or conversations of the suite's train split."""
    if given.calibration:
        lines = Path(given.calibration).read_text("utf-8").splitlines()
        return [line for line in lines if line.strip()]
    rows = [item for name in suite.dims for slots in suite.items(name, 16, split="train") for item in slots]
    return [list(item.messages) for item in rows]


def export(given) -> int:
    """Write the checkpoint that `--export` names."""
    from .torchao import bits_of, save_torchao

    bits = bits_of(given.export)
    if not given.out:
        raise ValueError("--export needs --out, the folder to write")
    model, tokenizer, _ = load_model(given)
    save_torchao(model, tokenizer, given.out, bits=bits, group_size=given.group_size or 128)
    print(f"wrote {given.out}: AutoModelForCausalLM.from_pretrained loads it where torchao is installed")
    return 0


def main(words: Sequence[str]) -> int:
    given = make_parser().read(words)
    if given.published:
        from .published import report

        print(report().to_markdown())
        return 0
    if given.export:
        return export(given)
    candidates = dict(word.partition("=")[::2] for word in given.candidates)
    for name, path in candidates.items():
        if not path:
            raise ValueError(f"--candidates {name!r} must be NAME=FOLDER")
    suite_of(given)
    from .compression import METHODS, CompressionConfig, compression_report

    settings = {name: getattr(given, name) for name in _SETTINGS if getattr(given, name) is not None}
    methods = tuple(given.methods or METHODS)
    CompressionConfig(methods=methods, **settings)  # what cannot work is refused before the model is loaded
    model, tokenizer, subject = load_model(given)
    suite = suite_of(given)  # of a model that reads terse wording only

    def on_method(name: str, row: dict) -> None:
        print(
            f"{name}: KL {row['kl']:.2g}, worst {row['worst']} {-row['loss']:+.3f}, {row['verdict']}", file=sys.stderr
        )

    report: TrustReport = compression_report(
        model,
        tokenizer,
        suite,
        subject=subject,
        methods=methods,
        calibration=calibration_of(given, suite),
        candidates=candidates,
        on_method=on_method,
        seed=given.seed,
        **settings,
    )
    return finish(report, given)
