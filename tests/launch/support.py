"""The table of layouts in docs/support.md, from what tests/launch/test_launch.py recorded.

    TRL_TRUST_RECORD=benchmarks/results/layouts.json pytest -m "slow or not slow" tests/launch/test_launch.py
    python tests/launch/support.py        # writes the part of docs/support.md between its two marks

A cell that no test recorded says "not run here"; a failed one says FAILED.
"""

import json
import sys
from pathlib import Path


ROOT = Path(__file__).parents[2]
RECORD = ROOT / "benchmarks" / "results" / "layouts.json"
PAGE = ROOT / "docs" / "support.md"
BEGIN, END = "<!-- layouts: made by tests/launch/support.py -->", "<!-- end of layouts -->"
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
    return "\n".join(lines)


def page(text: str, record: dict) -> str:
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{table(record)}\n{END}{rest.partition(END)[2]}"


def main() -> int:
    PAGE.write_text(page(PAGE.read_text(), json.loads(RECORD.read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
