"""Conjugate gradients that stop by their progress, on lists of arrays."""

import operator
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from normax._core.norms import nonzero

Vector = list[jax.Array]  # of one dtype
Product = Callable[[Vector], Vector]

_HISTORY = 100  # values of the model that are remembered
_NOISE = 16  # rounding of a product, in units of the precision


def inner(x: Vector, y: Vector) -> jax.Array:
    # `optax.tree.vdot` is a product of matrices to JAX. A GPU rounds its factors, and
    # arrays on an explicit mesh cannot be flattened for it.
    products = [jnp.sum(a * b) for a, b in zip(x, y, strict=True)]
    return jax.tree.reduce(operator.add, products)


def magnitude(x: Vector) -> jax.Array:
    """Return the power of two next to the largest entry, 1 if all are 0."""
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(a), initial=0) for a in x]))
    _, exponent = jnp.frexp(jax.lax.stop_gradient(largest))
    return jnp.ldexp(jnp.ones_like(largest), jnp.clip(exponent, -126, 126))


class _Search(NamedTuple):
    iterations: jax.Array
    done: jax.Array
    x: Vector
    residual: Vector
    direction: Vector
    square: jax.Array  # of the residual, in the metric of the preconditioner
    values: jax.Array  # of the model
    largest: jax.Array  # curvature so far


def conjugate_gradients(
    product: Product,
    vector: Vector,
    metric: Vector,
    start: jax.Array,
    tolerance: jax.Array,
    limit: jax.typing.ArrayLike,
) -> tuple[Vector, jax.Array]:
    r"""Minimize $\phi(x) = \tfrac12\langle x, A x\rangle - \langle b, x\rangle$ from 0.

    The search stops when $\phi$ makes little progress, which the conjugate gradients
    of JAX and lineax do not measure. It also stops when only rounding is left, or at
    the first direction without positive curvature: docs/theory/second_order.md.

    Args:
      product: The map $x \mapsto A x$, symmetric.
      vector: The right-hand side $b$.
      metric: Diagonal of the preconditioner $M$, positive.
      start: $\phi(0) / \langle b, M^{-1} b\rangle$, below 0 if the problem was shifted.
      tolerance: Least relative progress of an iteration.
      limit: Largest number of iterations.

    Returns:
      $x$, and the number of iterations.
    """
    noise = _NOISE * float(jnp.finfo(vector[0].dtype).eps)
    # The solution is linear in the right-hand side, which is scaled to about 1. So
    # no square overflows or underflows.
    scale = magnitude(vector)
    vector = optax.tree.scale(1 / scale, vector)

    def body(now: _Search) -> _Search:
        image = product(now.direction)
        curvature = inner(now.direction, image)
        size = inner(now.direction, optax.tree.mul(metric, now.direction))
        largest = jnp.maximum(now.largest, jnp.abs(curvature) / nonzero(size))
        flat = jnp.abs(curvature) <= noise * largest * size
        step = jnp.where(flat, 0, now.square / jnp.where(flat, 1, jnp.abs(curvature)))
        residual = optax.tree.add_scale(now.residual, -step, image)
        conditioned = optax.tree.div(residual, metric)
        square = inner(residual, conditioned)
        count = now.iterations + 1
        decrease = step * (now.square - step * curvature / 2)
        value = now.values[now.iterations % _HISTORY] - decrease
        k = jnp.clip(count // 10, 10, _HISTORY - 1)
        progress = value - now.values[(count - k) % _HISTORY]
        slow = (count > k) & (progress >= k.astype(value.dtype) * tolerance * value)
        settled = decrease <= noise**2 * jnp.abs(value)
        solved = ~(square > noise**2 * first)
        return _Search(
            count,
            slow | settled | solved | flat | ~(curvature > 0),
            optax.tree.add_scale(now.x, step, now.direction),
            residual,
            optax.tree.add_scale(conditioned, square / now.square, now.direction),
            square,
            now.values.at[count % _HISTORY].set(value),
            largest,
        )

    conditioned = optax.tree.div(vector, metric)
    square = first = inner(vector, conditioned)
    search = jax.lax.while_loop(
        lambda now: (now.iterations < limit) & ~now.done,
        body,
        _Search(
            jnp.zeros((), jnp.int32),
            square == 0,
            optax.tree.zeros_like(vector),
            vector,
            conditioned,
            square,
            jnp.full(_HISTORY, start * square),
            jnp.zeros_like(square),
        ),
    )
    return optax.tree.scale(scale, search.x), search.iterations
