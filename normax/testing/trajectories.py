"""Assertions that two networks, or two training runs, compute the same functions."""

import functools
import itertools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from normax._core.axes import PyTree
from normax._core.checks import check_range
from normax._core.comparisons import (
    Comparison,
    check_all,
    largest,
    maximum,
    named_leaves,
)
from normax._core.norms import nonzero
from normax._core.programs import compiled, full_precision

# Rounding may change an output by this much, in units of the precision of its largest
# entry. Runs must change it by this many times more, or rounding hides a difference.
_ROUNDING, _RESOLUTION = 32, 20.0

Run: TypeAlias = tuple[optax.GradientTransformation, Callable[..., Any], PyTree]


def _check_same_structure(
    params: PyTree, other: PyTree, custom_message: str | None
) -> None:
    names = [
        {jax.tree_util.keystr(path): jnp.shape(leaf) for path, leaf in flat}
        for flat in map(jax.tree_util.tree_leaves_with_path, (params, other))
    ]
    differing = dict(names[0].items() ^ names[1].items())
    if differing:
        custom = f" [{custom_message}]" if custom_message else ""
        raise AssertionError(
            "[normax] assert_rescaling_equivalent: a rescaling must keep the structure "
            f"and the shapes of the parameters; they differ at "
            f"params{', params'.join(sorted(differing))}{custom}"
        )


@full_precision()
def assert_rescaling_equivalent(
    params: PyTree,
    other: PyTree,
    fn: Callable[[PyTree], PyTree],
    *,
    rtol: float = 1e-3,
    atol: float = 0.0,
    custom_message: str | None = None,
) -> None:
    r"""Check that two sets of parameters are one network up to rescaling.

    $$f(\tilde w) = f(w), \qquad \operatorname{sign} \tilde w = \operatorname{sign} w$$

    A rescaling multiplies what enters a unit by a positive factor and divides what
    leaves it by the same. So it keeps the function, and the sign of every parameter.

    Args:
      params: Pytree of arrays $w$.
      other: Pytree $\tilde w$ of the same structure and shapes.
      fn: The network's outputs on a batch, a pytree of arrays: `fn(params)`.
      rtol: Tolerance relative to the largest entry of each output.
      atol: Absolute tolerance.
      custom_message: Added to the message of the error.

    Returns:
      None.

    Raises:
      AssertionError: A shape, an output or a sign differs, or is not finite.
      RuntimeError: Under `jax.jit` without `chex.chexify`.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import normax
      >>> def fn(params):
      ...     return jax.nn.relu(jnp.arange(3.0) * params["in"]) * params["out"]
      >>> params = {"in": 2.0, "out": -1.0}
      >>> other = {"in": 4.0, "out": -0.5}
      >>> normax.testing.assert_rescaling_equivalent(params, other, fn)

    References:
      Neyshabur, Salakhutdinov, Srebro, Path-SGD, 2015, §2.
    """
    _check_same_structure(params, other, custom_message)
    compiled_fn = compiled(fn)
    comparisons = [
        Comparison(where, x, y, atol + rtol * largest(y))
        for (where, y), (_, x) in zip(
            named_leaves("outputs", compiled_fn(params)),
            named_leaves("outputs", compiled_fn(other)),
            strict=True,
        )
    ]
    claim = "assert_rescaling_equivalent: fn must be the same for both"
    check_all(claim, comparisons, custom_message)
    signs = [
        Comparison(where, jnp.sign(x), jnp.sign(y), 0.0)
        for (where, y), (_, x) in zip(
            named_leaves("params", params), named_leaves("params", other), strict=True
        )
    ]
    claim = "assert_rescaling_equivalent: a rescaling must keep the signs"
    check_all(claim, signs, custom_message)


def _outputs(fn: Callable[[PyTree], PyTree], steps: int) -> Callable[..., PyTree]:
    """Return the compiled function of a run that evaluates `fn` at every step."""

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def train(tx, loss_fn, params, batches):
        tx = optax.with_extra_args_support(tx)
        params = jax.tree.map(jnp.asarray, params)

        def step(carry, batch):
            params, state = carry
            arguments = () if batch is None else (batch,)

            def value_fn(params):
                return loss_fn(params, *arguments)

            value, grad = jax.value_and_grad(value_fn)(params)
            extra = dict(value=value, grad=grad, value_fn=value_fn)
            updates, state = tx.update(grad, state, params, **extra)
            return (optax.apply_updates(params, updates), state), fn(params)

        carry = (params, tx.init(params))
        (params, _), history = jax.lax.scan(step, carry, batches, length=steps)
        return jax.tree.map(
            lambda ys, y: jnp.concatenate([ys, jnp.asarray(y)[None]]),
            history,
            fn(params),
        )

    return train


@full_precision()
def _check_runs(
    claim, first, second, fn, steps, batches, rtol, atol, custom_message
) -> None:
    check_range("steps", steps, low=1)
    train = _outputs(fn, steps)
    histories = [
        named_leaves("outputs", train(*run, batches)) for run in (first, second)
    ]
    comparisons: list[list[Comparison]] = [[] for _ in range(steps + 1)]
    changes = []
    for (where, y), (_, x) in zip(*histories, strict=True):
        change = jnp.abs(y - y[:1]).max(tuple(range(1, y.ndim)), initial=0.0)
        offset = x[0] - y[0]
        rounding = _ROUNDING * jnp.finfo(y.dtype).eps * largest(y)
        changes.append(change.max() / nonzero(rounding))
        # The epsilon of batch norm makes functions differ a little at the start. Then
        # their changes differ too, in proportion.
        relative = rtol + 10 * largest(offset) / nonzero(largest(y[0]))
        tolerances = relative * jax.lax.cummax(change) + rounding
        comparisons[0].append(
            Comparison(f"step 0, {where}", x[0], y[0], atol + rtol * largest(y[0]))
        )
        for t in range(1, steps + 1):
            values = (x[t] - offset, y[t], atol + tolerances[t])
            comparisons[t].append(Comparison(f"step {t}, {where}", *values))
    check_all(claim, list(itertools.chain(*comparisons)), custom_message)
    moved = Comparison(
        f"the outputs' largest change in {steps} steps, in units of what rounding may "
        f"change, and at least {_RESOLUTION}",
        jnp.minimum(maximum(changes), _RESOLUTION),
        jnp.full([], _RESOLUTION),
        0.0,
    )
    check_all(claim + ", and change them", [moved], custom_message)


