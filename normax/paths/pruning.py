r"""Pruning by paths: weights that few and small paths use are set to 0.

A pruned weight takes all paths through it along, and what these sum to is its
saliency. Rescaling hidden units moves size from weight to weight, so that the smallest
weights are others afterwards. Paths do not see it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from normax._core.axes import PyTree, parameter_names
from normax._core.checks import check_range, check_scalar
from normax._core.modules import refuse_modules
from normax._core.programs import is_float
from normax.paths.network import check_order
from normax.paths.norm import with_automatic_sharding
from normax.paths.numbers import DEAD
from normax.paths.one_example import Forward
from normax.paths.saliency import Saliency, saliencies


def _check_finite(params: PyTree) -> None:
    """Raise where paths are no numbers, unless the weights are traced."""
    for name, leaf in zip(
        parameter_names(params), jax.tree.leaves(params), strict=True
    ):
        if is_float(leaf) and not isinstance(leaf, jax.core.Tracer):
            count = int(jnp.sum(~jnp.isfinite(leaf)))
            if count:
                raise ValueError(
                    f"saliencies are sums of finite weights, but {name} holds {count} "
                    "that are NaN or infinite; mend them before pruning."
                )


def _chosen(params: PyTree, where: PyTree) -> list[bool]:
    """Return which arrays are pruned."""
    leaves, names = jax.tree.leaves(params), parameter_names(params)
    if where is None:
        chosen = [is_float(leaf) and np.ndim(leaf) >= 2 for leaf in leaves]
    else:
        try:
            spread = jax.tree.map(
                lambda choice, tree: jax.tree.map(lambda _: choice, tree), where, params
            )
        except ValueError as error:
            raise ValueError(
                f"where must be a prefix of `params`, which has {', '.join(names)}, "
                f"but it is {where!r}; give each array or group of arrays a boolean."
            ) from error
        chosen = jax.tree.leaves(spread)
        if wrong := [x for x in chosen if not isinstance(x, bool | np.bool)]:
            raise ValueError(
                f"where must hold booleans, got {wrong[0]!r}; pass True for the "
                "arrays to prune and False for others."
            )
    for name, leaf, choice in zip(names, leaves, chosen, strict=True):
        if choice and not is_float(leaf):
            raise ValueError(
                f"what is pruned must be floats, but `where` chooses {name}, which "
                f"holds {jnp.result_type(leaf)}; choose False for it."
            )
    if not any(chosen):
        raise ValueError(
            f"path_prune needs an array to prune, but none of the {len(leaves)} arrays "
            "of `params` is chosen; by default these are arrays of floats of rank 2 "
            "and more; choose others by `where`."
        )
    return chosen


def _check_fraction(fraction: Any) -> float:
    if isinstance(fraction, jax.core.Tracer):
        raise ValueError(
            "fraction must be a known number, but it is traced; make it a static "
            "argument of jax.jit."
        )
    check_scalar("fraction", fraction)
    check_range("fraction", fraction, 0)
    if fraction > 1:
        raise ValueError(
            f"fraction must be at most 1, all entries, got {fraction}; choose it in "
            "[0, 1]."
        )
    return float(fraction)


def _keep(keys: list[tuple[jax.Array, jax.Array]], fraction: float) -> jax.Array:
    """Return which entries are kept, of several arrays in a row."""
    exponents, mantissas = (
        jnp.concatenate(list(map(jnp.ravel, part))) for part in zip(*keys, strict=True)
    )
    index = jnp.arange(exponents.size, dtype=jnp.int32)
    # The sort is stable, so that of equal ones the first are pruned first.
    order = lax.sort((exponents, mantissas, index), num_keys=2)[2]
    pruned = order[: round(fraction * order.size)]
    return jnp.ones(order.shape, bool).at[pruned].set(False)


def path_mask(
    forward: Forward,
    params: PyTree,
    inputs: PyTree,
    fraction: float,
    per: str = "network",
    where: PyTree = None,
) -> PyTree:
    r"""Which weights to keep if those of least path saliency are pruned.

    $$\#\{i : \mathrm{mask}_i = \text{False}\} =
      \mathrm{round}(\text{fraction} \cdot n)$$

    Here $n$ counts the entries of the chosen arrays. Entries that are 0 come first, so
    that a mask for a larger fraction holds those before. Then come entries on no path,
    and the least salient. Of equal ones, the first in the order of the tree. No
    rescaling of hidden units changes the mask, but for saliencies that differ by
    rounding only.

    Args:
      forward: The network, as in `path_norm`.
      params: Its parameters, a pytree, which are edge weights, as in `path_scales`.
      inputs: An example or a batch of its inputs; only shapes matter.
      fraction: Share of the chosen entries that is pruned, from 0 to 1; a number that
        is not traced.
      per: Whether saliencies are compared in the whole `"network"`, or in each
        `"layer"`, that is array, by itself. A network can lose all paths through a
        layer if its saliencies are the smallest.
      where: Which arrays are chosen, a pytree of booleans or a prefix of one. None for
        all arrays of floats of rank 2 and more, which leaves biases and gains alone.

    Returns:
      Pytree like `params` of boolean arrays, True everywhere in arrays not chosen.
      Where the parameters are traced and hold a NaN or infinity, all are True.

    Raises:
      ValueError: As `path_scales`; `fraction` or `per` is out of range; `where` chooses
        integers, or nothing; or a weight is NaN or infinite.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from normax import paths
      >>> def forward(params, x):
      ...     return jax.nn.relu(x @ params["hidden"]) @ params["output"]
      >>> hidden, output = jnp.array([[1.0, 2.0]]), jnp.array([[3.0], [-2.0]])
      >>> params = {"hidden": hidden, "output": output}
      >>> mask = paths.path_mask(forward, params, jnp.ones((1, 1)), 0.5)
      >>> mask["hidden"], mask["output"].ravel()
      (Array([[False,  True]], dtype=bool), Array([False,  True], dtype=bool))

    References:
      Gonon, Brisebarre, Riccietti, Gribonval, A rescaling-invariant Lipschitz bound
      based on path-metrics, 2025.
    """
    check_order("path_mask", forward)
    refuse_modules(params)
    fraction = _check_fraction(fraction)
    if per not in ("network", "layer"):
        raise ValueError(
            f"per must be 'network' or 'layer', where saliencies are compared, got "
            f"{per!r}; choose one of the two."
        )
    chosen = _chosen(params, where)
    _check_finite(params)

    def evaluate(params):
        leaves, structure = jax.tree.flatten(params)
        keys = saliencies(forward, params, inputs, Saliency.keys)

        def of_entries(i):
            # What has been pruned before stays so, also beside weights on no path.
            exponent, mantissa = keys[i]
            return jnp.where(leaves[i] == 0, 2 * DEAD, exponent), mantissa

        # Where the order is unknown, nothing is pruned, so that no NaN is hidden.
        floats = [jnp.asarray(leaf) for leaf in leaves if is_float(leaf)]
        finite = jnp.all(jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in floats]))
        keep = [jnp.ones(jnp.shape(leaf), bool) for leaf in leaves]
        indices = [i for i, choice in enumerate(chosen) if choice]
        groups = [indices] if per == "network" else [[i] for i in indices]
        for group in groups:
            flat = _keep([of_entries(i) for i in group], fraction)
            ends = np.cumsum([keep[i].size for i in group])
            for i, part in zip(group, jnp.split(flat, ends[:-1]), strict=True):
                keep[i] = jnp.reshape(part, keep[i].shape) | ~finite
        return jax.tree.unflatten(structure, keep)

    return jax.jit(with_automatic_sharding(evaluate))(params)


def path_prune(
    forward: Forward,
    params: PyTree,
    inputs: PyTree,
    fraction: float,
    per: str = "network",
    where: PyTree = None,
) -> PyTree:
    r"""Set the weights of least path saliency to 0.

    $$\theta'_i = \theta_i \text{ where } \mathrm{mask}_i,
      \quad \theta'_i = 0 \text{ elsewhere}$$

    The mask is that of `path_mask`. Repeated with growing fractions, and with training
    between, it prunes iteratively. An optimizer keeps the zeros if it ends with a
    product of the updates and the mask.

    Args:
      forward: The network, as in `path_norm`.
      params: Its parameters, a pytree, which are edge weights, as in `path_scales`.
      inputs: An example or a batch of its inputs; only shapes matter.
      fraction: Share of the chosen entries that is pruned, as in `path_mask`.
      per: `"network"` or `"layer"`, as in `path_mask`.
      where: Which arrays are chosen, as in `path_mask`.

    Returns:
      Pytree like `params`, in the same dtypes.

    Raises:
      ValueError: As `path_mask`.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from normax import paths
      >>> def forward(params, x):
      ...     return jax.nn.relu(x @ params["hidden"]) @ params["output"]
      >>> hidden, output = jnp.array([[1.0, 2.0]]), jnp.array([[3.0], [-2.0]])
      >>> params = {"hidden": hidden, "output": output}
      >>> paths.path_prune(forward, params, jnp.ones((1, 1)), 0.5)["hidden"]
      Array([[0., 2.]], dtype=float32)

    References:
      Gonon, Brisebarre, Riccietti, Gribonval, A rescaling-invariant Lipschitz bound
      based on path-metrics, 2025.
    """
    check_order("path_prune", forward)
    mask = path_mask(forward, params, inputs, fraction, per, where)
    return jax.tree.map(
        lambda w, keep: jnp.where(keep, w, jnp.zeros_like(w)), params, mask
    )
