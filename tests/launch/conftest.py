"""Records outcomes for docs/support.md where `TRL_TRUST_RECORD` names a file; see support.py."""

import datetime
import json
import os
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest


CELLS = {}
FEATURES = {}  # of test_features.py; each cell bears its own test, commit and date


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if getattr(item, "originalname", "") == "test_a_method_trains_under_a_feature":
        if report.when == "call" or report.outcome != "passed":
            feature, name = item.callspec.params["feature"], item.callspec.params["name"]
            FEATURES[f"{feature} {name}"] = {"outcome": report.outcome, "test": item.nodeid}
        return
    if getattr(item, "originalname", "") != "test_two_processes_train_like_one" or not hasattr(item, "callspec"):
        return
    if "layout" in item.callspec.params and (report.when == "call" or report.outcome != "passed"):
        from test_launch import refusal

        layout, name = item.callspec.params["layout"], item.callspec.params["name"]
        CELLS[f"{layout} {name}"] = {"outcome": report.outcome, "refused": refusal(layout, name)}


def pytest_sessionfinish(session):
    if FEATURES and (path := os.environ.get("TRL_TRUST_RECORD")):
        path = Path(path).with_name("features.json")
        record = json.loads(path.read_text()) if path.exists() else {"cells": {}}
        described = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
        commit = subprocess.run(described, capture_output=True, text=True).stdout.strip()
        run = {"commit": commit, "date": datetime.date.today().isoformat()}
        run |= {name: version(name) for name in ("torch", "trl", "transformers")}
        record["cells"] |= {key: cell | run for key, cell in FEATURES.items()}
        path.write_text(json.dumps(record, indent=1) + "\n")
    if CELLS and (path := os.environ.get("TRL_TRUST_RECORD")):
        path = Path(path)
        record = json.loads(path.read_text()) if path.exists() else {"cells": {}}
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
        stamp = {"commit": commit, "date": datetime.date.today().isoformat()}
        if len(CELLS) >= len(record["cells"]):  # a whole run
            record |= stamp
            record["versions"] = {name: version(name) for name in ("torch", "trl", "transformers", "deepspeed")}
            stamp = {}
        record["cells"] |= {key: cell | stamp for key, cell in CELLS.items()}
        path.write_text(json.dumps(record, indent=1) + "\n")
