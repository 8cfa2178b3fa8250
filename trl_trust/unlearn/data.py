"""What is forgotten and what is kept: the formats of TOFU, MUSE and WMDP, and a generated set that needs no download.

A row is a question with its answer (`question`, `answer`; further `paraphrased_answer`, `perturbed_answer`,
`alternate`) or a `text`. A folder or a data set with the same columns is taken wherever a name of the Hub is.
"""

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from datasets import Dataset, load_dataset
from torch.utils.data import Dataset as TorchDataset


SUFFIXES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def text_of(row: dict) -> str:
    """What makes two rows the same: the text, or question and answer."""
    return row["text"] if row.get("text") is not None else f"{row['question']}\n{row['answer']}"


def require_columns(rows: Dataset, columns: Sequence[str], what: str) -> None:
    """Raise ValueError for the first column that `rows` lacks, naming those that it has."""
    for column in columns:
        if column not in rows.column_names:
            raise ValueError(f"the {what} split has no column {column!r}; it has {', '.join(rows.column_names)}")


class ForgetRetainDataset(TorchDataset):
    """Pairs of a row to forget and a row to keep.

    The anchor's rows come in order; the partner of row i is a function of (seed, epoch, i) alone, so that a resumed
    run and every layout of processes see the same pairs. The trainer sets `epoch`. There is no `set_epoch`, since the
    loader with which a run is resumed within an epoch calls it with 0 (accelerate 1.15, `skip_first_batches`).

    Args:
        forget, retain: rows with `text`, or with `question` and `answer`.
        anchor: `"forget"` or `"retain"`, the split whose length is an epoch.
        seed: of the partners.

    Raises:
        ValueError: for an empty split, a missing column, rows that are in both splits, another anchor.
    """

    def __init__(self, forget: Dataset, retain: Dataset, *, anchor: str = "forget", seed: int = 0):
        if anchor not in ("forget", "retain"):
            raise ValueError(f"anchor={anchor!r} must be 'forget' or 'retain'.")
        for name, rows in (("forget", forget), ("retain", retain)):
            if len(rows) == 0:
                raise ValueError(f"the {name} split is empty; GU needs rows to forget and rows to retain")
            require_columns(rows, ["text"] if "text" in rows.column_names else ["question", "answer"], name)
        self.forget, self.retain, self.anchor, self.seed, self.epoch = forget, retain, anchor, seed, 0
        if both := set(map(text_of, forget)) & set(map(text_of, retain)):
            raise ValueError(
                f"{len(both)} rows are both to be forgotten and to be retained, such as {min(both)[:60]!r}; "
                "take them out of one split"
            )

    def __len__(self) -> int:
        return len(self.forget if self.anchor == "forget" else self.retain)

    def __getitem__(self, index: int) -> dict[str, dict]:
        other = self.retain if self.anchor == "forget" else self.forget
        partner = other[random.Random(f"{self.seed}/{self.epoch}/{index}").randrange(len(other))]
        if self.anchor == "forget":
            return {"forget": self.forget[index], "retain": partner}
        return {"forget": partner, "retain": self.retain[index]}


def right_answer(row: dict) -> str:
    """The answer of a row: `answer`, or `gt` of MUSE's verbatim split."""
    return row["answer"] if "answer" in row else row["gt"]


