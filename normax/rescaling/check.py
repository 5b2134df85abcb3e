"""Rescaled networks, and the checks that they compute the same function.

A network that is given as a function is compared before and after, at random inputs.
If it differs, it is no plain stack of ReLU layers, and the error says why.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from normax._core.axes import PyTree, parameter_names
from normax._core.programs import full_precision
from normax.paths import path_norm
from normax.paths.feed_forward import Layer
from normax.paths.one_example import Forward
from normax.rescaling.network import MAKE_A_STACK, UnitFactors, scale_layers


def _require_in_range(params: PyTree, rescaled: PyTree) -> None:
    names = parameter_names(params)
    # JAX would compile this check anew for every shape, NumPy does not.
    before, after = (
        [np.asarray(x).astype(np.float64) for x in jax.tree.leaves(tree)]
        for tree in (params, rescaled)
    )
    for name, old in zip(names, before, strict=True):
        if not np.isfinite(old).all():
            raise ValueError(
                f"only finite weights can be rescaled, but {name} holds NaN or "
                "infinity; go back to where the network had not diverged."
            )
    leaves = jax.tree.leaves(params)
    for name, leaf, old, new in zip(names, leaves, before, after, strict=True):
        lost = ~np.isfinite(new) | (np.sign(new) != np.sign(old))
        if lost.any():
            first = tuple(int(i) for i in np.argwhere(lost)[0])
            raise ValueError(
                f"rescaled weights must be finite and keep their signs, but {name} at "
                f"{first} goes from {old[first]} to {new[first]} in "
                f"{jnp.result_type(leaf)}; use factors that are closer to 1, or "
                "parameters in a wider dtype."
            )


def _random_inputs(inputs: PyTree, seed: int) -> PyTree:
    """Return random inputs of the same shapes; later seeds draw larger ones."""
    rng = np.random.default_rng(seed)

    def draw(x):
        if isinstance(x, jax.ShapeDtypeStruct):
            x = np.zeros(x.shape, x.dtype)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        # Small inputs alone would miss some rules: relu6 is a ReLU below 6.
        size = 8.0**seed if jnp.finfo(x.dtype).maxexp > 16 else 1.0
        return jnp.asarray(size * rng.normal(size=x.shape), x.dtype)

    return jax.tree.map(draw, inputs)


def _trial_factors(
    factors: Sequence[UnitFactors],
) -> tuple[list[UnitFactors], list[UnitFactors]]:
    """Return random factors twice: tied as the given ones are, and all different."""
    # Units with equal given factors get equal tied ones, and a factor of 1 stays 1.
    logs = [np.log2(np.asarray(m, float)) + np.asarray(e) for m, e in factors]
    distinct, which = np.unique(np.concatenate(logs), return_inverse=True)
    rng, ends = np.random.default_rng(0), np.cumsum([log.size for log in logs])[:-1]
    tied = np.where(distinct == 0, 1.0, 2.0 ** rng.uniform(-2, 2, distinct.shape))
    different = 2.0 ** rng.uniform(-2, 2, which.shape)
    first, second = (
        [
            UnitFactors(jnp.asarray(values, m.dtype), jnp.zeros_like(e))
            for (m, e), values in zip(factors, np.split(drawn, ends), strict=True)
        ]
        for drawn in (tied[which], different)
    )
    return first, second


@full_precision()
def _require_same_function(
    params: PyTree,
    layers: tuple[Layer, ...],
    factors: Sequence[UnitFactors],
    rescaled: PyTree,
    forward: Forward,
    inputs: PyTree,
) -> None:
    # The given factors may be so near 1 that rounding hides what they change. So the
    # network is first tried with random factors.
    tied, different = _trial_factors(factors)
    treedef: Any
    leaves, treedef = jax.tree.flatten(params)
    ones = [UnitFactors(jnp.ones_like(m), jnp.zeros_like(e)) for m, e in factors]
    eps = max(float(jnp.finfo(leaf.dtype).eps) for leaf in leaves)
    # `forward` may close over values that have changed since JAX last traced it. JAX
    # traces a new function object again.
    compiled = jax.jit(functools.partial(forward))
    examples = [_random_inputs(inputs, seed) for seed in range(3)]
    outputs = [jax.tree.leaves(compiled(params, x)) for x in examples]

    def same(other: PyTree) -> bool:
        for x, expected in zip(examples, outputs, strict=True):
            for y, z in zip(expected, jax.tree.leaves(compiled(other, x)), strict=True):
                y, z = np.asarray(y, float), np.asarray(z, float)
                size = np.max(np.abs(y), initial=0.0)
                if not np.all(np.abs(z - y) <= max(1e-3, 8 * eps) * size):
                    return False
        return True

    def same_with(chosen: dict[int, UnitFactors]) -> bool:
        factors = [chosen.get(layer, one) for layer, one in enumerate(ones)]
        return same(treedef.unflatten(scale_layers(leaves, factors, layers=layers)))

    if not same_with(dict(enumerate(tied))):
        raise ValueError(
            _broken_rule(params, layers, different, same_with, forward, inputs)
        )
    if not same(rescaled):
        raise ValueError(
            "a rescaled network computes the same function, and rescalings keep this "
            "network's, but these factors carry its activations out of the range of "
            "its dtype; use factors that are closer to 1, or a wider dtype."
        )


def _broken_rule(
    params: PyTree,
    layers: tuple[Layer, ...],
    different: Sequence[UnitFactors],
    same_with: Callable[[dict[int, UnitFactors]], bool],
    forward: Forward,
    inputs: PyTree,
) -> str:
    """Return the error message: what the network has that no plain stack has."""
    breaking = [i for i, unit in enumerate(different) if not same_with({i: unit})]
    names = ", ".join(layers[i].name for i in breaking)
    claim = (
        "a rescaled network computes the same function, but rescaling the units of "
        f"{names} changes what `forward` computes"
    )
    try:
        path_norm(forward, params, inputs, log=True)
    except ValueError as reason:
        return f"{claim}: {reason}"
    shared = {i: different[breaking[0]] for i in breaking}
    if len({different[i].mantissa.shape for i in breaking}) == 1 and same_with(shared):
        return (
            f"{claim}: residual connections add their units; give these layers the "
            "same factors in `normax.rescaling.rescale_units`, and no others."
        )
    return (
        f"{claim}: what leaves these units is not what the next kernel that `forward` "
        f"uses takes in; {MAKE_A_STACK}, or give these layers factors 1."
    )


def rescaled_network(
    params: PyTree,
    layers: tuple[Layer, ...],
    factors: Sequence[UnitFactors],
    forward: Forward | None,
    inputs: PyTree,
) -> PyTree:
    """Rescale the hidden units; check the result where values are known, not traced."""
    leaves, treedef = jax.tree.flatten(params)
    leaves = [jnp.asarray(leaf) for leaf in leaves]
    result = jax.tree.unflatten(treedef, scale_layers(leaves, factors, layers=layers))
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((result, leaves))):
        return result
    _require_in_range(params, result)
    if forward is not None and factors:
        _require_same_function(params, layers, factors, result, forward, inputs)
    return result
