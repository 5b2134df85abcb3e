"""BatchRenorm: BatchNorm at r = 1 and d = 0, elsewhere the paper's recurrence."""

import functools
import importlib
import itertools
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from normax.nn import BatchNorm, BatchRenorm

pytestmark = [pytest.mark.usefixtures("quick_compilation"), pytest.mark.few_rows(1)]

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
datasets: Any = importlib.import_module("datasets")

RNGS = nnx.Rngs(0)


def draw(shape, seed=0, scale=1.0, shift=0.0):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=shape) * scale + shift
    return jax.device_put(values.astype(np.float32))


def init(key, shape, dtype):
    return draw(shape, 5).astype(dtype)


def statistics(layer):
    return {
        name: np.asarray(getattr(layer, name)[...], np.float64)
        for name in ("mean", "var")
    }


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_scale": False, "momentum": 0.5},
        {"use_bias": False, "epsilon": 1e-3},
        {"use_scale": False, "use_bias": False, "dtype": jnp.bfloat16},
        {"inputs": jnp.bfloat16},
        {"inputs": jnp.bfloat16, "use_scale": False, "use_bias": False},
        {"dtype": jnp.float16, "param_dtype": jnp.bfloat16},
        {"axis": 0, "use_fast_variance": False},
        {"axis": 1, "mask": True},
    ],
)
def test_batch_norm_to_the_last_bit(options):
    options = dict(options)
    mask = jnp.arange(5 * 5 * 5).reshape(5, 5, 5) % 3 > 0 if "mask" in options else None
    options.pop("mask", None)
    dtype = options.pop("inputs", jnp.float32)
    options |= {"scale_init": init, "bias_init": init, "rngs": RNGS}
    plain, ours = BatchNorm(5, **options), BatchRenorm(5, r_max=1, d_max=0, **options)
    for seed in range(3):
        x = draw((5, 5, 5), seed, 2.0, 1.0).astype(dtype)
        expected, found = plain(x, mask=mask), ours(x, mask=mask)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    expected, found = (layer(x, use_running_average=True) for layer in (plain, ours))
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)
    variables = dict(nnx.to_flat_state(nnx.state(ours)))
    assert variables.pop(("step",))[...] == 3
    others = dict(nnx.to_flat_state(nnx.state(plain)))
    assert variables.keys() == others.keys()
    for path, variable in others.items():
        assert type(variables[path]) is type(variable)
        assert variables[path].dtype == variable.dtype
        np.testing.assert_array_equal(variables[path][...], variable[...])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("limits", [(1.3, 0.2), (3.0, 5.0)])
def test_recurrence_of_the_paper(limits, masked):
    r_max, d_max = limits
    layer = BatchRenorm(
        3,
        r_max=r_max,
        d_max=d_max,
        momentum=0.8,
        epsilon=1e-3,
        axis=1,
        scale_init=init,
        bias_init=init,
        rngs=RNGS,
    )
    step = nnx.jit(lambda layer, x, mask: layer(x, mask=mask))
    mu, var = np.zeros(3), np.ones(3)
    gamma, beta = (np.asarray(p[...], np.float64) for p in (layer.scale, layer.bias))
    clipped = 0
    for seed in range(6):
        x = draw((4, 3, 2), seed, 1.5, 0.5)
        keep = np.random.default_rng(seed).random((4, 3, 2)) > 0.3 * masked
        y = step(layer, x, jnp.asarray(keep))
        rows = np.moveaxis(np.asarray(x, np.float64), 1, -1)
        kept = np.moveaxis(keep, 1, -1)
        mu_b = np.array([rows[..., i][kept[..., i]].mean() for i in range(3)])
        var_b = np.array([rows[..., i][kept[..., i]].var() for i in range(3)])
        sigma_b, sigma = np.sqrt(var_b + 1e-3), np.sqrt(var + 1e-3)
        r, d = sigma_b / sigma, (mu_b - mu) / sigma
        clipped += np.sum((r > r_max) | (r < 1 / r_max)) + np.sum(np.abs(d) > d_max)
        r, d = np.clip(r, 1 / r_max, r_max), np.clip(d, -d_max, d_max)
        expected = ((rows - mu_b) / sigma_b * r + d) * gamma + beta
        np.testing.assert_allclose(np.moveaxis(y, 1, -1), expected, atol=1e-5)
        mu, var = 0.8 * mu + 0.2 * mu_b, 0.8 * var + 0.2 * var_b
        np.testing.assert_allclose(statistics(layer)["mean"], mu, atol=1e-6)
        np.testing.assert_allclose(statistics(layer)["var"], var, rtol=1e-5)
    assert (clipped > 5) == (limits == (1.3, 0.2))
    assert layer.step[...] == 6