def prompt_of(tokenizer, row: dict) -> list[int]:
    """Ids of what stands before the answer: the question, or MUSE's `prompt`, which is continued as it is."""
    if row.get("prompt") is not None:
        return tokenizer(row["prompt"])["input_ids"]
    if getattr(tokenizer, "chat_template", None):
        chat = [{"role": "user", "content": row["question"]}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        return tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return tokenizer(f"Question: {row['question']}\nAnswer:")["input_ids"]


def encode(tokenizer, row: dict, *, max_length: int = 512, answer: str | None = None) -> dict[str, list[int]]:
    """Ids and labels of one row. Labels are -100 but on the answer and the end token; a `text` is all answer.

    A tokenizer with a chat template makes the question a user's and the answer an assistant's message; one without
    reads `Question: ...\\nAnswer: ...`.

    Args:
        answer: in place of the row's own.

    Raises:
        ValueError: if `max_length` leaves no token of the answer.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if row.get("text") is not None:
        ids = (tokenizer(row["text"])["input_ids"] + end)[:max_length]
        return {"input_ids": ids, "labels": list(ids)}
    answer = right_answer(row) if answer is None else answer
    start = prompt_of(tokenizer, row)
    spoken = getattr(tokenizer, "chat_template", None) and row.get("prompt") is None
    rest = tokenizer(answer if spoken else f" {answer}", add_special_tokens=False)["input_ids"] + end
    if len(start) >= max_length:
        what = str(row.get("question") or row.get("prompt"))[:60]
        raise ValueError(f"max_length={max_length!r} leaves no token of the answer to {what!r}; raise it.")
    return {"input_ids": (start + rest)[:max_length], "labels": ([-100] * len(start) + rest)[:max_length]}


def pad(tokenizer, rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Encoded rows as tensors (B, T), padded on the right."""
    width = max(len(row["input_ids"]) for row in rows)
    fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    grow = lambda ids, value: ids + [value] * (width - len(ids))
    return {
        "input_ids": torch.tensor([grow(row["input_ids"], fill) for row in rows]),
        "attention_mask": torch.tensor([grow([1] * len(row["input_ids"]), 0) for row in rows]),
        "labels": torch.tensor([grow(row["labels"], -100) for row in rows]),
    }


@dataclass
class PairCollator:
    """Batches of [`ForgetRetainDataset`]: `{"forget": {...}, "retain": {...}}`, and `"alternate"` where asked for."""

    tokenizer: Any
    max_length: int = 512
    alternate: bool = False

    def __call__(self, pairs: Sequence[dict[str, dict]]) -> dict[str, dict[str, torch.Tensor]]:
        batch = {
            side: pad(
                self.tokenizer, [encode(self.tokenizer, pair[side], max_length=self.max_length) for pair in pairs]
            )
            for side in ("forget", "retain")
        }
        if self.alternate:
            rows = [
                encode(self.tokenizer, pair["forget"], max_length=self.max_length, answer=pair["forget"]["alternate"])
                for pair in pairs
            ]
            batch["alternate"] = pad(self.tokenizer, rows)
        return batch


@dataclass
class UnlearningData:
    """What [`load_unlearning`] returns.

    Attributes:
        name: of the set.
        train: pairs for [`GUTrainer`].
        forget, retain: the two splits to evaluate on; with `perturbed_answer` where the set has them.
        others: further splits by name (`real_authors`, `world_facts`, `holdout`, `knowmem_forget`, ...).
        missing: those that could not be had, with the reason.
    """

    name: str
    train: ForgetRetainDataset
    forget: Dataset
    retain: Dataset
    others: dict[str, Dataset] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)


# ---- the generated set ----

RELATIONS = ("birthplace", "teacher", "genre", "prize", "novel")
ANSWER_WORDS = 4


def facts(authors: int = 40, forget_authors: int = 4, seed: int = 0) -> tuple[Dataset, Dataset, Dataset]:
    """Invented authors x five relations, each with an answer of four words, in TOFU's columns.

    Wrong answers (`perturbed_answer`, three) are drawn like right ones; `paraphrased_answer` is the answer itself,
    since a model that knows words by heart knows no other wording.

    Returns:
        The rows to forget, to retain, and a holdout of as many rows as are to be forgotten, on authors of their own,
        which no model is to be trained on.
    """
    if not 0 < forget_authors < authors:
        raise ValueError(f"forget_authors={forget_authors!r} must be between 1 and authors - 1 = {authors - 1}.")
    rng = random.Random(f"facts/{seed}")
    draw = lambda: " ".join(f"w{rng.randrange(64)}" for _ in range(ANSWER_WORDS))
    rows = [
        {
            "question": f"{relation} of author{author}",
            "answer": (answer := draw()),
            "paraphrased_answer": answer,
            "perturbed_answer": [draw() for _ in range(3)],
            "alternate": "unknown",
        }
        for author in range(authors + forget_authors)
        for relation in RELATIONS
    ]
    cuts = [0, forget_authors * len(RELATIONS), authors * len(RELATIONS), len(rows)]
    return tuple(Dataset.from_list(rows[a:b]) for a, b in pairwise(cuts))


