"""The repeated investment game of a player and a partner that trusts, forgives and remembers.

In each of `rounds` rounds both invest 0..10. First the partner decides, from the state before the round; then the
player; both earn from the state before the round; then trust and damage of both move ([`.dynamics`]). The player is
agent 0, its partner agent 1, and T_01 is the player's trust in the partner.

Provenance: dynamics and payoffs **exact** (arXiv 2510.24909, 2510.18802); the game, the partners and the scale of the
reward are this package's own. NumPy only. Shapes: B games at a time.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Annotated, Literal, NamedTuple

import numpy as np

from trl_trust.lookup import near
from trl_trust.settings import Fraction, NonNegative, OpenFraction, Positive, Range, check, setting

from .dynamics import TrustParams, update
from .payoffs import Payoff


LARGEST = 10  # amounts are whole numbers from 0 to this
OBSERVATIONS = ("partner_action", "own_trust", "round")


class View(NamedTuple):
    """What a partner knows when it decides; arrays are (B,), one entry a game.

    Attributes:
        round: of this decision, from 0.
        trust: its trust in the player, T_10.
        last: the player's last amount; the baseline before the first round.
        broken: whether the player ever invested less than the baseline.
        baseline: what is expected of both.
        seed: of the row; the same for all games of a call.
    """

    round: int
    trust: np.ndarray
    last: np.ndarray
    broken: np.ndarray
    baseline: float
    seed: int


def _trust_responsive(view: View):
    return np.clip(np.floor(10 * view.trust + 0.5), 0, LARGEST)


def _random(view: View):
    draw = np.random.default_rng((view.seed, view.round)).integers(0, LARGEST, endpoint=True)
    return np.full(len(view.trust), float(draw))


# name -> what the partner invests, (B,), given a `View`
PARTNERS: dict[str, Callable[[View], np.ndarray]] = {
    "trust_responsive": _trust_responsive,
    "tit_for_tat": lambda view: view.last,
    "grim": lambda view: np.where(view.broken, 0.0, 7.0),
    "random": _random,
    "exploiter": lambda view: np.where(view.trust < 0.7, 8.0, 0.0),
}
_MIXED = ("trust_responsive", "tit_for_tat", "grim", "exploiter")
PARTNER_NAMES = (*PARTNERS, "mixture")


@dataclass(frozen=True)
class Game(TrustParams):
    """
    The constants of the game, those of the trust dynamics included.

    Raises:
        ValueError: for a value outside its range.
    """

    rho: NonNegative = setting(0.20, "Weight of reciprocity: rho T_ij (a_j - b_j) a_i is added to what i earns.")
    endowment: Annotated[float, Range(LARGEST)] = setting(10.0, "What each agent has in a round.")
    baseline: Annotated[float, Range(0, LARGEST)] = setting(
        5.0, "Amount that is expected of both; less is a violation."
    )
    theta: Positive = setting(3.0, "Scale of what an investment earns, theta ln(1 + a).")
    gamma: NonNegative = setting(0.65, "Weight of what the investments create together.")
    alpha: OpenFraction = setting(0.5, "The player's share of it.")
    D: Fraction = setting(0.7, "Dependence of each on the other.")
    rounds: Annotated[int, Range(1, 200, whole=True)] = setting(8, "Rounds of an episode.")
    partner: str | Callable = setting(
        "trust_responsive",
        "trust_responsive, tit_for_tat, grim, random, exploiter, mixture (one drawn by the row's seed), or a function "
        "from a `View` to amounts.",
    )
    reward: Literal["private", "reciprocal", "integrated", "integrated_trust", "cooperative"] = setting(
        "reciprocal", "What the player is paid for."
    )
    observe: tuple[str, ...] = setting(OBSERVATIONS, "What the player is told after each round.")
    invalid_penalty: NonNegative = setting(0.1, "What an amount that is no whole number in 0..10 costs; it plays 0.")
    terminal_bonus: NonNegative = setting(
        0.0, "What a unit kept in the last round earns besides: a temptation to defect."
    )

    def __post_init__(self):
        check(self)
        object.__setattr__(self, "observe", tuple(self.observe))
        unknown = set(self.observe) - set(OBSERVATIONS)
        self.require(not unknown, "observe", f"may hold {', '.join(OBSERVATIONS)}")
        if not callable(self.partner) and self.partner not in PARTNER_NAMES:
            raise ValueError(f"partner={self.partner!r} is not known; {near(str(self.partner), PARTNER_NAMES)}.")

    def seated(self, seed: int) -> "Game":
        """This game with the partner that a mixture draws for a row's seed."""
        if self.partner != "mixture":
            return self
        return replace(self, partner=_MIXED[np.random.default_rng((seed, 1)).integers(len(_MIXED))])

    @property
    def payoff(self) -> Payoff:
        """The game of one round as a [`Payoff`]."""
        D = ((0.0, self.D), (self.D, 0.0))
        return Payoff(self.endowment, theta=self.theta, gamma=self.gamma, alpha=(self.alpha, 1 - self.alpha), D=D)