def test_no_gradient_through_the_corrections():
    layer = BatchRenorm(3, scale_init=init, bias_init=init, rngs=RNGS)
    layer.mean[...], layer.var[...] = draw((3,), 1), jnp.array([0.5, 2.0, 3.0])
    x, weights = draw((6, 3), 2), draw((6, 3), 3)
    mu, sigma = layer.mean[...][None], jnp.sqrt(layer.var[...] + 1e-5)[None]
    r = jnp.std(x, 0, keepdims=True) / sigma
    d = (jnp.mean(x, 0, keepdims=True) - mu) / sigma

    def plain(x, gamma, beta):
        centred = x - jnp.mean(x, 0, keepdims=True)
        z = centred / jnp.sqrt(jnp.mean(centred**2, 0, keepdims=True) + 1e-5)
        return jnp.sum(weights * jnp.sin((z * r + d) * gamma[None] + beta[None]))

    expected = jax.jit(jax.grad(plain, argnums=(0, 1, 2)))(
        x, layer.scale[...], layer.bias[...]
    )

    def loss_fn(x, layer):
        return jnp.sum(weights * jnp.sin(layer(x)))

    found, grads = nnx.jit(nnx.grad(loss_fn, argnums=(0, 1)))(x, layer)
    measured = found, grads["scale"][...], grads["bias"][...]
    for value, target in zip(measured, expected, strict=True):
        np.testing.assert_allclose(value, target, rtol=2e-4, atol=2e-5)


def test_training_computes_what_inference_will():
    layer = BatchRenorm(4, rngs=RNGS)
    layer.mean[...], layer.var[...] = draw((4,), 1), jnp.full(4, 1.5)
    x = draw((8, 4), 2)
    inference = layer(x, use_running_average=True)
    np.testing.assert_allclose(layer(x), inference, atol=1e-5)
    assert layer.step[...] == 1
    layer.eval()
    before = statistics(layer)
    layer(x)
    for name, value in statistics(layer).items():
        np.testing.assert_array_equal(value, before[name])
    assert layer.step[...] == 1


@pytest.mark.slow
def test_train_and_eval_agree_once_the_statistics_settle():
    batches = [draw((8, 3), seed, 2.0, 3.0) for seed in range(4)]
    gaps = {}
    for kind in (BatchRenorm, BatchNorm):
        layer = kind(3, rngs=RNGS)
        step = nnx.jit(lambda layer, x: layer(x))
        for x in itertools.islice(itertools.cycle(batches), 1200):
            y = step(layer, x)
        gaps[kind] = np.max(np.abs(y - layer(x, use_running_average=True)))
    assert gaps[BatchRenorm] < 0.05 < 0.5 < gaps[BatchNorm]


def test_limits_follow_schedules_of_the_own_steps():
    schedules = {
        "r_max": optax.linear_schedule(1.0, 3.0, 2, 2),
        "d_max": optax.linear_schedule(0.0, 5.0, 2, 2),
    }
    layer, plain = BatchRenorm(3, **schedules, rngs=RNGS), BatchNorm(3, rngs=RNGS)
    x = draw((5, 3), 0, 0.1, 3.0)
    halfway = BatchRenorm(3, r_max=2.0, d_max=2.5, rngs=RNGS)
    outputs = [[each(x) for each in (layer, plain, halfway)] for _ in range(5)]
    for step, other in ((0, 1), (1, 1), (2, 1), (3, 2)):
        np.testing.assert_allclose(outputs[step][0], outputs[step][other], rtol=1e-6)
    assert np.abs(outputs[3][0] - outputs[3][1]).max() > 0.5
    assert layer.step[...] == 5
    assert layer.step.dtype == jnp.int32


