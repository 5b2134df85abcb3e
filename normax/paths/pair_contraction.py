r"""Layers of two networks, in one pass over the weights of both.

A dense layer takes sums over its inputs with the meets $m$, the upper weights $u$ and
the gaps $g$ of two networks, $g^p = u^p - m^p$,

$$\sum_i m_{ij}^p\, x_i, \qquad \sum_i u_{ij}^p\, d_i, \qquad \sum_i g_{ij}^p\, x_i ,$$

and compares the weights. The last two are one sum, with one exponent. All are one pass
over two matrices, if no meet is written to memory.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from normax._core.scheduling import on_cpu, on_cuda, sums, unless_safe
from normax.paths import numbers, pairs
from normax.paths.arithmetic import PathArithmetic
from normax.paths.contraction import (
    arithmetic_of,
    fits_float64,
    moderate,
    power_of,
    roots_of_sums,
    sums_in_range,
)
from normax.paths.layers import TINY, Application
from normax.paths.numbers import Scaled, of_rank
from normax.paths.pairs import Tests, Upper

SMALL = 2**14  # weights for which a pass for each sum takes no longer
_WIDE = 128  # weights in a row for which a step of a loop takes longer than its start
_ROWS = 8  # rows that are added in a step: fewer or more take up to a third longer
_BLOCK = 64  # steps whose sums are added one after the other

Sums = tuple[jax.Array, ...]
Found = tuple[list[Scaled], jax.Array, Any]  # values, kinds, where these are in range


def _edges(
    p: Any, upper: Upper, w: jax.Array, other: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return meets, gaps and upper weights."""
    below, above = pairs.meet(w, other), upper.of(w, other)
    return below, pairs.gap(above, w, other, p), above


