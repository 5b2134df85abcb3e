"""The quadratic model of a loss, and its minimum by conjugate gradients."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from normax._core.axes import PyTree
from normax._core.norms import nonzero
from normax.second_order.conjugate_gradients import (
    Product,
    Vector,
    conjugate_gradients,
    inner,
    magnitude,
)


def curvature(
    loss: Callable[[Vector], jax.Array],
    outputs_fn: Callable[[Vector], PyTree] | None,
    loss_of_outputs: Callable[[PyTree], jax.Array] | None,
    w: Vector,
) -> Product:
    """Return products with the Gauss-Newton matrix, or else with the Hessian."""
    # `linearize` computes once what all products share.
    if outputs_fn is None or loss_of_outputs is None:
        return jax.linearize(jax.grad(loss), w)[1]
    outputs, push = jax.linearize(outputs_fn, w)
    pull = jax.linear_transpose(push, w)
    hessian = jax.linearize(jax.grad(loss_of_outputs), outputs)[1]
    return lambda v: pull(hessian(push(v)))[0]


class QuadraticModel(NamedTuple):
    r"""$m(p) = \langle g, p\rangle + \tfrac12 \langle p, (B + \sigma I)\,p\rangle$."""

    gradient: Vector
    curvature: Product
    shift: jax.Array  # sigma

    def product(self, p: Vector) -> Vector:
        return optax.tree.add_scale(self.curvature(p), self.shift, p)

    def evaluate(self, p: Vector) -> tuple[jax.Array, Vector]:
        """Return the model at `p`, and the product with `p`."""
        image = self.product(p)
        return inner(p, image) / 2 + inner(p, self.gradient), image


class Start(NamedTuple):
    """Where conjugate gradients start."""

    point: Vector
    image: Vector  # product with the point
    height: jax.Array  # of the model there, at most 0


def start_from(model: QuadraticModel, point: Vector) -> Start:
    """Start at a point if the model is lower there than at 0, and otherwise at 0."""
    height, image = model.evaluate(point)
    # A NaN is not below 0. So a start that is not finite is forgotten.
    kept = height < 0
    return Start(*jax.tree.map(lambda x: jnp.where(kept, x, 0), (point, image, height)))


def unit_of(w: Vector) -> jax.Array:
    """Return the power of two in which the solution is measured: the weights' own.

    In units of the weights, the curvature of a scale-invariant loss is about 1.
    """
    # Zeros and very small weights say nothing of the curvature.
    return jnp.clip(magnitude(w), 2.0**-50, 2.0**50)


def preconditioner(
    diagonal: Vector, shift: jax.Array, power: jax.Array, unit: jax.Array
) -> Vector:
    r"""Return $(c + \sigma)^\xi$ in units of the weights, 1 where that is 0."""
    scaled = [unit * (c + shift) * unit for c in diagonal]
    return [jax.lax.stop_gradient(nonzero(c) ** power) for c in scaled]


def minimize(
    model: QuadraticModel,
    start: Start,
    metric: Vector,
    unit: jax.Array,
    tolerance: jax.Array,
    limit: jax.typing.ArrayLike,
) -> tuple[Vector, jax.Array]:
    """Return the minimum of a model by conjugate gradients, and their iterations.

    Derivatives are those of the minimum. Metric and unit are as in `preconditioner`.
    """
    downhill = jax.tree.map(lambda g, a: -g - a, model.gradient, start.image)
    downhill = optax.tree.scale(unit, downhill)
    size = magnitude(downhill)
    scaled = optax.tree.scale(1 / size, downhill)
    square = inner(scaled, optax.tree.div(scaled, metric))
    height = jax.lax.stop_gradient(start.height / size / size / nonzero(square))
    change, iterations = jax.lax.custom_linear_solve(
        lambda v: optax.tree.scale(unit, model.product(optax.tree.scale(unit, v))),
        downhill,
        lambda product, vector: conjugate_gradients(
            product, vector, metric, height, tolerance, limit
        ),
        symmetric=True,
        has_aux=True,
    )
    return optax.tree.add_scale(start.point, unit, change), iterations
