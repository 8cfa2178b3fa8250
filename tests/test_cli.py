"""The command line: what it prints, what it launches, and how it says that something is wrong."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from importlib import import_module
from pathlib import Path

import psutil
import pytest
import yaml
from datasets import Dataset

from trl_trust import cli, script
from trl_trust.methods import HOSTS, METHODS, get_method, hosted
from trl_trust.optimizers import OPTIMIZERS, get_optimizer
from trl_trust.tools import Tool


METHOD_NAMES = [method.name for method in METHODS]


@pytest.fixture
def recipe(tmp_path, tiny_model_path):
    """Writes a recipe that trains one step on a CPU, changed by keywords, and returns its path."""
    rows = [{"prompt": f"{a}+1=", "solution": str(a + 1)} for a in range(8)]
    data = tmp_path / "train.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))

    def write(**changes) -> str:
        path = tmp_path / "recipe.yaml"
        settings = {
            "model_name_or_path": tiny_model_path,
            "dataset_name": str(data),
            "reward_funcs": ["math_accuracy_reward"],
            "output_dir": str(tmp_path / "out"),
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "max_steps": 1,
            "per_device_train_batch_size": 2,
            "num_generations": 2,
            "steps_per_generation": 2,
            "max_completion_length": 4,
        }
        path.write_text(yaml.safe_dump({k: v for k, v in {**settings, **changes}.items() if v is not None}))
        return str(path)

    return write


@pytest.fixture
def launched(monkeypatch) -> list[Namespace]:
    """What reached `accelerate launch`, in place of launching it."""
    calls = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", calls.append)
    return calls


def error_of(capsys, *words, launch=False) -> str:
    """The one line of the error that the command ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(words), launch=launch)
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("trl-trust: error")]
    assert len(lines) == 1
    return lines[0]


# -- looking around --------------------------------------------------------------------------------------------------


