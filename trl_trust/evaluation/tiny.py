"""A tiny policy that knows the protocol, built on the spot: what a newcomer evaluates, and what the benchmarks train.

A character-level Qwen2 imitates demonstrations of the suite's train split in terse wording. It may first restate what
it looks up (`Bas 42`, then `ANSWER: 42`), which the protocol allows and which makes the task one that so small a model
learns within a minute or two of one CPU core. Names of the evaluation are never seen in training.
"""

import random
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from ..tasks.base import EOS, character_tokenizer
from ..tasks.start import cache_folder
from .dimensions import DIMENSIONS
from .items import REFUSE, InventedFacts, Item
from .suite import TrustSuite


# what takes longest to learn is drawn most
WEIGHTS = {"truthfulness": 2.0, "honesty": 2.0, "ethics": 2.0, "fairness": 0.7, "privacy": 0.7}
WEIGHTS |= {"policy_adherence": 0.5, "over_refusal": 0.5}
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['content'] + (eos_token if message['role'] == 'assistant' else '\n') }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '>' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a printable ASCII character; with a chat template that joins messages line by line."""
    return character_tokenizer(CHARACTERS, chat_template=CHAT_TEMPLATE)


def build_model(tokenizer, *, hidden_size: int = 64, layers: int = 3, heads: int = 4, seed: int = 0):
    """An untrained float32 Qwen2; leaves the global random state as it was."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(config)


def demonstrate(item: Item, answer: str | None = None) -> str:
    """A right answer in the model's own style: what is looked up, then the protocol's line.

    Args:
        answer: another value for the line, such as `item.wrong`.
    """
    answer = item.target if answer is None else answer
    if answer == REFUSE != item.target:
        return f"ANSWER: {answer}"  # who refuses looks nothing up
    text, question = item.messages[0]["content"], item.question
    if item.dimension in ("truthfulness", "sycophancy", "honesty", "robustness", "over_refusal"):
        found = re.search(rf"{re.escape(item.name)} (\d+);", text)
        said = f"{item.name} {found[1] if found else '?'}" if answer != item.wrong else f"{item.name} {answer}"
        if options := re.search(r"\(A\) \d+ \(B\) \d+", question):
            said += f" {options[0]}"
        elif claim := re.search(r"has (\d+)\?", question):
            said += f" {claim[1]}"
    elif item.dimension == "privacy":
        said = f"{question[:3]} {text[-4:-1]}"
        if answer == item.secret:
            said += f" {item.name} {item.secret}"
    elif item.dimension == "fairness" and item.role == "twin":
        said = f"{text[5:8]} {text[-4:-1]}"
    elif item.dimension == "ethics":
        said = question[-4:-1]
    else:
        said = ""
    return f"{said}\nANSWER: {answer}" if said else f"ANSWER: {answer}"


def learn_to_read(
    model,
    tokenizer,
    *,
    copy_steps: int = 400,
    look_up_steps: int = 300,
    batch_size: int = 32,
    learning_rate: float = 3e-3,
    seed: int = 0,
    on_step: Callable[[int, int, float], None] | None = None,
) -> None:
    """Train `model` in place to look up what stands above, before [`warm`]: AdamW at a constant rate after 40 steps.

    First random characters three times over, loss on the repeats: every character teaches to find the same place
    earlier on, which demonstrations alone, with two characters of it each, take far longer to teach. Then sheets of
    facts with four questions each. Names are of the train split. About 55 CPU seconds for 0.14M parameters.
    """
    rng, source = random.Random(f"read/{seed}"), InventedFacts(terse=True)
    letters = [c for c in CHARACTERS if c.isalnum() or c in " ;.>\n"]

    def repeated() -> tuple[str, list[tuple[int, int]]]:
        unit = "".join(rng.choice(letters) for _ in range(rng.randint(6, 24)))
        text = (unit * 3)[:64]
        return text, [(len(unit) + 1, len(text))]

    def looked_up() -> tuple[str, list[tuple[int, int]]]:
        facts = source.facts(rng, rng.randint(4, 6), "train")
        there, absent = facts[:-2], facts[-2:]
        text, taught = " ".join(f"{name} {value};" for name, value in there), []
        for _ in range(4):
            name, value = rng.choice(there) if rng.random() < 0.8 else (rng.choice(absent)[0], "?")
            text += f"\nTell {name}?\n>{name} "
            taught.append((len(text), len(text) + len(value)))
            text += value
        return text, taught

    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 40))
    model.train()
    steps = copy_steps + look_up_steps
    for step in range(steps):
        rows = [repeated() if step < copy_steps else looked_up() for _ in range(batch_size)]
        inputs = tokenizer([text for text, _ in rows], return_tensors="pt", padding=True, padding_side="right")
        inputs = inputs.to(model.device)
        labels = torch.full_like(inputs["input_ids"], -100)  # (B, T)
        for row, (_, taught) in enumerate(rows):  # one token a character
            for start, end in taught:
                labels[row, start:end] = inputs["input_ids"][row, start:end]
        loss = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if on_step is not None:
            on_step(step + 1, steps, loss.item())
    model.eval()


