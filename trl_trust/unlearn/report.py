"""`trl-trust unlearn-eval`: what a model still knows of what it was to forget, as a report."""

import argparse
import sys


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="trl-trust unlearn-eval", description=__doc__)
    parser.add_argument("--model", required=True, help="a model or an adapter, on the Hub or in a folder")
    parser.add_argument("--data", required=True, help="such as tofu:forget10, muse-news, wmdp-cyber, facts")
    parser.add_argument("--data-path", help="a folder with one file a split, in place of the Hub")
    parser.add_argument("--seed", type=int, default=0, help="of the facts, which are generated (default 0)")
    parser.add_argument("--reference", help="report, or log of open-unlearning, of a model that never saw the split")
    parser.add_argument("--out", default="unlearn-report", help="folder of report.json, .md and .png")
    parser.add_argument("--compare", metavar="REPORT", help="an earlier report; exit 1 where a score became worse")
    parser.add_argument(
        "--gate", nargs="+", default=[], metavar="min_NAME=X", help="limits, such as max_forget/rouge_l=0.4; exit 1"
    )
    parser.add_argument("--no-generate", action="store_true", help="write no answers, so without ROUGE-L")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a row at most (default 512)")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="of a written answer (default 200)")
    parser.add_argument("--batch-size", type=int, default=16, help="rows a forward pass (default 16)")
    parser.add_argument("--dtype", default="auto", help="of the weights (default auto)")
    return parser


def main(words: list[str]) -> int:
    """Measure, write and print; 1 where a gate or the comparison fails.

    Raises:
        ValueError, OSError: in one line, for what cannot be read.
    """
    args = build_parser().parse_args(words)
    limits = {}
    for gate in args.gate:
        name, _, number = gate.partition("=")
        try:
            limits[name] = float(number)
        except ValueError:
            raise ValueError(f"--gate {gate}: write min_NAME=NUMBER or max_NAME=NUMBER") from None

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..evaluation import TrustGateError, TrustReport
    from .data import load_unlearning
    from .metrics import read_reference, unlearning_report

    before = TrustReport.load(args.compare) if args.compare else None
    if args.reference:
        read_reference(args.reference)  # a mistake is told before the model is loaded
    data = load_unlearning(args.data, path=args.data_path, seed=args.seed)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    report = unlearning_report(
        model,
        AutoTokenizer.from_pretrained(args.model),
        data,
        retain_reference=args.reference,
        subject=args.model,
        generate=not args.no_generate,
        max_length=args.max_length,
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
    )
    report.save(args.out)
    print(report.to_markdown())
    if before is not None:
        print(report.compare(before).to_markdown())
    try:
        report.gate(limits, baseline=before)
    except TrustGateError as error:
        print(f"trl-trust unlearn-eval: {error}", file=sys.stderr)
        return 1
    return 0
