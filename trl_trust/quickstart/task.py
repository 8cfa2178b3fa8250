"""Two-digit addition with a scratchpad: tokenizer, problems, demonstrator, reward and evaluation.

A prompt is `47+86=`; the completion adds column by column, ones first, and states the answer after a `#`:
`7+6=13,4+8+1=13#133`. The demonstrator writes such scratchpads with mistakes, so a model that imitates it is right now
and then: enough for reinforcement learning to start from, and far from done.
"""

import random
from collections.abc import Sequence

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast


PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
# Letters are no part of the task; they are there for feedback in words ("tens wrong"), which some methods read.
ALPHABET = "0123456789+-=#,.:;?!()<>_ \nabcdefghijklmnopqrstuvwxyz"
HELD_OUT = 256  # pairs that are never trained on, the same ones for every seed
MAX_COMPLETION_LENGTH = 24  # the longest correct completion, "9+9=18,9+9+1=19#198" and the end token, has 20 tokens

# Messages are simply joined; only what the assistant says is closed by the end token, and only that is ever learnt.
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{% endfor %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the character tokenizer: three special tokens (pad 0, end 1, unknown 2), then [`ALPHABET`] in order.

    It saves and loads like any other, decodes to exactly the text it encoded, and pads on the left.
    """
    vocabulary = {token: i for i, token in enumerate([PAD, EOS, UNK, *ALPHABET])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=UNK))  # BPE without merges: characters
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=_CHAT_TEMPLATE,
    )


def pairs(split: str, n: int | None = None, seed: int = 0) -> list[tuple[int, int]]:
    """Return `n` distinct pairs of two-digit numbers, in an order drawn from `seed`; all of the split if `n` is None.

    Args:
        split: `"train"` (7844 pairs) or `"test"` ([`HELD_OUT`] pairs). They are disjoint and do not depend on `seed`.
        n: How many pairs.
        seed: Seed of the order, and so of the choice when `n` is less than the split.

    Raises:
        ValueError: For another split, or more pairs than the split has.
    """
    every = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    random.Random("held out").shuffle(every)
    splits = {"test": every[:HELD_OUT], "train": every[HELD_OUT:]}
    if split not in splits:
        raise ValueError(f"split={split!r} does not exist; use 'train' or 'test'")
    chosen = splits[split]
    if n is not None and not 0 <= n <= len(chosen):
        raise ValueError(f"n={n} is out of range; the {split} split has {len(chosen)} pairs")
    random.Random(seed).shuffle(chosen)
    return chosen[:n]


def problems(split: str, n: int | None = None, seed: int = 0) -> Dataset:
    """Return [`pairs`] as a dataset with the columns `prompt` ("47+86=") and `answer` ("133")."""
    chosen = pairs(split, n, seed)
    return Dataset.from_dict({"prompt": [f"{a}+{b}=" for a, b in chosen], "answer": [str(a + b) for a, b in chosen]})


def demonstrate(a: int, b: int, rng: random.Random, *, drop_carry: float = 0.85, slip: float = 0.25) -> str:
    """Add `a` and `b` column by column and write down how, with mistakes.

    Args:
        a: Two-digit number.
        b: Two-digit number.
        rng: Where the mistakes come from.
        drop_carry: Probability of forgetting a carry.
        slip: Probability, in each column, of being off by one. With both 0 every answer is right.

    Returns:
        The scratchpad without an end token, e.g. `7+6=13,4+8+1=13#133`. The answer follows from the sums as written.
    """
    sums, digits, carry = [], "", 0
    for x, y in zip(reversed(str(a)), reversed(str(b)), strict=True):  # ones first
        if carry and rng.random() < drop_carry:
            carry = 0
        total = int(x) + int(y) + carry
        if rng.random() < slip:
            total = max(0, total + rng.choice((-1, 1)))
        sums.append(f"{x}+{y}+{carry}={total}" if carry else f"{x}+{y}={total}")
        digits = f"{total % 10}{digits}"
        carry = total // 10
    return f"{','.join(sums)}#{carry or ''}{digits}"


def exact_answer_reward(completions: Sequence, answer: Sequence[str], **kwargs) -> list[float]:
    """Reward 1 for a completion whose text after the first `#` is the answer, to the character, else 0.

    Args:
        completions: Texts, or conversations whose last message is the completion.
        answer: The column `answer`, one entry a completion.
    """
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    # partition, not a search for the last number: a second `#` must not buy a second guess
    return [float(text.partition("#")[1:] == ("#", right)) for text, right in zip(texts, answer, strict=True)]


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Dataset,
    *,
    samples: int = 8,
    reference: PreTrainedModel | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Measure a policy on `problems`. Leaves the global random state as it was; same seed, same numbers.

    Args:
        model: The policy; sampled at temperature 1 from its whole distribution.
        tokenizer: As built by [`build_tokenizer`].
        problems: Columns `prompt` and `answer`. One batch holds them all, `samples` times.
        samples: Completions drawn a problem, k in pass@k.
        reference: A model to measure the KL divergence to.
        seed: Seed of the sampling.

    Returns:
        `pass@1` (mean reward of the samples), `pass@k` (fraction of problems with a right sample), `greedy` (mean
        reward of greedy decoding), `entropy` (nats, mean over sampled tokens of the entropy of the whole next-token
        distribution) and, with a reference, `kl` (nats, likewise KL(model || reference)).
    """
    was_training = model.training
    model.eval()
    answers = list(problems["answer"])
    inputs = tokenizer(list(problems["prompt"]), return_tensors="pt", padding=True).to(model.device)
    prompt_length = inputs["input_ids"].shape[1]
    settings = {"max_new_tokens": MAX_COMPLETION_LENGTH, "pad_token_id": tokenizer.pad_token_id}

    def reward(sequences: torch.Tensor, answers: list[str]) -> torch.Tensor:
        texts = tokenizer.batch_decode(sequences[:, prompt_length:], skip_special_tokens=True)
        return torch.tensor(exact_answer_reward(texts, answers))

    greedy = reward(model.generate(**inputs, **settings, do_sample=False), answers)  # (N,)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sequences = model.generate(
            **inputs, **settings, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=samples
        )  # (N*k, P+T), the samples of a problem side by side
    correct = reward(sequences, [a for a in answers for _ in range(samples)]).view(-1, samples)  # (N, k)

    completion = sequences[:, prompt_length:]  # (N*k, T)
    ended = (completion == tokenizer.eos_token_id).cumsum(1) - (completion == tokenizer.eos_token_id).int()
    live = ended == 0  # (N*k, T), the end token counts
    attention = torch.cat([inputs["attention_mask"].repeat_interleave(samples, 0), live.long()], dim=1)

    def next_token_logps(policy: PreTrainedModel) -> torch.Tensor:
        logits = policy(input_ids=sequences, attention_mask=attention).logits[:, prompt_length - 1 : -1]
        return logits[live].float().log_softmax(-1)  # (live tokens, V)

    logps = next_token_logps(model)
    metrics = {
        "pass@1": correct.mean().item(),
        f"pass@{samples}": correct.amax(1).mean().item(),
        "greedy": greedy.mean().item(),
        "entropy": -(logps.exp() * logps).sum(-1).mean().item(),
    }
    if reference is not None:
        metrics["kl"] = (logps.exp() * (logps - next_token_logps(reference))).sum(-1).mean().item()
    model.train(was_training)
    return metrics
