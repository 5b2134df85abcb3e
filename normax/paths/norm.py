r"""Path norms and path scales of ReLU networks.

Rescaling a hidden unit of a ReLU network, its incoming weights by $c$ and its
outgoing ones by $1/c$, does not change the function. The path norm knows only products
of weights along paths, which no rescaling changes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from normax._core.axes import PyTree
from normax._core.modules import refuse_modules
from normax.paths import numbers
from normax.paths.arithmetic import PathArithmetic
from normax.paths.lifting import PathTransform
from normax.paths.network import check_order, check_power, lift, total
from normax.paths.numbers import Scaled
from normax.paths.one_example import Forward
from normax.paths.values import Factors


def with_automatic_sharding(fn: Callable[[PyTree], Any]) -> Callable[[PyTree], Any]:
    """Have XLA lay out what the paths are summed in, also on an explicit mesh."""

    @functools.wraps(fn)
    def call(params):
        mesh = jax.sharding.get_abstract_mesh()
        if AxisType.Explicit not in mesh.axis_types:
            return fn(params)
        return jax.sharding.auto_axes(fn, out_sharding=PartitionSpec())(params)

    return call


def _of_total(
    result: Callable[[PathArithmetic, Scaled], jax.Array],
    forward: Forward,
    params: PyTree,
    inputs: PyTree,
    p: jax.typing.ArrayLike,
) -> jax.Array:
    """Return a function of the sum over all paths."""
    refuse_modules(params)
    check_power(p)

    # A cache keyed by `forward` would keep what `forward` closed over at its first
    # call. So the program is compiled anew.
    def evaluate(params):
        transform = PathTransform(PathArithmetic(p))
        outputs, _ = lift(transform, forward, params, inputs)
        return result(transform.arithmetic, total(transform.arithmetic, outputs))

    return jax.jit(with_automatic_sharding(evaluate))(params)


def scale_factors(
    forward: Forward,
    params: PyTree,
    inputs: PyTree,
    p: jax.typing.ArrayLike,
    args: tuple[PyTree, ...] = (),
    direct: bool = False,
) -> PyTree:
    r"""Return factors of $\partial F/\partial v_e$, a tuple for each parameter.

    If `direct`, some are NaN where one pass over the weights did not do.
    """
    check_power(p)
    transform = PathTransform(PathArithmetic(p, direct))
    outputs, weights = lift(transform, forward, params, inputs, args)
    dtype = outputs[0].value.root.dtype
    for path in outputs:
        transform.accumulate(path, (numbers.ones(path.shape, dtype),))
    transform.run_backward()
    factors: list[Factors | None] = []
    for w in weights:
        if w.cotangent is not None and len(w.cotangent) > 2:
            factors.append((numbers.broadcast(w.cotangent, w.shape),))
        elif w.cotangent is not None:
            factors.append(w.cotangent)
        elif w.params:  # no path uses it
            factors.append((numbers.zeros(w.shape, dtype),))
        else:
            factors.append(None)
    return jax.tree.unflatten(jax.tree.structure(params), factors)


def path_norm(
    forward: Forward,
    params: PyTree,
    inputs: PyTree,
    p: jax.typing.ArrayLike = 2.0,
    log: bool = False,
) -> jax.Array:
    r"""Path norm of a ReLU network.

    $$\phi_p(w) = \Big(\sum_{\text{paths}} \prod_{e \in \text{path}}
      |w_e|^p\Big)^{1/p}$$

    The sum is over all paths from an input, or from the constant input of a bias, to an
    output. Constants that are added one after another, as a bias and the shift of batch
    norm, are one edge, their sum. Rescaling a hidden unit does not change it. `forward`
    is a positively homogeneous network written in JAX, Linen's `model.apply` and NNX's
    `nnx.merge` included: dense layers and convolutions of any kind, ReLU, leaky ReLU
    (as its steepest slope), max- and average-pooling, residual connections, batch norm
    with running statistics, `jit`, `checkpoint` and `scan`. The network is traced at
    every call; under `jax.jit` that costs nothing. First derivatives are exact; second
    ones are 0 along weights that are 0, if they alone make a path value 0, as all
    incoming weights of a dead unit do.

    Args:
      forward: The network, `forward(params, inputs) -> outputs`. All floats that it
        returns are outputs, also what no input reaches (paths from a constant): let it
        return the logits alone, without statistics or penalties.
      params: Its parameters, a pytree.
      inputs: An example or a batch of its inputs, arrays or `jax.ShapeDtypeStruct`s;
        only shapes matter, and the norm is that of one example. A batch is told by
        the first axis of all inputs and outputs but scalars, over which nothing sums.
        Integers are constants.
      p: The power, at least 1 and below 32.
      log: Whether to return $\log \phi_p$, which is finite at any depth, width and
        scale of the weights. In float32 the units of one layer may differ in scale by
        a factor of $10^{75}$, and positions of one unit, or what a window or a
        cumulative sum goes over, by $10^{38/p}$; what is smaller counts as 0.

    Returns:
      A scalar, in float32 or the wider dtype of the parameters. The norm is infinite
      where it is too large for that dtype; its logarithm is $-\infty$ if every path
      has a weight 0.

    Raises:
      ValueError: The network is not positively homogeneous (the message names the
        primitive and the source line), `p` is out of range, a parameter is complex,
        or the arguments are swapped.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import normax
      >>> def forward(params, x):
      ...     return jax.nn.relu(x @ params["hidden"]) @ params["output"]
      >>> hidden, output = jnp.array([[1.0, 2.0]]), jnp.array([[3.0], [2.0]])
      >>> params = {"hidden": hidden, "output": output}
      >>> norm = normax.path_norm(forward, params, jnp.ones((1, 1)))
      >>> round(float(norm), 5)  # the root of 9 + 16
      5.0
      >>> def deep(kernels, x):
      ...     for kernel in kernels:
      ...         x = jax.nn.relu(x @ kernel)
      ...     return x
      >>> kernels = [jnp.full((4, 4), 100.0)] * 60  # the norm is 2 * 200 ** 60
      >>> log_norm = normax.path_norm(deep, kernels, jnp.ones((1, 4)), log=True)
      >>> round(float(log_norm), 2), round(float(jnp.log(2.0) + 60 * jnp.log(200.0)), 2)
      (318.59, 318.59)

    References:
      Neyshabur, Salakhutdinov, Srebro, Path-SGD: Path-Normalized Optimization in Deep
      Neural Networks, 2015, equation (5).
    """
    check_order("path_norm", forward)

    def result(arithmetic, total):
        return arithmetic.log(total) / p if log else arithmetic.pth_root(total)

    return _of_total(result, forward, params, inputs, p)


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
    divides the gradient by it. The range is that of `path_norm`'s logarithm.

    Args:
      forward: The network, as in `path_norm`.
      params: Its parameters, a pytree. They are edge weights, up to reshaping,
        transposing, sums, and factors that hold another parameter or none.
      inputs: An example or a batch of its inputs; only shapes matter.
      p: The power, at least 1 and below 32.
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
      >>> normax.path_scales(forward, params, jnp.ones((1, 1)))["hidden"].round(4)
      Array([[9., 4.]], dtype=float32)

    References:
      Neyshabur, Salakhutdinov, Srebro, Path-SGD: Path-Normalized Optimization in Deep
      Neural Networks, 2015, equation (9).
    """
    check_order("path_scales", forward)
    refuse_modules(params)

    def evaluate(params):
        factors = scale_factors(forward, params, inputs, p)
        arithmetic = PathArithmetic(p)

        def finish(leaf, factors):
            if factors is None:
                return None
            if log:  # each by itself: a product may leave the range of its factors
                logarithms = [arithmetic.log(factor) for factor in factors]
                whole = functools.reduce(jnp.add, logarithms) * (2 / p)
            else:
                whole = arithmetic.path_scale(numbers.multiply(*factors))
            return jnp.broadcast_to(whole, jnp.shape(leaf))

        return jax.tree.map(finish, params, factors)

    return jax.jit(with_automatic_sharding(evaluate))(params)
