"""What a row of the table of methods owes besides its module: one line for each piece that is missing."""

import ast
import re
from importlib import import_module
from pathlib import Path

import trl_trust
from trl_trust.methods import GRADES, Method


ROOT = Path(__file__).parent.parent


def owed(row: Method) -> list[str]:
    """Each line names the file, and what it lacks. Empty for a finished method."""
    return [*_in_the_module(row), *_in_the_package(row), *_in_words(row), *_in_files(row)]


def _in_the_module(row: Method):
    module = import_module(row.module)
    names = [name for name in (row.trainer, row.config, row.loss) if name]
    lacking = [name for name in names if not hasattr(module, name)]
    if lacking:
        yield f"{row.module}: no {', '.join(lacking)}, which the row names"
        return
    trainer = getattr(module, row.trainer)
    if trainer._paper.get("id") != row.paper:
        yield f"{row.module}: {row.trainer}._paper is not `paper(title, {row.paper!r}, authors)`"
    elif "author" not in trainer._paper["citation"]:
        yield f"{row.module}: {row.trainer}._paper has no authors"
    if row.name not in trainer._tag_names:
        yield f"{row.module}: {row.trainer}._tag_names lacks {row.name!r}"
    if getattr(module, row.config) is not getattr(trainer, "config_class", getattr(module, row.config)):
        yield f"{row.module}: {row.trainer}.config_class is not {row.config}"


def _in_the_package(row: Method):
    tree = ast.parse(Path(trl_trust.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    seen = {alias.name for node in block.body for alias in node.names}
    lacking = [name for name in (row.config, row.trainer, row.loss) if name and name not in seen]
    if lacking:
        line = f"from {row.module.replace('trl_trust', '', 1)} import {', '.join(lacking)}"
        yield f"trl_trust/__init__.py: under TYPE_CHECKING, `{line}`"
    if row.grade not in GRADES:
        yield f"trl_trust/methods.py: grade={row.grade!r} is none of {', '.join(GRADES)}"
    if row.host == "grpo" and not row.asynchronous:
        yield f'trl_trust/methods.py: asynchronous="yes", or why {row.title} cannot be in the asynchronous trainer'


def _in_words(row: Method):
    summary = row.summary.replace("|", r"\|")
    line = f"| [{row.title}](docs/{row.page}.md) | {row.paper} | {row.grade} | {summary} |"
    if line not in (ROOT / "README.md").read_text().splitlines():
        yield f"README.md: the row `{line}`"
    page = ROOT / "docs" / f"{row.page}.md"
    if not page.is_file():
        yield f"docs/{row.page}.md: the page, with arXiv {row.paper} and `Grade: **{row.grade}**`"
    else:
        text = " ".join(page.read_text().split())
        if row.paper not in text:
            yield f"docs/{row.page}.md: its paper, {row.paper}"
        if not re.search(rf"[Gg]rade: \*+{row.grade}\b", text):
            yield f"docs/{row.page}.md: `Grade: **{row.grade}**`"


def _in_files(row: Method):
    recipes = list((ROOT / "recipes" / row.recipes).glob("*.yaml"))
    if len(recipes) < 2:
        yield f"recipes/{row.recipes}/: two recipes, the paper's and one for a 24 GB GPU; there are {len(recipes)}"
    name = row.name.replace("-", "_")
    if row.host == "grpo" and not any((ROOT / "tests").rglob(f"test_{name}.py")):
        yield f"tests/: test_{name}.py, with worked numbers, invariants and a tiny real run"
