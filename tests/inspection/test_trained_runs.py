"""Faults planted in real training runs are found, and healthy runs give no alarm.

The runs are saved by plain Orbax and read without their models.
"""

import functools

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState

from normax.inspection import inspect_run

pytestmark = pytest.mark.slow
STEPS = (0, 60, 120, 180)
CLASSES = 8


def batch(step, shape):
    """Return noisy images of classes that differ in their means."""
    keys = jax.random.split(jax.random.key(step), 2)
    labels = jax.random.randint(keys[0], (32,), 0, CLASSES)
    means = jax.random.normal(jax.random.key(99), (CLASSES, *shape))
    return means[labels] + 2 * jax.random.normal(keys[1], (32, *shape)), labels


def tokens(step):
    jumps = jax.random.randint(jax.random.key(step), (16, 17), 0, 3)
    sequence = jnp.cumsum(jumps, 1) % 16
    return sequence[:, :-1], sequence[:, 1:]


def cross_entropy(logits, labels):
    loss = optax.softmax_cross_entropy_with_integer_labels
    return loss(logits.astype(jnp.float32), labels).mean()


class ConvNet(nnx.Module):
    def __init__(self, rngs):
        self.conv1 = nnx.Conv(3, 8, (3, 3), use_bias=False, rngs=rngs)
        self.norm1 = nnx.BatchNorm(8, rngs=rngs)
        self.conv2 = nnx.Conv(8, 16, (3, 3), use_bias=False, rngs=rngs)
        self.norm2 = nnx.BatchNorm(16, rngs=rngs)
        self.head = nnx.Linear(16, CLASSES, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm1(self.conv1(x)))
        x = nnx.relu(self.norm2(self.conv2(x)))
        return self.head(x.mean((1, 2)))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm1 = nnx.LayerNorm(32, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, 32, decode=False, rngs=rngs)
        self.norm2 = nnx.LayerNorm(32, rngs=rngs)
        self.up = nnx.Linear(32, 64, rngs=rngs)
        self.down = nnx.Linear(64, 32, rngs=rngs)

    def __call__(self, x):
        x += self.attention(self.norm1(x))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class Transformer(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(16, 32, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])
        self.head = nnx.Linear(32, 16, rngs=rngs)

    def __call__(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class MLP(linen.Module):
    """Three layers with layer norm; the middle one may get no gradient."""

    param_dtype: jnp.dtype = jnp.float32
    stopped: bool = False

    @linen.compact
    def __call__(self, x):
        kinds = {"param_dtype": self.param_dtype, "dtype": jnp.bfloat16}
        x = linen.Dense(64, **kinds)(x)
        x = linen.relu(linen.LayerNorm(**kinds)(x))
        y = linen.Dense(64, **kinds)(x)
        y = jax.lax.stop_gradient(y) if self.stopped else y
        x = linen.relu(x + linen.LayerNorm(**kinds)(y))
        return linen.Dense(CLASSES, **kinds)(x)


def train_nnx(folder, model, tx, data):
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, inputs, labels):
        loss = lambda model: cross_entropy(model(inputs), labels)  # noqa: E731
        optimizer.update(model, nnx.grad(loss)(model))

    with ocp.CheckpointManager(folder) as manager:
        for count in range(STEPS[-1] + 1):
            if count in STEPS:
                save = ocp.args.StandardSave
                state = {
                    "model": save(nnx.state(model)),
                    "opt": save(nnx.state(optimizer)),
                }
                manager.save(count, args=ocp.args.Composite(**state))
                manager.wait_until_finished()
            step(model, optimizer, *data(count))
    return folder


def train_mlp(folder, tx, model=None, change=lambda params: params, copies=None):
    """Train, and save a Linen TrainState; `change` plants what is in the parameters."""
    model = model or MLP()
    params = change(model.init(jax.random.key(0), batch(0, (20,))[0])["params"])
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    @jax.jit
    def step(state, inputs, labels):
        apply = lambda params: model.apply({"params": params}, inputs)  # noqa: E731
        loss = lambda params: cross_entropy(apply(params), labels)  # noqa: E731
        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    with ocp.CheckpointManager(folder) as manager:
        for count in range(STEPS[-1] + 1):
            if count in STEPS:
                saved = state
                if copies:
                    cast = lambda x: x.astype(copies)  # noqa: E731
                    saved = {
                        "params": jax.tree.map(cast, state.params),
                        "opt_state": {"master": state.params},
                    }
                manager.save(count, args=ocp.args.StandardSave(saved))
                manager.wait_until_finished()
            state = step(state, *batch(count, (20,)))
    return folder


def found(folder, **config):
    report = inspect_run(folder, **config)
    return {(finding.kind, finding.array) for finding in report.findings}


