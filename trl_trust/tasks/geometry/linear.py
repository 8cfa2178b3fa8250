"""Exact linear equations over the rationals, each of which remembers what it was made from."""

from collections.abc import Hashable, Mapping
from fractions import Fraction


Row = dict[Hashable, Fraction]


def add(into: dict, row: Mapping, factor: Fraction) -> None:
    """`into += factor * row`, without zeros."""
    for key, number in row.items():
        total = into.get(key, 0) + factor * number
        if total:
            into[key] = total
        else:
            into.pop(key, None)


class LinearSystem:
    """Equations `sum of row[x] x = 0` over unknowns and constants, in reduced row echelon form.

    A constant is a key that begins a tuple `("1", ...)`: it is never solved for. Directions need one, 180 degrees;
    logarithms of lengths need one for each prime, which are independent over the rationals.
    """

    def __init__(self):
        self.rows: dict[Hashable, Row] = {}  # by the unknown that the row is solved for
        self.origins: dict[Hashable, Row] = {}  # the same row as a sum of the equations that were put in

    def reduce(self, row: Mapping[Hashable, Fraction]) -> tuple[Row, Row]:
        """What is left of `row` once every unknown that is known is replaced, and the equations that did it.

        Returns:
            The remainder, empty if the equation follows, of constants alone if its value is determined; and numbers
            by equation, so that `row - remainder` is the sum of the equations times these numbers.
        """
        left: Row = {key: Fraction(number) for key, number in row.items() if number}
        used: Row = {}
        for key in [key for key in left if key in self.rows]:
            number = left.get(key)
            if number:
                add(left, self.rows[key], -number)
                add(used, self.origins[key], number)
        return left, used

    def insert(self, row: Mapping[Hashable, Fraction], name: Hashable) -> bool:
        """Put the equation in under `name`; whether it said something new.

        Raises:
            ValueError: if it contradicts the others.
        """
        left, used = self.reduce(row)
        unknown = next((key for key in left if not is_constant(key)), None)
        if unknown is None:
            if left:
                raise ValueError(f"{name} contradicts {sorted(map(str, used))}")
            return False
        scale = 1 / left[unknown]
        solved = {key: number * scale for key, number in left.items()}
        origin = {key: -number * scale for key, number in used.items()}
        add(origin, {name: Fraction(1)}, scale)
        for key, other in self.rows.items():
            number = other.get(unknown)
            if number:
                add(other, solved, -number)
                add(self.origins[key], origin, -number)
        self.rows[unknown], self.origins[unknown] = solved, origin
        return True


def is_constant(key: Hashable) -> bool:
    return isinstance(key, tuple) and key[0] == "1"