def _by_rows(
    terms: Callable[..., tuple[Sums, Tests]], count: int, *operands: jax.Array
) -> tuple[Sums, Tests]:
    """Reduce terms over the first axes, some rows at a time.

    Without it XLA:CPU takes several sums over columns one column at a time, or writes
    all terms to memory. The ratio is 6 to 10 for a matrix of 2000 x 2000.
    """
    rows = [jnp.reshape(x, (-1, *x.shape[count:])) for x in operands]
    bits: list[int] = []

    def terms_of(i):
        row = (lax.dynamic_index_in_dim(x, i, keepdims=False) for x in rows)
        values, tests = terms(*row)
        bits[:] = tests
        return values, pairs.pack(tests)

    def join(found, more):
        totals = tuple(map(jnp.add, found[0], more[0]))
        return totals, lax.bitwise_or(found[1], more[1])

    # Several rows share each load and store of the totals.
    whole = len(rows[0]) // _ROWS * _ROWS
    none = jax.tree.map(jnp.zeros_like, jax.eval_shape(terms_of, 0))

    def strip(start):
        return functools.reduce(join, (terms_of(start + i) for i in range(_ROWS)))

    def from_row(start, size):
        part = size // _BLOCK
        each = strip if part == _ROWS else functools.partial(from_row, size=part)
        last = jnp.minimum(_BLOCK, (whole - 1 - start) // part + 1)
        step = lambda i, found: join(found, each(start + i * part))  # noqa: E731
        return lax.fori_loop(0, last, step, none)

    # Sums of sums lose less than one long sum.
    size = _ROWS * _BLOCK
    while size < whole:
        size *= _BLOCK
    rest = map(terms_of, range(whole, len(rows[0])))
    totals, packed = functools.reduce(join, rest, from_row(0, size))
    axes = tuple(range(count))
    tests = {bit: jnp.expand_dims(packed & bit != 0, axes) for bit in bits}
    return tuple(jnp.expand_dims(x, axes) for x in totals), tests


def _reduce(
    terms: Callable[..., tuple[Sums, Tests]],
    axes: tuple[int, ...],
    *operands: jax.Array,
) -> tuple[Sums, Tests]:
    """Sum the values of `terms`, and join its tests, over axes that are kept."""
    shape = operands[0].shape

    def at_once(*operands):
        values, tests = terms(*operands)
        return sums(values, axes), pairs.any_of(tests, axes)

    kept = math.prod(shape[len(axes) :])
    leading = sorted(axes) == list(range(len(axes)))
    if leading and kept >= _WIDE and math.prod(shape) > kept:
        return on_cpu(functools.partial(_by_rows, terms, len(axes)), at_once)(*operands)
    return at_once(*operands)


# Each way takes the weights of both networks, the sums x over paths with the smaller
# weights and, if there are any, the differences d from them. It returns x behind the
# layer, and d or one or two terms of it.


def _contract(
    arithmetic: PathArithmetic,
    upper: Upper,
    application: Application,
    w: jax.Array,
    other: jax.Array,
    *values: Scaled,
) -> Found:
    """Apply a dense layer at one position, in one pass."""
    notes: list[Any] = []

    def power(product):  # none is negative
        return product if arithmetic.plain else arithmetic.power(product)

    def terms(w, other, x, *aligned):
        below, *others = _edges(arithmetic.p, upper, w, other)
        parts = (power(e * size) for e, size in zip(others, aligned, strict=False))
        found = power(below * x), functools.reduce(jnp.add, parts)
        return found, pairs.tests_of(w, other, arithmetic.p)

    def contraction(*values, axes):
        aligned, exponent = numbers.together(values)
        sizes = [moderate(root) for root in (values[0].root, *aligned)]
        totals, tests = _reduce(terms, axes, w, other, *sizes)
        # A sum is safely 0 if all its terms are.
        met, differ = tests[pairs.MET], pairs.pack(tests) & upper.gaps != 0
        apart = jnp.any(values[1].root != 0) if len(values) > 1 else False
        safe = [
            sums_in_range(total) | ((total == 0) & ~some)
            for total, some in zip(totals, (met, differ | met & apart), strict=True)
        ]
        notes.append((pairs.pack(pairs.any_of(tests)), safe))
        exponents = values[0].exponent, of_rank(exponent, w.ndim)
        roots = map(arithmetic.root, totals)
        return list(map(Scaled, roots, exponents))

    found = application.multiply(contraction, *values)
    return found, *notes[0]


def _contract_carefully(
    arithmetic: PathArithmetic,
    upper: Upper,
    application: Application,
    w: jax.Array,
    other: jax.Array,
    *values: Scaled,
) -> list[Scaled]:
    """Do the same, each sum in two passes, or on an NVIDIA GPU in one."""
    edges = _edges(arithmetic.p, upper, w, other)

    def contraction(*values, axes):
        of = (values[0], *values)
        return [
            Scaled(roots_of_sums(arithmetic, axes, e, x.root), x.exponent)
            for e, x in zip(edges, of, strict=False)
        ]

    return application.multiply(contraction, *values)


def _survey(
    arithmetic: PathArithmetic, w: jax.Array, other: jax.Array, *edges: jax.Array
) -> tuple[jax.Array, jax.Array | bool]:
    """Return how weights differ, and whether powers of edges exceed `TINY` or are 0."""
    tests = pairs.tests_of(w, other, arithmetic.p)
    del tests[pairs.MET]  # which says nothing here, so its place is free
    if not arithmetic.plain:
        tiny = ((arithmetic.power(e) <= TINY) & (e != 0) for e in edges)
        tests[pairs.MET] = functools.reduce(jnp.logical_or, tiny)
    found = pairs.any_of(tests)
    none_tiny = arithmetic.plain or ~found.pop(pairs.MET)
    return pairs.pack(found), none_tiny


def _lanes(
    arithmetic: PathArithmetic,
    upper: Upper,
    w: jax.Array,
    other: jax.Array,
    x: Scaled,
    *d: Scaled,
) -> list[tuple[jax.Array, tuple[Scaled, ...]]]:
    r"""Return the edges that a layer of many positions has, and what goes along them.

    $$\sum_i u_{ij}^p\, d_i + g_{ij}^p\, x_i =
      \sum_i m_{ij}^p\, d_i + g_{ij}^p\, (x_i + d_i)$$

    So the layer is applied with meets to $x$ and $d$, and with gaps to their sum.
    """
    below, between, _ = _edges(arithmetic.p, upper, w, other)
    return [(below, (x, *d)), (between, (functools.reduce(arithmetic.add, (x, *d)),))]


def _apply(
    arithmetic: PathArithmetic,
    upper: Upper,
    application: Application,
    w: jax.Array,
    other: jax.Array,
    *values: Scaled,
) -> Found:
    """Apply a layer of many positions without scaling its weights."""
    lanes = _lanes(arithmetic, upper, w, other, *values)
    kinds, none_tiny = _survey(arithmetic, w, other, *(edges for edges, _ in lanes))
    found, safe = [], []
    for edges, along in lanes:
        through = functools.partial(
            application.layer.directly,
            arithmetic,
            powers=edges if arithmetic.plain else arithmetic.power(edges),
            none_tiny=none_tiny,
            shape=application.shape,
        )
        stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *along)
        results, in_range = jax.vmap(through)(stacked)
        safe.append(in_range)
        found += [Scaled(*(part[i] for part in results)) for i in range(len(along))]
    return found, kinds, safe


