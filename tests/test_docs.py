"""The docs reflect the table of methods, the commands are the ones CI runs, and the package imports nothing heavy."""

import ast
import re
import subprocess
import sys
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest

import trl_trust
from trl_trust.methods import GRADES, METHODS, get_method


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_a_method_is_in_every_table(method):
    (row,) = [line for line in README.splitlines() if f"](docs/{method.name}.md)" in line and line.startswith("|")]
    assert method.paper in row and method.grade in row
    page = (ROOT / "docs" / f"{method.name}.md").read_text()
    assert method.paper in page and re.search(rf"[Gg]rade: \*+{method.grade}\b", " ".join(page.split()))
    assert method.grade in GRADES


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_a_method_is_exported_and_names_itself(method):
    trainer, config, loss = (getattr(trl_trust, name) for name in (method.trainer, method.config, method.loss))
    module = import_module(method.module)
    assert trainer is getattr(module, method.trainer) and config is getattr(module, method.config) and callable(loss)
    assert trainer._paper["id"] == method.paper and method.name in trainer._tag_names
    assert {method.trainer, method.config, method.loss} <= set(trl_trust.__all__) & set(dir(trl_trust))


def test_type_checkers_see_what_is_exported():
    tree = ast.parse(Path(trl_trust.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    seen = {alias.name for node in block.body for alias in node.names}
    assert seen == {name for name in trl_trust.__all__ if not name.startswith("__")} - {"METHODS"}


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_every_field_of_a_config_says_what_it_does(method):
    config = getattr(trl_trust, method.config)
    own = [f for f in fields(config) if f.name in config.__annotations__]
    assert [f.name for f in own if not f.metadata.get("help")] == []


def test_unknown_names_say_so():
    with pytest.raises(KeyError, match="unknown method 'ppo'.*dispo"):
        get_method("ppo")
    with pytest.raises(AttributeError, match="no attribute 'PPOTrainer'"):
        trl_trust.PPOTrainer  # noqa: B018


def test_importing_the_package_loads_neither_torch_nor_trl():
    check = "import sys, trl_trust; sys.exit(any(m in sys.modules for m in ('torch', 'trl', 'transformers', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0


def test_ci_runs_the_readmes_test_command():
    (command,) = re.findall(r"^pip install .*&& pytest.*$", README, re.M)
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


def test_links_of_the_docs_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
