r"""Differences of path sums: two networks, interpreted at once.

Rounding changes weights by $10^{-3}$ and less, and sums over paths in float32 have
seven digits. So the difference of two sums is never taken. Let $w$ and $w'$ be the
weights of one edge. Their meet $m$ is the smaller of the two where their signs agree,
else 0. Let $u$ be at least as large, for instance the larger of the two. The transform
carries two numbers for each activation: the sum $x$ over its paths with $|m|^p$, and
the difference $d$ of the sum with $|u|^p$ from it. A layer takes them to

$$x_j = \sum_i |m_{ij}|^p x_i, \qquad
  d_j = \sum_i |u_{ij}|^p d_i + \big(|u_{ij}|^p - |m_{ij}|^p\big)\, x_i .$$

Nothing is subtracted but the weights of an edge. So each rule of the path transform is
evaluated up to three times, for $m$, $u$ and the gap between the two. Layers whose
weights differ take all three at once, see `pair_contraction.py`. Constants that affine
operations add are kept for both networks, and become an edge as in each.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn

from normax._core.norms import at_least_float32
from normax._core.programs import bind, is_float, program_in_place
from normax.paths import numbers, pairs
from normax.paths.arithmetic import PathArithmetic
from normax.paths.layers import Application
from normax.paths.lifting import PathTransform
from normax.paths.pair_contraction import apply_both
from normax.paths.pairs import Comparison, Upper
from normax.paths.primitive_spec import NotHomogeneous
from normax.paths.primitives.carries import Body
from normax.paths.primitives.linear import LAYERS
from normax.paths.primitives.scan import scan_with
from normax.paths.primitives.steps import Settled
from normax.paths.values import Activation, Origin, Path, Unsupported, Value, Weight


class _Lane(enum.Enum):
    MEET, UPPER, GAP = range(3)


@dataclasses.dataclass(eq=False)
class Changed(Weight):
    """A weight of both networks.

    Attributes:
      other: The array of the other network.
      compared: Whether the two have been compared.
    """

    other: Any = dataclasses.field(kw_only=True)
    compared: bool = False

    def inverse(self) -> Weight:
        """Return one over the weights."""
        inverse = super().inverse()
        (other,) = at_least_float32(self.other)
        return Changed(inverse.value, inverse.params, other=1 / other)


@dataclasses.dataclass(eq=False)
class Difference(Activation):
    """An activation of both networks: its path is the difference, its constant both.

    Attributes:
      meet: The paths with the smaller weights.
      differs: Whether weights have differed so far. If not, the difference is 0.
    """

    meet: Path = dataclasses.field(kw_only=True)
    differs: bool = True


def _smaller(x: Any) -> Any:
    """Return the activation with the smaller weights; other values as they are."""
    if isinstance(x, Difference):
        return Activation(x.meet, x.constant, x.source, x.multiple)
    return x


class DifferenceTransform(PathTransform):
    """Two networks, whose sums over paths differ by the sums over `Difference.path`.

    Attributes:
      compared: The weights of edges that have been compared: the names of the
        parameters they are made of, and how they differ.
    """

    def __init__(
        self, arithmetic: PathArithmetic, other: Mapping[str, Any], upper: Upper
    ):
        """Interpret two networks.

        Args:
          arithmetic: Arithmetic of path values.
          other: The parameters of the second network by name.
          upper: Takes weights of both networks to $u$.
        """
        super().__init__(arithmetic)
        self.compared: list[tuple[frozenset[str], Comparison]] = []
        self._other, self._upper = other, upper
        self._lane, self._multiplied, self._added = _Lane.UPPER, False, False

    def parameter(self, name: str, leaf: Any) -> Weight:
        """Return a parameter of both networks."""
        w = super().parameter(name, leaf)
        if not w.params:
            return w
        return Changed(w.value, w.params, other=jnp.asarray(self._other[name]))

    def input(self, shape: tuple[int, ...], dtype: Any) -> Activation:
        """Return an input, which does not differ."""
        return Difference(
            Path(numbers.zeros(shape, dtype)),
            meet=Path(numbers.ones(shape, dtype)),
            differs=False,
        )

    def evaluate_weights(self, eqn: JaxprEqn, inputs: Sequence[Weight]) -> list[Weight]:
        """Evaluate an equation that no activation enters, in both networks."""
        results = super().evaluate_weights(eqn, inputs)
        if not any(isinstance(x, Changed) for x in inputs):
            return results
        others = bind(
            eqn, *(x.other if isinstance(x, Changed) else x.value for x in inputs)
        )
        if not eqn.primitive.multiple_results:
            others = [others]
        return [
            Changed(w.value, w.params, None, w.repeats, other=other) if w.params else w
            for w, other in zip(results, others, strict=True)
        ]

    def edges(self, w: Weight) -> jax.Array:
        """Return the weights of the edges of this lane."""
        if not isinstance(w, Changed):
            return super().edges(w)
        self._multiplied = True
        self._compare(w)
        return self._edges(w, self._lane)

    def flush(self, x: Activation | Weight) -> Path:
        """Turn the constant of an activation into an edge of this lane."""
        constant = x if isinstance(x, Weight) else x.constant
        if constant is None:
            return super().flush(x)
        if isinstance(constant, Changed):
            self._added = True
            self._compare(constant)
            lane = _Lane.GAP if self._lane is _Lane.UPPER else _Lane.MEET
            edge = Weight(self._edges(constant, lane))
        elif self._lane is _Lane.UPPER:  # an edge of both networks makes no difference
            edge = Weight(jnp.zeros_like(constant.value), uniform=0.0)
        else:
            edge = constant
        if isinstance(x, Weight):
            return super().flush(edge)
        return x.path if edge.uniform == 0 else super().flush(Activation(x.path, edge))

    def _edges(self, w: Changed, lane: _Lane) -> jax.Array:
        value, other = at_least_float32(w.value, w.other)
        if lane is _Lane.MEET:
            return pairs.meet(value, other)
        above = self._upper.of(value, other)
        if lane is _Lane.UPPER:
            return above
        return pairs.gap(above, value, other, self.arithmetic.p)

    def _compare(self, w: Changed, kinds: jax.Array | None = None) -> None:
        """Note how the weights of an array differ, unless that is done."""
        if w.compared:
            return
        w.compared = True
        if is_float(w.value):
            both = at_least_float32(w.value, w.other)
            # What is reported takes more passes over memory, and is computed only if
            # it is asked for.
            extremes = pairs.extremes_of(*both)
            if kinds is None:
                kinds = pairs.kinds_of(*both)
        else:  # conditions or indices, which say which paths there are
            differ = jnp.any(w.value != w.other)
            kinds = pairs.pack({pairs.OTHER_CHOICE: differ})
            extremes = jnp.zeros(4)
        names = frozenset[str]().union(*(origin.names for origin in w.params))
        self.compared.append((names, Comparison(kinds, extremes)))

    def _apply(self, application: Application, w: Changed) -> Difference:
        """Apply a layer of both networks."""
        x = application.x
        self._lane = _Lane.MEET
        below = self.flush(_smaller(x)).value
        self._lane, self._added = _Lane.UPPER, False
        more = self.flush(x).value
        differs = self._added or getattr(x, "differs", True)
        below, more, kinds = apply_both(
            self.arithmetic,
            self._upper,
            application,
            (w.value, w.other),
            below,
            more if differs else None,
        )
        self._compare(w, kinds)
        return Difference(Path(more), meet=Path(below))

    def _evaluate(
        self, eqn: JaxprEqn, inputs: Sequence[Any], line: str | None
    ) -> Sequence[Value]:
        active = [x for x in inputs if isinstance(x, Activation)]
        if not active or program_in_place(eqn) is not None:
            return super()._evaluate(eqn, inputs, line)
        if eqn.primitive.name == "scan":
            self.line = line
            return scan_with(_loop, self, eqn, inputs)
        for x in inputs:
            if isinstance(x, Changed) and not is_float(x.value):
                self._compare(x)
        changed = next((x for x in inputs if isinstance(x, Changed)), None)
        if eqn.primitive.name in LAYERS and changed is not None:
            try:
                application = LAYERS[eqn.primitive.name](eqn, inputs)
            except NotHomogeneous:
                return super()._evaluate(eqn, inputs, line)
            return [self._apply(application, changed)]
        smaller = list(map(_smaller, inputs))
        evaluate = super()._evaluate
        self._lane = _Lane.MEET
        meets = evaluate(eqn, smaller, line)
        self._lane, self._multiplied, self._added = _Lane.UPPER, False, False
        results = evaluate(eqn, inputs, line)
        multiplied, gaps = self._multiplied, results
        differed = self._added or any(getattr(x, "differs", True) for x in active)
        if multiplied:
            self._lane = _Lane.GAP
            gaps = evaluate(eqn, smaller, line)
            self._lane = _Lane.UPPER

        def joined(x: Any, below: Any, more: Any) -> Difference:
            path = more.path
            if multiplied and differed:
                path = Path(self.arithmetic.add(x.path.value, path.value))
            return Difference(
                path,
                x.constant,
                x.source,
                x.multiple,
                meet=below.path,
                differs=multiplied or differed,
            )

        return [
            joined(*both) if isinstance(both[0], Activation) else both[0]
            for both in zip(results, meets, gaps, strict=True)
        ]


# Scans. Their arrays are those of both networks.


def _pack(body: Body, value: Any, kind: Any, stacked: bool = False) -> Any:
    """Return the arrays of a value of this kind: all of both networks, or of one."""
    if isinstance(value, Unsupported):
        return None
    constant = value.constant if isinstance(value, Activation) else value
    both: tuple[jax.Array, ...] | None = None
    if constant is not None:
        both = (jnp.asarray(constant.value),)
        if kind.names:
            other = constant.other if isinstance(constant, Changed) else constant.value
            both = (*both, jnp.asarray(other))
    if isinstance(value, Weight):
        return both
    below = value.meet if isinstance(value, Difference) else value.path
    return body.fix(value.path.value, stacked), body.fix(below.value, stacked), both


def _unpack(arrays: Any, kind: Any) -> Value:
    """Return the value of this kind that has these arrays."""
    if isinstance(kind, Unsupported):
        return kind

    def weight(arrays):
        value, *other = arrays
        params = frozenset(Origin(frozenset([name])) for name in kind.names)
        if other:
            return Changed(value, params, repeats=kind.repeats, other=other[0])
        return Weight(value, params, None if kind.active else kind.uniform)

    if not kind.active:
        return weight(arrays)
    path, below, both = arrays
    constant = weight(both) if kind.constant else None
    return Difference(Path(path), constant, meet=Path(below))


def _loop(
    transform: DifferenceTransform,
    eqn: JaxprEqn,
    body: Body,
    settled: Settled,
    out_kinds: Sequence[Any],
) -> Sequence[Value]:
    """Interpret a scan whose steps all mean the same."""
    del eqn
    start, stop = body.carries.start, body.carries.stop
    count, names = stop - start, list[frozenset[str]]()
    arrays = [
        _pack(body, value, kind, i >= stop)
        for i, (value, kind) in enumerate(zip(settled.values, body.kinds, strict=True))
    ]
    always = [
        *settled.always,
        *(k if isinstance(k, Unsupported) else None for k in out_kinds[count:]),
    ]

    def step(carry, slices):
        inner = DifferenceTransform(transform.arithmetic, {}, transform._upper)
        operands = [*arrays[:start], *carry, *slices]
        each = zip(operands, body.kinds, strict=True)
        values = [_unpack(*value) for value in each]
        found = inner.interpret(body.closed.jaxpr, body.closed.consts, values)
        held = zip(body.hold(found, always), out_kinds, strict=True)
        packed = [_pack(body, *pair) for pair in held]
        names[:] = [name for name, _ in inner.compared]
        return packed[:count], (packed[count:], [x for _, x in inner.compared])

    final, (stacked, compared) = lax.scan(
        step, arrays[start:stop], arrays[stop:], body.length, body.reverse
    )
    for name, each in zip(names, compared, strict=True):
        steps = {bit: each.kinds & bit != 0 for bit in pairs.KINDS}
        kinds = pairs.pack(pairs.any_of(steps))
        extremes = jnp.max(each.extremes, axis=0)
        transform.compared.append((name, Comparison(kinds, extremes)))
    both = zip([*final, *stacked], out_kinds, strict=True)
    return [_unpack(*pair) for pair in both]
