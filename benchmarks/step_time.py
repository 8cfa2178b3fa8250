"""Time and peak memory of one update (forward, loss, backward, optimizer) against stock `GRPOTrainer`, same rollouts.

    python benchmarks/step_time.py [--methods dispo dppo] [--rounds 40] [--json benchmarks/results/step_time.json]

Generation is left out: every method generates with TRL's own code, which would only hide a difference. Within
a round each trainer makes one update, in a new random order; the figure is the median over rounds of the ratio of a
method's time to stock's in the same round. Memory is the peak resident size of a process of its own that makes three
updates (on a GPU, the peak allocated).
"""

import argparse
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path

import cells


os.environ.setdefault("HF_HUB_OFFLINE", "1")

SHAPES = {  # hidden size, layers, vocabulary, rows, completion tokens
    "quickstart": (64, 2, None, 128, 24),
    "small": (256, 4, 8192, 16, 64),
}


def build(method: str, shape: str, directory: str, settings: dict):
    """A trainer with one generation batch in its buffer, ready to update on it for ever."""
    import torch
    from transformers import AutoTokenizer, PrinterCallback, Qwen2ForCausalLM
    from transformers.utils import logging
    from trl import GRPOConfig, GRPOTrainer

    from trl_trust.methods import get_method
    from trl_trust.quickstart.task import problems

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if method == "grpo":
        trainer_class, config_class = GRPOTrainer, GRPOConfig
    else:
        row = get_method(method)
        trainer_class, config_class = (getattr(import_module(row.module), name) for name in (row.trainer, row.config))
    _, _, _, rows, tokens = SHAPES[shape]
    args = config_class(
        directory,
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=10**9,
        max_steps=10**6,
        learning_rate=1e-6,
        per_device_train_batch_size=rows,
        num_generations=8,
        steps_per_generation=2,
        num_iterations=10**6,
        max_completion_length=tokens,
        generation_kwargs={"min_new_tokens": tokens},
        **settings,
    )
    reward = lambda completions, **kwargs: [float(len(set(text)) % 4) for text in completions]
    trainer = trainer_class(
        model=Qwen2ForCausalLM.from_pretrained(directory),
        reward_funcs=reward,
        args=args,
        train_dataset=problems("train", 256),
        processing_class=AutoTokenizer.from_pretrained(directory),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    trainer.create_optimizer()
    batch = next(iter(trainer.get_train_dataloader()))
    trainer._prepare_inputs(batch)  # generate once; later calls take the buffered mini-batches
    return trainer, batch


def update(trainer, batch) -> float:
    """Make one update and return its seconds: of the process on a CPU, of the wall on a GPU."""
    import torch

    cuda = torch.cuda.is_available()
    clock = time.perf_counter if cuda else time.process_time  # a CPU may have other work to do
    start = clock()
    trainer.training_step(trainer.model, batch, None)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    if cuda:
        torch.cuda.synchronize()
    return clock() - start


def save_model(shape: str, directory: str) -> int:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from trl_trust.quickstart.task import build_tokenizer

    hidden, layers, vocabulary, _, _ = SHAPES[shape]
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary or len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return model.num_parameters()


def peak_memory(method: str, shape: str, directory: str, settings: dict) -> float:
    """MiB, of a fresh process."""
    command = [sys.executable, __file__, "--memory-of", method, "--shapes", shape, "--directory", directory]
    command += ["--settings", json.dumps({method: settings})]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def measure(methods: list[str], shape: str, rounds: int, settings: dict) -> dict:
    from rich.progress import track

    with tempfile.TemporaryDirectory() as directory:
        parameters = save_model(shape, directory)
        names = ["grpo", *methods]
        trainers = {name: build(name, shape, directory, settings.get(name, {})) for name in names}
        times = {name: [] for name in names}
        for _ in range(3):
            for name in names:
                update(*trainers[name])
        for _ in track(range(rounds), description=f"{shape}: interleaved updates"):
            for name in random.sample(names, len(names)):
                times[name].append(update(*trainers[name]))
        memory = {name: peak_memory(name, shape, directory, settings.get(name, {})) for name in names}
    ratio = lambda name: statistics.median(a / b for a, b in zip(times[name], times["grpo"], strict=True))
    return {
        "parameters": parameters,
        "rounds": rounds,
        "stock_ms": round(1000 * statistics.median(times["grpo"]), 2),
        "time_ratio": {name: round(ratio(name), 4) for name in methods},
        "peak_mib": {name: round(memory[name], 1) for name in names},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=["dispo", "dppo"])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--settings", type=json.loads, default={}, help='{"mdpo": {"divergence": "full"}}')
    parser.add_argument("--json", type=Path, help="merge the results into this file")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--directory", help=argparse.SUPPRESS)
    options = parser.parse_args()

    import torch

    torch.set_num_threads(1)
    if options.memory_of:
        trainer, batch = build(
            options.memory_of, options.shapes[0], options.directory, options.settings[options.memory_of]
        )
        for _ in range(3):
            update(trainer, batch)
        if torch.cuda.is_available():
            print(torch.cuda.max_memory_allocated() / 2**20)
        else:  # not ru_maxrss, which a process inherits from the one that started it
            (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
            print(int(peak) / 1024)
        return

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU, 1 thread"
    results = {}
    for shape in options.shapes:
        results[shape] = found = measure(options.methods, shape, options.rounds, options.settings)
        print(
            f"{shape} ({found['parameters'] / 1e6:.2f}M parameters, {device}); stock {found['stock_ms']} ms an update"
        )
        for name, value in found["time_ratio"].items():
            memory = found["peak_mib"]
            print(f"  {name:8} time x{value:.3f}   peak {memory[name]:.1f} MiB against {memory['grpo']:.1f} MiB")
    if options.json:
        kept = cells.load(options.json) if options.json.exists() else {}
        kept[" ".join(options.methods)] = {
            "command": cells.command(),
            "device": device,
            "settings": options.settings,
            **results,
        }
        cells.save(options.json, kept)


if __name__ == "__main__":
    main()
