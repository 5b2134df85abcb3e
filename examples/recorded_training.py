"""Training of the convolutional network in which every step is recorded.

Batch norm has no epsilon here, so that the loss does not depend on the norms of the
kernels, except by rounding. It has no running averages either, because they would mix
several steps. Tests use the statistics of training images at the present weights.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import datasets
import jax
import jax.numpy as jnp
import optax
from convnet import ConvNet, Setting, kernel_axes, make_course, take, test_logits
from flax import nnx

import normax

STATISTICS_IMAGES = 2048


class Run(NamedTuple):
    """Losses (epoch, step), norms (epoch, step, vector) and test logits by epoch."""

    losses: jax.Array
    norms: jax.Array
    logits: jax.Array


Train = Callable[[Any, optax.GradientTransformation], Run]


def vector_norms(params: Any) -> jax.Array:
    """Return the norms of the weight vectors of all kernels."""
    norms = normax.weight_norm(params, kernel_axes(params))
    return jnp.concatenate(jax.tree.leaves(norms))


def make_train(
    data: datasets.Dataset, setting: Setting, seed: int
) -> tuple[Any, Train]:
    """Return initial parameters, and training from parameters with an optimizer."""
    model, order, keys = make_course(data, setting, seed)
    for norm in model.norms:
        norm.epsilon = norm.momentum = 0.0
    graph, *variables = nnx.split(model, nnx.Param, ...)
    start, statistics = variables
    data = jax.device_put(data)

    def network(params: Any) -> ConvNet:
        dtype = vector_norms(params).dtype
        cast = jax.tree.map(lambda x: x.astype(dtype), statistics)
        return nnx.merge(graph, params, cast, copy=True)

    def loss_fn(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        logits = network(params)(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def test(params: Any) -> jax.Array:
        model = network(params)
        model(jnp.asarray(data.x_train[:STATISTICS_IMAGES]))
        return test_logits(model, data)

    def train(params: Any, optimizer: optax.GradientTransformation) -> Run:
        def step(carry: Any, batch: Any) -> Any:
            params, state = carry
            x, y = take(data, setting, batch)
            loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
            updates, state = optimizer.update(grads, state, params)
            new = optax.apply_updates(params, updates)
            return (new, state), (loss, vector_norms(params))

        def epoch(carry: Any, batch: Any) -> Any:
            carry, (losses, norms) = jax.lax.scan(step, carry, batch)
            return carry, Run(losses, norms, test(carry[0]))

        carry = params, optimizer.init(params)
        return jax.lax.scan(epoch, carry, (order, keys))[1]

    return start, train
