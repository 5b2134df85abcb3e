r"""Newton's method, whose steps the scale of the weights cannot fool.

*Scale-invariant losses.* Where $L(\alpha w) = L(w)$ the gradient is of degree -1 in
$w$, so that $\langle w, g\rangle = 0$ and $H w = -g$: the Hessian is singular along
$w$ only where $g = 0$. Newton's step on $L$ itself is therefore $-H^{-1} g = w$: it
doubles the weights and leaves the function as it is. The quadratic model is to blame,
which holds scale and direction to be independent. `newton` has the remedy in `axes`:
the model without what mixes the two.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jax.sharding import PartitionSpec as P

from normax._core.axes import Axes, PyTree, check_axes, resolve_axes
from normax._core.checks import check_range, requiring_params
from normax._core.norms import at_least_float32, nonzero
from normax._core.programs import full_precision
from normax.spheres.projection import remove_radial_component


def _equilibrate(matrix: jax.Array) -> jax.Array:
    """Return factors of rows and columns that make their largest entries nearly 1."""
    scale = jnp.ones_like(matrix[0])
    for _ in range(3):
        largest = jnp.max(jnp.abs(scale[:, None] * matrix * scale[None]), axis=1)
        scale = scale / jnp.sqrt(nonzero(largest))
    return scale


def _decompose(matrix, damping, rtol, saddle_free):
    if saddle_free:
        eigenvalues, vectors = jnp.linalg.eigh(matrix)
        curvatures = jnp.abs(eigenvalues) + damping
    else:
        # In units in which curvatures are alike, or rounding would take for no
        # curvature what is little only beside that of other parameters.
        matrix = matrix + damping * jnp.eye(len(matrix), dtype=matrix.dtype)
        scale = _equilibrate(matrix)
        scaled = scale[:, None] * matrix * scale[None]
        eigenvalues, vectors = jnp.linalg.eigh(scaled)
        curvatures, vectors = eigenvalues, scale[:, None] * vectors
    size = jnp.abs(curvatures)
    kept = size > rtol * jnp.max(size)
    inverses = jnp.where(kept, 1 / jnp.where(kept, curvatures, 1), 0)
    return eigenvalues, vectors, inverses


@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
def _solve(
    matrix: jax.Array,
    vector: jax.Array,
    damping: jax.Array,
    rtol: jax.Array,
    saddle_free: bool,
) -> jax.Array:
    r"""Return $(A + \mu I)^{-1} x$, or $(|A| + \mu I)^{-1} x$, of a symmetric matrix.

    The inverse is $W c^{-1} W^\top$ with $c^{-1} = 0$ where
    $|c| \le \text{rtol} \cdot \max |c|$: with $S$ of `_equilibrate`,
    $S (A + \mu I) S = V c V^\top$ and $W = S V$; or $A = W e W^\top$ and
    $c = |e| + \mu$. Then, with $D_{ij} = (|e_i| - |e_j|) / (e_i - e_j)$, its derivative
    $-W c^{-1} (W^\top (\dot A + \dot\mu I) W)\,c^{-1} W^\top$, or
    $-W c^{-1} (D \circ W^\top \dot A W + \dot\mu I)\,c^{-1} W^\top$, is finite also
    where eigenvalues meet, at which those of $W$ are not.
    """
    _, vectors, inverses = _decompose(matrix, damping, rtol, saddle_free)
    return vectors @ (inverses * (vectors.T @ vector))


@_solve.defjvp
@full_precision()
def _solve_jvp(saddle_free, primals, tangents):
    matrix, vector, damping, rtol = primals
    matrix_dot, vector_dot, damping_dot, _ = tangents
    eigenvalues, vectors, inverses = _decompose(matrix, damping, rtol, saddle_free)
    solution = inverses * (vectors.T @ vector)
    change = vectors.T @ matrix_dot @ vectors
    if saddle_free:
        e = eigenvalues
        size = jnp.abs(e)
        change *= (e[:, None] + e[None]) / nonzero(size[:, None] + size[None])
        shift = damping_dot * solution
    else:
        shift = vectors.T @ (damping_dot * (vectors @ solution))
    change = vectors.T @ vector_dot - change @ solution - shift
    return vectors @ solution, vectors @ (inverses * change)


def _spread(array: jax.Array, like: jax.typing.ArrayLike | None = None) -> jax.Array:
    """Spread an array over an explicit mesh as `like` is, or like one vector."""
    here = jax.typeof(array).sharding
    there = P(*[None] * array.ndim) if like is None else jax.typeof(like).sharding.spec
    return array if here.spec == there else jax.sharding.reshard(array, there)


def _check_size(params: PyTree, max_parameters: Any) -> None:
    size = sum(jnp.size(leaf) for leaf in jax.tree.leaves(params))
    if not isinstance(max_parameters, jax.core.Tracer) and size > max_parameters:
        raise ValueError(
            "normax.second_order.newton holds a dense Hessian, so that there must be "
            f"at most max_parameters={max_parameters} parameters, but there are "
            f"{size}; raise max_parameters if a matrix of that size fits, or use "
            "normax.second_order.hessian_free, which takes products of curvature and "
            "vectors only."
        )


def newton(
    learning_rate: optax.ScalarOrSchedule = 1.0,
    damping: jax.typing.ArrayLike = 0.0,
    weight_decay: jax.typing.ArrayLike = 0.0,
    saddle_free: bool = False,
    axes: Axes = "none",
    rtol: jax.typing.ArrayLike | None = None,
    max_parameters: int = 2000,
) -> optax.GradientTransformationExtraArgs:
    r"""Newton's method with a dense Hessian, for at most a few thousand parameters.

    $$w \leftarrow w - \eta\,(H + \lambda I + \mu I)^{-1} (g + \lambda w), \qquad
    H = \nabla^2 L(w)$$

    The gradient $g$ is the one that `update` is given, the Hessian that of `value_fn`
    at `params`: `update(grads, state, params, value_fn=loss_of_params)`. The step has
    the units of the weights, whatever the units of each parameter and of the loss.
    Weight decay belongs to the loss, as $\tfrac{\lambda}{2}\|w\|^2$; a decay added to
    $g$ before, in a chain, changes the gradient alone.

    The inverse is a pseudo-inverse: in directions without curvature, of an absolute
    value below `rtol` times the largest, nothing moves (in units in which the largest
    curvatures of all parameters are alike, unless `saddle_free`). With damping $\mu$
    they move as in gradient descent at rate $\eta/\mu$. Newton's method also goes to
    saddles and maxima. With `saddle_free` it leaves them: $|H + \lambda I| + \mu I$,
    with the absolute values of the eigenvalues, takes the place of the matrix. Damping,
    and absolute values of negative eigenvalues, depend on the units of parameters.
    Products of float32 matrices are taken in full, also on a GPU: their rounding would
    be curvature where there is none.

    *For scale-invariant weights* name the vectors in `axes`. Without it Newton's step
    is $+\eta w$ if nothing but $L$ is minimized, which changes no function: the
    Hessian then has $H w = -g$, and is singular along $w$ only where $g = 0$. With it
    $H$ and $g$ become $P H P$ and $P g$, where $P = I - \hat w \hat w^\top$ for every
    vector, which is Newton's method on spheres. Radially the loss is
    $\tfrac{\lambda}{2}\|w\|^2$, and the step $-\eta\,w\,\lambda / (\lambda + \mu)$. So
    functions do not depend on the scale of $w$, and under any weight decay norms go to
    0 as $(1 - \eta)^t$, at once with $\eta = 1$.

    Args:
      learning_rate: Learning rate $\eta$, a number or a schedule.
      damping: Damping $\mu$, in the units of the Hessian.
      weight_decay: Weight decay $\lambda$ of all parameters, coupled.
      saddle_free: Whether to take the absolute values of the eigenvalues.
      axes: Which entries form one scale-invariant vector, as in
        `projection_unit_norm`.
      rtol: Curvatures below this part of the largest count as 0; None for the number
        of parameters times the rounding of the dtype.
      max_parameters: Largest number of parameters; the memory is its square.

    Returns:
      A gradient transformation that needs `params` and `value_fn`. Under
      `optax.masked` or `partition`, `value_fn` is called with what is left of the
      parameters. An array whose gradient is None is a constant.

    Raises:
      ValueError: There are more parameters than `max_parameters`, `axes` is malformed
        or does not fit them, a number is out of range, or `update` is called without
        `params` or `value_fn`.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import normax
      >>> import optax
      >>> def loss(w):
      ...     return 50 * (w[0] - 1) ** 2 + (w[0] - w[1]) ** 2
      >>> @jax.jit
      ... def step(w, state):
      ...     grads = jax.grad(loss)(w)
      ...     updates, state = tx.update(grads, state, w, value_fn=loss)
      ...     return optax.apply_updates(w, updates), state
      >>> tx, w = normax.second_order.newton(), jnp.zeros(2)
      >>> step(w, tx.init(w))[0].round(4)
      Array([1., 1.], dtype=float32)

    References:
      van Laarhoven, L2 Regularization versus Batch and Weight Normalization, 2017,
      section 5.4 and Table 1. Dauphin et al., Identifying and Attacking the Saddle
      Point Problem in High-Dimensional Non-Convex Optimization, 2014.
    """
    check_axes(axes)
    check_range("damping", damping, low=0)
    check_range("weight_decay", weight_decay, low=0)
    check_range("rtol", rtol, low=0)

    def init_fn(params):
        resolve_axes(axes, params)
        _check_size(params, max_parameters)
        return optax.EmptyState()

    def update_fn(updates, state, params=None, *, value_fn=None, **extra_args):
        del extra_args
        _check_size(params, max_parameters)
        if value_fn is None:
            raise ValueError(
                "normax.second_order.newton takes the curvature from the loss, but "
                "`value_fn` is None; call update(grads, state, params, "
                "value_fn=loss_of_params)."
            )
        leaves, treedef = jax.tree.flatten(params)
        grads = treedef.flatten_up_to(updates)
        # Arrays without a gradient, or without derivatives, are constants.
        free = [
            index
            for index, (w, g) in enumerate(zip(leaves, grads, strict=True))
            if g is not None and jnp.issubdtype(jax.dtypes.result_type(w), jnp.floating)
        ]
        if not sum(jnp.size(leaves[index]) for index in free):
            return updates, state

        def flatten(tree):
            pieces = [at_least_float32(tree[index])[0] for index in free]
            return ravel_pytree([_spread(piece) for piece in pieces])

        def place(pieces, others):
            others = list(others)
            for index, piece in zip(free, pieces, strict=True):
                others[index] = piece
            return treedef.unflatten(others)

        def place_like(flat, others):
            pieces = zip(unravel(flat), [others[index] for index in free], strict=True)
            return place(
                [_spread(x.astype(jnp.result_type(y)), y) for x, y in pieces], others
            )

        w, unravel = flatten(leaves)
        g, _ = flatten(grads)
        decay, mu = (jnp.asarray(x, w.dtype) for x in (weight_decay, damping))
        precision = w.size * jnp.finfo(w.dtype).eps if rtol is None else rtol

        def tangential(flat):
            projected, _ = remove_radial_component(axes).update(
                place(unravel(flat), grads), optax.EmptyState(), params
            )
            return flatten(treedef.flatten_up_to(projected))[0]

        identity = jnp.eye(w.size, dtype=w.dtype)
        projection = jax.vmap(tangential)(identity)
        with full_precision():
            hessian = jax.hessian(lambda flat: value_fn(place_like(flat, leaves)))(w)
            step = projection @ _solve(
                projection @ hessian @ projection + decay * identity,
                projection @ (g + decay * w),
                mu,
                jnp.asarray(precision, w.dtype),
                saddle_free,
            )
            radial = w - projection @ w
        step += decay / nonzero(decay + mu) * radial
        return place_like(step, grads), state

    chain = optax.chain(
        optax.GradientTransformationExtraArgs(init_fn, update_fn),
        optax.scale_by_learning_rate(learning_rate),
    )
    return requiring_params("newton", chain)
