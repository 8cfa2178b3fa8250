"""What every task offers, the tokenizer they share, and how a policy is measured on one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .sampling import sample


PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
# Letters are no part of the tasks; they are there for feedback in words ("tens wrong"), which some methods read.
ALPHABET = "0123456789+-=#,.:;?!()<>_ \nabcdefghijklmnopqrstuvwxyz"

# Messages are simply joined; only what the assistant says is closed by the end token, and only that is ever learnt.
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{% endfor %}"
)


def character_tokenizer(
    characters: Sequence[str], *, eos_token: str = EOS, unk_token: str | None = UNK, chat_template: str | None = None
) -> PreTrainedTokenizerFast:
    """Return a tokenizer of one token a character: pad, end and unknown (if any), then `characters` (ASCII) in order.

    It saves and loads like any other, decodes to exactly the text it encoded, and pads on the left.
    """
    special = [token for token in (PAD, eos_token, unk_token) if token is not None]
    # Blank, tab and line break go by their byte-level names. AutoTokenizer (transformers 5.23) makes a Qwen2Tokenizer
    # of whatever was saved beside a Qwen2 model, and that one knows no others: it would lose all three in silence.
    named = {" ": "\u0120", "\t": "\u0109", "\n": "\u010a"}
    vocabulary = {token: i for i, token in enumerate([*special, *(named.get(c, c) for c in characters)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=unk_token))  # no merges: characters
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=eos_token,
        unk_token=unk_token,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=chat_template,
    )


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer of the tasks: [`character_tokenizer`] of [`ALPHABET`]."""
    return character_tokenizer(ALPHABET, chat_template=_CHAT_TEMPLATE)


def completion_text(completion) -> str:
    """The text of a completion, which TRL gives as such or as a conversation whose last message it is."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


@dataclass(frozen=True)
class Task:
    """A world with an exact reward.

    Attributes:
        name: Key of [`~trl_trust.tasks.TASKS`].
        problems: `(split, n=None, seed=0)` to a dataset with the column `prompt` and those that `reward` reads. The
            splits `"train"` and `"test"` are disjoint and do not depend on the seed, which only orders them.
        reward: A reward function as TRL calls it: completions and columns to numbers from 0 to 1. 1 is solved, and
            nothing else is.
        draw: A training problem from a random state, in whatever form `demonstrate` takes it.
        demonstrate: `(problem, rng, **mistakes)` to prompt and completion, right or wrong as the mistakes ask. All
            prompts have one length.
        max_completion_length: Tokens that a right completion needs at most, with the end token, and a few more.
        start: Options of [`~trl_trust.tasks.start.warm_start`], mistakes included, that make a policy which is right
            now and then: enough for reinforcement learning to start from, and far from done.
        teacher: The same for a strong policy.
    """

    name: str
    problems: Callable[..., Dataset]
    reward: Callable[..., list[float]]
    draw: Callable[[Random], Any]
    demonstrate: Callable[..., tuple[str, str]]
    max_completion_length: int
    start: Mapping[str, Any] = field(default_factory=dict)
    teacher: Mapping[str, Any] = field(default_factory=dict)

    def build_tokenizer(self) -> PreTrainedTokenizerFast:
        """Return the tokenizer of the task, [`build_tokenizer`]."""
        return build_tokenizer()

    @torch.no_grad()
    def evaluate(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        problems: Dataset,
        *,
        samples: int = 8,
        reference: PreTrainedModel | None = None,
        greedy: bool = True,
        seed: int = 0,
    ) -> dict[str, float]:
        """Measure a policy on `problems`. Leaves the global random state as it was; same seed, same numbers.

        Args:
            model: The policy; sampled at temperature 1 from its whole distribution.
            tokenizer: As built by [`build_tokenizer`].
            problems: As returned by `problems`. One batch holds them all, `samples` times.
            samples: Completions drawn a problem, k in pass@k.
            reference: A model to measure the KL divergence to.
            greedy: Whether to decode greedily too.
            seed: Seed of the sampling.

        Returns:
            `pass@1` (fraction of the samples that solve their problem), `pass@k` (fraction of problems with such a
            sample), `reward` (mean over the samples), `greedy` (mean reward of greedy decoding), `entropy` (nats, mean
            over sampled tokens of the entropy of the whole next-token distribution) and, with a reference, `kl` (nats,
            likewise KL(model || reference)).
        """
        was_training = model.training
        model.eval()
        columns = {name: list(problems[name]) for name in problems.column_names}
        prompts = tokenizer(columns["prompt"], return_tensors="pt", padding=True).to(model.device)
        generator = torch.Generator(model.device).manual_seed(seed)

        def draw(n: int, **how) -> tuple:
            drawn = sample(model, **prompts, samples=n, max_new_tokens=self.max_completion_length, **how)
            texts = tokenizer.batch_decode(drawn.ids, skip_special_tokens=True)
            return drawn, torch.tensor(self.rewards(texts, columns, n)).view(-1, n)

        drawn, rewards = draw(samples, generator=generator)  # (N, k)
        solved = (rewards == 1).float()
        live = drawn.mask  # (N*k, T), the end token counts
        metrics = {
            "pass@1": solved.mean().item(),
            f"pass@{samples}": solved.amax(1).mean().item(),
            "reward": rewards.mean().item(),
            "entropy": drawn.entropies[live].mean().item(),
        }
        if greedy:
            metrics["greedy"] = draw(1)[1].mean().item()
        if reference is not None:
            logps, ref_logps = (drawn.next_token_logps(policy) for policy in (model, reference))
            metrics["kl"] = (logps.exp() * (logps - ref_logps)).sum(-1).mean().item()
        model.train(was_training)
        return metrics

    def rewards(self, completions: Sequence, columns: Mapping[str, Sequence], samples: int = 1) -> list[float]:
        """Reward completions to the rows of `columns`, `samples` to each, side by side."""
        spread = {name: [value for value in column for _ in range(samples)] for name, column in columns.items()}
        return self.reward(completions=completions, prompts=spread.pop("prompt"), **spread)