def test_looking_around_imports_neither_torch_nor_trl():
    commands = [
        ["--help"],
        ["--version"],
        *([name, "--help"] for name in METHOD_NAMES),
        *([name] for name in cli.SHOW),
    ]
    code = (
        "import sys, time; from trl_trust.cli import main\n"
        f"for words in {commands!r}: assert main(words) == 0\n"
        "heavy = {'torch', 'trl', 'transformers', 'datasets', 'accelerate'} & set(sys.modules)\n"
        "assert not heavy, heavy; print('seconds', time.process_time())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 1.0


@pytest.mark.parametrize("method", METHODS, ids=METHOD_NAMES)
def test_help_shows_the_fields_that_the_config_has(method, capsys):
    config = getattr(import_module(method.module), method.config)
    stating = [base for base in config.__mro__ if base.__name__.endswith("Settings") and base.__name__ != "Settings"]
    own = {name for base in (config, *stating) for name in base.__annotations__}
    own &= {f.name for f in dataclasses.fields(config)}
    stated = cli.stated_fields(method.module, method.config)
    assert {name for name, _, _ in stated} == own
    for name, default, text in stated:
        field = config.__dataclass_fields__[name]
        assert text == field.metadata["help"]
        assert default == repr(field.default) or not isinstance(field.default, (str, int, float, type(None)))

    arguments = getattr(import_module(method.script), HOSTS[method.host].arguments)
    assert cli.main([method.name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(
        f"--{name} " in shown
        for name in [*own, *({"reward_funcs", "prompt_column"} & {f.name for f in dataclasses.fields(arguments)})]
    )
    assert "--help-all" in shown
    for name in cli.unread_fields(method.module, method.config):
        assert name in config.unread_fields and name in shown


def test_help_all_lists_every_field(capsys):
    assert cli.main(["dispo", "--help-all"]) == 0
    shown = capsys.readouterr().out
    assert all(f"--{name} " in shown for name in ("epsilon_pos_low", "learning_rate", "lora_r", "vllm_mode"))


def test_tables(capsys):
    for command, names in {
        "methods": METHOD_NAMES,
        "optimizers": [row.name for row in OPTIMIZERS],
        "recipes": list(cli.recipes()),
    }.items():
        assert cli.main([command]) == 0
        shown = capsys.readouterr().out
        assert names and all(name in shown for name in names)


def test_commands_that_take_nothing_refuse_words(capsys):
    assert "unexpected '--foo' after 'methods'" in error_of(capsys, "methods", "--foo")


def test_quickstart_gets_its_arguments(monkeypatch):
    monkeypatch.setattr("trl_trust.quickstart.run.main", lambda words: len(words))
    assert cli.main(["quickstart", "--steps", "2"]) == 2


# -- recipes by name -------------------------------------------------------------------------------------------------


def test_recipe_by_short_name_and_by_file(tmp_path):
    path = str(cli.recipes()["dispo/qwen3-1.7b-math"])
    assert os.path.isfile(path)
    for words in (["--config", "dispo/qwen3-1.7b-math"], ["--config=dispo/qwen3-1.7b-math.yaml"], ["--config", path]):
        assert cli.resolve_recipe([*words, "--seed", "1"]) == ["--config", path, "--seed", "1"]


def test_recipes_of_a_wheel_come_first(tmp_path, monkeypatch):
    (tmp_path / "recipes" / "dispo").mkdir(parents=True)
    (tmp_path / "recipes" / "dispo" / "inside.yaml").write_text("# inside\n")
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "cli.py"))
    assert list(cli.recipes()) == ["dispo/inside"]


def test_unreadable_recipes(tmp_path, capsys):
    assert "dispo/qwen3-1.7b-math" in error_of(capsys, "dispo", "--config", "dispo/qwen3-1.7b")
    assert "dppo/qwen3-30b-a3b-math" in error_of(capsys, "dispo", "--config", "no-such-recipe")
    assert "after it" in error_of(capsys, "dispo", "--config")
    for name, content, said in [
        ("broken.yaml", b"a: [1\nb: 2", "line 2"),
        ("list.yaml", b"- a\n- b", "mapping"),
        ("latin.yaml", "name: caf\xe9".encode("latin-1"), "cannot read recipe"),
    ]:
        (tmp_path / name).write_bytes(content)
        error = error_of(capsys, "dispo", "--config", str(tmp_path / name))
        assert said in error and name in error


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words", "said"),
    [
        ({"epsilon_pos_lo": 0.1}, [], "unknown field 'epsilon_pos_lo' in the recipe; did you mean 'epsilon_pos_low'?"),
        ({"delta_low": 0.1}, [], "in the recipe; it is a field of DPPO: `trl-trust dppo`"),
        ({"signal": "weak", "use_cpu": None, "bf16": None}, [], "it is a field of ERPD: `trl-trust erpd`"),
        ({"use_cpu": None, "bf16": None}, [], "to train on a CPU set use_cpu: true, bf16: false"),
        ({"reward_model_name_or_path": "./no/such"}, [], "reward_model_name_or_path='./no/such' is no directory"),
        ({}, ["--lora_rr", "1"], "unknown field 'lora_rr' on the command line; did you mean 'lora_r'?"),
        ({}, ["--learning_r", "1"], "did you mean 'learning_rate'?"),  # no abbreviations
        ({}, ["stray"], "unexpected 'stray'"),
        ({}, ["--num_processes", "2"], "for the launcher"),
        ({}, ["--learning_rate", "fast"], "invalid float value: 'fast'"),
        ({"learning_rate": [1, 2]}, [], "invalid float value: '[1, 2]'"),
        ({"max_steps": True}, [], "invalid int value: 'True'"),
        ({"epsilon_pos_low": -1.0}, [], "epsilon_pos_low=-1.0"),
        ({"loss_type": "cispo"}, [], "loss_type='cispo'"),
        ({"save_strategy": "sometimes"}, [], "sometimes"),
        ({"optim": "auom"}, [], "auon"),
        ({}, ["--optim", "auom"], "auon"),
        ({"model_name_or_path": None}, [], "model_name_or_path"),
        ({"model_name_or_path": "/no/such/model"}, [], "/no/such/model"),
        ({"dataset_name": None}, [], "dataset_name"),
        ({"dataset_name": "/no/such/file.jsonl"}, [], "no such file"),
        ({"dataset_name": "someone/absent"}, [], "someone/absent"),
        ({"datasets": [{"path": "json"}]}, [], "either `dataset_name`"),
        ({"dataset_train_split": "training"}, [], "no split 'training'; it has train"),
        ({"eval_strategy": "epoch"}, [], "no split 'test'"),
        ({"prompt_column": "problem"}, [], "no column 'problem' for the prompt; it has prompt, solution"),
        ({"reward_funcs": None}, [], "reward_funcs"),
        ({"reward_funcs": "math_acuracy_reward"}, [], "did you mean 'math_accuracy_reward'?"),
        ({"reward_funcs": ["json.nothing"]}, [], "json.nothing"),
        ({"reward_funcs": ["no_such_module.reward"]}, [], "no_such_module"),
        ({"reward_funcs": ["json.__doc__"]}, [], "cannot be called"),
        ({"reward_funcs": [f"{__name__}.level_reward"]}, [], "level_reward needs the column `level`"),
    ],
)  # fmt: skip
def test_errors_are_one_line(recipe, capsys, changes, words, said):
    assert said in error_of(capsys, "dispo", "--config", recipe(**changes), *words)


