"""A policy that can call the tool and no more: tokenizer, tiny model and warm start, all built locally.

The chat template is Qwen3's, as TRL ships it. The fixed strings of the conversation are single tokens, among them the
call `<tool_call>{"name": "invest", ...` up to the amount, so that a round costs about a dozen tokens: at a token a
character an update would cost ten times as much.
"""

from os import PathLike
from pathlib import Path
from random import Random

from .environment import CoopetitionEnv, coopetition_dataset
from .game import LARGEST, Game


EOS = "<|im_end|>"


def _conversation(env: CoopetitionEnv, amounts, prompt: str) -> list[dict]:
    """The game as messages: the prompt, a call and its result for each amount, and a last empty turn."""
    messages = [{"role": "user", "content": prompt + env.reset()}]
    for amount in amounts:
        call = {"type": "function", "function": {"name": "invest", "arguments": {"amount": amount}}}
        messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        messages.append({"role": "tool", "name": "invest", "content": env.invest(amount)})
    return [*messages, {"role": "assistant", "content": ""}]


def build_tokenizer(game: Game | None = None):
    """A character tokenizer (ASCII) with Qwen3's chat template, and one token for each fixed string of the game.

    Args:
        game: whose rules and rounds make up the prompt; other games cost more tokens, but nothing else.
    """
    from tokenizers import AddedToken
    from trl.chat_template_utils import qwen3_chat_template

    from ..base import character_tokenizer

    characters = [*map(chr, range(32, 127)), "\n", "\t"]
    tokenizer = character_tokenizer(characters, eos_token=EOS, unk_token=None, chat_template=qwen3_chat_template)
    env = CoopetitionEnv(Game() if game is None else game)
    prompt = coopetition_dataset(1)[0]["prompt"][0]["content"]
    text = tokenizer.apply_chat_template(
        _conversation(env, [0], prompt)[:1], tools=[env.invest], tokenize=False, add_generation_prompt=True
    )
    head, trust = text[: text.index("Your trust in it is ")], "Your trust in it is "
    back = "<|im_end|>\n<|im_start|>assistant\n"
    rounds = f" of {env._game.rounds}."
    fixed = [
        head + trust,
        f"{rounds}{back}",
        '<tool_call>\n{"name": "invest", "arguments": {"amount": ',
        "}}\n</tool_call>",
        "\n<|im_start|>user\n<tool_response>\nThe partner invested ",
        f". {trust}",
        ". Round ",
        f"{rounds}\n</tool_response>{back}",
        f". The game is over.\n</tool_response>{back}",
        str(LARGEST),
    ]
    tokenizer.add_tokens([AddedToken(words, normalized=False) for words in fixed])
    return tokenizer


def episode(tokenizer, env: CoopetitionEnv, amounts, prompt_ids: list[int]) -> tuple[list[int], list[int]]:
    """Ids of an episode as TRL would see it, and 1 where the model speaks."""
    ids, mask = list(prompt_ids), [0] * len(prompt_ids)
    env.reset()
    for amount in amounts:
        call = f'<tool_call>\n{{"name": "invest", "arguments": {{"amount": {amount}}}}}\n</tool_call><|im_end|>'
        told = (
            f"\n<|im_start|>user\n<tool_response>\n{env.invest(amount)}\n</tool_response><|im_end|>\n"
            "<|im_start|>assistant\n"
        )
        for text, said in ((call, 1), (told, 0)):
            new = tokenizer.encode(text, add_special_tokens=False)
            ids += new
            mask += [said] * len(new)
    return [*ids, tokenizer.eos_token_id], [*mask, 1]


def build_start(
    output_dir: str | PathLike, game: Game | None = None, *, steps: int = 120, batch_size: int = 32, seed: int = 0
) -> Path:
    """Write a tiny Qwen2 (0.1M parameters) that plays legal games with amounts drawn at random, and its tokenizer.

    It imitates calls whose amounts are uniform in 0..10: it knows the form of a call and nothing of the game.

    Args:
        output_dir: folder to write to.
        game: what it plays.
        steps, batch_size: of the imitation, with AdamW in one cycle up to 5e-3.
        seed: of parameters and amounts.
    """
    import torch

    from trl_trust.tasks.start import build_model

    game = Game() if game is None else game
    tokenizer = build_tokenizer(game)
    model = build_model(tokenizer, seed=seed)
    env, rng = CoopetitionEnv(game), Random(seed)
    prompt = _conversation(env, [], coopetition_dataset(1)[0]["prompt"][0]["content"])[:1]
    prompt_ids = tokenizer.apply_chat_template(
        prompt, tools=[env.invest], tokenize=True, return_dict=False, add_generation_prompt=True
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps + 1)
    for _ in range(steps):
        rows = [
            episode(tokenizer, env, [rng.randint(0, LARGEST) for _ in range(game.rounds)], prompt_ids)
            for _ in range(batch_size)
        ]
        length = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row, _ in rows])  # (B, T)
        said = torch.tensor([mask + [0] * (length - len(mask)) for _, mask in rows])
        model(input_ids=ids, labels=ids.masked_fill(said == 0, -100)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    return Path(output_dir)
