"""The command line: `trl-trust METHOD --config RECIPE [--any-field VALUE]`, and what there is to look at.

`trl-trust` launches training through accelerate, as `trl` does; `python -m trl_trust` trains in its own process, which
is what a launcher runs. Nothing here imports torch or TRL before a training command needs it.
"""

import ast
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from textwrap import fill

from .lookup import near
from .methods import ASYNCHRONOUS, GRADES, HOSTS, METHODS, get_method, why_not_asynchronous
from .tools import TOOLS


# what is neither a method nor a tool of the table: word -> module with `main(words) -> int`
COMMANDS = {"plot": "trl_trust.plot", "quickstart": "trl_trust.quickstart.run"}

LAUNCHED = "TRL_TRUST_LAUNCHED"  # in the environment of a process that `trl-trust` launched
SECONDS_TO_STOP = 30  # which the training processes have after Ctrl-C

# TRL's own commands that train nothing
TRL_COMMANDS = ("env", "vllm-serve")

# TRL's own scripts, run as they are, with the optimizers of this package known by name
TRL_SCRIPTS = ("sft", "dpo", "kto", "reward", "rloo", "distillation")


def main(argv: list[str] | None = None, launch: bool = True) -> int:
    """Run the command line and return its exit status.

    Args:
        argv: words after the program's name; those of the process by default.
        launch: train through `accelerate launch`, or else in this process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return run(words, launch)
    except KeyboardInterrupt:
        return stopped("Ctrl-C", 130)


def run(words: list[str], launch: bool) -> int:
    """Run the command that `words` say, see [`main`]."""
    if "--traceback" in words:
        words.remove("--traceback")
        os.environ["TRL_TRUST_TRACEBACK"] = "1"  # `one_line_errors` reads it, here and in the processes launched
    command, *rest = words or ["--help"]
    methods, tools = [method.name for method in (*METHODS, *ASYNCHRONOUS)], {tool.command: tool for tool in TOOLS}
    wants_help = not {"-h", "--help"}.isdisjoint(rest)

    if command in ("-h", "--help"):
        show(top_help)
    elif command == "--version":
        print(import_module("trl_trust").__version__)
    elif command in COMMANDS:
        with one_line_errors():
            return import_module(COMMANDS[command]).main(rest)
    elif command in TRL_COMMANDS:
        return import_module("trl.cli.main").main(words) or 0
    elif command in SHOW:
        with one_line_errors():
            if rest and not wants_help:
                raise ValueError(f"unexpected {rest[0]!r} after {command!r}, which takes nothing")
        show(SHOW[command])
    elif command in tools:
        with one_line_errors():
            return import_module(tools[command].module).main(resolve_recipe(rest)) or 0
    elif command in methods and wants_help:
        show(partial(method_help, command))
    elif command in methods or command in (*TRL_SCRIPTS, "grpo", "rollouts"):
        # a process that a launcher started does not launch again
        return train(command, rest, launch and "LOCAL_RANK" not in os.environ)
    else:
        with one_line_errors():
            if reason := why_not_asynchronous(command):
                raise ValueError(reason)
            known = [*methods, *TRL_SCRIPTS, *TRL_COMMANDS, *tools, *SHOW, *COMMANDS, "grpo", "rollouts"]
            raise ValueError(f"unknown command {command!r}; {near(command, known, n=3)}")
    return 0


def stopped(by: str, status: int) -> int:
    """Say in one line what ended the command, and return `status`. A launched process leaves that to its launcher."""
    if LAUNCHED not in os.environ:
        print(f"trl-trust: stopped by {by}", file=sys.stderr)
    return status


def show(page: Callable[[], str | None]) -> None:
    """Print what `page` returns, unless it prints by itself."""
    try:
        text = page()
        if text is not None:
            print(text)
        sys.stdout.flush()
    except BrokenPipeError:  # `trl-trust methods | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn an error in what the user gave into one line on stderr and exit status 2."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("TRL_TRUST_TRACEBACK"):
            raise
        process = f" in process {os.environ['RANK']}" if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
        print(f"trl-trust: error{process}:", *str(error).split(), file=sys.stderr)
        raise SystemExit(2) from None


def split_assignment(word: str, start: str = "--") -> list[str]:
    """`--name=value` as two words."""
    return word.split("=", 1) if word.startswith(start) else [word]


# --------------------------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------------------------


def train(command: str, words: list[str], launch: bool) -> int:
    """Train with the settings in `words`, in this process or through a launcher, and return the exit status.

    What goes wrong before the first step is told in one line; what goes wrong in training keeps its traceback.
    """
    with one_line_errors():
        words = resolve_recipe(words)
        from . import optim  # noqa: F401  registers the optimizers' names before a parser lists them

        parser, prepare = script_of(command)
        if not {"-h", "--help", "--help-all"}.isdisjoint(words):
            parser.print_help()
            return 0
        if not launch:
            show_log()
        start = launcher(command, words, parser) if launch else prepare(words)
    return start() if launch else in_this_process(start)


class Terminated(BaseException):
    """SIGTERM, raised where the process is, so that what must be closed and kept is."""


def in_this_process(start: Callable[[], int | None]) -> int:
    """Train, and return the exit status: 130 after Ctrl-C, 143 after SIGTERM."""

    def terminate(signum, frame):
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        status = start() or 0
    except KeyboardInterrupt:
        status = stopped("Ctrl-C", 130)
    except Terminated:
        status = stopped("SIGTERM", 143)
    finally:
        signal.signal(signal.SIGTERM, before)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # Leave without destructors: all is saved and closed, and where DDP drops the last reference to gloo's process
        # group, torch 2.13 joins a thread that waits for the interpreter's lock, and hangs now and then.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def show_log() -> None:
    """Let this package's own log reach stderr: warnings, and on the main process what it notes at the start."""
    logger = logging.getLogger("trl_trust")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("trl-trust: %(levelname)s: %(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO if int(os.environ.get("RANK", 0)) == 0 else logging.WARNING)


def script_of(command: str) -> tuple:
    """The parser of a training command, and the function that takes its words and returns the training, or sampling,
    ready to start."""
    prog = f"trl-trust {command}"
    if command in TRL_SCRIPTS:
        from .script import RecipeParser

        script = import_module(f"trl.scripts.{command}")
        parser = RecipeParser(script.make_parser().dataclass_types, prog=prog)
        return parser, lambda words: partial(script.main, *parser.parse(words))
    if command == "grpo":
        baseline = import_module("trl_trust.baseline")
        return baseline.make_parser(prog=prog), baseline.prepare
    if command == "rollouts":
        rollouts = import_module("trl_trust.frozen.script")
        return rollouts.make_parser(prog), rollouts.prepare
    method = get_method(command)
    script = import_module(method.script)
    return script.make_parser(method, prog), partial(script.prepare, method=method)


def launcher(command: str, words: list[str], parser) -> Callable[[], int]:
    """Return what launches `python -m trl_trust command` as `accelerate launch` would, with the options in `words`."""
    import psutil
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

    from .script import launcher_options

    is_flag = launcher_options()
    from_recipe, from_words = parser.split(words)
    parser.refuse_unknown(from_recipe, "in the recipe", is_flag)
    parser.refuse_unknown(from_words, "on the command line", is_flag)

    launch_words = [part for word in from_words for part in split_assignment(word)]
    for option, value in zip(from_recipe[::2], from_recipe[1::2], strict=True):
        if option not in launch_words:  # the command line overrides the recipe
            launch_words += ([option] if value == "True" else []) if is_flag[option] else [option, value]
    script_words, taken = [], iter([*from_words, None])
    next_taken = next(taken)
    for word in words:  # `from_words` is an ordered part of `words`: what remains is for the script
        if word == next_taken:
            next_taken = next(taken)
        else:
            script_words.append(word)
    launch_parser = launch_command_parser()
    launch_parser.error = parser.error  # one line, without the usage of a hundred options
    args = launch_parser.parse_args(
        [*resolve_accelerate_config_argument(launch_words), "--module", "trl_trust", command, *script_words]
    )
    if args.training_script != "trl_trust":  # a word too many among the launcher's
        raise ValueError(f"unexpected {args.training_script!r} on the command line; a setting is `--name value`")

    def start() -> int:
        children = psutil.Process().children

        def forward(signum, frame):
            for child in children():
                child.send_signal(signum)

        before = signal.signal(signal.SIGTERM, forward)  # torch's launcher of several processes has one of its own
        os.environ[LAUNCHED] = "1"
        try:
            launch_command(args)
        except subprocess.CalledProcessError as error:
            if error.returncode < 0:  # else the process has said itself what went wrong
                print(f"trl-trust: error: training was ended by signal {-error.returncode}", file=sys.stderr)
            return end({130: "Ctrl-C", 143: "SIGTERM"}.get(error.returncode), abs(error.returncode))
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            print(f"trl-trust: error: process {rank} failed with exit status {failure.exitcode}", file=sys.stderr)
            return abs(failure.exitcode)
        except SignalException as error:
            return end(error.sigval.name if error.sigval != signal.SIGINT else "Ctrl-C", 128 + error.sigval)
        except KeyboardInterrupt:  # which the terminal sent to the children too
            for child in psutil.wait_procs(children(), timeout=SECONDS_TO_STOP)[1]:
                child.kill()
            return end("Ctrl-C", 130)
        finally:
            os.environ.pop(LAUNCHED, None)
            signal.signal(signal.SIGTERM, before)
        return 0

    def end(by: str | None, status: int) -> int:
        os.environ.pop(LAUNCHED, None)
        return status if by is None else stopped(by, status)

    return start


# --------------------------------------------------------------------------------------------------------------------
# Recipes
# --------------------------------------------------------------------------------------------------------------------


def recipes() -> dict[str, Path]:
    """The recipes of this installation: short name, `METHOD/NAME`, to file."""
    package = Path(__file__).parent
    installed = package / "recipes"  # in a wheel; in a checkout they are at the top of the repository
    root = installed if installed.is_dir() else package.parent / "recipes"
    return {f"{path.parent.name}/{path.stem}": path for path in sorted(root.glob("*/*.yaml"))}


def resolve_recipe(words: list[str]) -> list[str]:
    """Replace what follows `--config`, a file or a recipe's short name, by the file.

    Raises:
        ValueError: if there is no such recipe, or it is not YAML.
    """
    import yaml

    words = [part for word in words for part in split_assignment(word, "--config=")]
    if "--config" not in words:
        return words
    place = words.index("--config") + 1
    if place == len(words):
        raise ValueError("--config: expected a recipe after it, a file or a short name")
    name, known = words[place], recipes()
    path = Path(name) if Path(name).is_file() else known.get(name.removesuffix(".yaml").removeprefix("recipes/"))
    if path is None:
        raise ValueError(f"no recipe {name!r}: it is no file, and of the short names {near(name, known, n=3)}")
    try:
        yaml.safe_load(path.read_text("utf-8"))  # TRL's parser reads it again; this is for the message
    except yaml.MarkedYAMLError as error:
        raise ValueError(f"recipe {path}, line {error.problem_mark.line + 1}: {error.problem}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read recipe {path}: {error}") from error
    except RecursionError as error:
        raise ValueError(f"cannot read recipe {path}: it is nested too deeply") from error
    words[place] = str(path)
    return words


# --------------------------------------------------------------------------------------------------------------------
# Things to look at
# --------------------------------------------------------------------------------------------------------------------


def top_help() -> str:
    """The text of `trl-trust --help`."""
    rows = "\n".join(f"  {method.name:<14}{method.summary}" for method in METHODS)
    measure = "".join(f"  {tool.command:<14}{tool.summary}\n" for tool in TOOLS)
    measure = f"Measure, build and report (`trl-trust COMMAND --help` shows how):\n{measure}\n" if TOOLS else ""
    return f"""\
trl-trust: trust-region post-training for Hugging Face TRL

Usage: trl-trust COMMAND [--config RECIPE] [--FIELD VALUE ...]

Train with a method of this package (`trl-trust METHOD --help` shows its settings):
{rows}

The same terms in TRL's asynchronous trainer, beside a vLLM server:
  {" ".join(method.name for method in ASYNCHRONOUS)}

Train with stock GRPO from the recipe of a method, or with a policy term of your own:
  grpo          TRL's GRPO to the bit, with the metrics that every method logs; --policy_loss my_module.my_loss

Train with TRL's own script, with the optimizers of this package known by name:
  {" ".join(TRL_SCRIPTS)}

{measure}Sample once, for methods that learn from frozen rollouts:
  rollouts      write prompts, completions, rewards and log-probabilities to a folder

Look around:
  quickstart    train a small model here and now: no download, no GPU
  plot          draw reward, entropy, KL and what the region did, of one or several runs
  methods       the methods, with paper and provenance
  tools         what measures and builds, with paper and provenance
  optimizers    the optimizers that `--optim NAME` knows
  recipes       the recipes that `--config NAME` knows

TRL's own: {", ".join(TRL_COMMANDS)}

Options:
  --config      recipe (YAML): a file, or a short name such as dispo/qwen3-1.7b-math
  --help-all    after a training command: every field there is (imports TRL)
  --traceback   show where an error comes from
  --version

Options of `accelerate launch` (--num_processes 2, --accelerate_config zero3) mix with the fields, here and in recipes.
"""


def method_help(name: str) -> str:
    """The text of `trl-trust METHOD --help`: what the method adds to TRL's settings, read without importing it."""
    method = get_method(name)
    source = get_method(name.removeprefix("async-"))  # of an asynchronous row: the config that its fields come from
    sections = {
        f"{method.title}'s own fields": stated_fields(source.module, source.config),
    }
    arguments, ours = HOSTS[method.host].arguments, "TrustScriptArguments"
    given = class_of(source_of(method.script), arguments)  # None: TRL's own
    if given and ours in (arguments, *map(ast.unparse, given.bases)):
        sections["Data and reward"] = stated_fields("trl_trust.script", ours)
    if given and arguments != ours:
        sections[f"{method.title} as a whole"] = stated_fields(method.script, arguments)
    if source is not method:
        sections["Step control there"] = stated_fields("trl_trust.asynchronous.config", "AsyncTrustGRPOConfig")
    where = "" if source is method else " in TRL's asynchronous trainer"
    lines = [
        f"{method.title}{where} (arXiv {method.paper}): {method.summary}",
        f"Provenance: {method.grade}, i.e. {GRADES[method.grade]}",
        "",
        f"Usage: trl-trust {name} [--config RECIPE] [--FIELD VALUE ...]",
    ]
    for title, fields in sections.items():
        lines += ["", f"{title}:"]
        for field, default, text in fields:
            lines.append(f"  --{field} ({default})")
            lines.append(fill(text, 110, initial_indent=" " * 6, subsequent_indent=" " * 6))
    own = [recipe for recipe in recipes() if recipe.startswith(f"{method.recipes}/")]
    unread = ", ".join(unread_fields(source.module, source.config))
    lines += [
        "",
        *([fill(f"Not read, and so refused when set: {unread}", 110, subsequent_indent="  "), ""] if unread else []),
        f"Recipes: {', '.join(own) or 'none'}",
        "All fields of the TRL config that it extends, of ModelConfig and ScriptArguments, and all options of",
        "`accelerate launch` are taken too, here and in a recipe.",
        f"`trl-trust {name} --help-all` lists the fields (and imports TRL to do so).",
    ]
    return "\n".join(lines)


def stated_fields(module: str, config: str) -> list[tuple[str, str, str]]:
    """(name, default, help) of the fields that a config class itself states, read from its source: importing it
    would take seconds. It has to state them as `name: type = setting(default, "help")`, or with `field`. Those of a
    base whose name ends in `Settings`, such as `GroupSettings`, count among them."""
    source, found = source_of(module), []
    stating = class_of(source, config)
    for node in stating.body:
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call)):
            continue
        if ast.unparse(node.value.func) == "setting":
            default, text = node.value.args
            text = ast.literal_eval(text)
        else:
            given = {keyword.arg: keyword.value for keyword in node.value.keywords}
            default = given.get("default", given.get("default_factory"))
            text = ast.literal_eval(given["metadata"])["help"]
        found.append((node.target.id, ast.unparse(default), text))
    names = [name for name, _, _ in found]
    for base in map(ast.unparse, stating.bases):
        if base.endswith("Settings") and base != "Settings":
            found += [row for row in stated_fields(home_of(base, module, source), base) if row[0] not in names]
    return found


