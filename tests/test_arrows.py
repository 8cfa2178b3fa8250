"""Which module may import which. The rules go by module and are read from the source, lazy imports included."""

import ast
from pathlib import Path

import pytest

import trl_trust
from trl_trust.methods import METHODS


PACKAGE = Path(trl_trust.__file__).parent
TRAINING = ("policy", "distill", "frozen", "asynchronous", "optim", "unlearn", "flow", "robust")  # rooms with trainers


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in PACKAGE.rglob("*.py")}


def imports_of(module: str) -> set[str]:
    """Dotted names that a module imports, `package.module` and `package.module.name`; those for type checkers not."""
    path, found = MODULES[module], set()
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            found |= {source} | {f"{source}.{alias.name}" for alias in node.names}
    return found


IMPORTS = {module: imports_of(module) for module in MODULES}


def reached(module: str, *forbidden: str) -> list[str]:
    """What `module` imports of `forbidden`, names of modules or of packages with all that is in them."""
    under = tuple(f"{name}." for name in forbidden)
    return sorted(name for name in IMPORTS[module] if name in forbidden or name.startswith(under))


def in_rooms(*rooms: str) -> list[str]:
    prefixes = tuple(f"trl_trust.{room}" for room in rooms)
    return [name for name in MODULES if name in prefixes or name.startswith(tuple(f"{p}." for p in prefixes))]


def test_nobody_imports_the_command_line():
    assert [m for m in MODULES if m != "trl_trust.__main__" and reached(m, "trl_trust.cli")] == []


@pytest.mark.parametrize("module", sorted({row.module for row in METHODS}))
def test_a_method_imports_no_sibling(module):
    siblings = {row.module for row in METHODS} - {module}
    assert reached(module, *siblings) == []


@pytest.mark.parametrize("module", ["settings", "lookup", "methods", "tools", "optimizers", "plot", "policy.terms"])
def test_the_ground_floor_knows_no_trainer(module):
    rooms = [f"trl_trust.{room}" for room in TRAINING if f"{room}.terms" != module]
    rooms = rooms if module != "policy.terms" else [m for m in MODULES if m != "trl_trust.policy.terms"]
    assert reached(f"trl_trust.{module}", *rooms, "trl", "transformers", "accelerate") == []


@pytest.mark.parametrize("module", in_rooms("tasks"))
def test_tasks_import_no_trainer(module):
    ours = [f"trl_trust.{room}" for room in (*TRAINING, "script", "quickstart", "baseline")]
    assert reached(module, *ours) == []
    theirs = [name for name in IMPORTS[module] if name.startswith(("trl.", "transformers.")) and "Trainer" in name]
    assert [name for name in theirs if name != "transformers.TrainerCallback"] == []  # which is any trainer's


@pytest.mark.parametrize("module", in_rooms("evaluation"))
def test_evaluation_knows_no_trainer_of_ours(module):
    assert reached(module, *(f"trl_trust.{room}" for room in (*TRAINING, "script", "quickstart", "baseline"))) == []


@pytest.mark.parametrize("module", in_rooms(*TRAINING))
def test_trainers_know_nothing_of_the_quickstart(module):
    assert reached(module, "trl_trust.quickstart") == []


def test_diffusers_is_named_in_one_place():
    assert {m for m in MODULES if reached(m, "diffusers")} <= {"trl_trust.flow.adapters"}


def test_private_names_of_trl_and_transformers_stay_in_their_rooms():
    """The rooms that the contract test watches."""
    allowed = ("trl_trust.policy.base", "trl_trust.asynchronous", "trl_trust.optim.plug")
    private = {
        module: names
        for module, found in IMPORTS.items()
        if not module.startswith(allowed)
        and (
            names := [
                name
                for name in found
                if name.startswith(("trl.", "transformers.")) and any(part.startswith("_") for part in name.split("."))
            ]
        )
    }
    assert private == {}


def test_the_rules_can_fail():
    IMPORTS["trl_trust.tasks.made_up"] = {"trl_trust.policy.base", "trl.GRPOTrainer"}
    try:
        assert reached("trl_trust.tasks.made_up", "trl_trust.policy") == ["trl_trust.policy.base"]
        with pytest.raises(AssertionError):
            test_tasks_import_no_trainer("trl_trust.tasks.made_up")
    finally:
        del IMPORTS["trl_trust.tasks.made_up"]
    assert "trl_trust.policy.terms.PolicyBatch" in IMPORTS["trl_trust.policy.dispo"] | IMPORTS["trl_trust.policy.base"]