def level_reward(completions, level, **kwargs):
    return level


def test_missing_reference_column(recipe, tmp_path, capsys):
    (tmp_path / "plain.csv").write_text("prompt,level\n1+1=,3\n")
    for reward in ("math_accuracy_reward", "accuracy_reward"):
        path = recipe(dataset_name=str(tmp_path / "plain.csv"), reward_funcs=reward)
        assert "`solution`" in error_of(capsys, "dispo", "--config", path)


def test_an_empty_file_and_empty_prompts_are_told(recipe, tmp_path, capsys):
    (tmp_path / "empty.jsonl").write_text("")
    path = recipe(dataset_name=str(tmp_path / "empty.jsonl"))
    assert "empty.jsonl': the file is empty" in error_of(capsys, "dispo", "--config", path)
    rows = [{"quest": prompt, "solution": "2"} for prompt in ("1+1=", None, "2+0=", None)]
    (tmp_path / "nulls.jsonl").write_text("\n".join(map(json.dumps, rows)))
    path = recipe(dataset_name=str(tmp_path / "nulls.jsonl"), prompt_column="quest")
    said = "the column 'quest' is empty in 2 of 4 rows, the first is row 1; leave them out"
    assert said in error_of(capsys, "dispo", "--config", path)


def test_a_recipe_that_is_nested_too_deeply(tmp_path, capsys):
    (tmp_path / "deep.yaml").write_text("a: " + "[" * 3000 + "]" * 3000)
    assert "it is nested too deeply" in error_of(capsys, "dispo", "--config", str(tmp_path / "deep.yaml"))


def test_broken_data_file(recipe, tmp_path, capsys):
    (tmp_path / "broken.json").write_text('{"prompt": ')
    assert "broken.json" in error_of(capsys, "dispo", "--config", recipe(dataset_name=str(tmp_path / "broken.json")))


def test_unknown_command(capsys):
    assert "did you mean 'dispo'" in error_of(capsys, "disspo")
    listed = error_of(capsys, "xyzzy").split("there are: ")[1].split(", ")
    assert len(listed) == len(set(listed)) > 20


def test_traceback_on_demand(recipe, monkeypatch):
    monkeypatch.setenv("TRL_TRUST_TRACEBACK", "")  # restored afterwards
    with pytest.raises(ValueError, match="epsilon_pos_low"):
        cli.main(["dispo", "--config", recipe(epsilon_pos_low=-1.0), "--traceback"], launch=False)


# -- launching -------------------------------------------------------------------------------------------------------


