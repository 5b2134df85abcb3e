r"""Hessian-free optimization: Newton's steps by conjugate gradients, without a matrix.

Every step minimizes a model of the loss, $\langle g, p\rangle + \tfrac12 \langle p,
(B + \mu I)\,p\rangle$, of whose matrix only products with vectors are ever formed. $B$
is the Hessian, or the Gauss-Newton matrix of a convex loss of a network's
outputs.

*Scale-invariant weights.* Where outputs do not depend on the scale of $w$, the
Gauss-Newton matrix has $G w = 0$, while the Hessian has $H w = -g$: Gauss-Newton steps
without damping are tangent to the sphere through $w$, of a length proportional to
$\|w\|$, and those of the Hessian tend to $+w$, which changes no function.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from normax._core.axes import PyTree
from normax._core.checks import check_range, requiring_params
from normax._core.norms import at_least_float32, nonzero
from normax.second_order.conjugate_gradients import (
    Product,
    Vector,
    add,
    conjugate_gradients,
    divide,
    inner,
    magnitude,
    multiply,
)

_Trial = tuple[jax.Array, jax.Array, jax.Array]  # part, its loss, loss of the whole
_SMALLEST_PART = 2.0**-20  # of a step
_SLOPE = 1e-2  # part of the slope's decrease that a step must bring


class HessianFreeState(NamedTuple):
    r"""State of `hessian_free`.

    Attributes:
      count: Number of steps, int32.
      damping: Damping $\mu$ of the next step.
      direction: Last solution $p$ of conjugate gradients, from which the next start;
        None for arrays of integers.
      reduction_ratio: Ratio $\rho$ of the last step; 1 before the first, and where
        rounding hides what the loss decreases by.
      iterations: Number of conjugate gradient iterations of the last step, int32.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, as in optax
    damping: jax.Array
    direction: PyTree
    reduction_ratio: jax.Array
    iterations: jax.Array