def home_of(name: str, module: str, source: list[ast.stmt]) -> str:
    """The module that a name of `module` is defined in: itself, or what it is imported from, by dots."""
    for node in source:
        if isinstance(node, ast.ImportFrom) and node.level and name in [alias.name for alias in node.names]:
            return ".".join([*module.split(".")[: -node.level], node.module])
    return module


def unread_fields(module: str, config: str) -> list[str]:
    """Names in the `unread_fields` that a config class itself states, read from its source like [`stated_fields`]."""
    source, found = source_of(module), []
    tables = {ast.unparse(node.targets[0]): node.value for node in source if isinstance(node, ast.Assign)}

    def collect(table: ast.Dict) -> None:
        for key, value in zip(table.keys, table.values, strict=True):
            if key is not None:
                found.append(key.value)
            elif ast.unparse(value) in tables:  # `**TABLE` of the same module; the base class's is left out
                collect(tables[ast.unparse(value)])

    for node in class_of(source, config).body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if ast.unparse(target) == "unread_fields":
                collect(node.value)
    return found


def source_of(module: str) -> list[ast.stmt]:
    """The statements of a module of this package, which is not imported."""
    # `find_spec` would import the packages above it, which load torch
    path = Path(__file__).parents[1].joinpath(*module.split(".")).with_suffix(".py")
    return ast.parse(path.read_text("utf-8")).body


