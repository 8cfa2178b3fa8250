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
from snippets import run_code, shrink, tiny_model
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


def test_the_readme_lists_the_rows_of_the_tables_and_no_others():
    pages = re.findall(r"^\| \[(.+?)\]\(docs/.+?\) \| .+? \| .+? \| .+ \|$", README, re.M)
    assert pages == [row.title for row in (*METHODS, *TOOLS)]


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


# -- code, commands and errors of the pages -------------------------------------------------------------------------

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

# Pages whose Python cannot run here, and why; their keywords are checked instead.
NOT_RUN = {"sage.md": "a pipeline of 1.3 billion parameters"}


def blocks(page, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda page: page.stem)
def test_code_of_a_page_runs(page, tmp_path, monkeypatch):
    """All blocks of a page in their order, in one namespace."""
    if page.name in NOT_RUN:
        for block in blocks(page, "python"):
            check_keywords(block)
        return
    shrink(monkeypatch)
    monkeypatch.chdir(tmp_path)
    model, namespace = tiny_model(tmp_path / "model"), {"__name__": "page"}
    for block in blocks(page, "python"):
        run_code(block, model, namespace)


def check_keywords(source: str) -> None:
    """Every keyword given to a name of this package is one that it has."""
    tree, names = ast.parse(source), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("trl_trust"):
            names |= {
                alias.asname or alias.name: getattr(import_module(node.module), alias.name) for alias in node.names
            }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names:
            known = inspect.signature(names[node.func.id]).parameters
            assert {keyword.arg for keyword in node.keywords} <= set(known), ast.unparse(node)


def test_keywords_are_checked():
    check_keywords("from trl_trust import DISPOConfig\nDISPOConfig(output_dir='x', epsilon_pos_low=0.1)")
    with pytest.raises(AssertionError, match="epsilon_pos_lo="):
        check_keywords("from trl_trust import DISPOConfig\nDISPOConfig(epsilon_pos_lo=0.1)")


def test_commands_and_recipes_of_the_pages_exist():
    commands = {
        *(m.name for m in (*METHODS, *ASYNCHRONOUS)),
        *(tool.command for tool in TOOLS),
        *cli.TRL_SCRIPTS,
        *cli.TRL_COMMANDS,
    }
    commands |= {*cli.SHOW, *cli.COMMANDS, "grpo", "rollouts", "METHOD", "--version"}
    seen = set()
    for page in [*PAGES, *(ROOT / "examples").rglob("*.md")]:
        text = page.read_text()
        for code in [*re.findall(r"^```(?:bash)?\n(.*?)^```", text, re.M | re.S), *re.findall(r"`([^`\n]+)`", text)]:
            for word, rest in re.findall(r"(?:^|&& |-m )trl[-_]trust +([\w.-]+)([^\n#]*)", code, re.M):
                seen.add(word)
                assert word in commands, f"{page.name}: trl-trust {word}"
                for name in re.findall(r"--config +([\w.-]+/[\w.-]+)", rest):
                    local = (page.parent / name).exists() or name.endswith(".yaml")
                    assert local or name in cli.recipes(), f"{page.name}: {name}"
    assert {"dispo", "grpo", "plot", "quickstart"} <= seen


def test_errors_that_troubleshooting_quotes_are_ours():
    source = " ".join(path.read_text() for path in (ROOT / "trl_trust").rglob("*.py"))
    source = re.sub(r'"\s*f?"', "", source)  # one text over several lines
    quoted = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.M)
    assert len(quoted) > 15
    assert [text for text in quoted if text not in source] == []


def test_the_index_lists_every_page():
    """Those of methods and tools are in the README's tables."""
    index = (ROOT / "docs" / "README.md").read_text()
    of_rows = {f"{row.page}.md" for row in (*METHODS, *TOOLS)} | {"README.md"}
    pages = [page.name for page in (ROOT / "docs").glob("*.md") if page.name not in of_rows]
    assert [name for name in pages if f"({name}" not in index] == []
