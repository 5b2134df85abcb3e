"""Rescalings keep the function of a network; what they are, and what they refuse."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx

import normax

pytestmark = [pytest.mark.usefixtures("quick_compilation"), pytest.mark.few_rows(1)]


def normal(seed, shapes, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return {
        k: jax.device_put(rng.normal(size=s).astype(dtype)) for k, s in shapes.items()
    }


MLP_SHAPES = {
    "Dense_2": {"kernel": (5, 6), "bias": (6,)},
    "Dense_3": {"kernel": (6, 4), "bias": (4,)},
    "Dense_10": {"kernel": (4, 3), "bias": (3,)},
}


def mlp_params(seed=0, dtype=jnp.float32):
    layers = enumerate(MLP_SHAPES.items())
    return {name: normal(10 * seed + i, s, dtype) for i, (name, s) in layers}


@jax.jit
def mlp(params, x):
    for name in MLP_SHAPES:
        x = x @ params[name]["kernel"] + params[name]["bias"][None]
        x = jax.nn.relu(x) if name != "Dense_10" else x
    return x


class ConvNet(nn.Module):
    """A convolution, a grouped one, a depthwise one, a flatten, two dense layers."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3))(x))
        x = nn.max_pool(nn.relu(nn.Conv(6, (3, 3), feature_group_count=2)(x)), (2, 2))
        x = nn.leaky_relu(nn.Conv(6, (2, 2), feature_group_count=6, strides=2)(x))
        x = nn.relu(nn.Dense(5)(x.reshape(x.shape[0], -1)))
        return nn.Dense(2)(x)


IMAGES = np.random.default_rng(2).normal(size=(4, 6, 6, 3)).astype(np.float32)
X = np.random.default_rng(1).normal(size=(16, 5)).astype(np.float32)


CONV_SHAPES = {
    "Conv_0": {"kernel": (3, 3, 3, 4), "bias": (4,)},
    "Conv_1": {"kernel": (3, 3, 2, 6), "bias": (6,)},
    "Conv_2": {"kernel": (2, 2, 1, 6), "bias": (6,)},
    "Dense_0": {"kernel": (54, 5), "bias": (5,)},
    "Dense_1": {"kernel": (5, 2), "bias": (2,)},
}


def conv_params(seed=0):
    layers = enumerate(CONV_SHAPES.items())
    return {name: normal(10 * seed + i, s) for i, (name, s) in layers}


conv_net = jax.jit(lambda params, x: ConvNet().apply({"params": params}, x))


def assert_close(x, y, rtol):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    assert np.max(np.abs(x - y)) <= rtol * np.max(np.abs(y))


def test_equation_1():
    params, c = mlp_params(), [np.linspace(0.1, 3, 6), np.array([4, 1, 0.5, 7])]
    rescaled = normax.rescaling.rescale_units(params, c)
    first, second, third = (params[name] for name in MLP_SHAPES)
    expected = {
        "Dense_2": {
            "kernel": first["kernel"] * c[0][None],
            "bias": first["bias"] * c[0],
        },
        "Dense_3": {
            "kernel": second["kernel"] * c[1][None] / c[0][:, None],
            "bias": second["bias"] * c[1],
        },
        "Dense_10": {"kernel": third["kernel"] / c[1][:, None], "bias": third["bias"]},
    }
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, 5e-7), rescaled, expected
    )
    jax.tree.map(lambda x, y: x.dtype == y.dtype or pytest.fail(), rescaled, params)


