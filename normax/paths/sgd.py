r"""Path-SGD: steepest descent in the geometry of paths.

Rescaling the hidden units of a ReLU network does not change its function, but it
changes the step of SGD. The step of Path-SGD is divided by the curvature of the path
norm, and is rescaled as the weights are.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from normax._core.axes import PyTree
from normax._core.checks import check_learning_rate, check_range, require_params
from normax._core.scheduling import one_after
from normax.paths.arithmetic import divide_by_path_scale
from normax.paths.feed_forward import require_whole_network
from normax.paths.one_example import Forward
from normax.paths.programs import path_program


class ScaleByPathSGDState(NamedTuple):
    r"""State of `scale_by_path_sgd`.

    Attributes:
      count: Number of updates so far, an int32 scalar.
      inverse_roots: Two factors of $\gamma^{-1/4}$, of the last time that path scales
        were computed; None if they are computed at every step.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, as in optax
    inverse_roots: tuple[PyTree, PyTree] | None


def scale_by_path_sgd(
    forward: Forward | None = None,
    inputs: PyTree = None,
    p: jax.typing.ArrayLike = 2.0,
    update_every: jax.typing.ArrayLike = 1,
) -> optax.GradientTransformationExtraArgs:
    r"""Divide updates by the path scales of the parameters, as Path-SGD does.

    $$u_e \leftarrow u_e \,/\, \gamma_p(w, e)$$

    Steps along the result commute with every rescaling of hidden units. There is no
    $\epsilon$, which would break that: where $\gamma = 0$ no path uses the weight, and
    its update is 0. The scales are computed with a range of their own, so that
    very unbalanced networks train in float32 as balanced ones do.

    It needs the parameters of the whole network, so it stands outside of
    `optax.masked` and `optax.partition`. Under `optax.inject_hyperparams`, name
    `forward`, `inputs` and `p` in `static_args`.

    Args:
      forward: The network without its loss, `forward(params, inputs) -> outputs`,
        without dropout; see `path_norm`. None for a plain stack of dense layers with
        ReLUs between them: the kernels (inputs, outputs) and biases are then read
        off the parameters in natural order of their names (Dense_2 before Dense_10).
        As with `jax.jit`, what it closes over is read when this function object is
        first used with such parameters, inputs and `p`: transformations with the same
        one share a compiled program, and a new one, such as
        `functools.partial(forward)` or `model.apply` written again, is read anew.
        So do not close over what training changes: path scales are off by 1e4 once a
        running variance has fallen from 1 to 1e-4. Let `forward` take such values
        as further arguments, and hand them over at every step:
        `update(updates, state, params, forward_args=(batch_stats,))` calls
        `forward(params, inputs, batch_stats)`, without compiling anew.
      inputs: An example or a batch of the network's inputs; only shapes matter, but
        integers are constants, and read when the transformation is built.
      p: The power of the path norm, at least 1 and below 32.
      update_every: Number of steps after which the scales are computed again; in
        between they are kept in the state. The steps still commute with rescalings.
        Name it in `static_args` of `optax.inject_hyperparams`: a number that is traced
        may be more than 1, so that the state keeps scales.

    Returns:
      A transformation whose `update` requires `params`.

    Raises:
      ValueError: `forward` comes without `inputs` or the other way round, or `p` or
        `update_every` is out of range. `init` and `update` raise if parameters are
        masked, are no plain stack though there is no `forward`, or are those of a
        network that is not positively homogeneous; `update` if `params` is None, or
        if `forward_args` lacks what `forward` takes. A `forward` that needs them is
        looked at in `update` only.

    Examples:
      >>> import jax.numpy as jnp
      >>> import normax
      >>> tx = normax.scale_by_path_sgd()
      >>> params = [jnp.array([[1.0, 2.0]]), jnp.array([[3.0], [2.0]])]
      >>> grads = [jnp.ones((1, 2)), jnp.ones((2, 1))]
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> updates[1].round(5)  # the incoming weights are 1 and 2
      Array([[1.  ],
             [0.25]], dtype=float32)

    References:
      Neyshabur, Salakhutdinov, Srebro, Path-SGD: Path-Normalized Optimization in Deep
      Neural Networks, 2015, equation (8). Algorithm 1, line 8, there multiplies by
      $\gamma$, a misprint.
    """
    check_range("p", p, 1, 32)
    check_range("update_every", update_every, 1)
    if (forward is None) != (inputs is None):
        given, missing = (
            ("inputs", "forward") if forward is None else ("forward", "inputs")
        )
        raise ValueError(
            "`forward` and `inputs` describe the network together, but only "
            f"`{given}` is given; pass `{missing}` as well, or neither for a plain "
            "stack of dense layers."
        )
    if forward is not None and not callable(forward):
        raise ValueError(
            f"forward must be a function, but is a {type(forward).__name__}; the order "
            "is scale_by_path_sgd(forward, inputs)."
        )
    every_step = isinstance(update_every, int) and update_every == 1

    program = path_program(forward, inputs, p)

    def init_fn(params):
        require_whole_network("scale_by_path_sgd", params)
        count = jnp.zeros((), jnp.int32)
        if every_step:
            program.check(params)  # raises now what would be raised later
            return ScaleByPathSGDState(count, None)
        return ScaleByPathSGDState(count, program.first_roots(params))

    def update_fn(updates, state, params=None, *, forward_args=(), **extra_args):
        del extra_args
        params = require_params("scale_by_path_sgd", params)
        require_whole_network("scale_by_path_sgd", params)
        program.check_args(forward_args)
        if every_step:
            roots, event = program.roots(params, forward_args)
        else:
            due, kept = state.count % update_every == 0, state.inverse_roots
            roots, event = program.roots_if(due, params, kept, forward_args)
        one = one_after(event, updates)

        def divide(param, update, first, second):
            del param
            if update is None or first is None:
                return update
            second = second * one.astype(second.dtype)
            return divide_by_path_scale(jnp.asarray(update), first, second)

        updates = jax.tree.map(divide, params, updates, *roots)
        count = optax.safe_increment(state.count)
        return updates, ScaleByPathSGDState(count, None if every_step else roots)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def path_sgd(
    learning_rate: optax.ScalarOrSchedule,
    forward: Forward | None = None,
    inputs: PyTree = None,
    p: jax.typing.ArrayLike = 2.0,
    momentum: float | None = None,
    nesterov: bool = False,
    update_every: jax.typing.ArrayLike = 1,
) -> optax.GradientTransformationExtraArgs:
    r"""Path-SGD: steepest descent with respect to the path norm, edge by edge.

    $$w_e \leftarrow w_e - \frac{\eta}{\gamma_p(w, e)}
      \frac{\partial L}{\partial w_e}$$

    Networks that are rescalings of each other stay so, step by step, with momentum
    as well: its velocity has the units of the weights.

    Args:
      learning_rate: Learning rate $\eta$, a number or a schedule.
      forward: The network, or None for a plain stack of dense layers, see
        `scale_by_path_sgd`.
      inputs: An example or a batch of the network's inputs; only shapes matter.
      p: The power of the path norm, at least 1 and below 32.
      momentum: Decay rate of the velocity, None for none.
      nesterov: Whether the momentum is Nesterov's.
      update_every: Number of steps after which the scales are computed again.

    Returns:
      A transformation whose `update` requires `params`, and takes `forward_args`.

    Raises:
      ValueError: As `scale_by_path_sgd`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import normax
      >>> tx = normax.path_sgd(learning_rate=0.5)
      >>> params = [jnp.array([[1.0, 2.0]]), jnp.array([[3.0], [2.0]])]
      >>> grads = [jnp.ones((1, 2)), jnp.ones((2, 1))]
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> updates[1].round(5)
      Array([[-0.5  ],
             [-0.125]], dtype=float32)

    References:
      Neyshabur, Salakhutdinov, Srebro, Path-SGD: Path-Normalized Optimization in Deep
      Neural Networks, 2015, equation (8).
    """
    check_learning_rate(learning_rate)
    check_range("momentum", momentum, 0, 1)
    return optax.chain(
        scale_by_path_sgd(forward, inputs, p, update_every),
        optax.identity() if momentum is None else optax.trace(momentum, nesterov),
        optax.scale_by_learning_rate(learning_rate),
    )