def class_of(source: list[ast.stmt], name: str) -> ast.ClassDef | None:
    """The class of that name among the statements of a module; None where it is not defined there."""
    return next((node for node in source if isinstance(node, ast.ClassDef) and node.name == name), None)


def show_methods() -> None:
    """`trl-trust methods`."""
    show_table(METHODS)


def show_tools() -> None:
    """`trl-trust tools`."""
    show_table(TOOLS)
    for tool in TOOLS:
        needs = f" (pip install trl-trust[{tool.extra}])" if tool.extra else ""
        print(fill(f"{tool.name}: {', '.join(tool.commands)}{needs}", 110, subsequent_indent="  "))


def show_optimizers() -> None:
    """`trl-trust optimizers`."""
    from .optimizers import OPTIMIZERS

    show_table(OPTIMIZERS)


def show_table(rows) -> None:
    """Print rows of the table of methods or of optimizers, and what their grades mean."""
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "arXiv", "provenance", "what it does", box=None, pad_edge=False)
    for row in rows:
        table.add_row(row.name, row.paper, row.grade, row.summary)
    Console().print(table)
    print()
    for grade, meaning in GRADES.items():
        if any(row.grade == grade for row in rows):
            print(fill(f"{grade}: {meaning}", 110, subsequent_indent="  "))


def show_recipes() -> None:
    """`trl-trust recipes`. The first line of a recipe says what it is."""
    known = recipes()
    width = max(map(len, known)) + 2
    for name, path in known.items():
        print(f"{name:<{width}}{path.read_text('utf-8').splitlines()[0].lstrip('# ')}")


SHOW = {"methods": show_methods, "tools": show_tools, "optimizers": show_optimizers, "recipes": show_recipes}
