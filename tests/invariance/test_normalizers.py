"""Every cell of the table of normalizers; and their use from Linen."""

import inspect

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import normax

pytestmark = [pytest.mark.usefixtures("quick_compilation"), pytest.mark.few_rows(1)]

SHAPE = (3, 3, 3, 8)
AXES = {"unit": (0, 1, 2), "layer": (0, 1, 2, 3), "none": ()}
RNGS = nnx.Rngs(0)


def draw(shape, seed):
    return jax.device_put(
        np.random.default_rng(seed).normal(size=shape).astype(jnp.float32)
    )


def convolve(kernel, x):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def normalized(kind, **options):
    layer = kind(8, epsilon=1e-10, rngs=RNGS, **options)
    for seed, (_, param) in enumerate(nnx.to_flat_state(nnx.state(layer, nnx.Param))):
        param[...] = draw((8,), seed)
    if isinstance(layer, nnx.BatchNorm):
        layer.mean[...], layer.var[...] = draw((8,), 5), draw((8,), 6) ** 2 + 1

    def call(kernel, x):
        # A copy, whose statistics may change inside a transformation.
        graphdef, state = nnx.split(layer)
        return nnx.merge(graphdef, jax.tree.map(jnp.array, state))(convolve(kernel, x))

    return call


def stopped(kernel, x):
    z = convolve(kernel, x)
    mean, deviation = (
        jax.lax.stop_gradient(f(z, (0, 1, 2), keepdims=True))
        for f in (jnp.mean, jnp.std)
    )
    return (z - mean) / deviation


def init(key, shape, dtype):
    return draw(shape, 7)


def weight_normalized(kernel, x):
    layer = normax.nn.WeightNorm(
        nnx.Conv(3, 8, (3, 3), padding="VALID", kernel_init=init, rngs=nnx.Rngs(0))
    )
    layer.layer.kernel = layer.layer.kernel.replace(kernel)
    return layer(x)


LAYERS = {
    "BatchNorm": normalized(normax.nn.BatchNorm),
    "BatchNorm, stopped": stopped,
    "BatchNorm, inference": normalized(normax.nn.BatchNorm, use_running_average=True),
    "BatchRenorm": normalized(normax.nn.BatchRenorm, r_max=1e3, d_max=1e3),
    "LayerNorm": normalized(normax.nn.LayerNorm),
    "RMSNorm": normalized(normax.nn.RMSNorm),
    "GroupNorm": normalized(normax.nn.GroupNorm, num_groups=2),
    "InstanceNorm": normalized(normax.nn.InstanceNorm),
    "WeightNorm": weight_normalized,
}


@jax.jit
def radial_parts(kernel, slope):
    parts = []
    for axes in AXES.values():
        inner = jnp.sum(kernel * slope, axes)
        norms = [jnp.sqrt(jnp.sum(x**2, axes)) for x in (kernel, slope)]
        parts.append(jnp.max(jnp.abs(inner) / (norms[0] * norms[1])))
    return parts


@pytest.mark.parametrize("name", normax.invariance.INVARIANCES)
def test_every_cell(name):
    call, row = LAYERS[name], normax.invariance.INVARIANCES[name]
    kernel, x = draw(SHAPE, 1), draw((6, 6, 6, 3), 2)
    factors = jnp.exp(draw((1, 1, 1, 8), 8))
    changed = {
        "unit": (kernel * factors, x),
        "layer": (3.7 * kernel, x),
        "input_scale": (kernel, 0.3 * x),
        "input_shift": (kernel, x + draw((1, 1, 1, 3), 9)),
        "example_scale": (kernel, x * jnp.exp(draw((6, 1, 1, 1), 10))),
    }
    assert {*changed, "orthogonal_gradient"} == set(row._fields)

    @jax.jit
    def outputs_and_slope(kernels, inputs):
        def loss_fn(kernel):
            y = call(kernel, x)
            return jnp.sum(jnp.sin(jnp.arange(y.size)).reshape(y.shape) * y)

        slope = jax.grad(loss_fn)(kernel)
        return jax.lax.map(lambda pair: call(*pair), (kernels, inputs)), slope

    kernels, inputs = (
        jnp.stack(x) for x in zip((kernel, x), *changed.values(), strict=True)
    )
    outputs, slope = outputs_and_slope(kernels, inputs)
    first, *others = np.asarray(outputs, np.float64)
    for field, other in zip(changed, others, strict=True):
        difference = np.abs(other - first).max() / np.abs(first).max()
        assert difference < 2e-5 if getattr(row, field) else difference > 0.05, field
    # A gradient orthogonal to every unit's vector is so to the layer's.
    radial = dict(zip(AXES, radial_parts(kernel, slope), strict=True))
    orthogonal = {"unit": ("unit", "layer"), "layer": ("layer",), "none": ()}
    for axes in ("unit", "layer"):
        if axes in orthogonal[row.orthogonal_gradient]:
            assert radial[axes] < 2e-5
        else:
            assert radial[axes] > 0.02