def _backtrack(
    loss: Callable[[jax.Array], jax.Array],
    before: jax.Array,
    slope: jax.Array,
    rounding: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Halve the step until the loss decreases.

    Args:
      loss: The loss as a function of the part of the step that is taken.
      before: Its value at 0.
      slope: Its derivative there.
      rounding: What does not count as an increase.

    Returns:
      The part of the step to take, 0 if none will do, and the loss after the whole.
    """
    one = jnp.ones_like(slope)
    # Neither they nor anything that the loss closes over is differentiated.
    loss, consts = jax.closure_convert(loss, one)
    before, slope, rounding, *consts = jax.lax.stop_gradient(
        [before, slope, rounding, *consts]
    )

    def fails(part: jax.Array, after: jax.Array) -> jax.Array:
        return ~(after <= before + _SLOPE * part * slope + rounding)

    def halve(now: _Trial) -> _Trial:
        part = now[0] / 2
        after = loss(part, *consts)
        return part, after, jnp.where(part == 1, after, now[2])

    unknown = jnp.full_like(before, jnp.nan)
    part, last, whole = jax.lax.while_loop(
        lambda now: fails(*now[:2]) & (now[0] > _SMALLEST_PART),
        halve,
        (2 * one, unknown, unknown),
    )
    # A loss that was no number before has nothing to decrease from.
    part = jnp.where(fails(part, last), 0 * before, part)
    return part, whole


def _curvature(
    loss: Callable[[Vector], jax.Array],
    outputs_fn: Callable[[Vector], PyTree] | None,
    loss_of_outputs: Callable[[PyTree], jax.Array] | None,
    w: Vector,
) -> Product:
    """Return products with the Gauss-Newton matrix, or else with the Hessian.

    All that does not depend on the vector is computed here, once for all products.
    """
    if outputs_fn is None or loss_of_outputs is None:
        return jax.linearize(jax.grad(loss), w)[1]
    outputs, push = jax.linearize(outputs_fn, w)
    pull = jax.linear_transpose(push, w)
    hessian = jax.linearize(jax.grad(loss_of_outputs), outputs)[1]
    return lambda v: pull(hessian(push(v)))[0]


def _dtype(leaves: list[Any]) -> Any:
    """Return the common dtype of all arrays of floats, float32 at least."""
    numbers = [jnp.zeros((), jnp.result_type(x)) for x in leaves if _is_float(x)]
    return at_least_float32(jnp.float32(0), *numbers)[0].dtype


def _is_float(array: Any) -> bool:
    return jnp.issubdtype(jax.dtypes.result_type(array), jnp.floating)


def hessian_free(
    learning_rate: optax.ScalarOrSchedule = 1.0,
    damping: jax.typing.ArrayLike = 1.0,
    weight_decay: jax.typing.ArrayLike = 0.0,
    outputs_fn: Callable[[PyTree], PyTree] | None = None,
    loss_of_outputs: Callable[[PyTree], jax.Array] | None = None,
    cg_iterations: jax.typing.ArrayLike = 250,
    cg_tolerance: jax.typing.ArrayLike = 5e-4,
    warm_start: jax.typing.ArrayLike = 0.95,
    preconditioner_power: jax.typing.ArrayLike = 0.75,
) -> optax.GradientTransformationExtraArgs:
    r"""Hessian-free optimization: Newton's method by conjugate gradients.

    $$w \leftarrow w + \alpha\,\eta\,p, \qquad
    (B + \lambda I + \mu I)\,p = -(g + \lambda w)$$

    The gradient $g$ is the one that `update` is given, for the loss $L$ that it is
    given: `update(grads, state, params, value_fn=loss_of_params)`. With a network's
    `outputs_fn`, called with the parameters, and a convex `loss_of_outputs` of what it
    returns, $B$ is the Gauss-Newton matrix $J^\top H J$, which has no negative
    curvature; otherwise it is the Hessian of $L$. No matrix is formed: memory is a
    small multiple of the parameters'.

    *Mini-batches.* The three functions close over the batch, so hand those of the
    batch at hand to each `update`; this is also how $B$ may come from a part of it.
    For one batch, the last two may be given once, here.

    *Conjugate gradients* start from the last step's solution times `warm_start` (from
    0, if that has no lower model than 0), and stop when the model's last $k$ values
    have decreased by less than $k\,\epsilon$ of it, $k = \max(10, i / 10)$, or when
    what is left of the gradient is rounding. At negative curvature they end with a
    step along it, as long as if the curvature were positive; where there is no
    curvature, without one. They are preconditioned if `update` is given
    `curvature_diagonal`, a pytree like the parameters of numbers $c \ge 0$, by
    $(c + \lambda + \mu)^\xi$. Martens takes $\xi = 3/4$ and the squares
    of the gradients of single examples, added up as the loss is. With the diagonal of
    $B$, $\xi = 1$ and no damping, no step depends on the units of the parameters,
    converged or not.

    *Damping* $\mu$ becomes $\tfrac32 \mu$ after a step with $\rho < \tfrac14$ and
    $\tfrac23 \mu$ after one with $\rho > \tfrac34$, where $\rho$ is the change of
    $L_\lambda = L + \tfrac\lambda2 \|w\|^2$ by the step $s = \eta p$, over that of its
    model without damping, $\langle g_\lambda, s\rangle + \tfrac12 \langle s, (B +
    \lambda I)\,s\rangle$.

    *Backtracking.* The part $\alpha$ of the step is the first of $1, \tfrac12, \dots$
    with $L_\lambda(w + \alpha s) \le L_\lambda(w) + 0.01\,\alpha\,\langle g_\lambda,
    s\rangle$, up to rounding; below $10^{-6}$ there is no step.

    *The scale of weights.* Without damping the step has the units of the weights, even
    where conjugate gradients stop early: of a loss invariant to the scale of *all* its
    weights, $w$ and $\alpha w$ visit the same functions, whichever $B$. If that of
    some arrays only, it is so of Gauss-Newton steps that have converged or are
    preconditioned by the diagonal with $\xi = 1$. Damping breaks this: it
    is a curvature, and belongs to one scale of the weights. Under weight decay
    norms go to 0 as $(1 - \eta)^t$ with undamped Gauss-Newton steps. In float32 they
    may be between $10^{-15}$ and $10^{15}$.

    *Rounding.* A GPU or TPU rounds the factors of float32 products of matrices to 10
    bits or 7 by default, also in the gradient, and steps end where that hides the
    slope. Run the whole step under `jax.default_matmul_precision("highest")` to go on.

    Derivatives through `update` are those of the linear system, solved likewise;
    $\alpha$, the change of $\mu$ and the number of iterations count as constants.

    Args:
      learning_rate: Learning rate $\eta$, a number or a schedule.
      damping: Damping $\mu$ of the first step, in the units of $B$.
      weight_decay: Weight decay $\lambda$ of all parameters, coupled.
      outputs_fn: The network's outputs, a pytree of arrays, as a function of the
        parameters; an argument of `update` of this name goes before it.
      loss_of_outputs: A convex function of the outputs; likewise.
      cg_iterations: Largest number of iterations in a step.
      cg_tolerance: The $\epsilon$ of the stopping rule.
      warm_start: Factor of the last solution; 0 for a start from 0.
      preconditioner_power: Exponent $\xi$ of the preconditioner.

    Returns:
      A gradient transformation that needs `params` and `value_fn`, with the state
      `HessianFreeState`. Under `optax.masked` or `partition`, the functions are called
      with what is left of the parameters. An array whose gradient is None is a
      constant. Under `optax.inject_hyperparams`, `outputs_fn` and `loss_of_outputs`
      need `static_args`.

    Raises:
      ValueError: A number is out of range, only one of `outputs_fn` and
        `loss_of_outputs` is given, or `update` is called without `params` or
        `value_fn`.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import normax
      >>> import optax
      >>> def outputs_fn(w):
      ...     return jnp.stack([10 * w[0] - 10, w[0] - w[1]])
      >>> def loss_of_outputs(y):
      ...     return jnp.sum(y**2)
      >>> @jax.jit
      ... def step(w, state):
      ...     loss = lambda w: loss_of_outputs(outputs_fn(w))
      ...     functions = dict(outputs_fn=outputs_fn, loss_of_outputs=loss_of_outputs)
      ...     updates, state = tx.update(
      ...         jax.grad(loss)(w), state, w, value_fn=loss, **functions
      ...     )
      ...     return optax.apply_updates(w, updates), state
      >>> tx, w = normax.second_order.hessian_free(damping=0.0), jnp.zeros(2)
      >>> step(w, tx.init(w))[0].round(4)
      Array([1., 1.], dtype=float32)

    References:
      Martens, Deep learning via Hessian-free optimization, 2010. van Laarhoven, L2
      Regularization versus Batch and Weight Normalization, 2017, section 5.4.
    """
    numbers = dict(
        damping=damping,
        weight_decay=weight_decay,
        cg_tolerance=cg_tolerance,
        warm_start=warm_start,
        preconditioner_power=preconditioner_power,
    )
    for name, number in numbers.items():
        check_range(name, number, low=0)
    check_range("cg_iterations", cg_iterations, low=1)

    def init_fn(params):
        dtype = _dtype(jax.tree.leaves(params))
        return HessianFreeState(
            count=jnp.zeros((), jnp.int32),
            damping=jnp.asarray(damping, dtype),
            direction=jax.tree.map(
                lambda w: jnp.zeros_like(w, dtype) if _is_float(w) else None, params
            ),
            reduction_ratio=jnp.ones((), dtype),
            iterations=jnp.zeros((), jnp.int32),
        )

    def update_fn(
        updates,
        state,
        params=None,
        *,
        value_fn=None,
        outputs_fn=outputs_fn,
        loss_of_outputs=loss_of_outputs,
        curvature_diagonal=None,
        **extra_args,
    ):
        del extra_args
        if value_fn is None:
            raise ValueError(
                "normax.second_order.hessian_free evaluates the loss, but `value_fn` "
                "is None; call update(grads, state, params, value_fn=loss_of_params)."
            )
        if (outputs_fn is None) != (loss_of_outputs is None):
            raise ValueError(
                "normax.second_order.hessian_free takes the Gauss-Newton matrix from "
                f"`outputs_fn` and `loss_of_outputs` together, but got {outputs_fn} "
                f"and {loss_of_outputs}; give both, or neither for the Hessian."
            )
        leaves, treedef = jax.tree.flatten(params)
        grads = treedef.flatten_up_to(updates)
        # Arrays without a gradient, or without derivatives, are constants.
        free = [
            index
            for index, (w, g) in enumerate(zip(leaves, grads, strict=True))
            if g is not None and _is_float(w)
        ]
        if not sum(jnp.size(leaves[index]) for index in free):
            return updates, state
        dtype = state.damping.dtype

        def pick(tree):
            arrays = treedef.flatten_up_to(tree)
            return [jnp.asarray(arrays[index], dtype) for index in free]

        def place(vector, others):
            others = list(others)
            for index, piece in zip(free, vector, strict=True):
                others[index] = piece
            return treedef.unflatten(others)

        def place_like(vector, others):
            dtypes = [jnp.result_type(others[index]) for index in free]
            pieces = zip(vector, dtypes, strict=True)
            return place([x.astype(dtype) for x, dtype in pieces], others)

        w, gradient, last = pick(params), pick(updates), pick(state.direction)
        decay = jnp.asarray(weight_decay, dtype)
        mu, tolerance = state.damping, jnp.asarray(cg_tolerance, dtype)

        def loss(vector):
            return value_fn(place_like(vector, leaves))

        def decayed(vector):
            return loss(vector) + decay / 2 * inner(vector, vector)

        outputs = outputs_fn and (lambda vector: outputs_fn(place_like(vector, leaves)))
        undamped = _curvature(loss, outputs, loss_of_outputs, w)

        def product(v, shift):
            return add(undamped(v), shift, v)

        gradient = add(gradient, decay, w)
        # The system is solved in units of the weights: of a scale-invariant loss, the
        # curvature is inverse to their square. Where it is not, zeros and very small
        # weights say nothing.
        unit = jnp.clip(magnitude(w), 2.0**-50, 2.0**50)
        if curvature_diagonal is None:
            metric = [jnp.ones((), dtype) for _ in w]
        else:
            power = jnp.asarray(preconditioner_power, dtype)
            diagonal = [
                unit * (c + decay + mu) * unit for c in pick(curvature_diagonal)
            ]
            metric = [jax.lax.stop_gradient(nonzero(c) ** power) for c in diagonal]

        # From the last solution, unless the model is no lower there than at 0.
        last = [jnp.asarray(warm_start, dtype) * x for x in last]
        image = product(last, decay + mu)
        height = inner(last, image) / 2 + inner(last, gradient)
        kept = height < 0
        last, image = [
            [jnp.where(kept, x, 0) for x in vector] for vector in (last, image)
        ]
        vector = [-g - a for g, a in zip(gradient, image, strict=True)]
        vector = multiply(unit, vector)
        size = magnitude(vector)
        scaled = multiply(1 / size, vector)
        square = inner(scaled, divide(scaled, metric))
        height = jnp.where(kept, height, 0) / size / size
        start = jax.lax.stop_gradient(height / nonzero(square))
        change, iterations = jax.lax.custom_linear_solve(
            lambda v: multiply(unit, product(multiply(unit, v), decay + mu)),
            vector,
            lambda product, vector: conjugate_gradients(
                product, vector, metric, start, tolerance, cg_iterations
            ),
            symmetric=True,
            has_aux=True,
        )
        direction = add(last, unit, change)

        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        step = [jnp.asarray(rate, dtype) * p for p in direction]
        slope = inner(gradient, step)
        model = slope + inner(step, product(step, decay)) / 2
        before = loss(w)
        rounding = 8 * jnp.finfo(before.dtype).eps * jnp.abs(before).astype(dtype)
        before = decayed(w)
        part, after = _backtrack(
            lambda part: decayed(add(w, part, step)), before, slope, rounding
        )
        seen = ~(jnp.abs(model) <= rounding)
        ratio = jnp.where(seen, (after - before) / jnp.where(seen, model, 1), 1)
        factor = jnp.where(
            (ratio >= 0.25) & (model < 0), jnp.where(ratio > 0.75, 2 / 3, 1), 1.5
        )
        new_state = HessianFreeState(
            count=optax.safe_increment(state.count),
            damping=mu * jnp.where(seen, factor, 1).astype(dtype),
            direction=place(direction, treedef.flatten_up_to(state.direction)),
            reduction_ratio=jax.lax.stop_gradient(ratio.astype(dtype)),
            iterations=iterations,
        )
        return place_like([part * s for s in step], grads), new_state

    return requiring_params(
        "hessian_free", optax.GradientTransformationExtraArgs(init_fn, update_fn)
    )