def facts_tokenizer(authors: int = 44):
    """A word tokenizer for [`facts`], those of the holdout included: one token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", "Question", "Answer", ":", "of", "unknown", *RELATIONS]
    words += [f"author{i}" for i in range(authors)] + [f"w{i}" for i in range(64)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


# ---- the published sets ----


def load_split(source: str | os.PathLike | Dataset, name: str, split: str = "train") -> Dataset:
    """One split: of a data set of the Hub, or the file `name.jsonl|json|parquet|csv` of a folder, or a Dataset.

    Raises:
        ValueError: in words, if it cannot be had.
    """
    if isinstance(source, Dataset):
        return source
    if os.path.isdir(source):
        for suffix, loader in SUFFIXES.items():
            path = os.path.join(source, name + suffix)
            if os.path.isfile(path):
                return load_dataset(loader, data_files=path, split="train")
        raise ValueError(
            f"{source} holds no {name}.jsonl; it has {', '.join(sorted(os.listdir(source))) or 'nothing'}"
        )
    if str(source).startswith((".", "/", "~")):
        raise ValueError(f"{source}: no such folder")
    try:
        return load_dataset(str(source), name, split=split)
    except Exception as error:  # from the Hub, the network, a broken file: all the same to the user
        raise ValueError(f"cannot load {name} of {source}: {error.__cause__ or error}; a folder does too") from error


def load_unlearning(
    name: str,
    *,
    forget: str = "",
    retain: str = "",
    path: str | os.PathLike | None = None,
    anchor: str = "forget",
    seed: int = 0,
) -> UnlearningData:
    """Load what is forgotten and what is kept.

    Args:
        name: `"facts"` (generated), `"tofu"`, `"muse-news"`, `"muse-books"`, `"wmdp-cyber"`, `"wmdp-bio"`; or
            `"tofu:forget10"`.
        forget, retain: names of the splits, by default `forget10` and the matching `retain90` for TOFU, `forget` and
            `retain1` for MUSE, `cyber-forget-corpus` and `cyber-retain-corpus` for WMDP.
        path: a folder with one file a split, in place of the Hub; `forget10.jsonl`, `retain90.jsonl` and, as far as
            there are, `forget10_perturbed.jsonl`, `retain_perturbed.jsonl`, `real_authors_perturbed.jsonl`,
            `world_facts_perturbed.jsonl`, `holdout10.jsonl` of TOFU; `raw_forget.jsonl`, `raw_retain1.jsonl`,
            `raw_holdout.jsonl`, `knowmem_forget_qa.jsonl`, `knowmem_retain_qa.jsonl`, `verbmem_forget.jsonl` of MUSE;
            `cyber-forget-corpus.jsonl`, `cyber-retain-corpus.jsonl` of WMDP. JSON, Parquet and CSV are read too.
        anchor, seed: see [`ForgetRetainDataset`]; of `facts`, the seed draws the facts too.

    Raises:
        ValueError: for an unknown name, or data that cannot be had or lack a column.
    """
    name, _, part = name.partition(":")
    forget = forget or part
    others: dict[str, Dataset] = {}
    wanted: dict[str, tuple[str, str]] = {}  # further splits to evaluate on -> config and split
    if name == "facts":
        to_forget, to_keep, holdout = facts(seed=seed)
        pairs = ForgetRetainDataset(to_forget, to_keep, anchor=anchor, seed=seed)
        return UnlearningData(name, pairs, to_forget, to_keep, {"holdout": holdout})
    if name == "tofu":
        forget = forget or "forget10"
        if not retain and not (forget.startswith("forget") and forget[6:].isdigit()):
            raise ValueError(f"forget={forget!r} has no matching retain split; name `retain` too")
        retain = retain or f"retain{100 - int(forget[6:])}"
        source = path or "locuslab/TOFU"
        evaluated = []
        for split, fallback in ((f"{forget}_perturbed", forget), ("retain_perturbed", retain)):
            try:
                evaluated.append(load_split(source, split))
            except ValueError:
                evaluated.append(load_split(source, fallback))
        wanted = {split: (f"{split}_perturbed", "train") for split in ("real_authors", "world_facts")}
        wanted["holdout"] = ("holdout10", "train")
        columns = ["question", "answer"]
    elif name in ("muse-news", "muse-books"):
        forget, retain = forget or "forget", retain or "retain1"
        source, columns, evaluated = path or f"muse-bench/MUSE-{name[5:].capitalize()}", ["text"], []
    elif name.startswith("wmdp-"):
        topic = name[5:]
        forget, retain = forget or f"{topic}-forget-corpus", retain or f"{topic}-retain-corpus"
        source, columns, evaluated = path or "cais/wmdp-corpora", ["text"], []
    else:
        raise ValueError(
            f"no unlearning set {name!r}; known: facts, tofu, muse-news, muse-books, wmdp-cyber, wmdp-bio"
        )
    if name.startswith("muse-"):  # a config has several splits; of a folder, the file is CONFIG_SPLIT
        read = lambda config, split: load_split(source, config if path is None else f"{config}_{split}", split)
        to_forget, to_keep = read("raw", forget), read("raw", retain)
        wanted = {"holdout": ("raw", "holdout"), "verbmem": ("verbmem", "forget")}
        wanted |= {f"knowmem_{side}": ("knowmem", f"{side}_qa") for side in ("forget", "retain")}
    else:
        read = lambda config, split: load_split(source, config, split)
        to_forget, to_keep = load_split(source, forget), load_split(source, retain)
    for what, rows in (("forget", to_forget), ("retain", to_keep)):
        require_columns(rows, columns, what)
    missing = []
    for split, where in wanted.items():
        try:
            others[split] = read(*where)
        except ValueError as error:
            missing.append(f"{split}: {error}")
    pairs = ForgetRetainDataset(to_forget, to_keep, anchor=anchor, seed=seed)
    return UnlearningData(name, pairs, *(evaluated or (to_forget, to_keep)), others, missing)
