r"""Path norms, path scales, and Path-SGD: steepest descent in the geometry of paths.

Rescaling a hidden unit of a ReLU network, its incoming weights by $c$ and its
outgoing ones by $1/c$, does not change the function, but it changes the step of SGD.
The path norm and Path-SGD know only products of weights along paths, which no
rescaling changes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, PartitionSpec

import normax._path_layers  # registers its rules
import normax._path_rules
import normax._path_scan  # noqa: F401
from normax._axes import PyTree
from normax._checks import check_range, require_params
from normax._feed_forward import dense_stack, require_whole_network
from normax._norms import at_least_float32
from normax._path_arithmetic import PathArithmetic, Scaled
from normax._path_lifting import (
    Activation,
    Factors,
    Origin,
    Path,
    PathTransform,
    Unsupported,
    Weight,
)

Forward = Callable[[PyTree, PyTree], PyTree]


def _is_float(leaf: Any) -> bool:
    # Keys of random numbers, which NNX states hold, have no numeric dtype.
    dtype = getattr(leaf, "dtype", None) or jax.dtypes.result_type(leaf)
    return jnp.issubdtype(dtype, jnp.inexact)


def _one_example(forward: Forward, params: PyTree, inputs: PyTree) -> PyTree:
    """Return inputs with a batch of one, if their first axis is that of a batch."""
    sizes = {np.shape(x)[:1] for x in jax.tree.leaves(inputs)}
    if len(sizes) != 1 or sizes <= {(), (1,)}:
        return inputs

    def first(x):
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype)
        return x[:1]

    one = jax.tree.map(first, inputs)
    whole = jax.eval_shape(forward, params, inputs)
    try:
        part = jax.eval_shape(forward, params, one)
    except Exception:  # whatever the network raises: the first axis is one of features
        return inputs
    is_batch = jax.tree.map(
        lambda a, b: a.shape[:1] in sizes and b.shape == (1, *a.shape[1:]), whole, part
    )
    return one if all(jax.tree.leaves(is_batch)) else inputs


def _lift(
    forward: Forward, params: PyTree, inputs: PyTree, p: jax.typing.ArrayLike
) -> tuple[PathTransform, Path, list[Weight]]:
    """Interpret a network.

    Returns:
      The interpreter, the sum over all paths, and the nodes of the parameters.
    """
    check_range("p", p, 1, 32)
    flat = jax.tree_util.tree_leaves_with_path(params)
    names = [f"params{jax.tree_util.keystr(path)}" for path, _ in flat]
    for name, (_, leaf) in zip(names, flat, strict=True):
        if _is_float(leaf) and jnp.iscomplexobj(leaf):
            raise ValueError(
                f"the weights of a path norm must be real, but {name} is complex; hold "
                "real and imaginary parts as two arrays."
            )
    inputs = _one_example(forward, params, inputs)
    closed = jax.make_jaxpr(forward)(params, inputs)
    arithmetic = PathArithmetic(p)
    transform = PathTransform(arithmetic)
    weights = [
        Weight(
            jnp.asarray(leaf),
            frozenset([Origin(frozenset([name]))] if _is_float(leaf) else []),
        )
        for name, (_, leaf) in zip(names, flat, strict=True)
    ]
    floats = [jnp.asarray(leaf) for _, leaf in flat if _is_float(leaf)]
    (dtype,) = {array.dtype for array in at_least_float32(jnp.float32(0), *floats)}
    activations = [
        Activation(Path(arithmetic.ones(np.shape(leaf), dtype)))
        if _is_float(leaf)
        else Weight(leaf)
        for leaf in jax.tree.leaves(inputs)
    ]
    if any(
        isinstance(getattr(x, "value", 0), jax.ShapeDtypeStruct) for x in activations
    ):
        raise ValueError(
            "integers among the inputs are constants of the network, so their values "
            "matter, but `inputs` holds only the shape of some; pass them as arrays."
        )
    outputs = transform.interpret(closed.jaxpr, closed.consts, [*weights, *activations])
    reached: list[Any] = []
    for output, variable in zip(outputs, closed.jaxpr.outvars, strict=True):
        if isinstance(output, Unsupported):
            raise ValueError(output.message)
        floating = jnp.issubdtype(variable.aval.dtype, jnp.inexact)
        if floating and isinstance(output, Activation | Weight):
            reached.append(output)
    if not any(isinstance(output, Activation) for output in reached):
        raise ValueError(
            "paths lead from the inputs to the outputs, but no output of `forward` "
            "depends on a floating-point input; pass `inputs` as an array of floats."
        )
    return transform, transform.total(reached), weights


def _with_automatic_sharding(fn: Callable[[PyTree], Any]) -> Callable[[PyTree], Any]:
    """Have XLA lay out what the paths are summed in, also on an explicit mesh."""

    @functools.wraps(fn)
    def call(params):
        mesh = jax.sharding.get_abstract_mesh()
        if AxisType.Explicit not in mesh.axis_types:
            return fn(params)
        return jax.sharding.auto_axes(fn, out_sharding=PartitionSpec())(params)

    return call


def _compiled(
    result: Callable[..., Any],
    forward: Forward,
    params: PyTree,
    inputs: PyTree,
    p: jax.typing.ArrayLike,
) -> Any:
    # One program, compiled anew: a cache keyed by `forward` would keep stale what
    # `forward` closes over.
    def evaluate(params):
        return result(*_lift(forward, params, inputs, p))

    return jax.jit(_with_automatic_sharding(evaluate))(params)


def _scale_factors(
    forward: Forward, params: PyTree, inputs: PyTree, p: jax.typing.ArrayLike
) -> PyTree:
    r"""Return factors of $\partial F/\partial v_e$, a tuple for each parameter."""
    transform, total, weights = _lift(forward, params, inputs, p)
    one = transform.arithmetic.ones((), total.value.root.dtype)
    transform.accumulate(total, (one,))
    transform.run_backward()
    factors: list[Factors | None] = []
    for w in weights:
        if w.cotangent is not None and len(w.cotangent) > 2:
            factors.append((transform.arithmetic.broadcast(w.cotangent, w.shape),))
        elif w.cotangent is not None:
            factors.append(w.cotangent)
        elif w.params:  # no path uses it
            factors.append((transform.arithmetic.zeros(w.shape, one.root.dtype),))
        else:
            factors.append(None)
    return jax.tree.unflatten(jax.tree.structure(params), factors)


def _two_factors(params: PyTree, factors: PyTree) -> tuple[tuple[PyTree, PyTree], ...]:
    """Return path scales as trees like the parameters, whose leaves are arrays.

    Optimizers' states hold such trees only, if they are to pass through Flax NNX.

    Args:
      params: The parameters.
      factors: A tuple of factors for each.

    Returns:
      Two factors, each the tree of its roots and that of its exponents.
    """

    def tree(index, part):
        def pick(leaf, product):
            if product is None:
                return None
            one = PathArithmetic(1).ones((1,) * np.ndim(leaf), product[0][0].dtype)
            return (*product, one)[index][part]

        return jax.tree.map(pick, params, factors)

    return tuple((tree(index, 0), tree(index, 1)) for index in range(2))


def path_norm(
    forward: Forward, params: PyTree, inputs: PyTree, p: jax.typing.ArrayLike = 2.0
) -> jax.Array:
    r"""Path norm of a ReLU network.

    $$\phi_p(w) = \Big(\sum_{\text{paths}} \prod_{e \in \text{path}}
      |w_e|^p\Big)^{1/p}$$

    The sum is over all paths from an input, or from the constant input of a bias, to
    an output. Rescaling a hidden unit does not change it. `forward` is any
    positively homogeneous network written in JAX, Linen's `model.apply` and NNX's
    `nnx.merge` included: dense layers and convolutions of any kind, ReLU, leaky ReLU
    (as its steepest slope), max- and average-pooling, residual connections, batch
    norm with running statistics, `jit`, `checkpoint` and `scan`. The network is
    traced at every call; under `jax.jit` that costs nothing.

    Args:
      forward: The network, `forward(params, inputs) -> outputs`.
      params: Its parameters, a pytree.
      inputs: An example or a batch of its inputs, arrays or `jax.ShapeDtypeStruct`s;
        only shapes matter, and the norm is that of one example. Integers are
        constants.
      p: The power, from 1 to 32.

    Returns:
      A scalar, in float32 or the wider dtype of the parameters; infinite where it
      is too large for that dtype, see `log_path_norm`.

    Raises:
      ValueError: The network is not positively homogeneous (the message names the
        primitive and the source line), `p` is out of range, or a parameter is
        complex.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import normax
      >>> def forward(params, x):
      ...     return jax.nn.relu(x @ params["hidden"]) @ params["output"]
      >>> hidden, output = jnp.array([[1.0, 2.0]]), jnp.array([[3.0], [2.0]])
      >>> params = {"hidden": hidden, "output": output}
      >>> float(normax.path_norm(forward, params, jnp.ones((1, 1))))  # 9 + 16
      5.0

    References:
      Neyshabur, Salakhutdinov, Srebro, Path-SGD: Path-Normalized Optimization in Deep
      Neural Networks, 2015, equation (5).
    """
    return _compiled(
        lambda transform, total, _: transform.arithmetic.pth_root(total.value),
        forward, params, inputs, p,
    )  # fmt: skip


def log_path_norm(
    forward: Forward, params: PyTree, inputs: PyTree, p: jax.typing.ArrayLike = 2.0
) -> jax.Array:
    r"""Logarithm of the path norm of a ReLU network.

    $$\log \phi_p(w) = \frac{1}{p} \log
      \sum_{\text{paths}} \prod_{e \in \text{path}} |w_e|^p$$

    Finite at any depth, width and scale of the weights.

    Args:
      forward: The network, as in `path_norm`.
      params: Its parameters, a pytree.
      inputs: An example or a batch of its inputs; only shapes matter.
      p: The power, from 1 to 32.

    Returns:
      A scalar, in float32 or the wider dtype of the parameters; $-\infty$ if every
      path has a weight 0.

    Raises:
      ValueError: As `path_norm`.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import normax
      >>> def forward(params, x):
      ...     for kernel in params:
      ...         x = jax.nn.relu(x @ kernel)
      ...     return x
      >>> deep = [jnp.full((4, 4), 100.0)] * 60  # the norm is 4 * 200 ** 60
      >>> log_norm = normax.log_path_norm(forward, deep, jnp.ones((1, 4)))
      >>> round(float(log_norm), 2), round(float(jnp.log(2.0) + 60 * jnp.log(200.0)), 2)
      (318.59, 318.59)

    References:
      Neyshabur, Salakhutdinov, Srebro, Path-SGD: Path-Normalized Optimization in Deep
      Neural Networks, 2015, equation (5).
    """
    return _compiled(
        lambda transform, total, _: transform.arithmetic.log(total.value) / p,
        forward, params, inputs, p,
    )  # fmt: skip


def path_scales(
    forward: Forward,
    params: PyTree,
    inputs: PyTree,
    p: jax.typing.ArrayLike = 2.0,
    log: bool = False,
) -> PyTree:
    r"""Curvature of the squared path norm along each parameter, $\gamma_p(w, e)$.

    $$\gamma_p(w, e) = \Big(\sum_{\text{paths through } e}\;
      \prod_{e' \ne e} |w_{e'}|^p\Big)^{2/p}$$

    A weight that many edges share, such as an entry of a convolution's kernel, counts
    every edge: the sum is over the edges and the paths through them. Path-SGD
    divides the gradient by it.

    Args:
      forward: The network, as in `path_norm`.
      params: Its parameters, a pytree. They are edge weights, up to reshaping,
        transposing, sums, and factors that hold another parameter or none.
      inputs: An example or a batch of its inputs; only shapes matter.
      p: The power, from 1 to 32.
      log: Whether to return $\log \gamma$, which is finite at any depth and scale.

    Returns:
      Pytree like `params` of arrays in float32 or wider, with None for arrays of
      integers. Where no path uses a weight, $\gamma = 0$ and its logarithm is
      $-\infty$.

    Raises:
      ValueError: As `path_norm`; or a parameter is no edge weight (the message names
        it and the primitive that computes with it, as weight norm's division does).

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import normax
      >>> def forward(params, x):
      ...     return jax.nn.relu(x @ params["hidden"]) @ params["output"]
      >>> hidden, output = jnp.array([[1.0, 2.0]]), jnp.array([[3.0], [2.0]])
      >>> params = {"hidden": hidden, "output": output}
      >>> normax.path_scales(forward, params, jnp.ones((1, 1)))["hidden"]
      Array([[9., 4.]], dtype=float32)

    References:
      Neyshabur, Salakhutdinov, Srebro, Path-SGD: Path-Normalized Optimization in Deep
      Neural Networks, 2015, equation (9).
    """

    def evaluate(params):
        factors = _scale_factors(forward, params, inputs, p)
        arithmetic = PathArithmetic(p)
        plain = arithmetic.path_scale

        def finish(leaf, factors):
            if factors is None:
                return None
            value = arithmetic.broadcast(factors, jnp.shape(leaf))
            return arithmetic.log(value) * (2 / p) if log else plain(value)

        return jax.tree.map(finish, params, factors)

    return jax.jit(_with_automatic_sharding(evaluate))(params)


class ScaleByPathSGDState(NamedTuple):
    """State of `scale_by_path_sgd`.

    Attributes:
      count: Number of updates so far, an int32 scalar.
      path_scales: The path scales of the last time they were computed, two factors of
        roots and exponents; None if they are computed at every step.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, as in optax
    path_scales: PyTree


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
      inputs: An example or a batch of the network's inputs; only shapes matter.
      p: The power of the path norm, from 1 to 32.
      update_every: Number of steps after which the scales are computed again; in
        between they are kept in the state. The steps still commute with rescalings.

    Returns:
      A transformation whose `update` requires `params`.

    Raises:
      ValueError: `forward` comes without `inputs` or the other way round, or `p` or
        `update_every` is out of range. `init` and `update` raise if parameters are
        masked, are no plain stack though there is no `forward`, or are those of a
        network that is not positively homogeneous; `update` if `params` is None.

    Examples:
      >>> import jax.numpy as jnp
      >>> import normax
      >>> tx = normax.scale_by_path_sgd()
      >>> params = [jnp.array([[1.0, 2.0]]), jnp.array([[3.0], [2.0]])]
      >>> grads = [jnp.ones((1, 2)), jnp.ones((2, 1))]
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> updates[1]  # the incoming weights are 1 and 2
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
    every_step = isinstance(update_every, int) and update_every == 1

    @jax.jit
    @_with_automatic_sharding
    def compute(params):
        network = dense_stack(params) if forward is None else (forward, inputs)
        factors = _scale_factors(network[0], params, network[1], p)
        return _two_factors(params, factors)

    def scales_of(params):
        # Without parameters, as a placeholder of optax.tree.map_params stands for.
        return compute(params) if jax.tree.leaves(params) else ((params,) * 2,) * 2

    def init_fn(params):
        require_whole_network("scale_by_path_sgd", params)
        count = jnp.zeros((), jnp.int32)
        if every_step:
            if jax.tree.leaves(params):
                jax.eval_shape(compute, params)  # raises what would be raised later
            return ScaleByPathSGDState(count, None)
        return ScaleByPathSGDState(count, scales_of(params))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        params = require_params("scale_by_path_sgd", params)
        require_whole_network("scale_by_path_sgd", params)
        if every_step:
            scales = scales_of(params)
        else:
            scales = jax.lax.cond(
                state.count % update_every == 0,
                scales_of,
                lambda params: state.path_scales,
                params,
            )
        arithmetic = PathArithmetic(p)

        def divide(param, update, *arrays):
            del param
            if update is None or arrays[0] is None:
                return update
            factors = (Scaled(*arrays[:2]), Scaled(*arrays[2:]))
            return arithmetic.divide_by_path_scale(jnp.asarray(update), factors)

        kept = None if every_step else scales
        count = optax.safe_increment(state.count)
        updates = jax.tree.map(divide, params, updates, *scales[0], *scales[1])
        return updates, ScaleByPathSGDState(count, kept)

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
      p: The power of the path norm, from 1 to 32.
      momentum: Decay rate of the velocity, None for none.
      nesterov: Whether the momentum is Nesterov's.
      update_every: Number of steps after which the scales are computed again.

    Returns:
      A transformation whose `update` requires `params`.

    Raises:
      ValueError: As `scale_by_path_sgd`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import normax
      >>> tx = normax.path_sgd(learning_rate=0.5)
      >>> params = [jnp.array([[1.0, 2.0]]), jnp.array([[3.0], [2.0]])]
      >>> grads = [jnp.ones((1, 2)), jnp.ones((2, 1))]
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> updates[1]
      Array([[-0.5  ],
             [-0.125]], dtype=float32)

    References:
      Neyshabur, Salakhutdinov, Srebro, Path-SGD: Path-Normalized Optimization in Deep
      Neural Networks, 2015, equation (8).
    """
    return optax.chain(
        scale_by_path_sgd(forward, inputs, p, update_every),
        optax.identity() if momentum is None else optax.trace(momentum, nesterov),
        optax.scale_by_learning_rate(learning_rate),
    )
