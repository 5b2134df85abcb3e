"""What an update does to weight vectors: norms, relative updates, angles."""

import jax
import jax.numpy as jnp

from normax._core.axes import Axes, PyTree, map_vectors
from normax._core.norms import (
    at_least_float32,
    finish_polar_parts,
    nonzero,
    ratio,
    vector_norm,
)


def weight_norm(params: PyTree, axes: Axes = "unit") -> PyTree:
    r"""Euclidean norm of every weight vector.

    $$\|w\| = \Big(\sum_{i \in \text{axes}} w_i^2\Big)^{1/2}$$

    Args:
      params: Pytree of arrays.
      axes: Which entries form one weight vector: `"unit"` (all axes but the
        last), `"layer"` (the whole array), a tuple of axes, `"none"`, or a
        pytree prefix of `params` with such leaves. A bare word concerns arrays
        of rank two and higher.

    Returns:
      Pytree of the norms, in float32 or better; each has the shape of its array without
      `axes`. None for arrays left alone.

    Raises:
      ValueError: `axes` does not fit `params`, or an array is complex.

    Examples:
      >>> import jax.numpy as jnp
      >>> import normax
      >>> params = {"kernel": jnp.array([[3.0, 0.0], [4.0, 2.0]]), "bias": jnp.ones(2)}
      >>> normax.weight_norm(params)
      {'bias': None, 'kernel': Array([5., 2.], dtype=float32)}

    References:
      van Laarhoven, 2017, arXiv:1706.05350, section 3.1.
    """

    def measure(vector_axes, w):
        (w,) = at_least_float32(w)
        return jnp.squeeze(vector_norm(w, vector_axes), vector_axes)

    return map_vectors(measure, axes, params)


def relative_length(w_norm: jax.Array, u_norm: jax.Array) -> jax.Array:
    # 0 * u_norm keeps the NaN of an update, which a plain 0 would hide.
    return jnp.where(w_norm == 0, 0 * u_norm, ratio(u_norm, nonzero(w_norm)))


def angle_of_update(
    w_norm: jax.Array, radial: jax.Array, tangential: jax.Array
) -> jax.Array:
    unit = nonzero(w_norm)
    opposite = ratio(tangential, unit)
    adjacent = jnp.where(w_norm == 0, 0, 1 + ratio(radial, unit))
    # The derivative of atan2 is not finite at the origin.
    at_origin = (opposite == 0) & (adjacent == 0)
    return jnp.arctan2(opposite, jnp.where(at_origin, 1, adjacent))


def _angle(vector_axes, parts, care, w, u):
    w_norm, _, radial, tangential = parts
    angle = angle_of_update(w_norm, radial, tangential)
    return (jnp.squeeze(angle, vector_axes),)


def relative_update(params: PyTree, updates: PyTree, axes: Axes = "unit") -> PyTree:
    r"""Length of every update relative to its weight vector.

    $$\|u\| / \|w\|, \qquad \text{or } 0 \text{ where } w = 0$$

    Args:
      params: Pytree of arrays $w$, before the update.
      updates: Pytree of what will be added to them, $u$.
      axes: Which entries form one weight vector, as in `weight_norm`.

    Returns:
      Pytree of ratios, shaped like the norms of `weight_norm`.

    Raises:
      ValueError: `axes` does not fit `params`, or an array is complex.

    Examples:
      >>> import jax.numpy as jnp
      >>> import normax
      >>> w, u = jnp.array([[3.0], [4.0]]), jnp.array([[0.0], [0.5]])
      >>> normax.relative_update(w, u)
      Array([0.1], dtype=float32)

    References:
      Kosson, Messmer, Jaggi, Rotational Equilibrium, 2024, arXiv:2305.17212.
    """

    def measure(vector_axes, w, u):
        w, u = at_least_float32(w, u)
        ratio = relative_length(
            vector_norm(w, vector_axes), vector_norm(u, vector_axes)
        )
        return jnp.squeeze(ratio, vector_axes)

    return map_vectors(measure, axes, params, updates)


def angular_update(params: PyTree, updates: PyTree, axes: Axes = "unit") -> PyTree:
    r"""Angle by which an update turns every weight vector, in radians.

    $$\operatorname{atan2}\big(\|u_\perp\|,\; \|w\| + \langle u, \hat w\rangle\big)$$

    with $u_\perp$ the part of $u$ orthogonal to $w$. It is precise for small angles too
    (docs/theory/spheres.md), and 0 or $\pi/2$ where $w = 0$.

    Args:
      params: Pytree of arrays $w$, before the update.
      updates: Pytree of what will be added to them, $u$.
      axes: Which entries form one weight vector, as in `weight_norm`.

    Returns:
      Pytree of angles in $[0, \pi]$, shaped like the norms of `weight_norm`.

    Raises:
      ValueError: `axes` does not fit `params`, or an array is complex.

    Examples:
      >>> import jax.numpy as jnp
      >>> import normax
      >>> w, u = jnp.array([[3.0], [4.0]]), jnp.array([[-4e-5], [3e-5]])
      >>> normax.angular_update(w, u)
      Array([1.e-05], dtype=float32)

    References:
      Kosson, Messmer, Jaggi, Rotational Equilibrium, 2024, arXiv:2305.17212.
    """

    def measure(rows):
        return [angle for (angle,) in finish_polar_parts(_angle, rows)[0]]

    return map_vectors(measure, axes, params, updates, together=True)
