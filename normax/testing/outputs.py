"""An assertion about all inputs at once: how far two networks are apart."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from normax._core.axes import PyTree
from normax._core.checks import check_range, check_scalar
from normax._core.comparisons import largest
from normax._core.programs import compiled, full_precision
from normax.paths import output_change_bound
from normax.paths.one_example import Forward


@full_precision()
def assert_outputs_near(
    forward: Forward,
    params: PyTree,
    other: PyTree,
    inputs: PyTree,
    atol: float,
    *,
    custom_message: str | None = None,
) -> None:
    r"""Check that two ReLU networks have nearly the same outputs at all inputs.

    $$\|f_\theta(x) - f_{\theta'}(x)\|_1 \le \text{atol} \qquad
      \text{for all } \|x\|_\infty \le B$$

    It passes only if this is proven by `normax.paths.output_change_bound`, up to the
    rounding of the bound; $B$ is the largest entry of `inputs`. The bound of a deep
    network is far above what can be measured. So a failure does not mean that the
    outputs are far apart. The message says by how much a single output differs at
    `inputs`, which is at most the sum over outputs.

    Args:
      forward: The network, as in `normax.path_norm`.
      params: Its parameters, a pytree.
      other: Other parameters of the same network, such as pruned or rounded ones.
      inputs: An example or a batch of its inputs, arrays.
      atol: The largest change of the outputs of one example, summed over them.
      custom_message: Added to the message of the error.

    Returns:
      None.

    Raises:
      AssertionError: The bound is larger than `atol`, or no number.
      ValueError: As `normax.paths.output_change_bound`; or `atol` is negative.
      RuntimeError: Under `jax.jit`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import normax
      >>> params, rounded = jnp.array([[0.7], [0.3]]), jnp.array([[0.69], [0.29]])
      >>> normax.testing.assert_outputs_near(
      ...     lambda w, x: x @ w, params, rounded, jnp.ones((1, 2)), atol=0.03
      ... )

    References:
      Gonon, Brisebarre, Riccietti, Gribonval, A rescaling-invariant Lipschitz bound
      based on path-metrics, 2025.
    """
    check_scalar("atol", atol)
    check_range("atol", atol, 0)
    bound = output_change_bound(forward, params, other, inputs)
    if isinstance(bound, jax.core.Tracer):
        raise RuntimeError(
            "assert_outputs_near compares values, but under jax.jit there are none "
            "yet; call it outside."
        )
    if bound <= atol:
        return
    run = compiled(forward)
    both = map(jax.tree.leaves, (run(params, inputs), run(other, inputs)))
    outputs = zip(*both, strict=True)
    measured = max((float(largest(jnp.subtract(a, b))) for a, b in outputs), default=0)
    custom = f" [{custom_message}]" if custom_message else ""
    raise AssertionError(
        "[normax] assert_outputs_near: the outputs of two networks must be proven to "
        f"differ by at most atol = {atol:.6g}, but the proven bound is "
        f"{float(bound):.6g} for the sum over outputs; at these inputs no single "
        f"output differs by more than {measured:.6g}{custom}"
    )
