r"""Certificates: how far the outputs of two ReLU networks can be apart.

Let $x_i$, $x_i'$ be activations of two networks whose weights are $w$ and $w'$, of
equal signs, with $|w'| \le |w|$. If $|x_i'| \le B\,s_i$ and
$|x_i - x_i'| \le B\,d_i$, then

$$\Big|\sum_i w_{ij} x_i - w_{ij}' x_i'\Big| \le
  B \sum_i |w_{ij}|\, d_i + |w_{ij} - w_{ij}'|\, s_i ,$$

and no nonlinearity of a path norm moves two numbers further apart. This is how the path
metric goes through a layer. At the inputs $s = 1$, $d = 0$, and $B$ is the largest
entry, or 1 for the constant input of the biases.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from normax._core.axes import PyTree
from normax._core.norms import at_least_float32
from normax._core.programs import is_float
from normax.paths.metric import path_metric_bound
from normax.paths.network import check_order
from normax.paths.one_example import Forward


def output_change_bound(
    forward: Forward, params: PyTree, other: PyTree, inputs: PyTree
) -> jax.Array:
    r"""Bound on how far the outputs of two ReLU networks are apart.

    $$\|f_\theta(x) - f_{\theta'}(x)\|_1 \le \max(1, B)\;
      \|\Phi(\theta) - \Phi(\theta')\|_1 \qquad \text{for all } \|x\|_\infty \le B$$

    $B$ is the largest entry of `inputs`, and the metric is `path_metric_bound`, which
    is the exact one for pruning and rounding towards zero. The bound holds for every
    input that is no larger, not only for those given, and after any rescaling of hidden
    units. It sums over all paths as if all were active and none cancelled. So of deep
    networks it is larger than what is measured, by orders of magnitude. It is attained
    where weights and inputs are positive. It says nothing of the rounding of a forward
    pass itself.

    Args:
      forward: The network, as in `path_norm`.
      params: Its parameters $\theta$, a pytree.
      other: Other parameters $\theta'$, of the same structure and shapes.
      inputs: An example or a batch of its inputs, arrays.

    Returns:
      A scalar, in float32 or wider: the bound on the sum of absolute differences over
      all outputs of one example.

    Raises:
      ValueError: As `path_metric_bound`; or `inputs` holds shapes without values, or
        integers.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from normax import paths
      >>> def forward(params, x):
      ...     return jax.nn.relu(x @ params["hidden"]) @ params["output"]
      >>> hidden, output = jnp.array([[1.0, 2.0]]), jnp.array([[3.0], [-2.0]])
      >>> params = {"hidden": hidden, "output": output}
      >>> pruned = {"hidden": hidden, "output": jnp.array([[0.0], [-2.0]])}
      >>> x = jnp.array([[-1.0], [5.0]])  # the outputs change by 0 and 15
      >>> round(float(paths.output_change_bound(forward, params, pruned, x)), 4)
      15.0

    References:
      Gonon, Brisebarre, Riccietti, Gribonval, A rescaling-invariant Lipschitz bound
      based on path-metrics, 2025.
    """
    check_order("output_change_bound", forward, "forward, params, other, inputs")
    leaves = jax.tree.leaves(inputs)
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves):
        raise ValueError(
            "output_change_bound depends on the largest entry of the inputs, but "
            "`inputs` holds shapes without values; pass arrays."
        )
    if others := [str(jnp.result_type(x)) for x in leaves if not is_float(x)]:
        raise ValueError(
            "output_change_bound holds for all inputs that are no larger, and integers "
            f"have no such size, but `inputs` holds {', '.join(others)}; let `forward` "
            "close over them, one example at a time."
        )
    floats = [x for x in leaves if np.size(x)]
    sizes = [jnp.max(jnp.abs(at_least_float32(x)[0])) for x in floats]
    bound = path_metric_bound(forward, params, other, inputs)
    return functools.reduce(jnp.maximum, sizes, jnp.ones((), bound.dtype)) * bound