class State(NamedTuple):
    """Where B games stand: `trust` and `damage` (B, 2), T_01 and T_10 in this order; what the partner remembers."""

    round: int
    trust: np.ndarray
    damage: np.ndarray
    last: np.ndarray
    broken: np.ndarray

    def pick(self, index: np.ndarray) -> "State":
        return State(self.round, *(values[index] for values in self[1:]))


def start(game: Game, batch: int = 1) -> State:
    """The state before the first round of `batch` games."""
    pair = (batch, 2)
    return State(
        0,
        np.full(pair, float(game.trust0)),
        np.full(pair, float(game.damage0)),
        np.full(batch, float(game.baseline)),
        np.zeros(batch, bool),
    )


def partner_amounts(game: Game, state: State, seed: int) -> np.ndarray:
    """What the partner invests in this round, (B,).

    Raises:
        ValueError: if a partner of one's own returns anything but numbers in 0..10, one for each game.
    """
    view = View(state.round, state.trust[:, 1], state.last, state.broken, game.baseline, seed)
    act = game.partner if callable(game.partner) else PARTNERS[game.partner]
    amounts = np.asarray(act(view), float)
    if amounts.shape != state.last.shape or not ((amounts >= 0) & (amounts <= LARGEST)).all():
        raise ValueError(f"partner={game.partner!r} must return numbers in 0..{LARGEST}, one for each game.")
    return amounts


def utilities(game: Game, state: State, own: np.ndarray, other: np.ndarray) -> np.ndarray:
    """What the player is paid in this round, (B,), from the state before it, by `game.reward`."""
    pi = game.payoff.private(np.stack([own, other], -1))  # (B, 2)
    back = game.rho * state.trust[:, 0] * (other - game.baseline) * own
    paid = {
        "private": lambda: pi[:, 0],
        "reciprocal": lambda: pi[:, 0] + back,
        "integrated": lambda: pi[:, 0] + back + game.D * pi[:, 1],
        "integrated_trust": lambda: (
            pi[:, 0] + back + game.D * np.minimum(state.trust[:, 0], 1 - state.damage[:, 0]) * pi[:, 1]
        ),
        "cooperative": lambda: pi.mean(-1) + back,
    }[game.reward]()
    if state.round == game.rounds - 1:
        paid = paid + game.terminal_bonus * (LARGEST - own)
    return paid


def play_round(game: Game, state: State, own: np.ndarray, seed: int = 0) -> tuple[State, np.ndarray, np.ndarray]:
    """One round in which the player invests `own` (B,).

    Returns:
        the state after it, what the player is paid (B,), and what the partner invested (B,).
    """
    own = np.asarray(own, float)
    other = partner_amounts(game, state, seed)
    paid = utilities(game, state, own, other)
    signal = np.tanh(
        game.kappa * (np.stack([other, own], -1) - game.baseline)
    )  # T_01 reads the partner, T_10 the player
    constants = {name: getattr(game, name) for name in ("lambda_plus", "lambda_minus", "mu", "delta", "xi")}
    after = update(state.trust, state.damage, signal, game.D, building=game.building, decay=game.decay, **constants)
    return State(state.round + 1, *after, own, state.broken | (own < game.baseline)), paid, other


class Played(NamedTuple):
    """Games that were played: `utility` per round (B,), `trust` (B, rounds + 1, 2), `other` (B, rounds)."""

    utility: np.ndarray
    trust: np.ndarray
    other: np.ndarray


def play(game: Game, plans: np.ndarray, seed: int = 0) -> Played:
    """Play plans (B, rounds) of the player, or (rounds,), against `game.partner`."""
    plans = np.atleast_2d(np.asarray(plans, float))
    if plans.shape[1] != game.rounds:
        raise ValueError(f"plans of shape {plans.shape} must have one amount for each of the {game.rounds} rounds.")
    game = game.seated(seed)
    state, total, trust, others = start(game, len(plans)), 0.0, [], []
    trust.append(state.trust)
    for own in plans.T:
        state, paid, other = play_round(game, state, own, seed)
        total = total + paid
        trust.append(state.trust)
        others.append(other)
    return Played(total / game.rounds, np.stack(trust, 1), np.stack(others, 1))


