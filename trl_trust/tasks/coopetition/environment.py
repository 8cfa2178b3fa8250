"""The investment game as TRL plays it: an environment with one tool, its data set, and the game in a single turn.

TRL calls `reset` with the row of the data set, shows the model the tool `invest`, and takes `get_reward` when the
rollout has ended. Whatever a model writes costs bounded time, raises nothing and earns nothing that it has not played
for. Neither torch nor TRL is imported here.
"""

import functools
import inspect
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from .game import LARGEST, Game, State, play, play_round, scale, start


logger = logging.getLogger(__name__)

TOKENS_A_ROUND = 90  # of a call, its result and the template around both, where no tokenizer tells
ROW = ("partner", "D", "trust0")  # columns of a row that replace the game's own
NAME = "coopetition"


def rules(game: Game) -> str:
    """The game in words, as the player reads it."""
    paid = {
        "private": "what you keep, what your investment earns and your share of the common product",
        "reciprocal": "what you keep, what your investment earns, your share of the common product, and more for "
        "every unit when a partner that you trust invests more than is expected",
        "integrated": "your own income and a part of your partner's",
        "integrated_trust": "your own income and, the more you trust it, a part of your partner's",
        "cooperative": "the mean of both incomes",
    }[game.reward]
    return (
        f"You and a partner invest in a common venture for {game.rounds} rounds. In each round both choose a whole "
        f"number from 0 to {LARGEST} at the same time. {game.baseline:g} is expected of each: more builds the other's "
        f"trust slowly, less destroys it quickly and is remembered. You are paid {paid}."
    )


def _lenient(method):
    """`method(self, amount)`, callable with any arguments: what is no single `amount` arrives as `None`.

    A call with missing or surplus arguments would otherwise raise, which TRL counts as a failure of the tool that
    costs the model nothing.
    """

    @functools.wraps(method)
    def call(self, *args, **kwargs):
        given = [*args, *kwargs.values()]
        fits = len(given) == 1 and set(kwargs) <= {"amount"}
        return method(self, given[0] if fits else None)

    call.__signature__ = inspect.signature(method)
    return call


class CoopetitionEnv:
    """A partner to play with. TRL makes each public method but `reset` and `get_reward` a tool: there is one.

    Args:
        game: the constants; a row may replace its partner, D and trust0.
        factory: where it is noted that the warning of a cut episode was given.
    """

    def __init__(self, game: Game | None = None, factory: "coopetition_env_factory | None" = None):
        self._base = Game() if game is None else game
        self._factory = factory
        self._begin(self._base, 0)

    def _begin(self, game: Game, seed: int) -> None:
        self._game, self._seed = game.seated(seed), seed
        self._states: list[State] = [start(self._game)]
        self._own: list[int] = []
        self._other: list[float] = []
        self._invalid = 0

    def reset(self, **row: Any) -> str:
        """Begin a new episode; columns `seed`, `partner`, `D` and `trust0` count, all others are ignored."""
        changes = {name: row[name] for name in ROW if row.get(name) is not None}
        seed = row.get("seed")
        self._begin(replace(self._base, **changes) if changes else self._base, 0 if seed is None else int(seed))
        return f"{rules(self._game)}\n{self._observation()}"

    @_lenient
    def invest(self, amount: int) -> str:
        """
        Invest in this round.

        Args:
            amount: How much to invest, a whole number from 0 to 10.

        Returns:
            What the partner invested, and how things stand before the next round.
        """
        if len(self._own) == self._game.rounds:
            return "The game is over."
        valid = isinstance(amount, int) and not isinstance(amount, bool) and 0 <= amount <= LARGEST
        self._invalid += not valid
        own = amount if valid else 0
        state, _, other = play_round(self._game, self._states[-1], np.array([float(own)]), self._seed)
        self._states.append(state)
        self._own.append(own)
        self._other.append(float(other[0]))
        prefix = "" if valid else f"That was no whole number from 0 to {LARGEST}, and counted as 0. "
        return prefix + self._observation()

    def _observation(self) -> str:
        game, played = self._game, len(self._own)
        parts = []
        if played and "partner_action" in game.observe:
            parts.append(f"The partner invested {self._other[-1]:g}.")
        if "own_trust" in game.observe:
            parts.append(f"Your trust in it is {self._states[-1].trust[0, 0]:.2f}.")
        if played == game.rounds:
            parts.append("The game is over.")
        elif "round" in game.observe:
            parts.append(f"Round {played + 1} of {game.rounds}.")
        return " ".join(parts) or "Go on."

    def get_reward(self) -> float:
        """The normalized reward of the episode as it stands; rounds that were not played count as amounts of 0."""
        game, played = self._game, len(self._own)
        if played < game.rounds and self._factory is not None:
            self._factory._warn_of_cut(played, game.rounds)
        return _reward(game, self._own, self._invalid, self._seed)

    def _metrics(self) -> dict[str, float]:
        """What is logged of an episode.

        - `rounds_played`, and `amount`, the mean of what was invested.
        - `trust`: mean over the played rounds of the partner's trust in the player; `final_trust`: the last.
        - `violation_rate`: share of the rounds below the baseline.
        - `recovery_time`: mean number of rounds from a violation until the partner's trust is what it was before it;
          where it does not come back, until the end and one more.
        - `exploitation`: mean of what the partner invested less what the player did, over 10.
        """
        own = np.array(self._own, float)
        trust = np.array([state.trust[0, 1] for state in self._states])  # (played + 1,)
        metrics = {"rounds_played": float(len(own)), "final_trust": float(trust[-1])}
        if len(own):
            broken = np.flatnonzero(own < self._game.baseline)
            metrics |= {
                "amount": own.mean(),
                "trust": trust[1:].mean(),
                "violation_rate": len(broken) / len(own),
                "exploitation": (np.array(self._other) - own).mean() / LARGEST,
            }
            if len(broken):
                back = [np.flatnonzero(trust[at + 1 :] >= trust[at]) for at in broken]
                metrics["recovery_time"] = np.mean(
                    [found[0] + 1 if len(found) else len(own) - at + 1 for at, found in zip(broken, back, strict=True)]
                )
        return {name: float(value) for name, value in metrics.items()}


