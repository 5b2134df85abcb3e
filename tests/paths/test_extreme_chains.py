"""Chains of layers whose weights are near the ends of the range of float32.

Behind a layer path values have any size, so whatever reads them must scale them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normax
from normax import paths
from normax.paths import pair_contraction

pytestmark = pytest.mark.usefixtures("quick_compilation")

relu = jax.nn.relu


def with_gain(w, x):
    return relu(x @ w["first"] * w["gain"]) @ w["last"]


def with_positions(w, x):
    return relu(x @ w["first"]).reshape(len(x), 2, 2) @ w["second"]


def convolve(x, w):
    return jax.lax.conv_general_dilated(
        x, w, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
    )


def with_convolution(w, x):
    return convolve(relu(x @ w["first"]).reshape(len(x), 4, 1), w["kernel"])


def of(size, *shape):
    return np.full(shape, size, np.float32)


def log_of_sum(p, paths, *weights):
    """Return the logarithm of the p-th root of a sum of that many equal terms."""
    logs = (np.log(np.longdouble(np.float32(w))) for w in weights)
    return float(np.log(np.longdouble(paths)) / p + sum(logs))


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("size", [1e38, 1e-37])
def test_what_follows_a_dense_layer(size, p, every_form):
    first, x = of(size, 20, 4), np.ones((1, 20), np.float32)
    gain = {"first": first, "gain": of(size, 1, 4), "last": of(1e-30, 4, 1)}
    chains = {
        with_gain: (gain, log_of_sum(p, 80, size, size, 1e-30)),
        with_positions: (
            {"first": first, "second": of(size, 2, 3)},
            log_of_sum(p, 240, size, size),
        ),
        with_convolution: (
            {"first": first, "kernel": of(size, 1, 1, 3)},
            log_of_sum(p, 240, size, size),
        ),
    }
    for forward, (params, expected) in chains.items():
        got = normax.path_norm(forward, params, x, p, log=True)
        np.testing.assert_allclose(got, expected, rtol=1e-6)
    if p == 1:  # each of the 4 gains is on a quarter of the paths
        total = log_of_sum(1, 80, size, size, 1e-30)
        found = paths.path_saliency(with_gain, gain, x, log=True)["gain"]
        np.testing.assert_allclose(found, total - np.log(4), rtol=1e-6)
    kernel = of(size, 4, 3)
    pruned = kernel * np.array([[0], [1], [1], [1]], np.float32)
    got = paths.path_metric(
        lambda w, x: relu(x @ first) @ w, kernel, pruned, x, p, True
    )
    np.testing.assert_allclose(got, log_of_sum(p, 60, size, size), rtol=1e-6)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("size", [1e38, 1e-37])
def test_what_follows_a_convolution(size, p, every_form, monkeypatch):
    monkeypatch.setattr(pair_contraction, "SMALL", 0)
    first, x = of(size, 1, 2, 4), np.ones((1, 5, 2), np.float32)
    # 5 positions, 2 channels before and 4 behind
    follows = {
        "gain": (lambda h, w: jnp.sum(relu(h * w)), of(size, 1, 1, 4), 40),
        "kernel": (lambda h, w: convolve(relu(h), w), of(size, 1, 4, 3), 120),
        "dense": (lambda h, w: relu(h).reshape(1, 20) @ w, of(size, 20, 3), 120),
        "shared": (lambda h, w: relu(h) @ w, of(size, 4, 3), 120),
    }
    for second, w, count in follows.values():

        def forward(params, x, second=second):
            return second(convolve(x, params["first"]), params["second"])

        params = {"first": first, "second": w}
        total = log_of_sum(p, count, size, size)
        got = normax.path_norm(forward, params, x, p, log=True)
        np.testing.assert_allclose(got, total, rtol=1e-6)
        if p == 1:
            found = paths.path_saliency(forward, params, x, log=True)
            for name, leaf in params.items():
                np.testing.assert_allclose(
                    found[name], total - np.log(leaf.size), rtol=1e-6
                )
        pruned = params | {"first": first * np.float32([[[1], [0]]])}
        got = paths.path_metric(forward, params, pruned, x, p, log=True)
        np.testing.assert_allclose(got, total - np.log(2) / p, rtol=1e-6)


@pytest.mark.parametrize("size", [1e38, 1e-37])
def test_depth_of_convolutions(size, every_form, monkeypatch):
    monkeypatch.setattr(pair_contraction, "SMALL", 0)
    depth, x = 8, np.ones((1, 5, 2), np.float32)

    def forward(kernels, x):
        return functools.reduce(lambda h, w: relu(convolve(h, w)), kernels, x)

    kernels = [of(size, 1, 2, 2)] * depth
    total = log_of_sum(1, 10 * 2**depth, *[size] * depth)
    got = normax.path_norm(forward, kernels, x, 1, log=True)
    np.testing.assert_allclose(got, total, rtol=1e-6)
    for found in paths.path_saliency(forward, kernels, x, log=True):
        np.testing.assert_allclose(found, total - np.log(4), rtol=1e-6)
    pruned = [kernels[0] * np.float32([[[1], [0]]]), *kernels[1:]]
    got = paths.path_metric(forward, kernels, pruned, x, log=True)
    np.testing.assert_allclose(got, total - np.log(2), rtol=1e-6)


@pytest.mark.parametrize("apply", [convolve, jnp.matmul])
def test_no_weight_has_no_share_of_what_is_infinite(apply, every_form):
    def forward(kernels, x):
        return functools.reduce(lambda h, w: relu(apply(h, w)), kernels, x)

    kernels = [of(1e30, 1, 2, 2)[(0,) * (apply is jnp.matmul)]] * 12
    first = kernels[0].copy()
    first[..., 1, 0] = 0
    x = np.ones((1, 5, 2), np.float32)
    found, *others = paths.path_saliency(forward, [first, *kernels[1:]], x)
    np.testing.assert_array_equal(found, np.where(first == 0, 0, np.inf))
    for other in others:
        np.testing.assert_array_equal(other, np.inf)


@pytest.mark.parametrize("log", [False, True])
def test_a_nan_is_not_hidden_by_a_weight_of_0(log, every_form):
    first, second = of(1, 1, 2, 2), of(1, 1, 2, 2)
    first[0, 0, 0], second[0, 0, 0] = 0, np.nan

    def forward(w, x):
        return convolve(relu(convolve(x, w["first"])), w["second"])

    params, x = {"first": first, "second": second}, np.ones((1, 3, 2), np.float32)
    assert np.isnan(paths.path_saliency(forward, params, x, log)["first"][0, 0, 0])


@pytest.mark.parametrize("p", [1, 2])
def test_units_of_different_scales_before_small_layers(p, every_form):
    scales = 10.0 ** -np.array([0, 10, 20, 30])
    params = {
        "first": (np.ones((3, 4)) * scales).astype(np.float32),
        "second": (np.eye(4) * 1e-35).astype(np.float32),
        "gain": of(1e-35, 1, 4),
        "last": np.diag(1 / scales).astype(np.float32),
    }

    def forward(w, x):
        return relu(x @ w["first"] @ w["second"] * w["gain"]) @ w["last"]

    x = np.ones((1, 3), np.float32)
    got = normax.path_norm(forward, params, x, p, log=True)
    np.testing.assert_allclose(got, log_of_sum(p, 12, 1e-35, 1e-35), rtol=1e-6)
    got = normax.path_scales(forward, params, x, p, log=True)["last"]
    expected = 2 * (np.log(3) / p + np.log(scales) + 2 * np.log(np.float64(1e-35)))
    np.testing.assert_allclose(np.diag(got), expected, rtol=1e-6)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("size", [1e-30, 1e-37])
def test_a_change_far_smaller_than_what_stays(size, p, every_form, monkeypatch):
    monkeypatch.setattr(pair_contraction, "SMALL", 0)
    monkeypatch.setattr(pair_contraction, "_WIDE", 1)
    large, count = np.float32(1e30), 3
    # What changes goes through small weights, and meets what stays.
    small = np.array([[1, 1, 0], [0, size, 0], [0, 0, 0]], np.float32)
    back = np.diag([0, large, 0]).astype(np.float32)
    params = {"first": of(1, 2, 3), "small": small, "back": back, "last": of(1, 3, 1)}
    other = params | {"first": np.array([[1, 0, 1]] * 2, np.float32)}

    def forward(w, x):
        h = relu(x @ w["first"])
        for name in ["small"] * count + ["back"] * count:
            h = relu(h @ w[name])
        return h @ w["last"]

    x = np.ones((1, 2), np.float32)
    got = paths.path_metric(forward, params, other, x, p, log=True)
    expected = log_of_sum(p, 2, *[size] * count, *[large] * count)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("p", [1, 2])
def test_sums_of_nothing_are_0(p, every_form):
    def forward(w, x):
        return relu(x @ w["first"] + w["bias"]) @ w["last"]

    params = {"first": np.ones((0, 3), np.float32), "bias": of(2, 1, 3)}
    params["last"] = of(1, 3, 1)
    got = normax.path_norm(forward, params, np.ones((1, 0), np.float32), p)
    np.testing.assert_allclose(got, (3 * 2**p) ** (1 / p), rtol=1e-6)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("pair", [(1, np.nan), (np.nan, 1)])
def test_distances_of_no_number_are_none(pair, p, every_form):
    w, other = (of(size, 2, 2) for size in pair)
    x = np.ones((1, 2), np.float32)
    assert np.isnan(paths.path_metric(lambda w, x: x @ w, w, other, x, p))