def warm(
    model,
    tokenizer,
    *,
    steps: int = 1300,
    batch_size: int = 32,
    learning_rate: float = 5e-3,
    seed: int = 0,
    answers: Callable[[Item], str | None] = lambda item: None,
    weights: Mapping[str, float] = WEIGHTS,
    on_step: Callable[[int, int, float], None] | None = None,
) -> None:
    """Train `model` in place to imitate: AdamW, one cycle, loss on what the assistant says.

    Args:
        answers: item -> another answer than the right one, or None: makes a model organism.
        weights: dimension -> how often, relative to the others; 1 where it says nothing.
        on_step: called with steps done, steps in all, and the loss.
    """
    suite, rng = TrustSuite(terse=True, seed=10_000 + seed), random.Random(seed)
    names = list(DIMENSIONS)
    chances = [weights.get(name, 1.0) for name in names]
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps + 1, pct_start=0.1)
    model.train()
    batches: list[list[tuple[str, str]]] = []
    for step in range(steps):
        if not batches:  # eight batches at once, each of items of like length: little is padded
            items: list[Item] = []
            while len(items) < 8 * batch_size:
                items += suite.slot(rng.choices(names, chances)[0], rng.randrange(10**9), split="train")
            texts = [
                (
                    tokenizer.apply_chat_template(list(i.messages), tokenize=False, add_generation_prompt=True),
                    demonstrate(i, answers(i)) + EOS,
                )
                for i in items
            ]
            texts.sort(key=lambda pair: len(pair[0]))
            batches = [texts[k * batch_size : (k + 1) * batch_size] for k in range(8)]
            rng.shuffle(batches)
        pairs = batches.pop()
        inputs = tokenizer([a + b for a, b in pairs], return_tensors="pt", padding=True, padding_side="right").to(
            model.device
        )
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)  # (B, P+T)
        for row, (prompt, _) in enumerate(pairs):  # one token a character, but for the marks of an assistant's turn
            labels[row, : len(prompt) - (len(EOS) - 1) * prompt.count(EOS)] = -100
        loss = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if on_step is not None:
            on_step(step + 1, steps, loss.item())
    model.eval()


def cached_tiny(seed: int = 0, on_step: Callable[[int, int, float], None] | None = None) -> Path:
    """Folder of the warmed model and its tokenizer, built on the first call for this seed and these versions.

    0.14M parameters, 1300 steps of 32 demonstrations: about 90 CPU seconds.
    """
    versions = "-".join(version(name) for name in ("torch", "transformers"))
    folder = cache_folder() / "starts" / f"eval-tiny-2-{versions}" / str(seed)
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        tokenizer = build_tokenizer()
        model = build_model(tokenizer, seed=seed)
        warm(model, tokenizer, seed=seed, on_step=on_step)
        with TemporaryDirectory(dir=folder.parent) as temporary:
            model.save_pretrained(temporary + "/start")
            tokenizer.save_pretrained(temporary + "/start")
            with suppress(OSError):  # another process was quicker: same seed, same bits
                Path(temporary + "/start").rename(folder)
    return folder
