"""Group norms against their definition; the least max-norm against brute force."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import normax

pytestmark = [pytest.mark.usefixtures("quick_compilation"), pytest.mark.few_rows(1)]


def draw(seed, widths, biases=False, dtype=jnp.float64):
    rng = np.random.default_rng(seed)
    layers = []
    for n_in, n_out in itertools.pairwise(widths):
        layers.append(
            {"kernel": jax.device_put(rng.normal(size=(n_in, n_out)).astype(dtype))}
        )
        if biases:
            layers[-1]["bias"] = jax.device_put(rng.normal(size=n_out).astype(dtype))
    return layers


def conv_draw(seed, biases=True):
    rng = np.random.default_rng(seed)
    # The second convolution has two groups, and a flatten comes before the last layer.
    shapes = [(3, 2, 4), (2, 2, 4), (8, 1)]
    return [
        {"kernel": jax.device_put(rng.normal(size=shape))}
        | ({"bias": jax.device_put(rng.normal(size=shape[-1]))} if biases else {})
        for shape in shapes
    ]


def columns(params):
    """Return the weights into every unit, biases included."""
    for layer in params:
        kernel = np.asarray(layer["kernel"], np.float64)
        for j in range(kernel.shape[-1]):
            weights = kernel[..., j].ravel()
            yield np.append(weights, layer["bias"][j]) if "bias" in layer else weights


def unit_norms(params, p):
    return np.array([np.linalg.norm(column, p) for column in columns(params)])


POWERS = [1.0, 1.5, 2.0, np.inf]


@pytest.mark.slow
@pytest.mark.parametrize("make", [lambda: draw(0, (3, 4, 2)), lambda: conv_draw(1)])
def test_group_norms_are_their_definition(make):
    compiled = jax.jit(normax.rescaling.group_norm)
    with jax.enable_x64(True):
        params = make()
        for p, q in zip(POWERS * 2, POWERS + POWERS[::-1], strict=True):
            expected = np.linalg.norm(unit_norms(params, p), q)
            np.testing.assert_allclose(
                normax.rescaling.group_norm(params, p, q), expected, 1e-12
            )
            np.testing.assert_allclose(compiled(params, p, q), expected, 1e-12)
        largest = max(unit_norms(params, 2))
        np.testing.assert_allclose(normax.rescaling.max_norm(params), largest)
        squares = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))
        np.testing.assert_allclose(
            normax.rescaling.group_norm(params, 2, 2) ** 2, squares
        )


@pytest.mark.slow
@pytest.mark.parametrize("p", POWERS)
def test_group_norms_at_any_scale(p):
    params = draw(0, (3, 4, 2), True, jnp.float32)
    for scale, q in ((1e-30, 1.0), (1e30, 1.0), (1e30, np.inf)):
        scaled = jax.tree.map(lambda w, scale=scale: w * scale, params)
        ratio = normax.rescaling.group_norm(scaled, p, q) / normax.rescaling.group_norm(
            params, p, q
        )
        np.testing.assert_allclose(ratio, scale, 2e-6)
    zeros = jax.tree.map(jnp.zeros_like, params)
    assert normax.rescaling.group_norm(zeros, p, p) == 0
    slopes = jax.grad(normax.rescaling.group_norm)(zeros, p, p)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))
    broken = [{"kernel": params[0]["kernel"].at[0, 0].set(jnp.inf)}]
    assert normax.rescaling.max_norm(broken, p) == np.inf
    broken = [{"kernel": params[0]["kernel"].at[0, 0].set(jnp.nan)}]
    assert np.isnan(normax.rescaling.max_norm(broken, p))


@pytest.mark.slow
@pytest.mark.devices(4)
def test_hidden_units_spread_over_an_explicit_mesh():
    params = [w["kernel"] for w in draw(0, (3, 4, 4, 2), False, jnp.float32)]
    expected = normax.rescaling.balance(params)
    mesh = jax.make_mesh((4,), ("units",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        kernels = zip(params, (P(None, "units"), P("units"), P("units")), strict=True)
        sharded = [jax.device_put(w, NamedSharding(mesh, spec)) for w, spec in kernels]
        found = normax.rescaling.balance(sharded)
    for got, want in zip(found, expected, strict=True):
        np.testing.assert_allclose(got, want, 1e-6)


def test_dtypes_and_refusals():
    low = draw(0, (3, 4, 2), True, jnp.bfloat16)
    assert normax.rescaling.group_norm(low, 2, 2).dtype == jnp.float32
    for p, q in ((0.5, 2), (2, 0.9), (np.nan, 2), (-np.inf, 2)):
        with pytest.raises(ValueError, match="must be at least 1"):
            normax.rescaling.group_norm(low, p, q)
    for p in (0.5, 33, np.inf):
        with pytest.raises(ValueError, match="p must be at least 1"):
            normax.rescaling.balance(low, p)
    with pytest.raises(ValueError, match=r"params\['scale'\].*fold batch norms"):
        normax.rescaling.max_norm({"scale": jnp.ones(3), "bias": jnp.ones(3)})


def rescaled_norms(params, sources, logs, p):
    """Rescale hidden units in NumPy; return the log norm of what enters each unit."""
    ends = np.cumsum([np.shape(layer["kernel"])[-1] for layer in params[:-1]])
    factors = [*np.split(np.exp(logs), ends)[:-1], None]
    scaled = []
    for i, layer in enumerate(params):
        kernel = np.array(layer["kernel"])
        for index in np.ndindex(kernel.shape):
            if i > 0:
                kernel[index] /= factors[i - 1][sources[i - 1](index)]
            if factors[i] is not None:
                kernel[index] *= factors[i][index[-1]]
        scaled.append({"kernel": kernel})
        if "bias" in layer:
            factor = 1.0 if factors[i] is None else factors[i]
            scaled[-1]["bias"] = np.array(layer["bias"]) * factor
    return np.log(unit_norms(scaled, p))


def least_log_max_norm(params, sources, p):
    """Minimize the largest of convex functions, as an epigraph."""
    hidden = sum(np.shape(layer["kernel"])[-1] for layer in params[:-1])

    def slack(z):
        return z[-1] - rescaled_norms(params, sources, z[:-1], p)

    start = np.zeros(hidden + 1)
    start[-1] = np.max(rescaled_norms(params, sources, start[:-1], p))
    found = scipy.optimize.minimize(
        *(lambda z: z[-1], start), method="SLSQP",
        jac=lambda z: np.eye(len(z))[-1], options={"maxiter": 500, "ftol": 1e-13},
        constraints={"type": "ineq", "fun": slack},
    )  # fmt: skip
    # 8: its differences of the norms are too coarse for another step down.
    assert found.status in (0, 8), found.message
    return found.fun


def dense(index):
    return index[0]


# Each case has parameters, and for each later kernel the unit that an entry comes from.
CASES = {
    "one output": (lambda: draw(0, (2, 3, 2, 1)), [dense, dense]),
    "several outputs": (lambda: draw(1, (2, 3, 2, 3)), [dense, dense]),
    "biases": (lambda: draw(2, (2, 3, 2, 2), True), [dense, dense]),
    "small weights, large biases": (
        lambda: [
            {"kernel": 0.01 * layer["kernel"], "bias": 10 * layer["bias"]}
            for layer in draw(3, (2, 3, 2, 1), True)
        ],
        [dense, dense],
    ),
    "convolutions": (
        lambda: conv_draw(4),
        [lambda i: 2 * (i[-1] // 2) + i[-2], lambda i: i[0] % 4],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_balance_attains_the_minimum_of_brute_force(case):
    with jax.enable_x64(True):
        make, sources = CASES[case]
        params = make()
        for p in (1.0, 1.5) if case == "biases" else (2.0,):
            balanced = normax.rescaling.balance(params, p)
            least = np.exp(least_log_max_norm(params, sources, p))
            np.testing.assert_allclose(
                normax.rescaling.max_norm(balanced, p), least, 1e-7
            )
            assert normax.rescaling.max_norm(params, p) > 1.05 * least
            outputs = np.shape(params[-1]["kernel"])[-1]
            # All hidden units have the same norm.
            norms = unit_norms(balanced, p)
            np.testing.assert_allclose(norms[:-outputs], least, 1e-7)
            np.testing.assert_allclose(max(norms[-outputs:]), least, 1e-7)


def forward(params, x):
    for i, layer in enumerate(params):
        x = x @ layer["kernel"]
        x = x + layer["bias"][None] if "bias" in layer else x
        x = jax.nn.relu(x) if i < len(params) - 1 else x
    return x


@pytest.mark.slow
@pytest.mark.parametrize("p", [1.0, 3.0])
def test_lemma_3_1(p):
    with jax.enable_x64(True):
        x = jnp.ones((1, 3))
        one = draw(0, (3, 4, 5, 1))
        measured = normax.rescaling.max_norm(normax.rescaling.balance(one, p), p) ** 3
        np.testing.assert_allclose(measured, normax.path_norm(forward, one, x, p))

        several = draw(1, (3, 4, 3))
        first, second = (np.abs(layer["kernel"]) for layer in several)
        norms = np.sum((first[:, :, None] * second[None]) ** p, (0, 1)) ** (1 / p)
        measured = (
            normax.rescaling.max_norm(normax.rescaling.balance(several, p), p) ** 2
        )
        np.testing.assert_allclose(measured, np.max(norms))

        biased = draw(2, (3, 4, 5, 1), True)
        m = normax.rescaling.max_norm(normax.rescaling.balance(biased, p), p)
        divided = jax.tree.map(lambda w: w / m, biased)
        np.testing.assert_allclose(normax.path_norm(forward, divided, x, p), 1.0)
        plain = normax.path_norm(forward, biased, x, p) ** (1 / 3)
        # The lemma does not hold with biases.
        assert not np.isclose(m, plain, rtol=1e-3)


@pytest.mark.slow
def test_rescaled_networks_have_one_balanced_form():
    params = draw(3, (4, 6, 6, 2), True, jnp.float32)
    balanced = normax.rescaling.balance(params)
    close = lambda x, y: np.testing.assert_allclose(x, y, 1e-5)  # noqa: E731
    jax.tree.map(close, normax.rescaling.balance(balanced), balanced)
    wild = normax.rescaling.rescale_units(
        params, [10 ** np.linspace(-9, 27, 6), 10 ** np.linspace(25, -9, 6)]
    )
    jax.tree.map(close, normax.rescaling.balance(wild), balanced)


@pytest.mark.slow
def test_dead_units_are_out_of_the_way():
    params = draw(4, (3, 4, 4, 2), True, jnp.float32)
    kernel, bias = params[0]["kernel"], params[0]["bias"]
    kernel = kernel.at[:, :2].set(0)
    # Nothing enters units 0 and 1 of the first layer. Only these two enter unit 3 of
    # the second layer, and nothing enters its unit 1.
    params[0] = {"kernel": kernel, "bias": bias.at[:2].set(0)}
    second = params[1]["kernel"].at[2:, 3].set(0)
    params[1] = {
        "kernel": second.at[0].multiply(1e20).at[:, 1].set(0),
        "bias": params[1]["bias"].at[3].set(0).at[1].set(0),
    }
    # Nothing leaves units 1 and 2 of the second layer.
    params[2]["kernel"] = params[2]["kernel"].at[2].set(0)
    params[2]["kernel"] = params[2]["kernel"].at[1].set(0)
    x = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    outputs = jax.jit(forward)
    for p in (1.0, 2.0):
        balanced = normax.rescaling.balance(params, p)
        np.testing.assert_allclose(outputs(balanced, x), outputs(params, x), 1e-4, 1e-5)
        alive = [
            {"kernel": params[0]["kernel"][:, 2:], "bias": params[0]["bias"][2:]},
            {
                "kernel": params[1]["kernel"][2:, jnp.array([0, 2])],
                "bias": params[1]["bias"][jnp.array([0, 2])],
            },
            {
                "kernel": params[2]["kernel"][jnp.array([0, 2])],
                "bias": params[2]["bias"],
            },
        ]
        least = normax.rescaling.max_norm(normax.rescaling.balance(alive, p), p)
        np.testing.assert_allclose(normax.rescaling.max_norm(balanced, p), least, 1e-5)
    nothing = jax.tree.map(jnp.zeros_like, params)
    jax.tree.map(
        np.testing.assert_array_equal, normax.rescaling.balance(nothing), nothing
    )


@pytest.mark.slow
def test_depth_and_layers_of_any_scale():
    depth, width = 24, 4
    rng = np.random.default_rng(0)
    # The product of these scales overflows midway.
    scales = [1e20] * 8 + [1.0] * 8 + [1e-20] * 8
    params = [
        jax.device_put((rng.normal(size=(width, width)) * scale).astype(np.float32))
        for scale in scales
    ]
    balanced = jax.tree.leaves(normax.rescaling.balance(params))
    norms = [np.linalg.norm(np.float64(w), axis=0) for w in balanced]
    m = norms[0][0]
    np.testing.assert_allclose(np.stack(norms[:-1]), m, 1e-5)
    np.testing.assert_allclose(np.max(norms[-1]), m, 1e-4)
    v = np.ones(width)
    log_norm = 0.0
    # The loop computes the path norms of the outputs in float64.
    for w in params:
        v = np.sqrt(np.float64(w).T ** 2 @ v**2)
        log_norm, v = log_norm + np.log(np.max(v)), v / np.max(v)
    np.testing.assert_allclose(depth * np.log(m), log_norm, 1e-4, 1e-3)


# Names whose order is not that of the layers, which the shapes do not show.
ORDER = ("encoder", "body", "decoder")


def ordered(params, x):
    return forward([params[name] for name in ORDER], x)


@pytest.mark.slow
def test_the_order_of_layers_is_that_of_the_network():
    with jax.enable_x64(True):
        layers = draw(5, (3, 3, 3, 3), True)
        params = dict(zip(ORDER, layers, strict=True))
        x = np.random.default_rng(0).normal(size=(8, 3))
        balanced = normax.rescaling.balance(params, forward=ordered, inputs=x)
        np.testing.assert_allclose(ordered(balanced, x), ordered(params, x), 1e-10)
        chain = [balanced[name] for name in ORDER]
        least = np.exp(least_log_max_norm(layers, [dense, dense], 2.0))
        np.testing.assert_allclose(normax.rescaling.max_norm(chain), least, 1e-7)
        np.testing.assert_allclose(unit_norms(chain, 2)[:6], least, 1e-7)
        by_names = normax.rescaling.balance(params)
        assert not np.allclose(ordered(by_names, x), ordered(params, x), rtol=0.1)


@pytest.mark.slow
def test_pairs_of_kernels_and_biases_are_those_of_the_network():
    with jax.enable_x64(True):
        # They are in one group, whose names say nothing of their order.
        first, second = draw(5, (3, 3, 3), True)
        flat = {"c": first["kernel"], "a": second["kernel"]}
        flat |= {"d": first["bias"], "e": second["bias"]}

        def two(w, x):
            return jax.nn.relu(x @ w["c"] + w["d"][None]) @ w["a"] + w["e"][None]

        x = np.random.default_rng(0).normal(size=(8, 3))
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        key = jax.random.key(0)
        for other in (
            normax.rescaling.balance(flat, forward=two, inputs=shape),
            normax.rescaling.rescale_units(
                flat, [jnp.array([2.0, 3.0, 4.0])], forward=two, inputs=shape
            ),
            normax.rescaling.random_rescaling(
                key, flat, fraction=1.0, forward=two, inputs=shape
            ),
        ):
            assert not np.allclose(other["c"], flat["c"])
            np.testing.assert_allclose(two(other, x), two(flat, x), 1e-10)
