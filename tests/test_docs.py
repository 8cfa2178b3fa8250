"""The docs reflect the table of methods, the commands are the ones CI runs, and the package imports nothing heavy."""

import ast
import inspect
import re
import subprocess
import sys
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest
from trl import GRPOTrainer

import trl_trust
from trl_trust import cli
from trl_trust.methods import ASYNCHRONOUS, GRADES, HOSTS, METHODS, get_method, hosted
from trl_trust.tools import TOOLS


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("row", [*METHODS, *TOOLS], ids=lambda row: row.name)
def test_a_row_is_in_the_readme_and_has_a_page(row):
    (line,) = [line for line in README.splitlines() if line.startswith(f"| [{row.title}](docs/{row.page}.md)")]
    _, paper, grade, summary = [cell.strip() for cell in line.strip("|").split(" | ")]
    assert (paper, grade, summary.replace("\\|", "|")) == (row.paper, row.grade, row.summary)
    page = (ROOT / "docs" / f"{row.page}.md").read_text()
    assert row.paper in page and re.search(rf"[Gg]rade: \*+{row.grade}\b", " ".join(page.split()))
    assert row.grade in GRADES


def test_the_asynchronous_page_says_who_is_there_and_who_cannot_be():
    page = (ROOT / "docs" / "asynchronous.md").read_text()
    for method in METHODS:
        if method.asynchronous == "yes":
            row = get_method(f"async-{method.name}")
            assert f"| [{method.title}]({method.page}.md) | `{row.name}` | `{row.trainer}` |" in page
            assert f"`{row.trainer}`" in (ROOT / "docs" / f"{method.page}.md").read_text()
        elif method.asynchronous:
            assert f"- {method.title}, because {method.asynchronous}" in page


def test_commands_are_of_one_row_each():
    words = [
        *(method.name for method in (*METHODS, *ASYNCHRONOUS)),
        *(tool.command for tool in TOOLS),
        *cli.TRL_SCRIPTS,
        *cli.SHOW,
    ]
    assert len(words) == len(set(words))
    assert all(usage.split()[0] == tool.command for tool in TOOLS for usage in tool.commands)
    assert {tool.recipes for tool in TOOLS} - {""} <= {name.split("/")[0] for name in cli.recipes()}


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_a_method_is_exported_and_names_itself(method):
    names, module = (
        [name for name in (method.trainer, method.config, method.loss) if name],
        import_module(method.module),
    )
    assert all(getattr(trl_trust, name) is getattr(module, name) for name in names)
    assert set(names) <= set(trl_trust.__all__) & set(dir(trl_trust))
    trainer = getattr(module, method.trainer)
    assert trainer._paper["id"] == method.paper and method.name in trainer._tag_names


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_a_method_extends_its_host(method):
    base, _, name = HOSTS[method.host].base.partition(":")
    assert issubclass(getattr(trl_trust, method.trainer), getattr(import_module(base), name))
    assert all(callable(getattr(import_module(method.script), name)) for name in ("make_parser", "prepare"))


@pytest.mark.parametrize("method", hosted("grpo"), ids=lambda m: m.name)
def test_a_trainer_shows_the_parameters_of_grpo_trainer(method):
    """Tools pass what `inspect.signature` names, and drop the rest."""
    theirs = list(inspect.signature(GRPOTrainer).parameters.values())
    ours = list(inspect.signature(getattr(trl_trust, method.trainer)).parameters.values())
    assert [(p.name, p.default) for p in ours[: len(theirs)]] == [(p.name, p.default) for p in theirs]
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])
    assert {"trpa": ["level_fn"], "rlad": ["teacher_model"], "vpd": ["feedback_func"]}.get(method.name, []) == [
        p.name for p in ours[len(theirs) :]
    ]


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
