r"""A small ResNet with batch norm, and where each of its kernels settles.

The network is that of He et al. (2016, section 4.2): a convolution, three stages of
residual blocks, mean pooling and a linear head, with `6 * blocks + 1` convolutions. Its
shortcuts have no parameters. `--framework` chooses Flax NNX or Linen.

Each convolution is followed by batch norm, so all their kernels are scale-invariant,
and the head is not. `--rule momentum` is SGD with momentum 0.9 and coupled decay; its
equilibrium angle is $\arccos(1 - \eta\lambda / (1 + \rho))$, and its norm depends on
the size of the gradient. `--rule adamw` has a known norm too. Gains and biases do not
decay. Rates and decays make equilibrium come within some hundred steps.

`--dataset cifar10` is what the figures are of. The program writes a picture and, as
CSV, a row for each array and entry to `--out`.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import datasets
import jax
import jax.numpy as jnp
import optax
from convnet import SETTINGS, faster_convolution, shift_and_flip
from experiments import (
    add_data_options,
    file_name,
    load_data,
    make_folder,
    make_parser,
    write_csv,
)
from flax import linen, nnx
from layer_dynamics import (
    MONITOR_DECAY,
    Columns,
    Network,
    compare,
    evaluate,
    from_linen,
    from_nnx,
    picture,
    scale_invariant,
    train,
)

import normax

# Learning rate and weight decay of each rule.
RATES = {"momentum": (0.05, 4e-3), "adamw": (3e-3, 1.0)}
WARMUP = 50
STRIDES = (1, 2, 2)  # of the three stages, each twice as wide as the one before


def convolution(make: Any, width: int) -> Any:
    """Return a maker of 3x3 convolutions that pads with zeros and has no bias."""
    return functools.partial(
        make,
        kernel_size=(3, 3),
        padding=1,
        use_bias=False,
        conv_general_dilated=faster_convolution(width),
    )


def shortcut(x: jax.Array, stride: int, width: int) -> jax.Array:
    """Return every `stride`-th pixel, with channels of zeros up to `width`."""
    missing = width - x.shape[-1]
    return jnp.pad(x[:, ::stride, ::stride], ((0, 0),) * 3 + ((0, missing),))


def pixels(images: jax.Array) -> jax.Array:
    """Return bytes as numbers around zero."""
    return images.astype(jnp.float32) / 255 - 0.5


class Block(nnx.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int, rngs: nnx.Rngs) -> None:
        conv = convolution(nnx.Conv, width)
        self.stride, self.width = stride, width
        self.conv1 = conv(inputs, width, strides=stride, rngs=rngs)
        self.norm1 = nnx.BatchNorm(width, momentum=0.9, rngs=rngs)
        self.conv2 = conv(width, width, strides=1, rngs=rngs)
        self.norm2 = nnx.BatchNorm(width, momentum=0.9, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the activations after the block."""
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return nnx.relu(y + shortcut(x, self.stride, self.width))


