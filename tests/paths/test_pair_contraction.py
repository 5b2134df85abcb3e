"""Path metrics of large layers: one pass over two networks, more where one won't do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from normax import paths
from normax.paths import contraction, layers, pair_contraction

pytestmark = [pytest.mark.usefixtures("quick_compilation"), pytest.mark.few_rows(2)]

RNG = np.random.default_rng(0)
relu = jax.nn.relu


def columns(params, x):
    return relu(x @ params["first"]) @ params["last"]


def rows(params, x):
    return params["last"] @ relu(params["first"] @ x)


def heads(params, x):
    h = relu(jnp.einsum("i,ihd->hd", x, params["first"]))
    return jnp.einsum("hd,hdo->o", h, params["last"])


def positions(params, x):
    return jnp.sum(relu(x @ params["first"]), 0) @ params["last"]


def convolve(x, w, groups):
    return jax.lax.conv_general_dilated(
        x,
        w,
        (2,),
        "SAME",
        dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=groups,
    )


def convolutional(params, x):
    return convolve(relu(convolve(x, params["first"], 1)), params["last"], 2)


def numpy_convolution(x, w, groups):
    """Return a convolution of stride 2, of a kernel of 3 taps, padded as SAME is."""
    width, outputs = x.shape[0], -(-x.shape[0] // 2)
    before = max(0, 2 * (outputs - 1) + 3 - width) // 2
    padded = np.zeros((2 * outputs + 3, x.shape[1]))
    padded[before : before + width] = x
    inputs, each = w.shape[1], w.shape[2] // groups
    result = np.zeros((outputs, w.shape[2]))
    for position in range(outputs):
        window = padded[2 * position : 2 * position + 3]
        for j in range(w.shape[2]):
            start = j // each * inputs
            result[position, j] = np.sum(window[:, start : start + inputs] * w[:, :, j])
    return result


def summed(kind, w):
    """Return the sums over paths to the outputs of a network with these weights."""
    first, last = w["first"], w["last"]
    if kind == "columns":
        return np.ones(len(first)) @ first @ last
    if kind == "rows":
        return last @ (first @ np.ones(first.shape[1]))
    if kind == "heads":
        return np.einsum("ihd,hdo->o", first, last)
    if kind == "positions":
        return 4 * np.ones(len(first)) @ first @ last
    h = numpy_convolution(np.ones((5, 2)), first, 1)
    return numpy_convolution(h, last, 2)


KINDS = {
    "columns": (columns, (3, 6), (6, 4), (3,)),
    "convolutional": (convolutional, (3, 2, 4), (3, 2, 6), (1, 5, 2)),
    "rows": (rows, (6, 3), (4, 6), (3,)),
    "heads": (heads, (3, 2, 3), (2, 3, 4), (3,)),
    "positions": (positions, (3, 6), (6, 4), (4, 3)),
}


def draw(kind):
    _, first, last, _ = KINDS[kind]
    return {
        "first": RNG.normal(size=first).astype(np.float32),
        "last": RNG.normal(size=last).astype(np.float32),
    }


def pruned(w, fraction=0.4):
    return np.where(RNG.random(w.shape) < fraction, 0, w).astype(np.float32)


def shrunk(w, by=0.5):
    return (w * (1 - by * RNG.random(w.shape))).astype(np.float32)


def powers(params, p):
    return {k: np.abs(np.asarray(w, np.float64)) ** p for k, w in params.items()}


def expected_metric(kind, larger, smaller, p):
    sums = (summed(kind, powers(params, p)) for params in (larger, smaller))
    return float(np.sum(next(sums) - next(sums))) ** (1 / p)


@pytest.fixture
def all_layers_are_large(every_form, monkeypatch):
    monkeypatch.setattr(pair_contraction, "SMALL", 0)
    monkeypatch.setattr(pair_contraction, "_WIDE", 1)


@pytest.fixture
def one_pass_must_do(all_layers_are_large, every_form, monkeypatch):
    """Return NaN wherever more than one pass is taken where one does."""
    sums, layer = contraction.in_two_passes, layers.Layer.propagate

    def two_passes(*args):
        return jnp.nan * sums(*args)

    def propagate(*args):
        found = layer(*args)
        return found._replace(root=jnp.nan * found.root)

    monkeypatch.setattr(contraction, "in_two_passes", two_passes)
    if every_form == "cpu":  # a GPU takes several, without a conditional
        monkeypatch.setattr(layers.Layer, "propagate", propagate)


def make(kind, measure=paths.path_metric, dtype=np.float32):
    """Return a program of its own, which is compiled with what is patched."""
    forward, _, _, shape = KINDS[kind]
    x = np.ones(shape, dtype)

    @functools.partial(jax.jit, static_argnums=2)
    def call(params, other, p):
        return measure(forward, params, other, x, p)

    return call


def check(got, expected, rtol=3e-6):
    np.testing.assert_allclose(got, expected, rtol=rtol)


@pytest.mark.parametrize("kind", KINDS)
def test_the_metric_is_the_difference_of_two_sums(kind, one_pass_must_do):
    metric, params = make(kind), draw(kind)
    for change in (pruned, shrunk):
        other = jax.tree.map(change, params)
        expected = expected_metric(kind, params, other, 1)
        check(metric(params, other, 1), expected)
        check(metric(other, params, 1), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_metric_of_other_powers_is_too_after_pruning(kind, one_pass_must_do):
    metric, params = make(kind), draw(kind)
    other = jax.tree.map(pruned, params)
    for p in (2, 3.5):
        check(metric(params, other, p), expected_metric(kind, params, other, p))
        assert np.isnan(metric(params, jax.tree.map(shrunk, params), p))


@pytest.mark.parametrize("kind", KINDS)
def test_changes_of_a_few_digits_keep_their_digits(kind, one_pass_must_do):
    metric, params = make(kind), draw(kind)
    other = jax.tree.map(functools.partial(shrunk, by=3e-7), params)
    expected = expected_metric(kind, params, other, 1)
    assert 0 < expected < 1e-5 * np.sum(summed(kind, powers(params, 1)))
    check(metric(params, other, 1), expected, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_leads_through_the_meet(kind, one_pass_must_do):
    bound, params, other = make(kind, paths.path_metric_bound), draw(kind), draw(kind)
    meets = jax.tree.map(
        lambda a, b: np.where(a * b > 0, np.minimum(abs(a), abs(b)), 0), params, other
    )
    expected = sum(expected_metric(kind, w, meets, 1) for w in (params, other))
    check(bound(params, other, 1), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_units_without_weights_or_changes_take_no_second_pass(kind, one_pass_must_do):
    metric, params = make(kind), draw(kind)
    axis = 0 if kind == "rows" else -1

    def change(w):
        w = np.moveaxis(w.copy(), axis, 0)
        w[1] = 0  # a unit that is dead in the smaller network
        w[2] *= 0.5
        return np.moveaxis(w, 0, axis)

    for last in (params["last"], change(params["last"])):
        other = {"first": change(params["first"]), "last": last}
        check(metric(params, other, 1), expected_metric(kind, params, other, 1))
    assert metric(params, params, 1) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_units_of_any_scale_are_as_far_apart(kind, all_layers_are_large):
    metric, params = make(kind), draw(kind)
    other = jax.tree.map(pruned, params)
    expected = {p: expected_metric(kind, params, other, p) for p in (1, 2)}
    unit = {"rows": np.s_[1], "heads": np.s_[..., 1, 1]}.get(kind, np.s_[..., 1])
    back = {
        "columns": np.s_[1],
        "rows": np.s_[:, 1],
        "heads": np.s_[1, 1],
        "positions": np.s_[1],
        "convolutional": np.s_[:, 1, :3],  # what the first group reads of channel 1
    }[kind]

    def rescaled(params, factor):
        first, last = params["first"].copy(), params["last"].copy()
        first[unit] *= factor
        last[back] /= factor
        return {"first": first, "last": last}

    for factor in np.float32([1e25, 1e-25]):
        pair = rescaled(params, factor), rescaled(other, factor)
        for p in (1, 2):  # the squares of these weights are out of range
            check(metric(*pair, p), expected[p], rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_without_order_are_refused(kind, one_pass_must_do):
    metric, params = make(kind), draw(kind)

    def changed(*factors):
        """Return a network in which a few weights of one array have other sizes."""
        last = params["last"].copy()
        last.ravel()[: len(factors)] *= np.float32(factors)
        return params | {"last": last}

    for factors in [(0.5, 2.0), (-1.0,), (-0.1,)]:
        assert np.isnan(metric(params, changed(*factors), 1))
    for factors in [(0.5, 0.9), (2.0, 1.5)]:
        assert metric(params, changed(*factors), 1) > 0
        assert np.isnan(metric(params, changed(*factors), 2))
    assert metric(params, changed(0.0), 2) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_are_those_of_the_sums(kind, all_layers_are_large):
    params = draw(kind)
    other = jax.tree.map(shrunk, params)
    forward, _, _, shape = KINDS[kind]
    x = np.ones(shape, np.float32)
    measure = functools.partial(paths.path_metric, forward, inputs=x)
    got = jax.jit(jax.grad(measure, argnums=(0, 1)))(params, other)
    for which, name in ((0, "first"), (1, "last")):
        pair = [powers(params, 1), powers(other, 1)]
        entry = (0,) * params[name].ndim
        sizes = []
        for step in (-1e-3, 1e-3):
            moved = [dict(w) for w in pair]
            moved[which][name] = pair[which][name].copy()
            moved[which][name][entry] += step
            sizes.append(np.sum(summed(kind, moved[0]) - summed(kind, moved[1])))
        sign = np.sign((params, other)[which][name][entry])
        expected = sign * (sizes[1] - sizes[0]) / 2e-3
        check(got[which][name][entry], expected, rtol=1e-5)


@pytest.mark.parametrize("kind", ["columns", "positions"])
@pytest.mark.parametrize("size", [1.0, 1e-20, 1e-37])
def test_what_is_left_may_be_far_smaller_than_what_is_gone(
    kind, size, all_layers_are_large
):
    params = {name: np.ones_like(w) for name, w in draw(kind).items()}
    other = {name: w.copy() for name, w in params.items()}
    other["first"][:, 0] = 0  # a large change, on no path
    params["last"][0] = other["last"][0] = 0
    for w in (params, other):
        w["first"][:, 1:] *= np.float32(size)
    other["last"][1] = 0  # a small change on paths
    forward, _, _, shape = KINDS[kind]
    got = paths.path_metric(forward, params, other, np.ones(shape, np.float32))
    check(got, expected_metric(kind, params, other, 1), rtol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_by_the_power(kind, all_layers_are_large):
    params = draw(kind)
    other = jax.tree.map(pruned, params)
    forward, _, _, shape = KINDS[kind]
    x = np.ones(shape, np.float32)
    measure = functools.partial(paths.path_metric, forward, params, other, x)
    low, high = (expected_metric(kind, params, other, 2 + h) for h in (-1e-5, 1e-5))
    check(jax.jit(jax.grad(measure))(2.0), (high - low) / 2e-5, rtol=2e-5)


@pytest.mark.slow
def test_one_unusual_pair_of_many(all_layers_are_large):
    forward, _, _, shape = KINDS["columns"]
    x = np.ones(shape, np.float32)
    pair = [draw("columns") for _ in range(3)]
    pair[1]["first"][:, 1] *= np.float32(1e25)
    pair[1]["last"][1] /= np.float32(1e25)
    other = [jax.tree.map(pruned, params) for params in pair]
    stacked = [jax.tree.map(lambda *w: np.stack(w), *trees) for trees in (pair, other)]
    got = jax.vmap(lambda a, b: paths.path_metric(forward, a, b, x))(*stacked)
    for distance, *both in zip(got, pair, other, strict=True):
        check(distance, expected_metric("columns", *both, 1), rtol=1e-5)


@pytest.mark.parametrize(
    ("p", "factor"),
    [
        (1, 1e21),
        pytest.param(2, 1e11, marks=pytest.mark.slow),
        pytest.param(3.5, 2e6, marks=pytest.mark.slow),
        pytest.param(31, 5, marks=pytest.mark.slow),
    ],
)
def test_channels_of_opposite_scales(p, factor, all_layers_are_large):
    # Powers of their values and weights are rounded to 0, but sums are in the range.
    def convolve(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
        )

    def network(params, x):
        h = relu(convolve(x, params["first"]))
        return jnp.sum(convolve(h, params["last"]), 1)

    # Weights of size 1 keep their powers in the range.
    w = {"first": RNG.uniform(0.9, 1.1, (1, 3, 2)), "last": np.ones((1, 2, 2))}
    w = {name: kernel.astype(np.float32) for name, kernel in w.items()}
    w["first"][0, :, 1] = 0.9
    v = w | {"first": w["first"].copy()}
    v["first"][0, 0] = 0
    expected = 0.0
    for params, sign in ((w, 1), (v, -1)):
        powered = powers(params, p)
        expected += sign * 4 * np.sum(powered["first"][0] @ powered["last"][0])
    scales = np.float32([factor, 1 / factor])
    pair = [
        {"first": x["first"] * scales, "last": x["last"] / scales[:, None]}
        for x in (w, v)
    ]
    x = np.ones((1, 4, 3), np.float32)
    got = paths.path_metric(network, *pair, x, p)
    check(got, expected ** (1 / p), rtol=1e-5)


def test_long_sums_keep_their_digits():
    w, v = np.full((2**16, 128), 0.1, np.float32), np.float32(0.07)
    got = paths.path_metric(
        lambda w, x: x @ w, w, np.full_like(w, v), np.ones(2**16, np.float32)
    )
    check(got, w.size * (float(w[0, 0]) - float(v)))


@pytest.mark.parametrize("count", [515, 33000, 3, 8, 21, 1100])
def test_each_row_counts_once(count, monkeypatch):
    # More rows than one step takes, than one sum of steps, and than a sum of these.
    monkeypatch.setattr(pair_contraction, "SMALL", 0)
    monkeypatch.setattr(pair_contraction, "_WIDE", 1)
    w = RNG.uniform(0.5, 1, (count, 3)).astype(np.float32)
    other, x = shrunk(w), np.ones(count, np.float32)
    measure = jax.jit(
        lambda w, other: paths.path_metric(lambda w, x: x @ w, w, other, x)
    )
    check(measure(w, other), np.sum(np.float64(w) - other))
    for row in {0, count // 2, count - 1}:
        larger = other.copy()
        larger[row, 1] *= 3
        assert np.isnan(measure(w, larger))


@pytest.mark.devices(8)
@pytest.mark.parametrize("kind", ["columns", "convolutional"])
def test_weights_may_lie_on_several_devices(kind, all_layers_are_large):
    forward, first, last, shape = KINDS[kind]
    draws = {"first": (*first[:-1], 16), "last": (*last[:-2], 16, 8)}
    if kind == "convolutional":
        draws["last"] = (3, 8, 16)  # in two groups
    params = {k: RNG.normal(size=s).astype(np.float32) for k, s in draws.items()}
    other = jax.tree.map(pruned, params)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    place = lambda w: jax.device_put(  # noqa: E731
        w, jax.NamedSharding(mesh, jax.P(*[None] * (w.ndim - 1), "d"))
    )
    x = np.ones(shape, np.float32)
    got = paths.path_metric(forward, *jax.tree.map(place, (params, other)), x)
    check(got, expected_metric(kind, params, other, 1))
    bound = paths.path_metric_bound(forward, *jax.tree.map(place, (other, params)), x)
    check(bound, got)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_metric_in_float64_and_under_strict_promotion(kind, one_pass_must_do):
    params = jax.tree.map(np.float64, draw(kind))
    other = jax.tree.map(lambda w: w * (1 - 1e-9 * RNG.random(w.shape)), params)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        got = make(kind, dtype=np.float64)(params, other, 1)
    check(got, expected_metric(kind, params, other, 1), rtol=1e-6)