def test_launch_divides_words_between_launcher_and_script(recipe, launched):
    path = recipe(num_processes=2, multi_gpu=True, use_fsdp=False, main_process_port=1234)
    assert cli.main(["dispo", "--config", path, "--num_processes=4", "--seed", "4", "--use_vllm"]) == 0
    (args,) = launched
    assert (args.training_script, args.module) == ("trl_trust", True)
    assert args.training_script_args == ["dispo", "--config", path, "--seed", "4", "--use_vllm"]
    assert (args.num_processes, args.multi_gpu, args.use_fsdp, args.main_process_port) == (4, True, False, 1234)


@pytest.mark.parametrize("where", ["recipe", "words", "both"])
def test_accelerate_configs_of_trl_by_name(recipe, launched, where):
    path = recipe(**({} if where == "words" else {"accelerate_config": "zero2" if where == "both" else "zero3"}))
    cli.main(["dppo", "--config", path, *([] if where == "recipe" else ["--accelerate_config", "zero3"])])
    assert launched[0].config_file.endswith("zero3.yaml")
    assert launched[0].training_script_args == ["dppo", "--config", path]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--num_proceses", "2"], "did you mean 'num_processes'?"),
        (["--num_processes", "two"], "invalid int value: 'two'"),
        (["--num_processes", "2", "stray"], "unexpected 'stray'"),
        (["--accelerate_config", "zero9"], "zero9"),
    ],
)
def test_launch_errors(recipe, launched, capsys, words, said):
    assert said in error_of(capsys, "dispo", "--config", recipe(), *words, launch=True)
    assert not launched


def test_launch_constructs_no_config(recipe, launched):
    """8 processes x 1 hold one group of 8; the launching process alone would find 1 x 1 indivisible."""
    sizes = {"per_device_train_batch_size": 1, "steps_per_generation": 2, "num_generations": 8}
    assert cli.main(["dispo", "--config", recipe(num_processes=8, **sizes)]) == 0
    assert launched[0].num_processes == 8


def test_exit_status_of_a_failed_launch(recipe, monkeypatch, capsys):
    def fail(code):
        def launch(args):
            raise subprocess.CalledProcessError(code, "python")

        return launch

    monkeypatch.setattr("accelerate.commands.launch.launch_command", fail(3))
    assert cli.main(["dispo", "--config", recipe()]) == 3
    monkeypatch.setattr("accelerate.commands.launch.launch_command", fail(-9))
    assert cli.main(["dispo", "--config", recipe()]) == 9
    assert "signal 9" in capsys.readouterr().err


def test_under_a_launcher_it_trains_in_process(recipe, launched, monkeypatch):
    ran = []
    monkeypatch.setattr(script.RecipeParser, "parse", lambda self, words: (Namespace(dataset_name="data"),))
    monkeypatch.setattr(script, "build_trainer", lambda method, *configs: method)
    monkeypatch.setattr(script, "run", lambda trainer, name, recipe: ran.append((trainer.name, name)))
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert cli.main(["dispo", "--config", recipe()]) == 0
    assert (ran, launched) == ([("dispo", "data")], [])


def test_in_process_passes_over_what_the_recipe_says_to_the_launcher(recipe, launched):
    path = recipe(num_processes=2, accelerate_config="zero3")
    assert cli.main(["dispo", "--config", path], launch=False) == 0
    assert not launched