class ResNet(nnx.Module):
    """The logits of a batch of images, in Flax NNX."""

    def __init__(
        self, width: int, blocks: int, channels: int, classes: int, rngs: nnx.Rngs
    ) -> None:
        self.stem = convolution(nnx.Conv, width)(channels, width, strides=1, rngs=rngs)
        self.stem_norm = nnx.BatchNorm(width, momentum=0.9, rngs=rngs)
        self.blocks: Any = nnx.List()
        inputs = width
        for stage, stride in enumerate(STRIDES):
            for index in range(blocks):
                outputs = width * 2**stage
                first = stride if index == 0 else 1
                self.blocks.append(Block(inputs, outputs, first, rngs))
                inputs = outputs
        self.head = nnx.Linear(inputs, classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Return logits (batch, classes)."""
        x = nnx.relu(self.stem_norm(self.stem(pixels(images))))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


class LinenBlock(linen.Module):
    """Two convolutions beside a shortcut."""

    width: int
    stride: int

    @linen.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Return the activations after the block."""
        conv = functools.partial(convolution(linen.Conv, self.width), self.width)
        norm = functools.partial(linen.BatchNorm, not train, momentum=0.9)
        y = conv(strides=self.stride, name="conv1")(x)
        y = linen.relu(norm(name="norm1")(y))
        y = norm(name="norm2")(conv(strides=1, name="conv2")(y))
        return linen.relu(y + shortcut(x, self.stride, self.width))


class LinenResNet(linen.Module):
    """The logits of a batch of images, in Flax Linen."""

    width: int
    blocks: int
    classes: int

    @linen.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Return logits (batch, classes)."""
        norm = linen.BatchNorm(not train, momentum=0.9, name="stem_norm")
        stem = convolution(linen.Conv, self.width)(self.width, strides=1, name="stem")
        x = linen.relu(norm(stem(pixels(images))))
        number = 0
        for stage, stride in enumerate(STRIDES):
            for index in range(self.blocks):
                first = stride if index == 0 else 1
                name = f"blocks_{number}"
                x = LinenBlock(self.width * 2**stage, first, name=name)(x, train)
                number += 1
        return linen.Dense(self.classes, name="head")(x.mean((1, 2)))


def make_network(
    framework: str, data: datasets.Dataset, width: int, blocks: int, seed: int
) -> Network:
    """Return the network at the start."""
    classes = int(max(data.y_train.max(), data.y_test.max())) + 1
    if framework == "nnx":
        channels = data.x_train.shape[-1]
        return from_nnx(ResNet(width, blocks, channels, classes, nnx.Rngs(seed)))
    images = jnp.asarray(data.x_train[:1])
    return from_linen(LinenResNet(width, blocks, classes), images, seed)


def draw(
    batch_size: int, augment: bool, data: Any, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return random images to train on, moved and flipped if asked, and classes."""
    images, labels = data
    choice, augmentation = jax.random.split(key)
    index = jax.random.randint(choice, (batch_size,), 0, len(images))
    chosen = images[index]
    if augment:
        chosen = shift_and_flip(augmentation, chosen)
    return chosen, labels[index]


class Outcome(NamedTuple):
    """What a run has found."""

    columns: Columns
    table: normax.theory.DynamicsTable
    network: Network
    test_error: float


def run(
    network: Network,
    data: datasets.Dataset,
    rule: str,
    batch_size: int,
    augment: bool,
    steps: int,
    rate: float,
    decay: float,
    seed: int,
) -> Outcome:
    """Train the network and compare its arrays with theory."""
    schedule = optax.warmup_constant_schedule(rate / WARMUP, rate, WARMUP)
    make = normax.UPDATE_RULES[rule].make
    rules = {True: make(schedule, decay), False: make(schedule)}
    optimizer = optax.chain(
        optax.partition(rules, network.mask),
        normax.monitor_weight_dynamics(network.axes, MONITOR_DECAY),
    )
    examples = jax.device_put((data.x_train, data.y_train))
    take = functools.partial(draw, batch_size, augment)
    invariant = scale_invariant(network, take(examples, jax.random.key(seed)), seed)
    every = max(1, steps // 100)
    carry, columns = train(network, optimizer, take, examples, steps, every, seed)
    params, rest, state = carry
    table = normax.dynamics_table(state, rule, schedule, decay)
    rates = schedule, decay
    columns = compare(network, columns, table, invariant, rule, *rates)
    batch = data.x_test, data.y_test
    _, error = evaluate(network.apply, params, rest, batch)
    return Outcome(columns, table, network, float(error))


def main(argv: Sequence[str] | None = None) -> Outcome:
    """Train, print the table, draw the picture."""
    parser = make_parser(__doc__)
    add_data_options(parser)
    add = parser.add_argument
    add("--framework", default="nnx", choices=("nnx", "linen"))
    add("--rule", default="momentum", choices=tuple(RATES))
    add("--steps", type=int, default=1000)
    add("--batch-size", type=int, default=64)
    add("--width", type=int, default=8, help="channels of the first stage")
    add("--blocks", type=int, default=1, help="in each of the three stages")
    add("--learning-rate", type=float, help="default: what suits the rule")
    add("--weight-decay", type=float, help="default: what suits the rule")
    add("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    numbers = options.steps, options.batch_size, options.width, options.blocks
    if min(numbers) < 1:
        parser.error("--steps, --batch-size, --width and --blocks must be at least 1.")
    given = options.learning_rate, options.weight_decay
    rate, decay = (
        default if value is None else value
        for value, default in zip(given, RATES[options.rule], strict=True)
    )
    if not (rate > 0 and decay > 0):
        parser.error("--learning-rate and --weight-decay must be positive.")
    make_folder(parser, options)
    data = load_data(parser, options, options.batch_size)
    network = make_network(
        options.framework, data, options.width, options.blocks, options.seed
    )
    outcome = run(
        network,
        data,
        options.rule,
        options.batch_size,
        SETTINGS[options.dataset].augment,
        options.steps,
        rate,
        decay,
        options.seed,
    )
    print(outcome.table)
    print(f"{network.size} parameters, test error {outcome.test_error:.1%}")
    name = file_name("resnet", options)
    write_csv(outcome.columns, options.out / f"{name}.csv")
    picture(outcome.columns).savefig(options.out / f"{name}.png", dpi=110)
    return outcome


if __name__ == "__main__":
    main()
