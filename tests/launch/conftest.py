"""Records outcomes for docs/support.md where `TRL_TRUST_RECORD` names a file; see support.py."""

import datetime
import json
import os
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest


CELLS = {}


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if getattr(item, "originalname", "") != "test_two_processes_train_like_one" or not hasattr(item, "callspec"):
        return
    if "layout" in item.callspec.params and (report.when == "call" or report.outcome != "passed"):
        from test_launch import refusal

        layout, name = item.callspec.params["layout"], item.callspec.params["name"]
        CELLS[f"{layout} {name}"] = {"outcome": report.outcome, "refused": refusal(layout, name)}


def pytest_sessionfinish(session):
    if CELLS and (path := os.environ.get("TRL_TRUST_RECORD")):
        path = Path(path)
        record = json.loads(path.read_text()) if path.exists() else {"cells": {}}
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
        record |= {"commit": commit, "date": datetime.date.today().isoformat()}
        record["versions"] = {name: version(name) for name in ("torch", "trl", "transformers", "deepspeed")}
        record["cells"] |= CELLS
        path.write_text(json.dumps(record, indent=1) + "\n")