@pytest.mark.parametrize(
    "command",
    [
        ["trl-trust", "dispo", "--num_processes", "2", "--multi_gpu"],
        ["accelerate", "launch", "--num_processes", "1", "-m", "trl_trust", "dispo"],
    ],
    ids=["trl-trust on two processes", "accelerate launch"],
)
def test_the_real_thing(recipe, tmp_path, command):
    """One step in processes of their own, with an optimizer by name and the report of each rank's world."""
    command[0] = os.path.join(os.path.dirname(sys.executable), command[0])
    words = [*command, "--config", recipe(optim="muon", reward_funcs=["world_reward.world"])]
    (tmp_path / "world_reward.py").write_text(
        "import os\n"
        "def world(completions, **kwargs):\n"
        "    open('rank' + os.environ.get('RANK', '0'), 'w').write(os.environ.get('WORLD_SIZE', '1'))\n"
        "    return [float(i) for i in range(len(completions))]\n"
    )
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    ranks = {path.name: path.read_text() for path in tmp_path.glob("rank*")}
    assert ranks == ({"rank0": "2", "rank1": "2"} if "--multi_gpu" in command else {"rank0": "1"})
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("launcher", "ended_by", "said"),
    [
        ([], signal.SIGTERM, "trl-trust: stopped by SIGTERM"),
        ([], signal.SIGINT, "trl-trust: stopped by Ctrl-C"),
        pytest.param(
            ["--num_processes", "2", "--multi_gpu"], signal.SIGTERM, "stopped by SIGTERM", marks=pytest.mark.slow
        ),
        pytest.param(
            ["--num_processes", "2", "--multi_gpu"], signal.SIGINT, "stopped by Ctrl-C", marks=pytest.mark.slow
        ),
    ],
    ids=["one process", "Ctrl-C", "two processes", "two, Ctrl-C"],
)
def test_what_ends_the_command_ends_the_training(recipe, tmp_path, launcher, ended_by, said):
    """SIGTERM reaches the command alone, Ctrl-C all processes of the terminal; both leave a log, and no process."""
    program = os.path.join(os.path.dirname(sys.executable), "trl-trust")
    path = recipe(max_steps=100_000, logging_steps=1, reward_funcs=["slow_reward.slow"])
    (tmp_path / "slow_reward.py").write_text(
        "import os, time\n"
        "def slow(completions, **kwargs):\n"
        "    open('pid' + os.environ.get('RANK', '0'), 'w').write(str(os.getpid()))\n"
        "    time.sleep(.2)\n"
        "    return [float(i) for i in range(len(completions))]\n"
    )
    words = [program, "dispo", *launcher, "--config", path]
    as_in_a_terminal = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a suite in the background has it ignored
    pipe = dict(cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True)
    command = subprocess.Popen(words, **pipe, preexec_fn=as_in_a_terminal)
    try:
        wait_for(lambda: (tmp_path / "out" / "trainer_state.json").exists() or command.poll() is not None)
        trained = [psutil.Process(int(path.read_text())) for path in tmp_path.glob("pid*")]
        os.killpg(command.pid, ended_by) if ended_by == signal.SIGINT else command.send_signal(ended_by)
        _, errors = command.communicate(timeout=200)
        assert command.returncode == 128 + ended_by
        assert errors.splitlines()[-1].endswith(said) and errors.count("trl-trust: ") == 1
        assert "Traceback" not in errors
        assert trained and not any(process.is_running() for process in trained)
        assert json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    finally:
        if command.poll() is None:
            os.killpg(command.pid, signal.SIGKILL)


def wait_for(condition, seconds=200):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited for too long"
        time.sleep(0.1)


# -- settings and data -----------------------------------------------------------------------------------------------


def test_command_line_overrides_recipe_and_bare_no_is_no(recipe):
    path = recipe(learning_rate="1e-5", epsilon_pos_high=float("inf"), reward_funcs="think_format_reward")
    text = Path(path).read_text()
    assert "save_strategy: 'no'" in text
    Path(path).write_text(text.replace("save_strategy: 'no'", "save_strategy: no"))
    parser = script.make_parser(get_method("dispo"))
    script_args, args, *_ = parser.parse(["--config", path, "--epsilon_neg_low", "0.5", "--lora_r", "4"])
    assert (args.save_strategy, args.learning_rate, args.epsilon_pos_high) == ("no", 1e-5, float("inf"))
    assert (args.epsilon_neg_low, script_args.reward_funcs) == (0.5, ["think_format_reward"])


def arguments(**changes) -> script.TrustScriptArguments:
    return script.TrustScriptArguments(**changes)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet", "csv", "directory"])
def test_local_data(tmp_path, kind, streaming):
    rows = Dataset.from_dict({"prompt": ["1+1=", "2+1="], "solution": ["2", "3"]})
    path = tmp_path / f"train.{'jsonl' if kind == 'directory' else kind}"
    getattr(rows, {"parquet": "to_parquet", "csv": "to_csv"}.get(kind, "to_json"))(path)
    name = str(tmp_path if kind == "directory" else path)
    args = arguments(dataset_name=name, dataset_streaming=streaming)
    data = script.prepare_split(script.load_data(args, Namespace(datasets=[])), "train", args)
    assert script.column_names(data) == ["prompt", "solution"]
    assert [row["prompt"] for row in data] == ["1+1=", "2+1="]