def myopic(game: Game, seed: int = 0) -> np.ndarray:
    """The plan (rounds,) of a player that knows what the partner invests in a round and looks no further."""
    game = game.seated(seed)
    state, plan, amounts = start(game), [], np.arange(LARGEST + 1.0)
    for _ in range(game.rounds):
        other = partner_amounts(game, state, seed)
        paid = utilities(game, state.pick(np.zeros(len(amounts), int)), amounts, np.repeat(other, len(amounts)))
        plan.append(amounts[paid.argmax()])
        state, _, _ = play_round(game, state, plan[-1:], seed)
    return np.array(plan)


def best_plan(game: Game, seed: int = 0, *, width: int = 16) -> np.ndarray:
    """The best plan known, (rounds,): the best of a beam search and of all plans that change their amount once, after
    changes of single rounds and of pairs of neighbors for as long as they pay.

    The beam keeps, after each round, the `width` plans that earned most among those that leave the two alike: the same
    next amount of the partner, its trust in the player to .05 and the player's trust in it to .1.
    """
    game = game.seated(seed)
    amounts = np.arange(LARGEST + 1.0)
    state, total, plans = start(game), np.zeros(1), np.zeros((1, 0))
    for left in reversed(range(game.rounds)):
        parents, own = np.repeat(np.arange(len(plans)), len(amounts)), np.tile(amounts, len(plans))
        state, paid, _ = play_round(game, state.pick(parents), own, seed)
        total, plans = total[parents] + paid, np.concatenate([plans[parents], own[:, None]], 1)
        group = np.zeros(len(plans))
        if left:
            trusts = np.round(state.trust * (10, 20)) @ (21, 1)
            group = 1000 * np.round(partner_amounts(game, state, seed)) + trusts
        order = np.lexsort((-total, group))
        _, first, sizes = np.unique(group[order], return_index=True, return_counts=True)
        kept = order[np.arange(len(order)) - np.repeat(first, sizes) < width]
        state, total, plans = state.pick(kept), total[kept], plans[kept]

    early, late, turn = (axis.reshape(-1, 1) for axis in np.meshgrid(amounts, amounts, range(game.rounds)))
    once = np.where(np.arange(game.rounds) <= turn, early, late)  # (11 * 11 * rounds, rounds)
    candidates = np.concatenate([plans, once, myopic(game, seed)[None]])
    while True:
        earned = play(game, candidates, seed).utility
        best, value = candidates[earned.argmax()], earned.max()
        candidates = [best[None]]
        for together in (1, 2):
            changes = np.stack(np.meshgrid(*[amounts] * together), -1).reshape(-1, together)
            for at in range(game.rounds - together + 1):
                changed = np.repeat(best[None], len(changes), 0)
                changed[:, at : at + together] = changes
                candidates.append(changed)
        candidates = np.concatenate(candidates)
        if play(game, candidates, seed).utility.max() <= value + 1e-9:
            return best


class Scale(NamedTuple):
    """The utilities per round that are 0 and 1 of the normalized reward."""

    zero: float
    one: float

    def __call__(self, utility):
        return (utility - self.zero) / (self.one - self.zero)


@lru_cache(maxsize=4096)
def _scale(game: Game, seed: int) -> Scale:
    one = play(game, best_plan(game, seed), seed).utility[0]
    zero = play(game, myopic(game, seed), seed).utility[0]
    if one - zero < 1e-6:  # nothing is gained by looking ahead: 0 is the worst of the constant plans
        constant = np.repeat(np.arange(LARGEST + 1.0)[:, None], game.rounds, 1)
        zero = play(game, constant, seed).utility.min()
    if one - zero < 1e-6:
        raise ValueError("in this game every plan earns the same: there is nothing to learn.")
    return Scale(float(zero), float(one))


def scale(game: Game, seed: int = 0) -> Scale:
    """What counts as 0 (the myopic player) and as 1 (the best plan known) in this game; searched once for each game.

    Where the myopic plan is itself the best, 0 is the worst of the eleven constant plans.
    """
    game = game.seated(seed)
    fixed = game.partner != "random" and not callable(game.partner)  # then the seed changes nothing
    return _scale(replace(game, observe=OBSERVATIONS, invalid_penalty=0.0), 0 if fixed else int(seed))
