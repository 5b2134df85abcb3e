r"""Contractions with the weights of two networks, in one pass over both.

A layer takes sums over its inputs with the meets $m$, the upper weights $u$ and the
gaps $g$ of two networks, $g^p = u^p - m^p$,

$$\sum_i m_{ij}^p\, x_i, \qquad \sum_i u_{ij}^p\, d_i, \qquad \sum_i g_{ij}^p\, x_i ,$$

and compares the weights. All are one pass over two matrices, if no meet is written to
memory.
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

from normax._core.scheduling import on_cpu, sums, unless_safe
from normax.paths import numbers, pairs
from normax.paths.arithmetic import PathArithmetic
from normax.paths.contraction import (
    arithmetic_of,
    in_two_passes,
    moderate,
    sums_in_range,
)
from normax.paths.layers import TINY, Application
from normax.paths.numbers import Scaled
from normax.paths.pairs import Tests, Upper

SMALL = 2**14  # weights for which a pass for each sum takes no longer
_WIDE = 128  # weights in a row for which a step of a loop takes longer than its start
_BLOCK = 64  # terms that are summed one after the other

Roots = tuple[jax.Array, ...]  # of x, and of d if there are differences so far


def _edges(
    p: Any, upper: Upper, w: jax.Array, other: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return meets, gaps and upper weights."""
    below, above = pairs.meet(w, other), upper.of(w, other)
    return below, pairs.gap(above, below, p), above


def _by_rows(
    terms: Callable[..., tuple[Roots, Tests]], count: int, *operands: jax.Array
) -> tuple[Roots, Tests]:
    """Reduce terms over the first axes, row by row.

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

    none = jax.tree.map(jnp.zeros_like, jax.eval_shape(terms_of, 0))

    def from_row(start, size):
        part = size // _BLOCK
        each = terms_of if part == 1 else functools.partial(from_row, size=part)
        last = jnp.minimum(_BLOCK, (len(rows[0]) - 1 - start) // part + 1)
        step = lambda i, found: join(found, each(start + i * part))  # noqa: E731
        return lax.fori_loop(0, last, step, none)

    # Sums of sums lose less than one long sum.
    size = _BLOCK
    while size < len(rows[0]):
        size *= _BLOCK
    totals, packed = from_row(0, size)
    axes = tuple(range(count))
    tests = {bit: jnp.expand_dims(packed & bit != 0, axes) for bit in bits}
    return tuple(jnp.expand_dims(x, axes) for x in totals), tests


def _reduce(
    terms: Callable[..., tuple[Roots, Tests]],
    axes: tuple[int, ...],
    *operands: jax.Array,
) -> tuple[Roots, Tests]:
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


def _directly(
    arithmetic: PathArithmetic,
    upper: Upper,
    axes: tuple[int, ...],
    w: jax.Array,
    other: jax.Array,
    *roots: jax.Array,
) -> tuple[Roots, jax.Array, Any]:
    """Return sums, how the weights differ, and where the sums are in range."""

    def terms(w, other, *sizes):
        edges = _edges(arithmetic.p, upper, w, other)
        of = (sizes[0], *sizes)  # the meets and the gaps with x, the upper with d
        products = (e * size for e, size in zip(edges, of, strict=False))
        # No product is negative.
        values = (x if arithmetic.plain else arithmetic.power(x) for x in products)
        return tuple(values), pairs.tests_of(w, other, arithmetic.p)

    sizes = [moderate(root) for root in roots]
    totals, tests = _reduce(terms, axes, w, other, *sizes)
    # A sum is safely 0 if all its terms are.
    met, packed = tests[pairs.MET], pairs.pack(tests)
    differ = packed & upper.gaps != 0
    terms_are = met, differ, (met | differ) & jnp.any(sizes[-1] != 0)
    safe = [
        sums_in_range(total) | ((total == 0) & ~some)
        for total, some in zip(totals, terms_are, strict=False)
    ]
    return totals, pairs.pack(pairs.any_of(tests)), safe


def _carefully(
    arithmetic: PathArithmetic,
    upper: Upper,
    axes: tuple[int, ...],
    w: jax.Array,
    other: jax.Array,
    *roots: jax.Array,
) -> Roots:
    """Return roots of the sums, each in two passes."""
    edges = _edges(arithmetic.p, upper, w, other)
    of = (roots[0], *roots)
    return tuple(
        in_two_passes(arithmetic, axes, e, root)
        for e, root in zip(edges, of, strict=False)
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _in_one_pass(
    p: Any, upper: Upper, axes: tuple[int, ...], operands: Roots, *traced_p: jax.Array
) -> tuple[Roots, jax.Array]:
    """Return roots of the sums, and the bits of the comparison."""
    arithmetic = arithmetic_of(p, traced_p)
    totals, kinds, safe = _directly(arithmetic, upper, axes, *operands)
    roots = tuple(map(arithmetic.root, totals))
    careful = functools.partial(_carefully, arithmetic, upper, axes)
    return unless_safe(safe, roots, careful, *operands), kinds


@_in_one_pass.defjvp
def _derivative(p, upper, axes, primals, tangents):
    # The pass may overflow, and has no derivative then.
    def carefully(operands, *traced_p):
        return _carefully(arithmetic_of(p, traced_p), upper, axes, *operands)

    results = _in_one_pass(p, upper, axes, *primals)
    none = np.zeros(results[1].shape, jax.dtypes.float0)
    return results, (jax.jvp(carefully, primals, tangents)[1], none)


def contract_both(
    arithmetic: PathArithmetic,
    upper: Upper,
    application: Application,
    weights: tuple[jax.Array, jax.Array],
    x: Scaled,
    d: Scaled | None,
) -> tuple[Scaled, Scaled, jax.Array]:
    """Return the path values of two networks behind a dense layer.

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
    w, other = (numbers.cast(weight, x) for weight in weights)
    found: list[jax.Array] = []

    def contraction(*values, axes):
        values = tuple(map(numbers.common, values))
        operands = (w, other, *(value.root for value in values))
        if w.size < SMALL:
            roots = _carefully(arithmetic, upper, axes, *operands)
            kinds = pairs.kinds_of(w, other)
        elif isinstance(arithmetic.p, jax.Array):
            roots, kinds = _in_one_pass(None, upper, axes, operands, arithmetic.p)
        else:
            roots, kinds = _in_one_pass(arithmetic.p, upper, axes, operands)
        found.append(kinds)
        of = (values[0], *values)
        return [
            numbers.normalize(Scaled(root, value.exponent))
            for root, value in zip(roots, of, strict=False)
        ]

    values = (x,) if d is None else (x, d)
    below, *more = application.multiply(contraction, *values)
    return below, functools.reduce(arithmetic.add, more), found[0]


