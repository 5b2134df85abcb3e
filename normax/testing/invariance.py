"""Assertions about one set of weights: norms, invariance, gradients."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from normax._core.axes import Axes, PyTree, broadcast_radius, map_vectors
from normax._core.comparisons import (
    Comparison,
    check_all,
    largest,
    maximum,
    named_leaves,
)
from normax._core.modules import refuse_modules
from normax._core.norms import at_least_float32, inner_product, nonzero, vector_norm
from normax._core.programs import compiled, full_precision
from normax.invariance.rescalings import rescalings

# A gradient may be the rounding of terms that cancel. In float32 it may be so below
# this fraction of the largest gradient, whose tolerance it then gets.
_NOISE = 1e-3


def _per_vector(vector_axes: tuple[int, ...], *values: jax.Array) -> Comparison:
    measured, expected, tolerance = (jnp.squeeze(x, vector_axes) for x in values)
    return Comparison("", measured, expected, tolerance)


def _named(tree: PyTree) -> list[Comparison]:
    found = jax.tree_util.tree_leaves_with_path(
        tree, is_leaf=lambda node: isinstance(node, Comparison)
    )
    return [
        comparison._replace(where=f"params{jax.tree_util.keystr(path)}")
        for path, comparison in found
    ]


def assert_unit_norm(
    params: PyTree,
    axes: Axes = "unit",
    radius: Any = 1.0,
    *,
    rtol: float | None = None,
    atol: float = 0.0,
    custom_message: str | None = None,
) -> None:
    r"""Check that every weight vector has the norm `radius`.

    $$\big|\, \|w\| - r \,\big| \le \text{atol} + \text{rtol} \cdot r$$

    Args:
      params: Pytree of arrays.
      axes: Which entries form one weight vector, as in `normax.weight_norm`.
      radius: Norm $r$, as in `normax.projection_unit_norm`.
      rtol: Relative tolerance. None for the precision of `normax.project_unit_norm`:
        1e-6 in float32, and one unit in the last place of coarser dtypes.
      atol: Absolute tolerance.
      custom_message: Added to the message of the error.

    Returns:
      None.

    Raises:
      AssertionError: A norm differs from `radius`, or is not finite.
      ValueError: `axes` or `radius` does not fit `params`.
      RuntimeError: Under `jax.jit` without `chex.chexify`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import normax
      >>> normax.testing.assert_unit_norm(jnp.array([[0.6, 0.0], [0.8, 1.0]]))

    References:
      van Laarhoven, L2 Regularization versus Batch and Weight Normalization, 2017,
      §5.5.
    """

    def compare(vector_axes, w, radius):
        (x,) = at_least_float32(w)
        norm = vector_norm(x, vector_axes)
        expected = jnp.broadcast_to(radius, norm.shape).astype(x.dtype)
        eps = max(jnp.finfo(jnp.result_type(w)).eps, 8 * jnp.finfo(x.dtype).eps)
        tolerance = atol + (float(eps) if rtol is None else rtol) * expected
        return _per_vector(vector_axes, norm, expected, tolerance)

    radii = broadcast_radius(radius, axes, params)
    claim = "assert_unit_norm: every weight vector must have the norm `radius`"
    check_all(
        claim,
        _named(map_vectors(compare, axes, params, radii, updates=False)),
        custom_message,
    )


@full_precision()
def assert_scale_invariant(
    fn: Callable[[PyTree], PyTree],
    params: PyTree,
    axes: Axes = "unit",
    *,
    rtol: float = 1e-3,
    atol: float = 0.0,
    custom_message: str | None = None,
) -> None:
    r"""Check that a function does not change with the scale of any weight vector.

    $$f(\dots, \alpha w, \dots) = f(\dots, w, \dots), \qquad \alpha > 0$$

    Args:
      fn: Called as `fn(params)`; returns a pytree of arrays.
      params: Pytree of arrays. One array after another is rescaled, by random factors.
      axes: Which entries form one weight vector, as in `normax.weight_norm`.
      rtol: Tolerance relative to the largest entry of each output. The default lets
        the $\epsilon$ of batch norm pass where it is below 1e-3 of the variance.
      atol: Absolute tolerance.
      custom_message: Added to the message of the error.

    Returns:
      None.

    Raises:
      AssertionError: An output changes, or is not finite.
      ValueError: `axes` does not fit `params`.
      RuntimeError: Under `jax.jit` without `chex.chexify`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import normax
      >>> def fn(w):
      ...     return w / jnp.linalg.norm(w, axis=0, keepdims=True)
      >>> normax.testing.assert_scale_invariant(fn, jnp.array([[3.0, 1.0], [4.0, 2.0]]))

    References:
      van Laarhoven, L2 Regularization versus Batch and Weight Normalization, 2017, §1.
    """
    refuse_modules(params)
    compiled_fn = compiled(fn)
    expected = named_leaves("outputs", compiled_fn(params))
    comparisons = [
        Comparison(f"{output} for {rescaling.where}", x, y, atol + rtol * largest(y))
        for rescaling in rescalings(params, axes)
        for (output, x), (_, y) in zip(
            named_leaves("outputs", compiled_fn(rescaling.params)),
            expected,
            strict=True,
        )
    ]
    claim = "assert_scale_invariant: rescaled weight vectors must not change fn"
    check_all(claim, comparisons, custom_message)


@full_precision()
def assert_inverse_gradient_scaling(
    loss_fn: Callable[[PyTree], Any],
    params: PyTree,
    axes: Axes = "unit",
    *,
    rtol: float = 1e-3,
    atol: float = 0.0,
    custom_message: str | None = None,
) -> None:
    r"""Check that the gradient is inverse to the scale of every weight vector.

    $$\nabla_w L(\alpha w) = \tfrac{1}{\alpha} \nabla_w L(w), \qquad \alpha > 0$$

    This holds for every scale-invariant loss.

    Args:
      loss_fn: Called as `loss_fn(params)`; returns a scalar.
      params: Pytree of arrays, rescaled as in `assert_scale_invariant`.
      axes: Which entries form one weight vector, as in `normax.weight_norm`.
      rtol: Tolerance relative to the largest entry of each array's gradient. Gradients
        so small that they may be rounding have a larger one.
      atol: Absolute tolerance.
      custom_message: Added to the message of the error.

    Returns:
      None.

    Raises:
      AssertionError: A gradient scales otherwise, or is not finite.
      ValueError: `axes` does not fit `params`.
      RuntimeError: Under `jax.jit` without `chex.chexify`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import normax
      >>> def loss_fn(w):
      ...     return jnp.sum(jnp.sin(w / jnp.linalg.norm(w, axis=0, keepdims=True)))
      >>> w = jnp.array([[3.0, 1.0], [4.0, 2.0]])
      >>> normax.testing.assert_inverse_gradient_scaling(loss_fn, w)

    References:
      van Laarhoven, L2 Regularization versus Batch and Weight Normalization, 2017, §3.
    """
    refuse_modules(params)
    gradient = jax.grad(compiled(loss_fn), allow_int=True)
    gradients = jax.tree.leaves(gradient(params))
    products = [
        largest(w) * largest(g)
        for w, g in zip(jax.tree.leaves(params), gradients, strict=True)
        if g.dtype != jax.dtypes.float0
    ]
    comparisons = []
    for where, position, factors, rescaled in rescalings(params, axes):
        noise = _NOISE * maximum(products)
        noise /= nonzero(largest(jax.tree.leaves(params)[position]))
        measured, expected = at_least_float32(
            factors * jax.tree.leaves(gradient(rescaled))[position], gradients[position]
        )
        tolerance = atol + rtol * jnp.maximum(largest(expected), noise)
        where = f"the gradient of {where}, times the factors"
        comparisons.append(Comparison(where, measured, expected, tolerance))
    claim = (
        "assert_inverse_gradient_scaling: gradients must be inverse to the scale of "
        "the weight vectors"
    )
    check_all(claim, comparisons, custom_message)


@full_precision()
def assert_orthogonal_gradient(
    loss_fn: Callable[[PyTree], Any],
    params: PyTree,
    axes: Axes = "unit",
    *,
    rtol: float = 1e-3,
    atol: float = 0.0,
    custom_message: str | None = None,
) -> None:
    r"""Check that the gradient is orthogonal to every weight vector.

    $$\langle w, \nabla_w L\rangle = 0$$

    This is the derivative of $L(\alpha w)$ at $\alpha = 1$, and holds for every
    scale-invariant loss.

    Args:
      loss_fn: Called as `loss_fn(params)`; returns a scalar.
      params: Pytree of arrays.
      axes: Which entries form one weight vector, as in `normax.weight_norm`.
      rtol: Largest cosine of the angle between a weight vector and its gradient.
        Products so small that they may be rounding have a larger one.
      atol: Absolute tolerance of the product, in units of the loss.
      custom_message: Added to the message of the error.

    Returns:
      None.

    Raises:
      AssertionError: A product is not 0, or is not finite.
      ValueError: `axes` does not fit `params`.
      RuntimeError: Under `jax.jit` without `chex.chexify`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import normax
      >>> def loss_fn(w):
      ...     return jnp.sum(jnp.sin(w / jnp.linalg.norm(w, axis=0, keepdims=True)))
      >>> w = jnp.array([[3.0, 1.0], [4.0, 2.0]])
      >>> normax.testing.assert_orthogonal_gradient(loss_fn, w)

    References:
      van Laarhoven, L2 Regularization versus Batch and Weight Normalization, 2017, §3.
    """
    refuse_modules(params)
    gradients = jax.grad(compiled(loss_fn), allow_int=True)(params)

    def size(vector_axes, w, g):
        w, g = at_least_float32(w, g)
        return vector_norm(w, vector_axes) * vector_norm(g, vector_axes)

    sizes = map_vectors(size, axes, params, gradients)
    noise = _NOISE * maximum(map(largest, jax.tree.leaves(sizes)))

    def compare(vector_axes, w, g, size):
        product = inner_product(*at_least_float32(w, g), vector_axes)
        tolerance = atol + rtol * jnp.maximum(size, noise)
        return _per_vector(vector_axes, product, jnp.zeros_like(product), tolerance)

    claim = "assert_orthogonal_gradient: <w, gradient> must be 0 for every vector"
    found = map_vectors(compare, axes, params, gradients, sizes)
    check_all(claim, _named(found), custom_message)
