"""Masks of weight decay where users hand them over: plain optax, and nnx.Optimizer."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import normax

pytestmark = [pytest.mark.usefixtures("quick_compilation")]
RNGS = nnx.Rngs(0)


class Network(nnx.Module):
    def __init__(self):
        self.first = nnx.Linear(3, 4, rngs=RNGS)
        self.norm = nnx.BatchNorm(4, rngs=RNGS)
        self.last = nnx.Linear(4, 2, rngs=RNGS)

    def __call__(self, x):
        return self.last(nnx.relu(self.norm(self.first(x))))


AXES = {
    "first": {"kernel": "unit", "bias": "none"},
    "norm": "none",
    "last": "none",
}


@pytest.mark.slow
@pytest.mark.parametrize("as_function", [False, True])
@pytest.mark.parametrize("opposite", [False, True])
def test_masks_work_inside_nnx_optimizer(as_function, opposite):
    model = Network()
    mask = normax.weight_decay_mask(AXES, nnx.state(model, nnx.Param))
    if as_function:
        mask = functools.partial(normax.weight_decay_mask, AXES)
    if opposite:
        found = mask
        mask = (
            jax.tree.map(operator.not_, mask)
            if not as_function
            else (lambda params: jax.tree.map(operator.not_, found(params)))
        )
    tx = optax.chain(
        optax.adamw(0.1, weight_decay=0.5, mask=mask),
        optax.masked(optax.trace(0.9), mask),
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    before = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    before = {path: np.array(jax.tree.leaves(w)[0]) for path, w in before.items()}

    @nnx.jit
    def step(model, optimizer):
        grads = jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param))
        optimizer.update(model, grads)

    step(model, optimizer)
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        decayed = (path == ("first", "kernel")) != opposite
        expected = before[path] * (0.95 if decayed else 1)
        np.testing.assert_allclose(jax.tree.leaves(variable)[0], expected, rtol=1e-6)


def test_a_bool_stands_for_each_variable():
    params = nnx.state(Network(), nnx.Param)
    mask = normax.weight_decay_mask(AXES, params)
    flat = {
        tuple(jax.tree_util.keystr((key,), simple=True) for key in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(mask)
    }
    assert len(flat) == 6 and flat.pop(("first", "kernel")) is True
    assert all(leaf is False for leaf in flat.values())