def assert_equivalent_trajectories(
    first: Run,
    second: Run,
    fn: Callable[[PyTree], PyTree],
    *,
    steps: int = 10,
    batches: PyTree = None,
    rtol: float = 1e-3,
    atol: float = 0.0,
    custom_message: str | None = None,
) -> None:
    r"""Check that two training runs visit the same functions, step by step.

    $$f(\tilde w_t) = f(w_t), \qquad t = 0, 1, \dots, \text{steps}$$

    After the start, *changes* of the outputs are compared, so that a small learning
    rate hides no difference. Runs that change the outputs by little more than rounding
    prove nothing, and fail. Tolerances: docs/theory/invariance.md.

    Args:
      first: The transformation, the loss and the first parameters, `(tx, loss_fn,
        params)`. `tx.update` is given `value`, `grad` and `value_fn`, as by
        `optax.lbfgs`. The loss is `loss_fn(params)`, or `loss_fn(params, batch)`.
      second: The other run; the structure of its parameters may differ.
      fn: The outputs that are compared, a pytree of arrays: `fn(params)`.
      steps: Number of steps.
      batches: Pytree of arrays, with the batches of all steps along their first axis;
        None for a loss of the parameters alone.
      rtol: Relative tolerance.
      atol: Absolute tolerance.
      custom_message: Added to the message of the error.

    Returns:
      None.

    Raises:
      AssertionError: Outputs part, at a step that the message names. Or an output is
        not finite, or never changes.
      ValueError: `steps` is not positive.
      RuntimeError: Under `jax.jit` without `chex.chexify`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import normax
      >>> import optax
      >>> def fn(w):
      ...     return w / jnp.linalg.norm(w)
      >>> def loss_fn(w):
      ...     return fn(w)[0]
      >>> w = jnp.array([3.0, 4.0])
      >>> first, second = optax.sgd(0.4), optax.sgd(0.1)
      >>> normax.testing.assert_equivalent_trajectories(
      ...     (first, loss_fn, 2 * w), (second, loss_fn, w), fn
      ... )

    References:
      van Laarhoven, L2 Regularization versus Batch and Weight Normalization, 2017, §3.
    """
    claim = "assert_equivalent_trajectories: both runs must visit the same functions"
    _check_runs(claim, first, second, fn, steps, batches, rtol, atol, custom_message)


def assert_rescaling_invariant(
    tx: optax.GradientTransformation,
    loss_fn: Callable[..., Any],
    params: PyTree,
    rescaled: PyTree,
    fn: Callable[[PyTree], PyTree],
    *,
    steps: int = 10,
    batches: PyTree = None,
    rtol: float = 1e-3,
    atol: float = 0.0,
    custom_message: str | None = None,
) -> None:
    r"""Check that an optimizer does not see how a network is scaled.

    $$\tilde w_0 \sim w_0 \;\Rightarrow\; f(\tilde w_t) = f(w_t), \qquad t \ge 0$$

    where $\tilde w \sim w$ are rescaling equivalent. Path-SGD is rescaling invariant;
    gradient descent is not.

    Args:
      tx: The optimizer.
      loss_fn: Called as `loss_fn(params)`, or `loss_fn(params, batch)`.
      params: Pytree of arrays $w_0$.
      rescaled: The same network rescaled, $\tilde w_0$.
      fn: As in `assert_equivalent_trajectories`.
      steps: Number of steps.
      batches: As in `assert_equivalent_trajectories`.
      rtol: As in `assert_equivalent_trajectories`.
      atol: Absolute tolerance.
      custom_message: Added to the message of the error.

    Returns:
      None.

    Raises:
      AssertionError: The two are not rescaling equivalent, or their outputs part.
      ValueError: `steps` is not positive.
      RuntimeError: Under `jax.jit` without `chex.chexify`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import normax
      >>> import optax
      >>> def fn(params):
      ...     return params["in"] * params["out"] * jnp.arange(3.0)
      >>> def loss_fn(params):
      ...     return jnp.sum((fn(params) - 1) ** 2)
      >>> params, rescaled = {"in": 1.0, "out": 0.5}, {"in": 2.0, "out": 0.25}
      >>> check = normax.testing.assert_rescaling_invariant
      >>> try:
      ...     check(optax.sgd(0.1), loss_fn, params, rescaled, fn)
      ... except AssertionError as error:
      ...     print(str(error).split("; ")[1][:6])
      step 1

    References:
      Neyshabur, Salakhutdinov, Srebro, Path-SGD, 2015, §2 and Theorem 4.1.
    """
    assert_rescaling_equivalent(
        params, rescaled, fn, rtol=rtol, atol=atol, custom_message=custom_message
    )
    claim = "assert_rescaling_invariant: both networks must stay the same function"
    runs = (tx, loss_fn, params), (tx, loss_fn, rescaled)
    _check_runs(claim, *runs, fn, steps, batches, rtol, atol, custom_message)
