"""What the path transform knows of a primitive: one entry, complete when it is written.

`primitive(...)` stands above the rule of a primitive and enters it into `SPECS`. All
parts without a default must be given, so none can be forgotten.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from jax.extend.core import JaxprEqn

from normax.paths.values import Factors, Value, Weight

if TYPE_CHECKING:
    from normax.paths.lifting import PathTransform

Rule = Callable[["PathTransform", JaxprEqn, Sequence[Any]], Sequence[Value]]
Pull = Callable[
    ["PathTransform", JaxprEqn, Sequence[Weight], Sequence[Factors | None]], None
]


class NotHomogeneous(Exception):
    """Why a primitive has no paths."""


class Entries(enum.Flag):
    """How the entries of results come from those of operands.

    Attributes:
      COMPUTED: By arithmetic, each from one entry of every operand.
      PARTS: Results are parts of one array; each is a parameter of its own.
      JOINED: Operands lie beside each other. They may be parts of one parameter. A
        result that is larger than one of them repeats nothing but a single number.
      COPIES: An entry may be taken several times.
    """

    COMPUTED = 0
    PARTS = enum.auto()
    JOINED = enum.auto()
    COPIES = enum.auto()


def _never(eqn: JaxprEqn, inputs: Sequence[Weight]) -> bool:
    del eqn, inputs
    return False


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrimitiveSpec:
    """A primitive in the path transform.

    Attributes:
      rule: Evaluates it where an activation enters; raises `NotHomogeneous`.
      pull: Sends cotangents back through it where only weights enter; None where
        results are no edge weights, which `path_scales` then refuses.
      entries: How entries of results come from those of operands.
      uniform: Where all entries of the one operand are the same number, the factor
        between it and that of the result; None where there is no telling.
      mixes: Returns the lengths of the axes along which it mixes entries; None for
        primitives that mix none.
      refuses: Whether `pull` does not hold for this equation.
      zero: Whether the result is 0 where an operand is.
      takes_signs: Whether the rule takes signs of activations.
      takes_unsupported: Whether it takes values that no rule covers; otherwise its
        results are covered by none either.
    """

    rule: Rule
    pull: Pull | None
    entries: Entries
    uniform: int | None
    mixes: Callable[[JaxprEqn], tuple[int, ...]] | None
    refuses: Callable[[JaxprEqn, Sequence[Weight]], bool] = _never
    zero: bool = False
    takes_signs: bool = False
    takes_unsupported: bool = False


SPECS: dict[str, PrimitiveSpec] = {}


def primitive(*names: str, **parts: Any) -> Callable[[Rule], Rule]:
    """Enter primitives into the registry, with the decorated function as their rule.

    Args:
      *names: Names of the primitives, in every version of JAX.
      **parts: The parts of `PrimitiveSpec` besides the rule.

    Returns:
      A decorator, which returns the rule as it is.

    Raises:
      TypeError: A part is missing.
      ValueError: A primitive has an entry already.
    """

    def enter(rule: Rule) -> Rule:
        spec = PrimitiveSpec(rule=rule, **parts)
        for name in names:
            if name in SPECS:
                raise ValueError(
                    f"a primitive has one entry, but `{name}` has two, the rules "
                    f"{SPECS[name].rule.__name__} and {rule.__name__}; remove one."
                )
            SPECS[name] = spec
        return rule

    return enter
