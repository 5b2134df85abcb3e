"""Time and compilation of a training step of Path-SGD beside SGD's.

    python -m pytest --noconftest tests/benchmarks/bench_path_sgd.py -s

Whole training steps (loss, gradient, update), compiled, with parameters and state
donated: the Path-SGD paper's network, 784-4000-4000-10 with batches of 100, and a
ResNet-18 for 32 x 32 images with batches of 128. All steps run in one process, in
alternation; reported are ratios of medians. Without the tests' settings, which split
the CPU into eight devices and store what is compiled.
"""

import statistics
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

import normax


class MultiLayerPerceptron(nn.Module):
    """Two hidden layers of 4,000 units."""

    @nn.compact
    def __call__(self, x):
        for width in (4000, 4000):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(10)(x)


class ResNet18(nn.Module):
    """The network for small images, with batch norm folded into biases."""

    @nn.compact
    def __call__(self, x):
        def conv(x, width, size, stride=1):
            return nn.Conv(width, (size, size), stride)(x)

        x = nn.relu(conv(x, 64, 3))
        for stage, width in enumerate((64, 128, 256, 512)):
            for block in range(2):
                stride = 2 if stage and not block else 1
                y = conv(nn.relu(conv(x, width, 3, stride)), width, 3)
                shortcut = conv(x, width, 1, stride) if x.shape != y.shape else x
                x = nn.relu(y + shortcut)
        return nn.Dense(10)(x.mean((1, 2)))


class Step:
    """A compiled training step, and the arrays that it is called with next."""

    def __init__(self, model, shape, make):
        inputs = jax.random.normal(jax.random.key(1), shape)
        labels = jnp.arange(shape[0]) % 10
        self.params = model.init(jax.random.key(0), inputs[:1])["params"]

        def forward(params, inputs):
            return model.apply({"params": params}, inputs)

        def loss(params):
            return optax.softmax_cross_entropy_with_integer_labels(
                forward(params, inputs), labels
            ).mean()

        tx = make(forward, inputs)
        self.state = tx.init(self.params)

        def step(params, state):
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        traced = jax.jit(step, donate_argnums=(0, 1))
        start = time.perf_counter()
        self.compiled = traced.lower(self.params, self.state).compile()
        self.compile_seconds = time.perf_counter() - start

    def seconds(self) -> float:
        start = time.perf_counter()
        self.params, self.state = self.compiled(self.params, self.state)
        jax.block_until_ready(self.params)
        return time.perf_counter() - start


RATE = 1e-4
SGD = lambda forward, inputs: optax.sgd(RATE)  # noqa: E731
WALK = {
    f"parameters, every {k}": lambda forward, inputs, k=k: normax.path_sgd(
        RATE, update_every=k
    )
    for k in (1, 10)
}
FORWARD = {
    f"forward, every {k}": lambda forward, inputs, k=k: normax.path_sgd(
        RATE, forward, inputs, update_every=k
    )
    for k in (1, 10)
}
CASES = {
    "perceptron": (MultiLayerPerceptron(), (100, 784), WALK | FORWARD, 30, 1.3),
    "resnet": (ResNet18(), (128, 32, 32, 3), FORWARD, 3, 1.15),
}


@pytest.mark.parametrize("name", CASES)
def test_training_step(name, benchmark):
    model, shape, makers, rounds, limit = CASES[name]
    sgd = Step(model, shape, SGD)
    ours = {label: Step(model, shape, make) for label, make in makers.items()}
    columns: dict[str, list[float]] = {label: [] for label in ours}
    reference = []
    for _ in range(rounds + 1):
        reference.append(sgd.seconds())
        for label, step in ours.items():
            columns[label].append(step.seconds())
    median = statistics.median(reference[1:])
    ratios = {
        label: round(statistics.median(column[1:]) / median, 3)
        for label, column in columns.items()
    }
    benchmark.extra_info.update(
        device=jax.devices()[0].device_kind,
        jax=jax.__version__,
        sgd_ms=round(1e3 * median, 1),
        sgd_compile_s=round(sgd.compile_seconds, 2),
        ratios=ratios,
        compile_ratios={
            label: round(step.compile_seconds / sgd.compile_seconds, 2)
            for label, step in ours.items()
        },
    )
    print(f"\n{name}: {benchmark.extra_info}")
    benchmark.pedantic(sgd.seconds, rounds=1)
    assert all(ratio < limit for ratio in ratios.values())
