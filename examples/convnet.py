"""A small convolutional network with batch norm, and its training run.

The network is that of van Laarhoven (2017, section 6): four convolutions, each followed
by batch norm and relu, and a linear head. The loss does not depend on the norms of the
kernels of the convolutions. Only these kernels are decayed and projected.

The learning rate falls to a tenth after half of the epochs, and again after four
fifths. With `augment`, the device moves and flips the images of every batch. It holds
all images as bytes.
"""

import argparse
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import datasets
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.lax import conv_general_dilated

import normax


class Setting(NamedTuple):
    """Network and training run that suit a data set."""

    channels: tuple[int, ...]
    strides: tuple[int, ...]
    batch_size: int
    epochs: int
    augment: bool


COLOUR = Setting((32, 64, 128, 128), (1, 2, 2, 2), 128, 100, True)
SETTINGS = {
    "digits": Setting((8, 16, 16, 16), (2, 1, 2, 1), 32, 24, False),
    "mnist": Setting((16, 32, 32, 32), (2, 1, 2, 1), 128, 10, False),
    "cifar10": COLOUR,
    "cifar100": COLOUR,
    "svhn": COLOUR,
}


# A norm counts as settled once its `memory` of the initial norm is below this.
SETTLED_MEMORY = 0.1


def add_network_options(parser: argparse.ArgumentParser) -> None:
    """Let the user choose the network and how long it trains."""
    add = parser.add_argument
    default = "default: what suits the data set"
    add("--channels", type=int, nargs=4, help=f"of the convolutions; {default}")
    add("--strides", type=int, nargs=4, help=f"of the convolutions; {default}")
    add("--epochs", type=int, help=default)


def make_setting(
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    settings: Mapping[str, Setting] = SETTINGS,
) -> Setting:
    """Return the setting of the data set, changed as the user chose."""
    setting = settings[options.dataset]
    given = {name: getattr(options, name) for name in ("channels", "strides", "epochs")}
    setting = setting._replace(**{k: v for k, v in given.items() if v is not None})
    if setting.epochs < 2 or min(*setting.channels, *setting.strides) < 1:
        parser.error("--epochs must be at least 2, --channels and --strides 1.")
    return setting