def _apply_carefully(
    arithmetic: PathArithmetic,
    upper: Upper,
    application: Application,
    w: jax.Array,
    other: jax.Array,
    *values: Scaled,
) -> list[Scaled]:
    """Do the same with weights scaled."""
    layer, shape = application.layer, application.shape
    return [
        layer.propagate(arithmetic, value, edges, False, shape)
        for edges, along in _lanes(arithmetic, upper, w, other, *values)
        for value in along
    ]


def apply_both(
    arithmetic: PathArithmetic,
    upper: Upper,
    application: Application,
    weights: tuple[jax.Array, jax.Array],
    x: Scaled,
    d: Scaled | None,
) -> tuple[Scaled, Scaled, jax.Array]:
    """Return the path values of two networks behind a layer.

    Args:
      arithmetic: Arithmetic of path values.
      upper: Takes weights of both networks to the upper ones.
      application: The layer.
      weights: Those of both networks.
      x: Sums over the paths with the smaller weights.
      d: The differences from them; None if there are none so far.

    Returns:
      The two behind the layer, and how the weights differ, as in `Comparison.kinds`.
    """
    ways = (_contract, _contract_carefully), (_apply, _apply_carefully)
    directly, carefully = ways[0 if application.at_one_position else 1]
    p, traced_p = power_of(arithmetic)

    def joined(arithmetic, below, *parts):
        return [below, functools.reduce(arithmetic.add, parts)]

    def careful(operands, *traced_p):
        arithmetic = arithmetic_of(p, traced_p)
        found = carefully(arithmetic, upper, application, *operands)
        return joined(arithmetic, *found)

    def each(operands, *traced_p):
        return careful(operands, *traced_p), pairs.kinds_of(*operands[:2])

    def in_one_pass(operands, *traced_p):
        arithmetic = arithmetic_of(p, traced_p)
        found, kinds, safe = directly(arithmetic, upper, application, *operands)
        found = joined(arithmetic, *found)
        return unless_safe(safe, found, careful, operands, *traced_p), kinds

    @jax.custom_jvp
    def once(operands, *traced_p):
        if fits_float64(arithmetic, w.dtype):
            return on_cuda(each, in_one_pass)(operands)
        return in_one_pass(operands, *traced_p)

    def derivative(primals, tangents):
        # What leaves the range has no derivative. Exponents of the two ways may differ,
        # so values come from the careful one as well.
        kinds = pairs.kinds_of(*primals[0][:2])
        none = np.zeros(kinds.shape, jax.dtypes.float0)
        found, tangents = jax.jvp(careful, primals, tangents)
        return (found, kinds), (tangents, none)

    once.defjvp(derivative)
    w, other = (numbers.cast(weight, x) for weight in weights)
    values = [numbers.common(value) for value in (x, d) if value is not None]
    if application.at_one_position:  # others divide by the largest themselves
        values = [numbers.normalize(value) for value in values]
    operands = (w, other, *values)
    (below, difference), kinds = (each if w.size < SMALL else once)(operands, *traced_p)
    return below, difference, kinds