def _reward(game: Game, amounts: Sequence[int], invalid: int, seed: int) -> float:
    """Normalized reward of the amounts that were played; without a single valid one it is never above 0."""
    plan = np.array([*amounts, *[0] * (game.rounds - len(amounts))], float)
    value = float(scale(game, seed)(play(game, plan, seed).utility[0]))
    if len(amounts) == invalid:
        value = min(value, 0.0)
    return value - game.invalid_penalty * invalid


class coopetition_env_factory:
    """What `environment_factory` of a GRPO trainer takes: each call returns a [`CoopetitionEnv`].

        env = coopetition_env_factory(rounds=8, partner="grim")
        GRPOTrainer(model, args=GRPOConfig(**env.grpo_kwargs()), train_dataset=coopetition_dataset(512),
                    reward_funcs=coopetition_metrics, environment_factory=env)

    Args:
        options: fields of [`Game`].

    Raises:
        ValueError: for a field that there is not, or a value outside its range.
    """

    def __init__(self, **options: Any):
        self.game = make_game(**options)
        self._warned = False

    def __call__(self) -> CoopetitionEnv:
        return CoopetitionEnv(self.game, self)

    def grpo_kwargs(self, max_completion_length: int | None = None, tokenizer=None, talk: int = 0) -> dict[str, int]:
        """Settings of `GRPOConfig` in which an episode fits.

        TRL's `max_completion_length`, by default 512, covers the whole conversation after the prompt, the results of
        the tool included; an episode that does not fit ends early, without an error.

        Args:
            max_completion_length: tokens; by default what is needed.
            tokenizer: what the need is measured with; without it [`TOKENS_A_ROUND`] tokens a round are assumed.
            talk: tokens a turn that the model may say beside the call, such as its thoughts.

        Returns:
            `max_completion_length` and `max_tool_calling_iterations`.

        Raises:
            ValueError: for a `max_completion_length` that is too small for the rounds.
        """
        need = self.tokens(tokenizer) + talk * (self.game.rounds + 1)
        if max_completion_length is None:
            max_completion_length = need
        self._check("max_completion_length", max_completion_length, need, "tokens", tokenizer is not None)
        return {"max_completion_length": max_completion_length, "max_tool_calling_iterations": self.game.rounds + 1}

    def check_args(self, args, tokenizer) -> None:
        """Raise `ValueError` if an episode cannot fit into `args`, a `GRPOConfig`. Our trainers call it."""
        self._check("max_completion_length", args.max_completion_length, self.tokens(tokenizer), "tokens")
        if args.max_tool_calling_iterations is not None:
            self._check("max_tool_calling_iterations", args.max_tool_calling_iterations, self.game.rounds, "calls")

    def _check(self, name: str, value: int, need: int, unit: str, measured: bool = True) -> None:
        if value < need:
            how = "" if measured else " by a rough count (pass `tokenizer` to measure)"
            raise ValueError(
                f"{name}={value} is too small: the {self.game.rounds} rounds of an episode need {need} {unit}{how}. "
                f"Raise it, or lower `rounds`."
            )

    def tokens(self, tokenizer=None) -> int:
        """Tokens that the calls and results of a whole episode take, and the last turn's end."""
        if tokenizer is None:
            return TOKENS_A_ROUND * (self.game.rounds + 1)
        call = {"type": "function", "function": {"name": "invest", "arguments": {"amount": LARGEST}}}
        turn = [
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "name": "invest", "content": _longest(self.game)},
        ]
        messages = [{"role": "user", "content": ""}]
        lengths = [
            len(tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False, add_generation_prompt=True))
            for chat in (messages, messages + turn * self.game.rounds)
        ]
        return lengths[1] - lengths[0] + 1

    def _warn_of_cut(self, played: int, rounds: int) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "CoopetitionEnv: an episode ended after %d of %d rounds, and the rest counts as amounts of 0. Either "
                "the model stopped calling `invest`, or max_completion_length (which covers all turns and tool "
                "results) or max_tool_calling_iterations cut it: see `grpo_kwargs()`. Said once.",
                played,
                rounds,
            )