def conv_as_matmul(x: Any, kernel: Any, strides: Any, *_: Any, **__: Any) -> jax.Array:
    """Return a 3x3 convolution with padding 1, as a product of matrices."""
    height, width = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifts = [
        x[:, i : i + height : strides[0], j : j + width : strides[1]]
        for i, j in itertools.product(range(3), repeat=2)
    ]
    return jnp.concatenate(shifts, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


def faster_convolution(widest: int) -> Callable[..., jax.Array]:
    """Return the faster 3x3 convolution, for layers of up to `widest` channels.

    On a CPU it is the product of matrices. On an H200, too, for small layers: one run
    on the digits takes a fifth of the time, and a sweep of 30 runs half. Wider layers
    were not measured there, so XLA's own convolution computes them.
    """
    device = jax.default_backend()
    as_matmul = device == "cpu" or (device == "gpu" and widest <= 32)
    return conv_as_matmul if as_matmul else conv_general_dilated


class ConvNet(nnx.Module):
    """Four convolutions with batch norm and relu, mean pooling, a linear head."""

    def __init__(
        self, setting: Setting, in_channels: int, classes: int, rngs: nnx.Rngs
    ) -> None:
        conv = functools.partial(
            nnx.Conv,
            kernel_size=(3, 3),
            padding=1,
            use_bias=False,
            conv_general_dilated=faster_convolution(max(setting.channels)),
            rngs=rngs,
        )
        widths = itertools.pairwise((in_channels, *setting.channels))
        self.convs = nnx.List(
            conv(*channels, strides=stride)
            for channels, stride in zip(widths, setting.strides, strict=True)
        )
        self.norms = nnx.List(
            nnx.BatchNorm(width, momentum=0.9, rngs=rngs) for width in setting.channels
        )
        self.head = nnx.Linear(setting.channels[-1], classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Return the logits of a batch of images in bytes."""
        x = images.astype(jnp.float32) / 255
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nnx.relu(norm(conv(x)))
        return self.head(x.mean((1, 2)))


def kernel_axes(params: Any) -> Any:
    """Mark the kernels of the convolutions, whose scale does not change the loss."""
    return jax.tree.map(lambda w: "unit" if w.ndim == 4 else "none", params)


def first_kernel(params: Any) -> jax.Array:
    """Return the kernel of the first convolution."""
    return params["convs"][0]["kernel"][...]


def make_optimizer(
    rule: str,
    projected: bool,
    learning_rate: optax.Schedule,
    weight_decay: jax.Array,
    other_rate: optax.Schedule,
) -> optax.GradientTransformation:
    """Return the rule, with decay and projection of the kernels alone."""
    make = normax.UPDATE_RULES[rule].make
    kernels = make(learning_rate, weight_decay=weight_decay)
    if projected:
        kernels = optax.chain(kernels, normax.project_unit_norm())
    # Decay of head, gains and biases would change the function that is learned. They
    # are not decayed, so lambda acts through the effective learning rate alone.
    return optax.partition({"unit": kernels, "none": make(other_rate)}, kernel_axes)


def shift_and_flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Move every image by up to four pixels and flip half of them."""
    shift_key, flip_key = jax.random.split(key)
    n, *shape = images.shape
    padded = jnp.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    corners = jax.random.randint(shift_key, (n, 2), 0, 9)
    flips = jax.random.bernoulli(flip_key, shape=(n, 1, 1, 1))

    def crop(image: jax.Array, corner: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (*corner, 0), shape)

    moved = jax.vmap(crop)(padded, corners)
    return jnp.where(flips, moved[:, :, ::-1], moved)


def batches(setting: Setting, size: int, key: jax.Array) -> jax.Array:
    """Return indices (epochs, steps, batch), a new permutation for each epoch."""
    steps = size // setting.batch_size
    order = jax.vmap(lambda key: jax.random.permutation(key, size))(
        jax.random.split(key, setting.epochs)
    )
    return order[:, : steps * setting.batch_size].reshape(
        setting.epochs, steps, setting.batch_size
    )


class Course(NamedTuple):
    """The network at the start, batches of indices, and a key for each batch."""

    model: ConvNet
    order: jax.Array
    keys: jax.Array


def make_course(data: datasets.Dataset, setting: Setting, seed: int) -> Course:
    """Draw the initial network of a training run, and the data that it will see."""
    init_key, order_key, augment_key = jax.random.split(jax.random.key(seed), 3)
    classes = int(max(data.y_train.max(), data.y_test.max())) + 1
    model = ConvNet(setting, data.x_train.shape[-1], classes, nnx.Rngs(init_key))
    order = batches(setting, len(data.x_train), order_key)
    return Course(model, order, jax.random.split(augment_key, order.shape[:2]))


def take(data: datasets.Dataset, setting: Setting, batch: Any) -> Any:
    """Return the images and classes of a batch, given as indices and a key."""
    indices, key = batch
    x, y = data.x_train[indices], data.y_train[indices]
    return (shift_and_flip(key, x) if setting.augment else x), y


def test_logits(model: ConvNet, data: datasets.Dataset) -> jax.Array:
    """Return the logits of the test images, normalized by running statistics."""
    model.eval()
    return jax.lax.map(lambda x: model(x[None])[0], data.x_test, batch_size=500)


def memory(start: jax.Array, end: jax.Array, power: int) -> jax.Array:
    """Return the share of the initial norm that decay and growth have left."""
    norms = [normax.weight_norm(w, "layer") for w in (start, end)]
    left = (start * end).sum() / (norms[0] * jnp.minimum(*norms))
    return jnp.maximum(left, 0) ** (power + 2)


def make_train(
    rule: str,
    data: datasets.Dataset,
    setting: Setting,
    *,
    projected: bool = False,
    seed: int = 0,
    other_rate: float | None = None,
) -> Callable[..., dict[str, jax.Array]]:
    """Return the training run, a function of learning rate and weight decay.

    The loss depends on the scale of head, gains and biases. They are trained with the
    learning rate `other_rate`, by default that of the kernels.
    """
    model, order, keys = make_course(data, setting, seed)
    graph, *variables = nnx.split(model, nnx.Param, ...)
    start, statistics = variables
    steps = order.shape[1]
    drop, second_drop = setting.epochs // 2, setting.epochs * 4 // 5
    drops = {drop * steps: 0.1, second_drop * steps: 0.1}
    data = jax.device_put(data)
    if projected:
        start = normax.projection_unit_norm(start, kernel_axes(start))

    def loss_fn(params: Any, statistics: Any, x: jax.Array, y: jax.Array) -> Any:
        model = nnx.merge(graph, params, statistics, copy=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(model(x), y)
        return losses.mean(), nnx.state(model, nnx.BatchStat)

    def train(eta: jax.Array, lam: jax.Array) -> dict[str, jax.Array]:
        schedules = [
            optax.piecewise_constant_schedule(rate, drops)
            for rate in (eta, eta if other_rate is None else other_rate)
        ]
        optimizer = make_optimizer(rule, projected, schedules[0], lam, schedules[1])

        def step(carry: Any, batch: Any) -> Any:
            params, statistics, state = carry
            x, y = take(data, setting, batch)
            (loss, statistics), grads = jax.value_and_grad(loss_fn, has_aux=True)(
                params, statistics, x, y
            )
            updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            norm = normax.weight_norm(first_kernel(params), "layer")
            return (params, statistics, state), (loss, norm)

        def epoch(carry: Any, batch: Any) -> Any:
            carry, (losses, norms) = jax.lax.scan(step, carry, batch)
            return carry, (losses.mean(), norms.mean(), first_kernel(carry[0]))

        carry = start, statistics, optimizer.init(start)
        carry, (losses, norms, kernels) = jax.lax.scan(epoch, carry, (order, keys))

        logits = test_logits(nnx.merge(graph, *carry[:2]), data)
        power = normax.UPDATE_RULES[rule].norm_power
        return {
            "norm": norms[drop - 1],
            "memory": memory(first_kernel(start), kernels[drop - 1], power),
            "test_error": (logits.argmax(-1) != data.y_test).mean(),
            "diverged": ~jnp.isfinite(losses).all(),
        }

    return train