def test_statistics_over_a_named_axis():
    layer = BatchRenorm(3, axis_name="devices", rngs=RNGS)
    whole = BatchRenorm(3, rngs=RNGS)
    x = draw((4, 5, 3), 1, 2.0, 1.0)
    axes = nnx.StateAxes({...: None})
    split = nnx.vmap(lambda layer, x: layer(x), in_axes=(axes, 0), axis_name="devices")(
        layer, x
    )
    np.testing.assert_allclose(split.reshape(20, 3), whole(x.reshape(20, 3)), atol=1e-5)
    for name, value in statistics(whole).items():
        np.testing.assert_allclose(statistics(layer)[name], value, rtol=1e-5)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"r_max": 0.5}, "r_max must be at least 1 and finite, got 0.5"),
        ({"d_max": -1.0}, "d_max must be at least 0 and finite, got -1.0"),
        ({"r_max": optax.constant_schedule(0.0)}, "r_max must be at least 1"),
        ({"d_max": jnp.nan}, "d_max must be at least 0"),
    ],
)
def test_limits_out_of_range_raise(limits, message):
    with pytest.raises(ValueError, match=message):
        BatchRenorm(3, **limits, rngs=RNGS)


def test_mode_must_be_known():
    layer = BatchRenorm(3, use_running_average=None, rngs=RNGS)
    with pytest.raises(ValueError, match="use_running_average"):
        layer(draw((4, 3)))


def test_a_nan_shows():
    layer = BatchRenorm(2, rngs=RNGS)
    y = layer(draw((4, 2)).at[0, 0].set(jnp.nan))
    np.testing.assert_array_equal(np.isnan(y), [[True, False]] * 4)


def errors_on_digits(norm, batch_size, seeds):
    """Train small networks of several seeds at once; return their test errors."""
    data = datasets.load("digits")
    mean, deviation = data.x_train.mean(), data.x_train.std()
    x, x_test = (
        jnp.asarray(((images - mean) / deviation).reshape(-1, 64), jnp.float32)
        for images in (data.x_train, data.x_test)
    )
    y, y_test = jnp.asarray(data.y_train), jnp.asarray(data.y_test)
    tx = optax.sgd(0.01, momentum=0.9)

    def make(key):
        rngs = nnx.Rngs(key)
        hidden = nnx.Linear(64, 32, rngs=rngs), norm(32, rngs=rngs), nnx.relu
        deeper = nnx.Linear(32, 32, rngs=rngs), norm(32, rngs=rngs), nnx.relu
        return nnx.Sequential(*hidden, *deeper, nnx.Linear(32, 10, rngs=rngs))

    def train(state, key):
        def step(state, key):
            model, optimizer = nnx.merge(graphdef, state)
            rows = jax.random.randint(key, (batch_size,), 0, len(x))

            def loss_fn(model):
                return optax.softmax_cross_entropy_with_integer_labels(
                    model(x[rows]), y[rows]
                ).mean()

            optimizer.update(model, nnx.grad(loss_fn)(model))
            return nnx.state((model, optimizer)), None

        keys = jax.random.split(key, 4 * len(x) // batch_size)
        state, _ = jax.lax.scan(step, state, keys)
        model, _ = nnx.merge(graphdef, state)
        model.eval()
        return jnp.mean(jnp.argmax(model(x_test), -1) != y_test)

    # XLA takes long to compile random numbers into a larger program. So the models are
    # drawn one by one.
    models = [make(key) for key in jax.random.split(jax.random.key(0), seeds)]
    states = []
    for model in models:
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        graphdef, state = nnx.split((model, optimizer))
        states.append(state)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    keys = jax.random.split(jax.random.key(1), seeds)
    return np.asarray(jax.jit(jax.vmap(train))(stacked, keys))


@pytest.mark.slow
def test_better_than_batch_norm_in_batches_of_four():
    limits = {
        "r_max": optax.linear_schedule(1.0, 3.0, 300, 100),
        "d_max": optax.linear_schedule(0.0, 5.0, 300, 100),
    }
    ours = errors_on_digits(functools.partial(BatchRenorm, **limits), 4, 8)
    plain = errors_on_digits(BatchNorm, 4, 8)
    gain = plain - ours
    assert gain.mean() > 3 * gain.std() / np.sqrt(len(gain))
    assert ours.mean() < 0.75 * plain.mean()