images = functools.partial(batch, shape=(8, 8, 3))
MOMENTUM = optax.chain(optax.add_decayed_weights(5e-3), optax.sgd(0.1, momentum=0.9))
ADAMW = optax.adamw(3e-3, weight_decay=0.1)
CONFIG = {"rule": "adamw", "learning_rate": 3e-3, "weight_decay": 0.1}
HEALTHY = {
    "conv net": lambda folder: train_nnx(
        folder,
        ConvNet(nnx.Rngs(0)),
        MOMENTUM,
        images,
    ),
    "transformer": lambda folder: train_nnx(
        folder, Transformer(nnx.Rngs(0)), ADAMW, tokens
    ),
    "MLP, float32 parameters": lambda folder: train_mlp(folder, ADAMW),
    "MLP, bfloat16 copies beside their masters": lambda folder: train_mlp(
        folder, ADAMW, copies=jnp.bfloat16
    ),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_gives_no_alarm(name, tmp_path):
    folder = HEALTHY[name](tmp_path / "run")
    assert found(folder) == set()
    assert found(folder, **CONFIG) == set()


def with_dead_units():
    """Return a conv net with three units that give 0 for all inputs."""
    model = ConvNet(nnx.Rngs(0))
    model.norm1.bias[...] = model.norm1.bias[...].at[:3].set(-50.0)
    return model


def prune(params):
    params["Dense_1"]["kernel"] = params["Dense_1"]["kernel"].at[:, 3].set(0)
    return params


def without(name):
    """Return an optimizer that leaves one layer out."""

    def labels(params):
        return {layer: "off" if layer == name else "on" for layer in params}

    return optax.partition({"on": ADAMW, "off": optax.set_to_zero()}, labels)


def strong_decay(name):
    """Return an optimizer under which one layer loses 2 % of itself per step."""

    def labels(params):
        return {layer: "strong" if layer == name else "usual" for layer in params}

    strong = optax.adamw(1e-3, weight_decay=20.0)
    return optax.partition({"strong": strong, "usual": ADAMW}, labels)


def keep_zero(tx):
    """Hold what is 0 at 0, as pruning does."""

    def update(updates, state, params=None):
        updates, state = tx.update(updates, state, params)
        hold = lambda u, p: jnp.where(p == 0, 0, u) if p.ndim > 1 else u  # noqa: E731
        return jax.tree.map(hold, updates, params), state

    return optax.GradientTransformation(tx.init, update)


def nan_after(tx, count):
    """Spoil the first kernel's update at one step, as a bad batch does."""

    def update(updates, state, params=None):
        inner, step = state
        updates, inner = tx.update(updates, inner, params)
        kernel = updates["Dense_0"]["kernel"]
        bad = jnp.where(step == count, jnp.nan, 0)
        updates["Dense_0"]["kernel"] = kernel.at[0, 0].add(bad.astype(kernel.dtype))
        return updates, (inner, step + 1)

    init = lambda params: (tx.init(params), jnp.int32(0))  # noqa: E731
    return optax.GradientTransformation(init, update)


KERNELS = [f"params/Dense_{i}/kernel" for i in range(3)]
# At NaN, relu passes no gradient to the bias before it.
SPOILED = [*KERNELS, *(f"params/Dense_{i}/bias" for i in range(3))]
SPOILED += [f"params/LayerNorm_{i}/scale" for i in range(2)]
HALF = MLP(param_dtype=jnp.bfloat16)
PLANTED = {
    "dead units": (
        lambda folder: train_nnx(folder, with_dead_units(), MOMENTUM, images),
        {("quiet_vectors", "model/conv1/kernel")},
    ),
    "a layer that the optimizer leaves out": (
        lambda folder: train_mlp(folder, without("Dense_1")),
        {("frozen", KERNELS[1]), ("frozen", "params/Dense_1/bias")},
    ),
    "a layer without a gradient": (
        lambda folder: train_mlp(folder, ADAMW, MLP(stopped=True)),
        {("no_gradient", KERNELS[1]), ("frozen", "params/Dense_1/bias")},
    ),
    "a pruned unit": (
        lambda folder: train_mlp(folder, keep_zero(ADAMW), change=prune),
        {("zero_vectors", KERNELS[1])},
    ),
    "a NaN": (
        lambda folder: train_mlp(folder, nan_after(ADAMW, 100)),
        {("not_finite", array) for array in SPOILED},
    ),
    "decay that is too strong": (
        lambda folder: train_mlp(folder, strong_decay("Dense_1")),
        {("norm_drift", KERNELS[1])},
    ),
    "norms that grow": (
        lambda folder: train_nnx(
            folder,
            ConvNet(nnx.Rngs(0)),
            optax.adam(lambda count: 1e-3 * 1.05**count),
            images,
        ),
        {("norm_drift", f"model/{name}/kernel") for name in ("conv1", "conv2", "head")},
    ),
    "bfloat16 parameters and small steps": (
        lambda folder: train_mlp(folder, optax.adamw(1e-4, weight_decay=0.1), HALF),
        {
            *(("frozen_gain", f"params/LayerNorm_{i}/scale") for i in (0, 1)),
            *(("rounded_away", kernel) for kernel in KERNELS),
        },
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_faults_are_found_and_nothing_else(name, tmp_path):
    train, planted = PLANTED[name]
    assert found(train(tmp_path / "run")) == planted


def test_with_its_rates_a_run_in_bfloat16_shows_what_is_rounded_away(tmp_path):
    tx = optax.adamw(1e-4, weight_decay=0.1)
    folder = train_mlp(tmp_path / "run", tx, HALF)
    config = {"rule": "adamw", "learning_rate": 1e-4, "weight_decay": 0.1}
    more = found(folder, **config) - found(folder)
    kinds = "decay_rounded_away", "step_rounded_away"
    assert more == {(kind, kernel) for kind in kinds for kernel in KERNELS}
