"""How results are kept: one JSON file a benchmark, cells added as they come, each with where it was made.

    results = cells.load(path, settings=SETTINGS)          # what is there
    cells.add(path, {"cell": name, "seed": seed, ...})      # in the place of one of the same cell and seed
    cells.save(path, results | cells.origin())              # a file of another form

A file is written whole or not at all, so that a run that is cut off loses the cell at hand and nothing else.
"""

import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("trl-trust", "trl", "transformers", "torch")


def command() -> str:
    """The command as it was run, from the top of the repository."""
    script = Path(sys.argv[0]).resolve()
    script = script.relative_to(ROOT) if script.is_relative_to(ROOT) else Path(script.name)
    threads = os.environ.get("OMP_NUM_THREADS")
    prefix = f"OMP_NUM_THREADS={threads} " if threads else ""
    return prefix + shlex.join(["python", str(script), *sys.argv[1:]])


def cpu_name() -> str:
    """The processor by its own name where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine(device: str = "cpu", threads: int = 1) -> dict[str, Any]:
    """What the numbers were measured on: the device by name, cores or not, threads, torch."""
    import torch

    name = cpu_name() if device == "cpu" else torch.cuda.get_device_name()
    return {"device": name, "cores": os.cpu_count(), "threads": threads, "torch": torch.__version__}


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Versions of what is installed; a package that is run from its checkout says so."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "checkout"
    return found


def origin(device: str = "cpu", threads: int = 1, packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """Command, machine and versions: what stands beside every number."""
    return {"command": command(), "machine": machine(device, threads), "versions": versions(packages)}


def load(path: Path, **settings: Any) -> dict[str, Any]:
    """What is in the file, or `settings` and no cells.

    Raises:
        SystemExit: if it was written with other `settings`.
    """
    if not path.exists():
        return {**settings, "cells": []}
    results = json.loads(path.read_text())
    for name, value in settings.items():
        if results.get(name) != json.loads(json.dumps(value)):
            raise SystemExit(
                f"{path} was written with other {name}: {results.get(name)}; move it away, or name another"
            )
    return results


def save(path: Path, results: dict[str, Any]) -> None:
    """Write the file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.part")
    scratch.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(scratch, path)


def add(path: Path, cell: dict[str, Any], keys: Sequence[str] = ("cell", "seed"), **settings: Any) -> None:
    """Add a cell with its origin to the file, in the place of one with the same values of `keys`."""
    results = load(path, **settings)
    kept = [old for old in results["cells"] if any(old.get(key) != cell.get(key) for key in keys)]
    save(path, {**results, "cells": [*kept, {**cell, "origin": origin()}]})