def _longest(game: Game) -> str:
    env = CoopetitionEnv(game)
    env._own, env._other = [LARGEST] * max(game.rounds - 1, 1), [float(LARGEST)]
    return env._observation()


def make_game(**options: Any) -> Game:
    """[`Game`] with an error that names an unknown field."""
    unknown = set(options) - set(Game.__dataclass_fields__)
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))}: no setting of the game; it has {', '.join(Game.stated)}.")
    return Game(**options)


def coopetition_metrics(environments, log_metric=None, **kwargs) -> list[float]:
    """A reward function that adds nothing to the reward, and logs `coopetition/rounds_played` and its fellows.

    See [`CoopetitionEnv._metrics`] for their meaning. An environment cannot log by itself: TRL hands `log_metric` to
    reward functions only.
    """
    episodes = [env._metrics() for env in environments if isinstance(env, CoopetitionEnv)]
    for name in sorted({name for episode in episodes for name in episode}) if log_metric else ():
        values = [episode[name] for episode in episodes if name in episode]
        log_metric(f"{NAME}/{name}", float(np.mean(values)))
    return [0.0] * len(environments)


def coopetition_dataset(
    n: int = 512,
    partners: Sequence[str] = ("trust_responsive",),
    seed: int = 0,
    mode: str = "environment",
    **options: Any,
):
    """Rows of the game: `prompt` (a conversation), `seed` and `partner`, drawn from `seed`.

    All rollouts of one prompt meet the same partner, seed and start. In mode "environment" the rules come from the
    environment; the model plays with its tool. In mode "single" they stand in the prompt, the model answers with all
    its amounts at once, and [`invest_reward`] reads the column `game`.

    Args:
        n: rows.
        partners: names; each row draws one.
        seed: of the draws.
        mode: "environment" or "single".
        options: for "single", fields of [`Game`].

    Returns:
        a `datasets.Dataset`.

    Raises:
        ValueError: for an unknown mode, partner or field.
    """
    from datasets import Dataset

    if mode not in ("environment", "single"):
        raise ValueError(f"mode={mode!r} must be 'environment' or 'single'.")
    if mode == "environment" and options:
        raise ValueError(f"{', '.join(options)}: in mode 'environment' the factory takes the settings of the game.")
    if isinstance(partners, str) or not partners:
        raise ValueError(f"partners={partners!r} must be a list of names.")
    games = {name: make_game(**{**options, "partner": name}) for name in partners}
    rng = np.random.default_rng(seed)
    names = [str(name) for name in rng.choice(list(partners), n)]
    columns = {"seed": rng.integers(2**31, size=n).tolist(), "partner": names}
    if mode == "environment":
        prompt = [{"role": "user", "content": "Play this game with the tool invest, one call a round.\n"}]
        return Dataset.from_dict({"prompt": [prompt] * n, **columns})
    ask = "Answer with your {} amounts, separated by spaces, and nothing else."
    prompts = [
        [{"role": "user", "content": f"{rules(games[name])} {ask.format(games[name].rounds)}"}] for name in names
    ]
    stated = {
        name: value for name, value in asdict(make_game(**options)).items() if value != Game.stated[name].default
    }
    stated.pop("partner", None)
    return Dataset.from_dict({"prompt": prompts, "game": [json.dumps(stated)] * n, **columns})


def read_plan(text: str, rounds: int) -> tuple[list[int], int]:
    """The amounts in `text`, at most `rounds` whole numbers between spaces or commas, and how many were none in 0..10.

    A text of any other form is one in which all rounds were invalid.
    """
    if len(text) > 64 + 8 * rounds or not re.fullmatch(r"\s*\d{1,3}(?:(?:\s*,\s*|\s+)\d{1,3})*\s*", text, re.ASCII):
        return [0] * rounds, rounds
    amounts = [int(word) for word in re.findall(r"\d+", text)]
    if len(amounts) > rounds:
        return [0] * rounds, rounds
    invalid = sum(amount > LARGEST for amount in amounts)
    return [amount if amount <= LARGEST else 0 for amount in amounts], invalid


def invest_reward(
    completions: Sequence, seed: Sequence[int], partner: Sequence[str], game=None, **kwargs
) -> list[float]:
    """Reward function of the game in a single turn: the normalized reward of the amounts in the completion.

    Args:
        completions: texts, or conversations whose last message is the completion.
        seed, partner, game: columns of [`coopetition_dataset`] in mode "single".
    """
    rewards = []
    for i, completion in enumerate(completions):
        text = completion if isinstance(completion, str) else completion[-1].get("content") or ""
        options = json.loads(game[i]) if game is not None else {}
        played = make_game(**{**options, "partner": partner[i]}).seated(seed[i])
        amounts, invalid = read_plan(text if isinstance(text, str) else "", played.rounds)
        rewards.append(_reward(played, amounts, invalid, seed[i]))
    return rewards
