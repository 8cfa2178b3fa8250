"""Exact linear equations over the rationals, each of which remembers what it was made from."""

from collections.abc import Hashable, Mapping
from fractions import Fraction


Row = dict[Hashable, int | Fraction]  # whole numbers as int, which is many times faster


def neat(number: int | Fraction) -> int | Fraction:
    return number.numerator if number.denominator == 1 else number


def add(into: dict, row: Mapping, factor: int | Fraction) -> None:
    """`into += factor * row`, without zeros."""
    for key, number in row.items():
        total = into.get(key, 0) + factor * number
        if not total:
            into.pop(key, None)
        else:
            into[key] = total if type(total) is int else neat(total)


class LinearSystem:
    """Equations `sum of row[x] x = 0` over unknowns and constants, in reduced row echelon form.

    A constant is a key that begins a tuple `("1", ...)`: it is never solved for. Directions need one, 180 degrees;
    logarithms of lengths need one for each prime, which are independent over the rationals.
    """

    def __init__(self):
        self.rows: dict[Hashable, Row] = {}  # by the unknown that the row is solved for
        self.origins: dict[Hashable, Row] = {}  # the same row as a sum of the equations that were put in

    def reduce(self, row: Row) -> tuple[Row, Row]:
        """What is left of `row` once every unknown that is known is replaced, and the equations that did it.

        Returns:
            The remainder, empty if the equation follows, of constants alone if its value is determined; and numbers
            by equation, so that `row - remainder` is the sum of the equations times these numbers.
        """
        known = [(key, row[key]) for key in row if key in self.rows]  # in echelon form none brings another in
        left, used = dict(row), {}
        for key, number in known:
            add(left, self.rows[key], -number)
            add(used, self.origins[key], number)
        return left, used

    def rest(self, row: Row) -> Row:
        """The remainder alone."""
        left = dict(row)
        for key, number in row.items():
            if key in self.rows:
                add(left, self.rows[key], -number)
        return left

    def insert(self, row: Row, name: Hashable) -> bool:
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
        scale = neat(1 / Fraction(left[unknown]))
        solved, origin = {}, {}
        add(solved, left, scale)
        add(origin, used, -scale)
        add(origin, {name: 1}, scale)
        for key, other in self.rows.items():
            number = other.get(unknown)
            if number:
                add(other, solved, -number)
                add(self.origins[key], origin, -number)
        self.rows[unknown], self.origins[unknown] = solved, origin
        return True


def is_constant(key: Hashable) -> bool:
    return isinstance(key, tuple) and key[0] == "1"