@pytest.mark.parametrize("streaming", [False, True])
def test_prompt_column_and_system_prompt(streaming):
    user = {"role": "user", "content": "1+1="}
    data = Dataset.from_dict(
        {
            "prompt": ["unused"],
            "problem": ["1+1="],
            "chat": [[{"role": "system", "content": "old"}, user]],
            "answer": ["2"],
        }
    )
    splits = {"train": data.to_iterable_dataset() if streaming else data}

    def prompt(**changes):
        (row,) = script.prepare_split(splits, "train", arguments(**changes))
        assert row["answer"] == "2"
        return row["prompt"]

    system = {"role": "system", "content": "Think."}
    assert prompt() == "unused"
    assert prompt(prompt_column="problem") == "1+1="
    assert prompt(prompt_column="problem", system_prompt="Think.") == [system, user]
    assert prompt(prompt_column="problem", system_prompt="") == [user]
    assert prompt(prompt_column="chat", system_prompt="Think.") == [system, user]


def test_mixture_of_data_sets(recipe, tmp_path):
    path = recipe(dataset_name=None, datasets=[{"path": "json", "data_files": str(tmp_path / "train.jsonl")}] * 2)
    script_args, _, _, mixture = script.make_parser(get_method("dispo")).parse(["--config", path])
    assert len(script.load_data(script_args, mixture)["train"]) == 16