def _survey(
    arithmetic: PathArithmetic, w: jax.Array, other: jax.Array, *edges: jax.Array
) -> tuple[jax.Array, list[jax.Array]]:
    """Return how weights differ, and of which edges none is tiny but not 0."""
    tests, first = pairs.tests_of(w, other, arithmetic.p), 1 << 10
    for i, e in enumerate(edges):
        tests[first << i] = (arithmetic.power(e) <= TINY) & (e != 0)
    found = pairs.any_of(tests)
    tiny = [found.pop(first << i) for i in range(len(edges))]
    return pairs.pack(found), [~some for some in tiny]


def apply_both(
    arithmetic: PathArithmetic,
    upper: Upper,
    application: Application,
    weights: tuple[jax.Array, jax.Array],
    x: Scaled,
    d: Scaled | None,
) -> tuple[Scaled, Scaled, jax.Array]:
    r"""Return the path values of two networks behind a layer of many positions.

    $$\sum_i u_{ij}^p\, d_i + g_{ij}^p\, x_i =
      \sum_i m_{ij}^p\, d_i + g_{ij}^p\, (x_i + d_i)$$

    So the layer is applied with meets to $x$ and $d$, and with gaps to their sum.

    Args:
      arithmetic: Arithmetic of path values.
      upper: Takes weights of both networks to the upper ones.
      application: The layer.
      weights: Those of both networks.
      x: Sums over the paths with the smaller weights.
      d: The differences from them; None if there are none so far.

    Returns:
      As `contract_both`.
    """
    layer, shape = application.layer, application.shape
    traced_p = (arithmetic.p,) if isinstance(arithmetic.p, jax.Array) else ()
    p = None if traced_p else arithmetic.p

    def lanes(operands, traced_p):
        w, other, x, *d = operands
        arithmetic = arithmetic_of(p, traced_p)
        below, between, _ = _edges(arithmetic.p, upper, w, other)
        whole = functools.reduce(arithmetic.add, (x, *d))
        return arithmetic, (below, (x, *d)), (between, (whole,))

    def carefully(operands, *traced_p):
        arithmetic, *both = lanes(operands, traced_p)
        return [
            layer.propagate(arithmetic, value, edges, False, shape)
            for edges, values in both
            for value in values
        ]

    @jax.custom_jvp
    def once(operands, *traced_p):
        arithmetic, *both = lanes(operands, traced_p)
        edges = (edges for edges, _ in both)
        kinds, none_tiny = _survey(arithmetic, *operands[:2], *edges)
        results, safe = [], []
        for (edges, values), fine in zip(both, none_tiny, strict=True):
            powers = edges if arithmetic.plain else arithmetic.power(edges)
            stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *values)
            through = functools.partial(
                layer.directly, arithmetic, powers=powers, none_tiny=fine, shape=shape
            )
            found, in_range = jax.vmap(through)(stacked)
            safe.append(in_range)
            results += [
                jax.tree.map(lambda parts, i=i: parts[i], found)
                for i in range(len(values))
            ]
        results = unless_safe(safe, results, carefully, operands, *traced_p)
        return list(map(numbers.normalize, results)), kinds

    def derivative(primals, tangents):
        # Exponents of the two ways may differ, so both come from the careful one.
        kinds = pairs.kinds_of(*primals[0][:2])
        none = np.zeros(kinds.shape, jax.dtypes.float0)
        results, tangents = jax.jvp(carefully, primals, tangents)
        return (results, kinds), (tangents, none)

    once.defjvp(derivative)
    w, other = (numbers.cast(weight, x) for weight in weights)
    values = [numbers.common(value) for value in (x, d) if value is not None]
    operands = (w, other, *values)
    if w.size < SMALL:
        results = carefully(operands, *traced_p)
        kinds = pairs.kinds_of(w, other)
    else:
        results, kinds = once(operands, *traced_p)
    below, *more = results
    return below, functools.reduce(arithmetic.add, more), kinds