def test_batch_renorm_is_invariant_once_its_statistics_have_followed():
    x, kernel = draw((40, 5), 1), draw((5, 3), 2)
    norm = normax.nn.BatchRenorm(3, momentum=0.5, r_max=1e3, d_max=1e3, rngs=RNGS)
    step = nnx.jit(lambda norm, kernel: norm(x @ kernel))
    outputs = [[step(norm, scale * kernel) for _ in range(40)] for scale in (1.0, 4.0)]
    np.testing.assert_allclose(outputs[1][-1], outputs[0][-1], rtol=1e-3, atol=1e-3)
    assert np.abs(outputs[1][0] - outputs[0][-1]).max() > 1


def test_rows_are_classes_of_the_package():
    assert LAYERS.keys() == normax.invariance.INVARIANCES.keys()
    for name in normax.invariance.INVARIANCES:
        assert inspect.isclass(getattr(normax.nn, name.split(",")[0]))


def test_layers_of_flax_are_its_own():
    for name in ("BatchNorm", "LayerNorm", "GroupNorm", "InstanceNorm", "RMSNorm"):
        assert getattr(normax.nn, name) is getattr(nnx, name)


def test_table_shows_every_row():
    lines = normax.invariance.invariance_table().splitlines()[2:]
    for line, (name, row) in zip(
        lines, normax.invariance.INVARIANCES.items(), strict=True
    ):
        assert line.startswith(name)
        cells = line[len(name) :].split()
        assert cells[:-1] == ["yes" if cell else "-" for cell in row[:-1]]
        assert cells[-1] == row.orthogonal_gradient


def weight_normalized_linear(inputs, outputs, *, rngs):
    return normax.nn.WeightNorm(nnx.Linear(inputs, outputs, rngs=rngs))


class LinenModel(flax.linen.Module):
    """A Linen module with both of our layers."""

    @flax.linen.compact
    def __call__(self, x, train):
        x = nnx.bridge.to_linen(weight_normalized_linear, 4, 16, name="hidden")(x)
        norm = nnx.bridge.to_linen(normax.nn.BatchRenorm, 16, momentum=0.9, name="norm")
        x = norm(x, use_running_average=not train)
        return flax.linen.Dense(1)(flax.linen.relu(x))


@pytest.mark.slow
def test_linen_training_loop():
    model, x = LinenModel(), draw((32, 4), 1)
    y = jnp.sin(x[:, :1]) + x[:, 1:2] * x[:, 2:3]
    variables = model.init(jax.random.key(0), x, train=True)
    params, stats = variables["params"], variables["batch_stats"]
    assert params["hidden"]["g"]["kernel"].shape == (16,)
    tx = optax.adam(0.03)

    def step(carry, _):
        params, stats, state = carry

        def loss_fn(params):
            variables = {"params": params, "batch_stats": stats}
            y_hat, changed = model.apply(
                variables, x, train=True, mutable=["batch_stats"]
            )
            return jnp.mean((y_hat - y) ** 2), changed["batch_stats"]

        (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), stats, state), loss

    carry = params, stats, tx.init(params)
    (after, stats, _), losses = jax.jit(
        lambda carry: jax.lax.scan(step, carry, length=300)
    )(carry)
    assert losses[-1] < 0.05 * losses[0]
    assert stats["norm"]["step"] == 300
    moved = np.abs(after["hidden"]["g"]["kernel"] - params["hidden"]["g"]["kernel"])
    assert np.median(moved) > 0.01
    variables = {"params": after, "batch_stats": stats}
    inference = model.apply(variables, x, train=False)
    assert np.mean((inference - y) ** 2) < 0.05 * losses[0]
    # The same numbers by hand.
    hidden = after["hidden"]["layer"]
    v, g = (
        np.asarray(p, np.float64)
        for p in (hidden["kernel"], after["hidden"]["g"]["kernel"])
    )
    z = np.asarray(x) @ (g * v / np.linalg.norm(v, axis=0)) + hidden["bias"][None]
    z = (z - stats["norm"]["mean"][None]) / np.sqrt(stats["norm"]["var"][None] + 1e-5)
    z = z * after["norm"]["scale"][None] + after["norm"]["bias"][None]
    dense = after["Dense_0"]
    expected = np.maximum(z, 0) @ dense["kernel"] + dense["bias"][None]
    np.testing.assert_allclose(inference, expected, atol=1e-4)