def test_saves_and_pushes_as_asked(recipe, tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr("trl.GRPOTrainer.push_to_hub", lambda self, **kwargs: pushed.append(kwargs))
    monkeypatch.setattr("transformers.Trainer.init_hf_repo", lambda *args, **kwargs: None)
    path = recipe(push_to_hub=True, hub_model_id="me/mine")
    monkeypatch.setattr("trl.GRPOTrainer.hub_model_id", "me/mine", raising=False)
    assert cli.main(["dispo", "--config", path], launch=False) == 0
    assert pushed[-1] == {"dataset_name": str(tmp_path / "train.jsonl")}


@pytest.mark.parametrize(
    ("method", "changes", "said"),
    [
        ("dispo", {"num_iterations": 0}, "num_iterations=0 must be a whole number >= 1"),
        ("dispo", {"optim": "auon", "optim_args": "foo=1"}, "optim_args of optim='auon' has unknown keys: foo"),
        (
            "rlad",
            {"teacher_model_name_or_path": "./no/such"},
            "teacher_model_name_or_path='./no/such' is no directory",
        ),
        ("dispo", {"resume_from_checkpoint": "true"}, "there is no checkpoint in output_dir="),
        ("dispo", {"resume_from_checkpoint": "nope"}, "resume_from_checkpoint='nope': no such folder"),
        ("dispo", {"model_name_or_path": "out-nope"}, "model_name_or_path='out-nope' is no directory with a model"),
        (
            "trpa",
            {"level_rule": "knights_and_knaves"},
            "knights_and_knaves_levels needs the column `solution_text_format`; the data set has prompt, solution",
        ),
        ("vpd", {"feedback_func": "test_cli.say_tests"}, "say_tests needs the column `tests`"),
        ("erpd", {"stage": "teacher"}, "stage: the rounds run both stages"),
        ("erpd", {"prompt_column": "quest"}, "the data set has no column 'quest' for the prompt"),
        ("erpd", {"rollouts": {"num_prompts": 9}}, "num_prompts=9 is more than the 8 rows of the data set"),
    ],
)
def test_bad_settings_are_told_before_training(method, changes, said, recipe, capsys):
    if method == "erpd":  # not a config of GRPO
        changes = {**dict.fromkeys(("num_generations", "steps_per_generation", "max_completion_length")), **changes}
    assert said in error_of(capsys, method, "--config", recipe(**changes))


def say_tests(prompts, completions, tests, **kwargs):
    raise AssertionError("called")


def test_resume_from_the_last_checkpoint(recipe, tmp_path):
    saving = dict(save_strategy="steps", save_steps=1, logging_steps=1, max_steps=1)
    assert cli.main(["dispo", "--config", recipe(**saving)], launch=False) == 0
    words = ["--config", recipe(**{**saving, "max_steps": 2}), "--resume_from_checkpoint", "true"]
    assert cli.main(["dispo", *words], launch=False) == 0
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"]] == [1, 2]


def stop_at_the_second(completions, **kwargs):
    stop_at_the_second.calls += 1
    if stop_at_the_second.calls == 2:
        raise RuntimeError("enough")
    return [float(i) for i in range(len(completions))]


def test_a_run_leaves_its_log_and_its_recipe_however_it_ends(recipe, tmp_path, monkeypatch, capsys):
    path = recipe(
        logging_steps=1, max_steps=3, num_processes=4, num_iterations=2, hub_token="secret", dataset_test_split="no"
    )
    words = ["dispo", "--config", path, "--learning_rate", "1e-4", "--chat_template_kwargs", '{"a": 1}']
    words += ["--reward_funcs", f"{__name__}.stop_at_the_second"]
    monkeypatch.setattr(stop_at_the_second, "calls", 0, raising=False)
    with pytest.raises(RuntimeError, match="enough"):
        cli.main([*words, "--steps_per_generation", "1"], launch=False)
    out = tmp_path / "out"
    state = json.loads((out / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"]] == [1, 2]
    assert cli.main(["plot", str(out)]) == 0 and (out / "plot.svg").exists()

    kept = out / "trl_trust_recipe.yaml"
    assert (
        kept.read_text().startswith("# trl-trust dispo, as it was run with trl ") and "secret" not in kept.read_text()
    )
    parsed = []
    for given in (words[1:], ["--config", str(kept)]):
        parsed.append([vars(config) for config in script.make_parser(get_method("dispo")).parse(given)])
    assert yaml.safe_load(kept.read_text())["num_processes"] == 4
    for name, theirs in parsed[0][1].items():
        if name not in ("hub_token", "steps_per_generation", "generation_batch_size"):
            assert repr(parsed[1][1][name]) == repr(theirs), name
    assert parsed[1][0] == parsed[0][0]


# -- the baseline ----------------------------------------------------------------------------------------------------


def trained_by(path, *words):
    """What `trl-trust grpo` trains, and its log."""
    start = import_module("trl_trust.baseline").prepare(["--config", path, *words])
    start()
    return start.args[0]


def test_grpo_takes_the_recipe_of_a_method(recipe, capsys):
    path = recipe(epsilon_pos_low=0.3, num_processes=1)
    trainer = trained_by(path)
    assert type(trainer).__name__ == "TrustGRPOTrainer"
    assert "trl-trust: left out, since GRPO does not know them: epsilon_pos_low\n" in capsys.readouterr().out
    assert any("trust/ratio/mean" in entry for entry in trainer.state.log_history)
    trainer = trained_by(path, "--loss_type", "cispo")
    assert type(trainer).__name__ == "GRPOTrainer" and trainer.args.loss_type == "cispo"
    assert "unknown field 'epsilon_pos_low' on the command line" in error_of(
        capsys, "grpo", "--config", path, "--epsilon_pos_low", "0.2"
    )


def test_grpo_launches_the_recipe_of_a_method(recipe, launched):
    path = recipe(epsilon_pos_low=0.3, num_processes=2)
    assert cli.main(["grpo", "--config", path]) == 0
    assert launched[0].num_processes == 2
    assert launched[0].training_script_args == ["grpo", "--config", path]


OF_GRPO = tuple(f"{method.recipes}/" for method in hosted("grpo"))


@pytest.mark.parametrize("name", [name for name in cli.recipes() if name.startswith(OF_GRPO)])
def test_grpo_reads_the_recipe_of_every_method(name, tmp_path):
    baseline = import_module("trl_trust.baseline")
    words = ["--use_vllm", "false", "--use_cpu", "--bf16", "false", "--output_dir", str(tmp_path)]
    parser = baseline.make_parser()
    _, config, *_ = parser.parse(["--config", str(cli.recipes()[name]), *words])
    assert type(config).__name__ == "TrustGRPOConfig" and not set(parser.left_out) & set(vars(config))


def test_a_policy_term_of_ones_own(recipe, tmp_path, monkeypatch, capsys):
    page = (Path(cli.__file__).parent.parent / "docs" / "cli.md").read_text()
    (tmp_path / "my_losses.py").write_text(page.split("```python\n# my_losses.py\n")[1].split("```")[0])
    with open(tmp_path / "my_losses.py", "a") as module:
        module.write("\n\ndef needs(batch, *, unknown):\n    pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    path = recipe(policy_loss="my_losses.reinforce", epsilon=0.3)
    trainer = trained_by(path)
    module, seen = import_module("my_losses"), []
    monkeypatch.setattr(module, "reinforce", lambda batch, *, epsilon: seen.append(epsilon))
    import_module("trl_trust.baseline").with_loss(module.reinforce).policy_loss(trainer, None)
    assert seen == [0.3]
    for words, said in [
        (["--policy_loss", "my_losses.nothing"], "policy_loss='my_losses.nothing' cannot be imported"),
        (["--policy_loss", "my_losses.needs"], "keyword 'unknown' is no field of TrustGRPOConfig"),
        (["--loss_type", "sapo"], "are two policy terms"),
    ]:
        assert said in error_of(capsys, "grpo", "--config", path, *words)


# -- TRL's own scripts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optim", ["auon", "hybrid_auon"])
def test_trl_script_with_our_optimizer(optim, recipe, tmp_path, capsys, monkeypatch):
    rule, calls = get_optimizer(optim).load(), []
    direction = rule.direction
    monkeypatch.setattr(rule, "direction", lambda *args: (calls.append(1), direction(*args))[1])
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": f"{a}+1={a + 1}"}) for a in range(8)))
    path = recipe(dataset_name=None, datasets=[{"path": "json", "data_files": str(tmp_path / "text.jsonl")}])
    settings = yaml.safe_load(Path(path).read_text())
    for name in ("reward_funcs", "num_generations", "steps_per_generation", "max_completion_length"):
        del settings[name]  # GRPO's own
    Path(path).write_text(yaml.safe_dump({**settings, "optim": optim}))
    assert cli.main(["sft", "--config", path], launch=False) == 0
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert calls
    assert "did you mean 'max_length'?" in error_of(capsys, "sft", "--config", path, "--max_lenght", "8")


@pytest.mark.parametrize("name", cli.TRL_SCRIPTS)
def test_trl_scripts_know_our_optimizers_and_launch(name, tmp_path, launched):
    words = ["--output_dir", str(tmp_path), "--optim", "hybrid_auon"]
    assert cli.main([name, *words, "--num_processes", "2"]) == 0
    assert launched[0].training_script_args == [name, *words]
    parser, _ = cli.script_of(name)
    assert parser.parse([*words, "--use_cpu", "--bf16", "false"])[1].optim == "hybrid_auon"


# -- the other table -------------------------------------------------------------------------------------------------


def test_a_row_of_tools_is_a_command(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_tool.py").write_text(
        "def main(words):\n    if not words:\n        raise ValueError('words=[]: say what')\n    return len(words)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    row = Tool("mine", "Mine", "my_tool", "2601.00001", "inspired", "counts words", ("count up", "count down"), "plot")
    monkeypatch.setattr(cli, "TOOLS", (row,))
    assert cli.main(["count", "down", "--to", "0"]) == 3
    assert error_of(capsys, "count") == "trl-trust: error: words=[]: say what"
    assert cli.main(["--help"]) == cli.main(["tools"]) == 0
    shown = capsys.readouterr().out
    assert "  count         counts words" in shown
    assert "mine: count up, count down (pip install trl-trust[plot])" in shown and "inspired: the paper" in shown
    assert "did you mean 'count'" in error_of(capsys, "coumt")
