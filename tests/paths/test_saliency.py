"""Path saliency, against sums over all paths, in and out of the range of floats."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from normax import paths
from normax.paths import saliency

pytestmark = [pytest.mark.usefixtures("quick_compilation")]

RNG = np.random.default_rng(0)
relu = jax.nn.relu


def draw(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def forward(params, x):
    """A network whose kernel `square` is on two edges of each path."""
    h = relu(x @ params["first"] + params["b"])
    h = relu(relu(h @ params["square"]) @ params["square"])
    return h @ params["last"]


def network():
    shapes = {"b": (4,), "first": (3, 4), "last": (4, 2), "square": (4, 4)}
    return {name: draw(*shape) for name, shape in shapes.items()}


X = np.ones(3, np.float32)


def test_saliency_is_the_weight_times_its_share_of_all_paths(every_form):
    params = network()
    w = {name: np.abs(w.astype(np.float64)) for name, w in params.items()}
    h = w["first"].sum(0) + w["b"]
    middle, out = h @ w["square"], w["last"].sum(1)
    twice = np.outer(h, w["square"] @ out) + np.outer(middle, out)
    into = w["square"] @ w["square"] @ out
    expected = {
        "b": w["b"] * into,
        "first": w["first"] * into,
        "last": w["last"] * (middle @ w["square"])[:, None],
        "square": w["square"] * twice,
    }
    got = paths.path_saliency(forward, params, X)
    for name in expected:
        np.testing.assert_allclose(got[name], expected[name], rtol=3e-6)


def convolutional(params, x):
    h = jax.lax.conv_general_dilated(
        x, params["first"], (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
    )
    return jnp.sum(relu(h), 1) @ params["last"]


@pytest.mark.parametrize("factor", [1.0, 1e25, 1e-25])
def test_saliencies_of_units_of_any_scale(factor, monkeypatch):
    params = {"first": draw(2, 3, 4), "last": draw(4, 2)}
    if factor >= 1:
        params["first"][..., 2] = 0  # a unit on no path
    sizes = {name: np.abs(w.astype(np.float64)) for name, w in params.items()}
    # The kernel of 2 goes over 3 of 4 positions.
    into, out = sizes["first"].sum((0, 1)), sizes["last"].sum(1)
    expected = {"first": 3 * sizes["first"] * out}
    expected["last"] = 3 * sizes["last"] * into[:, None]
    params["first"][..., 1] *= np.float32(factor)
    params["last"][1] /= np.float32(factor)
    if factor == 1:  # one pass must do
        factors = saliency.scale_factors

        def unless_direct(*args, direct=False):
            found = factors(*args, direct=direct)
            if direct:
                return found
            return jax.tree.map(
                lambda x: x * jnp.nan if x.dtype == np.float32 else x, found
            )

        monkeypatch.setattr(saliency, "scale_factors", unless_direct)
    x = np.ones((1, 4, 3), np.float32)
    got, logarithms = jax.jit(
        lambda w: [paths.path_saliency(convolutional, w, x, log=b) for b in (0, 1)]
    )(params)
    for name in expected:
        np.testing.assert_allclose(got[name], expected[name], rtol=3e-6)
        with np.errstate(divide="ignore"):
            log = np.log(expected[name])
        np.testing.assert_allclose(logarithms[name], log, rtol=3e-6, atol=3e-6)


@pytest.mark.slow
@pytest.mark.parametrize("factor", [1e20, 1e-20])
def test_logarithms_of_saliencies_out_of_the_range_of_floats(factor, every_form):
    def network(params, x):
        h = relu(relu(x @ params["first"]) @ params["middle"])
        return h @ params["last"]

    params = {"first": draw(3, 4), "middle": draw(4, 4), "last": draw(4, 2)}
    for name in ("first", "last"):
        params[name] *= np.float32(factor)
    sizes = {name: np.abs(w.astype(np.float64)) for name, w in params.items()}
    into, out = sizes["first"].sum(0), sizes["last"].sum(1)
    got = paths.path_saliency(network, params, np.ones(3), log=True)["middle"]
    expected = np.log(np.outer(into, out) * sizes["middle"])
    np.testing.assert_allclose(got, expected, rtol=3e-6)


@pytest.mark.slow
def test_an_edge_on_no_path_hides_no_other_of_its_weight(every_form):
    # Of one branch, only the first position reaches the kernel, and only the last one
    # the output. The path values before it are 1e120 times those of the other branch.
    first, last = np.zeros((2, 1, 4, 1), np.float32)
    first[:, 0], last[:, 3] = 1e30, 1

    def network(params, x):
        def convolve(x):
            return jax.lax.conv_general_dilated(
                x, params, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
            )

        dead = relu(convolve(x * first * first)) * last
        return jnp.sum(relu(convolve(x * 1e-30 * 1e-30)) + dead, 1)

    kernel, x = draw(1, 3, 2), np.ones((1, 4, 3), np.float32)
    got = paths.path_saliency(network, kernel, x, log=True)
    expected = np.log(4 * np.abs(kernel.astype(np.float64)) * 1e-60)
    np.testing.assert_allclose(got, expected, rtol=3e-6)


def deep(kernels, x):
    def layer(h, kernel):
        return relu(h @ kernel), None

    return jax.lax.scan(layer, x, kernels)[0]


def test_saliencies_of_a_deep_network_neither_overflow_nor_vanish(every_form):
    # They are 1e-50, and float32 ends at 1e-45.
    kernels, x = 0.01 * draw(30, 4, 4), np.ones(4, np.float32)
    got = jax.jit(lambda w: paths.path_saliency(deep, w, x, log=True))(kernels)
    sizes, sums, behind = np.abs(kernels.astype(np.float64)), [np.ones(4)], np.ones(4)
    for w in sizes[:-1]:
        sums.append(sums[-1] @ w)
    for i in range(30)[::-1]:
        expected = np.log(np.outer(sums[i], behind) * sizes[i])
        np.testing.assert_allclose(got[i], expected, rtol=3e-6)
        behind = sizes[i] @ behind


@pytest.mark.slow
def test_derivatives_of_saliencies_beside_a_dead_unit(every_form):
    def network(params, x):
        return params["gain"] * relu(x @ params["first"]) @ params["last"]

    def of_entry(params, gain):
        forward = lambda w, x: network(w | {"gain": gain}, x)  # noqa: E731
        return paths.path_saliency(forward, params, np.ones(3, np.float32))["last"][
            0, 0
        ]

    params = {"first": draw(3, 4), "last": draw(4, 2)}
    params["first"][:, 1] = 0
    # The saliency is |last| * gain * the sum of |first|.
    into, last = np.abs(params["first"][:, 0]).sum(), params["last"][0, 0]
    got, by_gain = jax.grad(of_entry, argnums=(0, 1))(params, jnp.float32(3.0))
    expected = {name: np.zeros_like(w) for name, w in params.items()}
    expected["first"][:, 0] = 3 * abs(last) * np.sign(params["first"][:, 0])
    expected["last"][0, 0] = 3 * into * np.sign(last)
    for name in expected:
        np.testing.assert_allclose(got[name], expected[name], rtol=3e-6, atol=1e-6)
    np.testing.assert_allclose(by_gain, abs(last) * into, rtol=3e-6)


@pytest.mark.slow
def test_saliencies_of_networks_without_weights():
    x = np.ones(3, np.float32)
    for params in ({"i": jnp.arange(3)}, {}):
        got = paths.path_saliency(lambda w, x: relu(x), params, x)
        assert got == dict.fromkeys(params)


# Values and powers of weights that are rounded to 0, one after the other, while their
# sums stay in the range: channels are scaled by A and by 1/A.
@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("factor", [1e21, pytest.param(1e23, marks=pytest.mark.slow)])
def test_channels_of_opposite_scales(factor, depthwise):
    def convolve(x, w, groups=1):
        return jax.lax.conv_general_dilated(
            x,
            w,
            (1,),
            "VALID",
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=groups,
        )

    def network(params, x):
        h = relu(convolve(x, params["first"]))
        h = relu(convolve(h, params["middle"], 4 if depthwise else 1))
        return jnp.sum(h, 1) @ params["last"]

    params = {"first": draw(1, 3, 4), "last": draw(4, 2)}
    params["middle"] = draw(1, 1 if depthwise else 4, 4)
    sizes = {name: np.abs(w.astype(np.float64)) for name, w in params.items()}
    middle = np.diag(sizes["middle"][0, 0]) if depthwise else sizes["middle"][0]
    into, out = sizes["first"][0].sum(0), sizes["last"].sum(1)
    expected = {"last": 4 * (into @ middle)[:, None] * sizes["last"]}
    each = 4 * np.outer(into, out) * middle
    expected["middle"] = np.diag(each)[None, None] if depthwise else each[None]
    scales = np.float32([factor, 1 / factor, 1, 1])
    params["first"] *= scales
    if depthwise:
        params["last"] /= scales[:, None]
    else:
        params["middle"] /= scales[:, None]
    x = np.ones((1, 4, 3), np.float32)
    got = jax.jit(lambda w: paths.path_saliency(network, w, x))(params)
    for name in expected:
        np.testing.assert_allclose(got[name], expected[name], rtol=3e-6)
