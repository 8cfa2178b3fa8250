"""docs/support.md says what the record says, and a cell that fails shows."""

import json

import support


def test_the_page_is_made_from_the_record():
    record, text = json.loads(support.RECORD.read_text()), support.PAGE.read_text()
    assert support.page(text, record) == text
    assert "FAILED" not in text


def test_a_broken_cell_and_one_that_no_test_backs_show():
    cells = {
        "zero2 dispo": {"outcome": "failed", "refused": None},
        "zero3 dispo": {"outcome": "passed", "refused": "its words"},
        "fsdp2 dispo@lora": {"outcome": "passed", "refused": None},
    }
    record = {"cells": cells, "commit": "c", "date": "d", "versions": {"torch": "1", "trl": "2", "deepspeed": "3"}}
    *_, row, _, words = support.table(record).splitlines()
    empty, last = ["not run here"] * 5, "not run here | passed"
    assert row == f"| dispo | {' | '.join(empty[:4])} | **FAILED** | {empty[0]} | refused (1) | {empty[0]} | {last} |"
    assert words == "(1) its words"