NETWORKS = {
    "mlp": (mlp_params, jax.jit(lambda params: mlp(params, X)), [6, 4]),
    "conv": (
        conv_params,
        jax.jit(lambda params: conv_net(params, IMAGES)),
        [4, 6, 6, 5],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
def test_the_function_and_the_path_norm_stay(network):
    make, outputs, widths = NETWORKS[network]
    params, x = make(), X if network == "mlp" else IMAGES
    net = mlp if network == "mlp" else conv_net
    log_norm = jax.jit(lambda params: normax.path_norm(net, params, x, log=True))
    for seed in range(3):
        rng = np.random.default_rng(seed)
        factors = [10 ** rng.uniform(-3, 3, width) for width in widths]
        for rescaled in (
            normax.rescaling.rescale_units(params, factors),
            normax.rescaling.random_rescaling(
                jax.random.key(seed), params, fraction=1.0
            ),
            normax.rescaling.balance(params, p=1.0 + seed / 2),
        ):
            normax.testing.assert_rescaling_equivalent(
                params, rescaled, outputs, rtol=3e-6
            )
            assert abs(log_norm(rescaled) - log_norm(params)) < 3e-6
            assert not np.allclose(*(jax.tree.leaves(t)[1] for t in (params, rescaled)))


@pytest.mark.slow
def test_any_layout_of_the_parameters():
    kernels = [(3, 4), (4, 1)]
    w = [
        jax.device_put(np.random.default_rng(0).normal(size=s).astype(jnp.float32))
        for s in kernels
    ]
    b = jnp.ones(4)
    factors = [jnp.array([2.0, 4.0, 0.5, 1.0])]
    layouts = [
        w,
        [w[0], b, w[1], jnp.ones(1)],
        {"params": {"w1": w[0], "b1": b, "w2": w[1], "b2": jnp.ones(1)}, "other": None},
        ((w[0], None), (w[1], None)),
    ]
    for params in layouts:
        rescaled = normax.rescaling.rescale_units(params, factors)
        assert jax.tree.structure(rescaled) == jax.tree.structure(params)
        kernels = [leaf for leaf in jax.tree.leaves(rescaled) if leaf.ndim == 2]
        np.testing.assert_array_equal(kernels[0], w[0] * factors[0][None])
        np.testing.assert_array_equal(kernels[1], w[1] / factors[0][:, None])
    model = nnx.Sequential(
        nnx.Linear(5, 7, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(7, 2, rngs=nnx.Rngs(1))
    )
    graph, state = nnx.split(model)
    rescaled = normax.rescaling.random_rescaling(
        *(jax.random.key(0), state, 1.0),
        forward=lambda state, x: nnx.merge(graph, state)(x), inputs=X,
    )  # fmt: skip
    assert_close(nnx.merge(graph, rescaled)(X), model(X), 3e-6)
    alone = [w[0]]
    for same in (
        normax.rescaling.rescale_units(alone, []),
        normax.rescaling.balance(alone),
    ):
        np.testing.assert_array_equal(same[0], w[0])
    np.testing.assert_array_equal(
        normax.rescaling.random_rescaling(jax.random.key(0), alone)[0], w[0]
    )


@pytest.mark.slow
def test_numbers_jit_vmap_and_bfloat16():
    params = mlp_params()
    expected = normax.rescaling.rescale_units(params, [2.0, np.full(4, 0.25)])
    compiled = jax.jit(normax.rescaling.rescale_units)(params, [jnp.array([2.0]), 0.25])
    jax.tree.map(np.testing.assert_array_equal, compiled, expected)
    many = jax.jit(jax.vmap(normax.rescaling.rescale_units, (None, 0)))(
        params, [jnp.array([2.0, 3.0]), jnp.array([0.25, 1.0])]
    )
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[0], y), many, expected)
    keys = jax.random.split(jax.random.key(0), 3)
    balanced = jax.jit(
        jax.vmap(
            lambda key: normax.rescaling.balance(
                normax.rescaling.random_rescaling(key, params, 1.0)
            )
        )
    )(keys)
    jax.tree.map(
        lambda x, y: assert_close(x[2], y, 3e-6),
        balanced,
        normax.rescaling.balance(params),
    )
    for dtype, rtol in ((jnp.bfloat16, 3e-2), (jnp.float16, 3e-3)):
        low = mlp_params(dtype=dtype)
        exact = [2.0**k for k in (1, -2)]
        for rescaled, tolerance in (
            (normax.rescaling.rescale_units(low, exact), 0.0),
            (normax.rescaling.balance(low), rtol),
        ):
            assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(rescaled))
            wide = (
                jax.tree.map(lambda w: w.astype("float32"), t) for t in (rescaled, low)
            )
            assert_close(mlp(next(wide), X), mlp(next(wide), X), tolerance)


def test_users_who_forbid_to_imply_dtypes():
    params = [jnp.ones((1, 4), jnp.bfloat16), jnp.ones((4, 1), jnp.bfloat16)]
    with jax.numpy_dtype_promotion("strict"):
        rescaled = normax.rescaling.rescale_units(params, [jnp.full(4, 2.0)])
        drawn = normax.rescaling.random_rescaling(jax.random.key(0), params)
    chex.assert_trees_all_equal(rescaled, [2 * params[0], params[1] / 2])
    chex.assert_trees_all_equal_dtypes(params, drawn)


