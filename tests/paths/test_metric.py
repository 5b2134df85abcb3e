"""The path metric, against networks whose paths are written out in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from normax import paths

pytestmark = [pytest.mark.usefixtures("quick_compilation"), pytest.mark.few_rows(2)]

RNG = np.random.default_rng(0)
relu = jax.nn.relu


class Paths:
    """All paths to some units, of two networks and of their meet: columns of arrays."""

    def __init__(self, units, constants=None):
        self.units, self.constants = units, constants

    @classmethod
    def inputs(cls, count):
        return cls([np.ones((1, 3)) for _ in range(count)])

    @staticmethod
    def edge(pair):
        """Return the weights of an edge in both networks and in their meet."""
        w, other = pair
        return np.array([w, other, min(w, other, key=abs) if w * other > 0 else 0.0])

    def layer(self, count, edges):
        """Go along edges (from, to, pair of weights)."""
        ends = [[np.zeros((0, 3))] for _ in range(count)]
        units = self.flushed().units
        for start, end, pair in edges:
            ends[end].append(units[start] * self.edge(pair))
        return Paths([np.concatenate(end) for end in ends])

    def dense(self, pairs):
        _, rows, columns = pairs.shape
        edges = [(i, j, pairs[:, i, j]) for i in range(rows) for j in range(columns)]
        return self.layer(columns, edges)

    def affine(self, scales, shifts):
        """Multiply by scales and add shifts, arrays of (network, unit)."""
        old = np.zeros_like(shifts) if self.constants is None else self.constants
        units = [u * self.edge(s) for u, s in zip(self.units, scales.T, strict=True)]
        return Paths(units, old * scales + shifts)

    def flushed(self):
        """Make the constant of each unit an edge."""
        if self.constants is None:
            return self
        pairs = zip(self.units, self.constants.T, strict=True)
        return Paths([np.concatenate([u, [self.edge(c)]]) for u, c in pairs])

    def joined(self, groups):
        """Sum or maximize over groups of units."""
        units = self.flushed().units
        return Paths([np.concatenate([units[i] for i in group]) for group in groups])

    def metric(self, p):
        a, b, _ = np.concatenate(self.flushed().units).T
        return np.sum(np.abs(a - b) ** p) ** (1 / p)

    def bound(self, p):
        a, b, m = np.abs(np.concatenate(self.flushed().units).T) ** p
        return np.sum(a - m) ** (1 / p) + np.sum(b - m) ** (1 / p)


def ones(pairs):
    return np.ones_like(pairs)


def residual(params, x):
    h = relu(x @ params["first"] + params["b"])
    h = relu(h @ params["square"] + h)
    return h @ params["last"] + params["c"] - x @ params["skip"]


def paths_of_residual(w):
    x = Paths.inputs(2)
    h = x.dense(w["first"]).affine(ones(w["b"]), w["b"]).flushed()
    square = h.dense(w["square"])
    h = Paths(
        [np.concatenate(both) for both in zip(square.units, h.units, strict=True)]
    )
    last = h.dense(w["last"])
    skip = x.dense(w["skip"])
    units = [np.concatenate(both) for both in zip(last.units, skip.units, strict=True)]
    return Paths(units, w["c"])


RESIDUAL = {"first": (2, 3), "b": (3,), "square": (3, 3), "last": (3, 2)} | {
    "skip": (2, 2),
    "c": (2,),
}


def convolutional(params, x):
    """Convolution, batch norm at inference, max-pooling, mean, dense layer."""
    h = jax.lax.conv_general_dilated(
        x, params["conv"], (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
    )
    b, mean, scale, beta = (
        params[k][None, None] for k in ("b", "mean", "scale", "beta")
    )
    h = (h + b - mean) * scale + beta
    h = jax.nn.leaky_relu(h, 0.1)
    h = jax.lax.reduce_window(h, -jnp.inf, jax.lax.max, (1, 2, 1), (1, 1, 1), "VALID")
    return jnp.mean(h, axis=(0, 1)) @ params["last"] + params["c"]


def paths_of_convolutional(w):
    x = Paths.inputs(8)  # 4 positions, 2 channels
    edges = [
        (2 * (position + k) + i, 2 * position + j, w["conv"][:, k, i, j])
        for position in range(3)
        for k in range(2)
        for i in range(2)
        for j in range(2)
    ]
    h = x.layer(6, edges)
    shift = (w["b"] - w["mean"]) * w["scale"] + w["beta"]
    h = h.affine(np.tile(w["scale"], 3), np.tile(shift, 3))
    h = h.joined([[0, 2], [1, 3], [2, 4], [3, 5]])
    h = h.joined([[0, 2], [1, 3]]).affine(np.full((2, 2), 0.5), np.zeros((2, 2)))
    h = Paths(h.units).dense(w["last"])
    return Paths(h.units, w["c"])


CONVOLUTIONAL = {"conv": (2, 2, 2), "last": (2, 2), "c": (2,)} | dict.fromkeys(
    ("b", "mean", "scale", "beta"), (2,)
)


def stacked(params, x):
    """Centred inputs, layers stacked by a scan, and a quotient of parameters."""

    def step(h, layer):
        kernel, bias = layer
        return relu(h @ kernel + bias), None

    h, _ = jax.lax.scan(step, x - 0.5, (params["kernels"], params["biases"]))
    return h * params["gain"] / params["divisor"]


def paths_of_stacked(w):
    h = Paths.inputs(2).affine(np.ones((2, 2)), np.full((2, 2), -0.5)).flushed()
    for i in range(3):
        bias = w["biases"][:, i]
        h = h.dense(w["kernels"][:, i]).affine(ones(bias), bias).flushed()
    for scale in (w["gain"], 1 / w["divisor"]):
        h = h.affine(scale, np.zeros_like(scale))
    return Paths(h.units)


STACKED = {"kernels": (3, 2, 2), "biases": (3, 2), "gain": (2,), "divisor": (2,)}


def recurrent(params, x):
    """A recurrent network, whose state starts as a parameter."""

    def step(h, x):
        return relu(h @ params["w"] + x @ params["v"] + params["b"]), h

    final, states = jax.lax.scan(step, params["start"], x)
    return final + states[-1]


def paths_of_recurrent(w):
    h, before = Paths([np.zeros((0, 3))] * 2, w["start"]), None
    for _ in range(3):
        before = h.flushed()
        terms = before.dense(w["w"]), Paths.inputs(2).dense(w["v"])
        units = zip(*(term.units for term in terms), strict=True)
        h = Paths([np.concatenate(both) for both in units], w["b"]).flushed()
    units = zip(h.units, before.units, strict=True)
    return Paths([np.concatenate(both) for both in units])


RECURRENT = {"w": (2, 2), "v": (2, 2), "b": (2,), "start": (2,)}

X = {"residual": (2,), "convolutional": (1, 4, 2), "stacked": (2,), "recurrent": (3, 2)}
NETWORKS = {
    "stacked": (stacked, paths_of_stacked, STACKED),
    "residual": (residual, paths_of_residual, RESIDUAL),
    "convolutional": (convolutional, paths_of_convolutional, CONVOLUTIONAL),
    "recurrent": (recurrent, paths_of_recurrent, RECURRENT),
}


def draw(shapes):
    return {
        name: RNG.normal(size=shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def in_order(params):
    """Let all terms of constants have one sign, so that the sum is in order too."""
    signs = {"b": 1, "mean": -1, "scale": 1, "beta": 1}
    return {
        name: signs[name] * np.abs(w) if name in signs else w
        for name, w in params.items()
    }


def pruned(params):
    """Set weights to 0, but no divisor, and no term of a constant."""
    kept = ("divisor", "b", "mean", "scale", "beta")
    return {
        name: w if name in kept else w * (RNG.random(w.shape) < 0.6)
        for name, w in params.items()
    }


def shrunk(params, by=1.0):
    def smaller(name, w):
        factor = np.float32(1 - by * RNG.random(w.shape).astype(np.float32))
        return w / factor if name == "divisor" else w * factor

    return {name: smaller(name, w) for name, w in params.items()}


def both(params, other):
    return {
        name: np.stack([params[name], other[name]]).astype(np.float64)
        for name in params
    }


@functools.cache
def program(name, p=None):
    """Return the metric as one program; the power is an argument if p is None."""

    def measure(params, other, *power):
        (q,) = power or (p,)
        x = np.ones(X[name], np.float32)
        return paths.path_metric(NETWORKS[name][0], params, other, x, q)

    return jax.jit(measure)


def check(got, expected, rtol=3e-6):
    np.testing.assert_allclose(got, expected, rtol=rtol)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_metric_is_that_of_all_paths(name):
    _, enumerate_paths, shapes = NETWORKS[name]
    params = in_order(draw(shapes))
    for other in (pruned(params), shrunk(params)):
        expected = enumerate_paths(both(params, other)).metric(1)
        check(program(name, 1.0)(params, other), expected)
        check(program(name, 1.0)(other, params), expected)


@pytest.mark.few_rows(1)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_metric_of_any_power_is_that_of_all_paths_after_pruning(name):
    _, enumerate_paths, shapes = NETWORKS[name]
    params = in_order(draw(shapes))
    other = pruned(params)
    for p in (1.0, 2.0, 3.5):
        expected = enumerate_paths(both(params, other)).metric(p)
        check(program(name)(params, other, p), expected)
    assert np.all(np.isnan(program(name)(params, shrunk(params), 2.0)))


@pytest.mark.parametrize("name", NETWORKS)
def test_changes_of_a_few_digits_keep_their_digits(name):
    # A difference of two path norms in float32 would have one digit here, or none.
    _, enumerate_paths, shapes = NETWORKS[name]
    params = in_order(draw(shapes))
    other = shrunk(params, by=3e-7)
    # The terms of a sum are rounded together, and so is one over a divisor.
    fixed = {"b", "mean", "scale", "beta"} if name == "convolutional" else {"divisor"}
    other |= {array: params[array] for array in fixed & set(params)}
    walked = enumerate_paths(both(params, other))
    assert 0 < walked.metric(1) < 1e-5 * np.sum(np.abs(np.concatenate(walked.units)))
    check(program(name, 1.0)(params, other), walked.metric(1), rtol=1e-5)


@pytest.mark.few_rows(1)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_bound_leads_through_the_meet(name):
    forward, enumerate_paths, shapes = NETWORKS[name]
    x = np.ones(X[name], np.float32)

    @jax.jit
    def bounds(params, other, p):
        return paths.path_metric_bound(forward, params, other, x, p)

    params = in_order(draw(shapes))
    for other in (draw(shapes), shrunk(params)):
        for p in (1.0, 2.0):
            walked = enumerate_paths(both(params, other))
            check(bounds(params, other, p), walked.bound(p))
            assert walked.metric(p) <= walked.bound(p) * (1 + 1e-12)
    np.testing.assert_allclose(walked.bound(1), walked.metric(1), rtol=1e-12)


def deep(kernels, x):
    def layer(h, kernel):
        return relu(h @ kernel), None

    return jax.lax.scan(layer, x, kernels)[0]


@pytest.mark.parametrize("scale", [0.03, 1.0])
def test_networks_of_a_hundred_layers_are_as_far_apart_in_float32(scale):
    # Their path norms are 1e-60 and 1e70. One weight in ten is smaller by 1e-4.
    kernels = (scale * RNG.normal(size=(100, 8, 8))).astype(np.float32)
    chosen = RNG.random(kernels.shape) < 0.1
    other = np.where(chosen, kernels * np.float32(1 - 1e-4), kernels)
    total, difference, scales = np.ones(8), np.zeros(8), 0.0
    for w, v in np.abs(np.stack([kernels, other], 1).astype(np.float64)):
        difference, total = difference @ w + total @ (w - v), total @ v
        scales += np.log(total.max())
        difference, total = difference / total.max(), total / total.max()
    log_norm = np.log(total.sum()) + scales
    assert abs(log_norm) > 60 * np.log(10)
    got = paths.path_metric(deep, kernels, other, np.ones(8, np.float32), log=True)
    np.testing.assert_allclose(got, np.log(difference.sum()) + scales, rtol=3e-6)


def dense(params, x):
    return relu(x @ params["hidden"] + params["bias"]) @ params["output"]


DENSE = {"hidden": (3, 4), "bias": (4,), "output": (4, 2)}


def test_rescaling_both_networks_does_not_move_them_apart():
    params = draw(DENSE)
    other, x = shrunk(params), np.ones(3, np.float32)
    factors = np.float32(10.0) ** RNG.uniform(-6, 6, size=4).astype(np.float32)

    def rescaled(w):
        into = {name: w[name] * factors for name in ("hidden", "bias")}
        return into | {"output": w["output"] / factors[:, None]}

    before = paths.path_metric(dense, params, other, x)
    after = paths.path_metric(dense, rescaled(params), rescaled(other), x)
    np.testing.assert_allclose(after, before, rtol=3e-6)


def affine(params, x):
    return x @ params["kernel"] + params["bias"]


AFFINE = {"kernel": (3, 2), "bias": (2,)}


def test_pairs_without_order_are_refused_and_nan_if_they_are_traced():
    x, params = np.ones(3, np.float32), draw(AFFINE)
    metric = functools.partial(paths.path_metric, affine)
    other = {"kernel": params["kernel"] * 2, "bias": params["bias"] / 2}
    with pytest.raises(ValueError, match=r"larger in `other` by .* smaller in") as e:
        metric(params, other, x)
    assert "weights of params['kernel'] are larger" in str(e.value)
    assert "weights of params['bias'] are smaller" in str(e.value)
    assert np.isnan(jax.jit(metric)(params, other, x))


def test_weights_within_a_scan_are_compared_at_every_step():
    kernels = np.abs(RNG.normal(size=(100, 8, 8))).astype(np.float32)
    other, x = kernels.copy(), np.ones(8, np.float32)
    other[[20, 70], 3, 5] *= [np.float32(2), np.float32(0.5)]
    with pytest.raises(ValueError, match=r"weights of params are larger .* smaller"):
        paths.path_metric(deep, kernels, other, x, log=True)


@pytest.mark.slow
def test_the_message_says_what_is_not_in_order():
    x, params = np.ones(3, np.float32), draw(AFFINE)
    metric = functools.partial(paths.path_metric, affine)
    with pytest.raises(
        ValueError, match=r"\['bias'\] are of opposite signs, of a size"
    ):
        metric(params, params | {"bias": -params["bias"]}, x)
    with pytest.raises(ValueError, match=r"\['bias'\] are changed by up to .* than 0"):
        metric(params, params | {"bias": params["bias"] / 2}, x, p=2.0)


def test_equal_networks_are_at_no_distance():
    params, x = draw(AFFINE), np.ones(3, np.float32)
    assert paths.path_metric(affine, params, params, x) == 0
    assert paths.path_metric(affine, params, params, x, log=True) == -np.inf


@pytest.mark.slow
def test_weights_of_a_lower_precision_are_compared_in_the_higher():
    params, x = draw(DENSE), np.ones(3, np.float32)
    rounded = jax.tree.map(lambda w: jnp.asarray(w, jnp.bfloat16), params)
    widened = jax.tree.map(lambda w: w.astype(jnp.float32), rounded)
    for pair in ((params, rounded), (rounded, params)):
        got = paths.path_metric_bound(dense, *pair, x)
        np.testing.assert_array_equal(
            got, paths.path_metric_bound(dense, params, widened, x)
        )


@pytest.mark.slow
def test_integers_among_the_parameters_must_agree():
    def chosen(params, x):
        return affine(params["weights"], x)[params["outputs"]]

    x, weights = np.ones(3, np.float32), draw(AFFINE)
    params, other = (
        {"weights": weights, "outputs": np.array([i], np.int32)} for i in (0, 1)
    )
    assert paths.path_metric(chosen, params, params, x) == 0
    for call in (paths.path_metric, paths.path_metric_bound):
        with pytest.raises(ValueError, match="hold different ones; pass the same"):
            call(chosen, params, other, x)
        assert np.isnan(jax.jit(functools.partial(call, chosen))(params, other, x))


def gated(params, x):
    return jnp.where(params["gate"] > 0, x @ params["kernel"], 0)


def ordered(params, x):
    return (x @ params["kernel"])[jnp.argsort(params["gate"])[:2]]


def gated_in_a_scan(params, x):
    def layer(h, gate):
        return jax.nn.relu(jnp.where(gate > 0, h @ params["kernel"], 0)), None

    gates = jnp.broadcast_to(params["gate"], (2, 3))
    return jax.lax.scan(layer, x, gates)[0]


@pytest.mark.parametrize(
    "network",
    [
        gated,
        pytest.param(ordered, marks=pytest.mark.slow),
        pytest.param(gated_in_a_scan, marks=pytest.mark.slow),
    ],
)
def test_conditions_and_indices_made_of_weights_must_agree(network):
    x, kernel = np.ones(3, np.float32), np.ones((3, 3), np.float32)
    gates = [np.float32(gate) for gate in ([1, 2, 3], [2, 3, 4], [3, 2, -1])]
    params, same, other = ({"kernel": kernel, "gate": gate} for gate in gates)
    for call in (paths.path_metric, paths.path_metric_bound):
        assert call(network, params, same, x) == 0
        with pytest.raises(ValueError, match="hold different ones; pass the same"):
            call(network, params, other, x)
        assert np.isnan(jax.jit(functools.partial(call, network))(params, other, x))


@pytest.mark.parametrize("p", [2, pytest.param(3.0, marks=pytest.mark.slow)])
def test_derivatives_at_pruned_weights_are_finite(p):
    w = {"first": np.float32([[1, 2], [3, 4]]), "last": np.float32([[1], [-2]])}
    zero = {"first": np.float32([[0, 2], [3, 4]]), "last": np.float32([[1], [-2]])}

    def network(params, x):
        return jax.nn.relu(x @ params["first"]) @ params["last"]

    measure = functools.partial(paths.path_metric, network, inputs=np.ones(2), p=p)
    of_larger = jax.grad(measure)(w, zero)
    # The distance is the one path through the pruned weight, 1 * 1.
    np.testing.assert_allclose(of_larger["first"], [[1, 0], [0, 0]], atol=1e-6)
    of_smaller = jax.grad(measure, argnums=1)(w, zero)
    for derivative in jax.tree.leaves((of_larger, of_smaller)):
        assert np.isfinite(derivative).all()


def test_what_is_no_number_is_at_no_distance():
    kernel = np.float32([[np.nan], [1]])
    for p in (1, 2):
        distance = paths.path_metric(lambda w, x: x @ w, kernel, kernel, np.ones(2), p)
        assert np.isnan(distance)