def test_factors_far_out_of_the_range_of_products():
    # The largest float32 is 3e38. So 1e27 times 1e27 overflows, and so does 1e20 times
    # 1e27.
    params = [jnp.full((1, 2), 1e-20), jnp.full((2, 2), 1e-19), jnp.full((2, 1), 1e20)]
    params[1] = jnp.array([[1e-19, 1e-19], [1e-18, 1e17]])
    factors = [jnp.array([1e-17, 1e27]), jnp.array([1e27, 1e-17])]
    rescaled = normax.rescaling.rescale_units(params, factors)
    np.testing.assert_allclose(rescaled[0], [[1e-37, 1e7]], 1e-6)
    np.testing.assert_allclose(rescaled[1], [[1e25, 1e-19], [1e-18, 1e-27]], 1e-6)
    np.testing.assert_allclose(rescaled[2], [[1e-7], [1e37]], 1e-6)
    huge = [jnp.full((1, 2), 1e-30), jnp.full((2, 2), 1.0), jnp.full((2, 1), 1e30)]
    for bad in ([1e38, 1e-30], [1e-30, 1.0]):
        with pytest.raises(ValueError, match=r"finite and keep their signs.*params\["):
            normax.rescaling.rescale_units(huge, bad)
    with jax.enable_x64(True):
        wide = mlp_params(dtype=jnp.float64)
        rescaled = normax.rescaling.rescale_units(wide, [1e250, 1e-50])
        x = X.astype(np.float64)
        np.testing.assert_allclose(mlp(rescaled, x), mlp(wide, x), 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named(bad):
    broken = mlp_params()
    broken["Dense_3"]["bias"] = broken["Dense_3"]["bias"].at[0].set(bad)
    for change in (
        normax.rescaling.balance,
        lambda params: normax.rescaling.rescale_units(params, [2.0, 3.0]),
        lambda params: normax.rescaling.random_rescaling(KEY, params),
    ):
        with pytest.raises(ValueError, match=r"finite.*params.*holds NaN or infinity"):
            change(broken)


def test_arrays_of_numpy():
    params = [np.ones((2, 400)), np.ones((400, 1))]
    rescaled = normax.rescaling.random_rescaling(KEY, params, log_std=3.0)
    assert {w.dtype for w in rescaled} == {jnp.dtype(jnp.float32)}
    x = np.ones((1, 2), np.float32)
    assert_close(jax.nn.relu(x @ rescaled[0]) @ rescaled[1], [[800.0]], 1e-5)


def conv_shapes(*shapes):
    return {f"Conv_{i}": jnp.ones(shape) for i, shape in enumerate(shapes)}


BATCH_NORM = mlp_params() | {"BatchNorm_0": {"scale": jnp.ones(6), "bias": jnp.ones(6)}}
REFUSED = [
    (mlp_params(), [1.0], "one number or array for every hidden layer.*there are 1"),
    (mlp_params(), 2.0, "every hidden layer"),
    (mlp_params(), [1.0, np.ones(3)], r"broadcast.*Dense_3.*\(3,\).*4 units"),
    (mlp_params(), [1.0, -1.0], "positive and finite.*-1"),
    (mlp_params(), [0.0, 1.0], "positive and finite"),
    (mlp_params(), [np.nan, 1.0], "positive and finite"),
    (mlp_params(), [1e-40, 1.0], "float32 can hold"),
    (mlp_params(), [2.0**200, 1.0], "float32 can hold"),
    (BATCH_NORM, [1.0, 1.0], r"params\['BatchNorm_0'\].*fold batch norms"),
    ({}, [], "no kernel"),
    ([jnp.ones((3, 4)), jnp.ones((5, 2))], [1.0], r"chain.*\(3, 4\).*\(5, 2\)"),
    ([jnp.ones((3, 4)), jnp.ones((8, 2))], [1.0], "chain"),
    (conv_shapes((3, 3, 3, 8), (3, 3, 5, 8)), [1.0], "chain"),
    (conv_shapes((3, 3, 3, 8), (3, 3, 16, 8)), [1.0], "chain"),
    # The next would need 4 groups of 1.5 channels.
    (conv_shapes((3, 3, 3, 8), (3, 3, 2, 6)), [1.0], "chain"),
    (conv_shapes((3, 3, 3, 8), (12, 6)), [1.0], "chain"),
    (conv_shapes((3, 4), (3, 4, 5)), [1.0], "chain"),  # It was stacked by scan.
    (
        [jnp.ones((3, 4), jnp.complex64), jnp.ones((4, 2))],
        [1.0],
        "real floating.*complex",
    ),
    ([jnp.ones((3, 4), jnp.int32), jnp.ones((4, 2))], [1.0], "real floating.*int32"),
]


@pytest.mark.parametrize(("params", "factors", "match"), REFUSED)
def test_what_is_refused(params, factors, match):
    with pytest.raises(ValueError, match=f"(?s){match}"):
        normax.rescaling.rescale_units(params, factors)
    if "factors" not in match and "layer" not in match and factors in ([1.0], []):
        for other in (
            normax.rescaling.balance,
            lambda w: normax.rescaling.random_rescaling(KEY, w),
        ):
            with pytest.raises(ValueError, match=f"(?s){match}"):
                other(params)


KEY = jax.random.key(0)
SQUARE = {
    f"Dense_{i}": jax.device_put(
        (np.random.default_rng(i).normal(size=(5, 5)) / 2).astype(np.float32)
    )
    for i in range(6)
}


def residual(params, x):
    x = x @ params["Dense_0"]
    for i in (1, 3):
        x = x + jax.nn.relu(x @ params[f"Dense_{i}"]) @ params[f"Dense_{i + 1}"]
    return jax.nn.relu(x) @ params["Dense_5"]


def stack(activation):
    def forward(params, x):
        for i in range(6):
            x = x @ params[f"Dense_{i}"]
            x = activation(x) if i < 5 else x
        return x

    return forward


@pytest.mark.slow
def test_forward_is_checked():
    given = dict(inputs=jax.ShapeDtypeStruct((8, 5), jnp.float32))
    for keeps in (jax.nn.relu, jax.nn.leaky_relu, jnp.abs):
        normax.rescaling.balance(SQUARE, forward=stack(keeps), **given)
    normax.rescaling.random_rescaling(
        KEY, SQUARE, forward=lambda *a: jax.nn.softmax(stack(jax.nn.relu)(*a)), **given
    )
    # A wrong activation is found however little the given factors change.
    for factors in ([1.0 + 1e-6, 1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 100.0, 1.0, 1.0]):
        for breaks, primitive in ((jax.nn.silu, "logistic"), (jnp.tanh, "tanh")):
            match = rf"(?s)Dense_0.*Dense_4.*applies `{primitive}`"
            with pytest.raises(ValueError, match=match):
                normax.rescaling.rescale_units(
                    SQUARE, factors, forward=stack(breaks), **given
                )
    # Inputs of moderate size do not reach the 6 of relu6 with these weights.
    small = jax.tree.map(lambda w: 0.2 * w, SQUARE)
    for change in (
        normax.rescaling.balance,
        lambda *a, **k: normax.rescaling.rescale_units(*a, [2.0] * 5, **k),
    ):
        with pytest.raises(ValueError, match="applies `min`"):
            change(small, forward=stack(jax.nn.relu6), **given)
    tied = r"Dense_0'\], .*Dense_2'\], .*Dense_4'\] changes.*residual.*same factors"
    for change in (
        normax.rescaling.balance,
        lambda *a, **k: normax.rescaling.random_rescaling(KEY, *a, **k),
    ):
        with pytest.raises(ValueError, match=tied):
            change(SQUARE, forward=residual, **given)
    c, inner = np.linspace(0.5, 2, 5), np.linspace(3, 0.1, 5)
    kept = normax.rescaling.rescale_units(
        SQUARE, [c, inner, c, 1 / inner, c], forward=residual, **given
    )
    with pytest.raises(ValueError, match="residual"):
        normax.rescaling.rescale_units(
            SQUARE, [c, 1.0, c[::-1], 1.0, c], forward=residual, **given
        )
    x = np.ones((1, 5), np.float32)
    assert_close(residual(kept, x), residual(SQUARE, x), 3e-6)

    def reversed_order(params, x):
        return stack(jax.nn.relu)(
            dict(zip(params, reversed(params.values()), strict=True)), x
        )

    turned = normax.rescaling.balance(SQUARE, forward=reversed_order, **given)
    assert_close(reversed_order(turned, x), reversed_order(SQUARE, x), 3e-6)

    def exchanged(params, x):
        return jax.nn.relu(x @ params["a"])[:, ::-1] @ params["b"]

    with pytest.raises(ValueError, match="not what the next kernel"):
        pair = {"a": SQUARE["Dense_0"], "b": SQUARE["Dense_1"]}
        normax.rescaling.balance(pair, forward=exchanged, **given)

    def large(params, x):
        return stack(jax.nn.relu)(params, x * 1e12) * 1e-12

    with pytest.raises(ValueError, match="out of the range"):
        normax.rescaling.rescale_units(
            SQUARE, [1e30, 1e30, 1.0, 1.0, 1.0], forward=large, **given
        )
    with pytest.raises(ValueError, match="only `forward` is given"):
        normax.rescaling.balance(SQUARE, forward=residual)
    with pytest.raises(ValueError, match=r"params\['step'\] has dtype int32"):
        normax.rescaling.balance({**SQUARE, "step": 3})


def reference_log10_factors(rng, units, picks):
    """Follow the paper's section 5, one pick after the other."""
    decades = np.zeros(units)
    for unit in rng.integers(0, units, picks):
        decades[unit] += rng.lognormal(0.0, 1.0)
    return decades


@pytest.mark.slow
def test_the_recipe_of_the_paper():
    params = [jnp.ones((1, 5000)), jnp.full((5000, 3000), 1e-3), jnp.ones((3000, 1))]
    rescaled = normax.rescaling.random_rescaling(KEY, params)
    first, third = np.float64(rescaled[0][0]), 1 / np.float64(rescaled[2][:, 0])
    decades = np.log10(np.concatenate([first, third]))
    ours = decades[decades > 0]
    reference = reference_log10_factors(np.random.default_rng(0), 8000, 2000)
    reference = reference[reference > 0]
    # This is the expected number of different units among picks with replacement.
    assert abs(len(ours) - 8000 * (1 - (1 - 1 / 8000) ** 2000)) < 60
    share = np.mean(first > 1)
    # Both layers get the same share of the picks.
    assert abs(share - np.mean(third > 1)) < 0.03
    truncated = np.minimum(reference, np.max(ours))
    assert scipy.stats.ks_2samp(ours, truncated).pvalue > 0.01
    expected = 1e-3 * third[None] ** 1.0 / first[:, None]
    np.testing.assert_allclose(rescaled[1], expected, 1e-5)
    other = normax.rescaling.random_rescaling(jax.random.key(1), params)
    assert np.mean(np.asarray(other[0]) > 1) < 0.3 and not np.array_equal(
        *(r[0] for r in (rescaled, other))
    )


def test_the_parameters_of_the_distribution():
    params = [jnp.ones((1, 40)), jnp.ones((40, 1))]
    rescaled = normax.rescaling.random_rescaling(
        KEY, params, fraction=1.0, log_mean=np.log(0.5), log_std=0.0
    )
    # Each pick multiplies by half a decade.
    picks = np.log10(np.float64(rescaled[0])) / 0.5
    np.testing.assert_allclose(picks, np.round(picks), atol=1e-5)
    assert np.sum(np.round(picks)) == 40 and np.max(picks) > 2.5
    same = normax.rescaling.random_rescaling(KEY, params, fraction=jnp.float32(0))
    jax.tree.map(np.testing.assert_array_equal, same, params)
    for bad in (dict(fraction=-0.1), dict(log_std=-1.0), dict(fraction=np.nan)):
        with pytest.raises(ValueError, match="must be at least 0"):
            normax.rescaling.random_rescaling(KEY, params, **bad)


@pytest.mark.slow
def test_the_tails_stay_finite():
    params, x = mlp_params(), X[:2]
    keys = jax.random.split(jax.random.key(7), 300)

    @jax.jit
    @jax.vmap
    def outputs(key):
        rescaled = normax.rescaling.random_rescaling(key, params, 1.0, log_mean=3.0)
        return rescaled, mlp(rescaled, x)

    rescaled, y = outputs(keys)
    assert np.max(rescaled["Dense_2"]["kernel"]) > 1e28
    np.testing.assert_allclose(y, np.broadcast_to(mlp(params, x), y.shape), 1e-4, 1e-5)
    half = mlp_params(dtype=jnp.bfloat16)
    mild = normax.rescaling.random_rescaling(jax.random.key(1), half, 1.0)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(mild))
