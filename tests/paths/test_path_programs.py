"""Programs of Path-SGD: compiled once for equal networks, never stale, and freed."""

import functools
import gc
import logging
import weakref

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normax

pytestmark = [pytest.mark.usefixtures("quick_compilation"), pytest.mark.few_rows(1)]

PARAMS = [jnp.array([[3.0, -1.0], [0.5, 2.0]]), jnp.array([[2.0], [-1.0]])]
X = jnp.ones((4, 2))


def chain(params, x):
    return jax.nn.relu(x @ params[0]) @ params[1]


def inverse_scales(tx, params=PARAMS):
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    return updates


def expected_scales(params=PARAMS, p=2.0):
    """Return 1 / gamma of the two layers, written out in float64."""
    first, last = (np.abs(np.asarray(w, np.float64)) ** p for w in params)
    into, out = first.sum(0)[:, None], last.sum(1)[None]
    pair = np.broadcast_to(out, first.shape), np.broadcast_to(into, last.shape)
    return [np.float32(gamma ** (-2 / p)) for gamma in pair]


def assert_scales(got, expected):
    chex.assert_trees_all_close(got, expected, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("update_every", [1, 3])
@pytest.mark.parametrize("walk", [True, False])
def test_the_same_network_is_compiled_once_for_200_transformations(
    walk, update_every, caplog
):
    calls = []

    def forward(params, x):
        calls.append(1)
        return chain(params, x)

    network = (None, None) if walk else (forward, X)

    def build():
        tx = normax.path_sgd(1.0, *network, update_every=update_every)
        inverse_scales(tx)

    build()
    first, _, objects = len(calls), gc.collect(), len(gc.get_objects())
    with jax.log_compiles(), caplog.at_level(logging.DEBUG, "jax"):
        for _ in range(200):
            build()
    assert len(calls) == first and bool(calls) != walk
    assert "Compiling" not in caplog.text and "tracing" not in caplog.text
    caplog.clear()
    gc.collect()
    assert len(gc.get_objects()) - objects < 200  # less than one for each


@pytest.mark.slow
def test_what_new_functions_compile_is_freed():
    def build():
        inverse_scales(normax.path_sgd(1.0, lambda w, x: chain(w, x), X))

    for _ in range(3):
        build()
    gc.collect()
    objects = len(gc.get_objects())
    for _ in range(5):
        build()
    gc.collect()
    assert len(gc.get_objects()) - objects < 100  # one program has 168


@pytest.mark.slow
def test_networks_are_freed_with_their_data():
    data = jnp.array([[2.0, 3.0]])
    forward = functools.partial(lambda scale, w, x: chain(w, x * scale), data)
    tx = normax.path_sgd(1.0, forward, X)
    inverse_scales(tx)
    references = [weakref.ref(forward), weakref.ref(data)]
    del forward, tx, data
    gc.collect()
    assert [reference() for reference in references] == [None, None]


@pytest.mark.slow
def test_new_functions_are_read_anew():
    # Of one code, one after the other: also where one has the address of another.
    def network(scale):
        return lambda params, x: scale * chain(params, x)

    for scale in (1.0, 2.0, 3.0, 4.0, 5.0):
        got = inverse_scales(normax.scale_by_path_sgd(network(scale), X))
        expected = [s / np.float32(scale) ** 2 for s in expected_scales()]
        assert_scales(got, expected)


def test_one_function_is_read_once_and_its_copies_anew():
    scale = [1.0]

    def forward(params, x):
        return scale[0] * chain(params, x)

    before = normax.scale_by_path_sgd(forward, X)
    assert_scales(inverse_scales(before), expected_scales())
    scale[0] = 10.0
    kept = normax.scale_by_path_sgd(forward, X)
    assert_scales(inverse_scales(kept), expected_scales())
    copy = normax.scale_by_path_sgd(functools.partial(forward), X)
    assert_scales(inverse_scales(copy), [s / 100 for s in expected_scales()])


class Network:
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, scale):
        self.scale = scale

    def __call__(self, params, x):
        return self.scale * chain(params, x)

    def __eq__(self, other):
        return True  # though they compute something else


class Slotted:
    __slots__ = ("scale",)  # no weak references

    def __init__(self, scale):
        self.scale = scale

    def __call__(self, params, x):
        return self.scale * chain(params, x)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        Network,
        Slotted,
        lambda scale: Network(scale).__call__,
        lambda scale: jax.jit(Network(scale).__call__),
        lambda scale: functools.partial(Network(scale)),
        lambda scale: functools.partial(lambda s, w, x: s * chain(w, x), scale),
    ],
)
def test_networks_of_any_kind(make):
    wider = [jnp.ones((2, 3)), jnp.ones((3, 1))]
    one, two = (normax.scale_by_path_sgd(make(scale), X) for scale in (1.0, 2.0))
    for params in (PARAMS, wider):  # the second is traced after the first
        expected = expected_scales(params)
        assert_scales(inverse_scales(two, params), [s / 4 for s in expected])
        assert_scales(inverse_scales(one, params), expected)
        gc.collect()


@pytest.mark.slow
def test_powers_are_told_apart():
    expected = {p: expected_scales(p=p) for p in (1.0, 1.5, 2.0, 3.0)}
    for number in (float, np.float32, np.float64, jnp.float32, np.asarray, jnp.asarray):
        for p, scales in expected.items():
            for network in ((None, None), (chain, X)):
                tx = normax.scale_by_path_sgd(*network, number(p))
                assert_scales(inverse_scales(tx), scales)
    traced = jax.jit(lambda p: inverse_scales(normax.scale_by_path_sgd(chain, X, p)))
    for p, scales in expected.items():
        assert_scales(traced(p), scales)
    assert_scales(inverse_scales(normax.scale_by_path_sgd(p=2)), expected[2.0])


def masked(params, inputs):
    hidden = jax.nn.relu(inputs["x"] @ params[0])
    return jnp.where(inputs["mask"], hidden, 0) @ params[1]


def test_integers_among_the_inputs_are_constants():
    mask = np.array([[True, True]])
    whole = normax.scale_by_path_sgd(masked, {"x": X[:1], "mask": mask})
    mask[0, 1] = False  # after one was built, and before another is
    part = normax.scale_by_path_sgd(masked, {"x": X[:1], "mask": mask})
    other = normax.scale_by_path_sgd(masked, {"x": X[:1], "mask": jnp.asarray(mask)})
    expected = expected_scales()
    fewer = [s * alive for s, alive in zip(expected, (mask, mask.T), strict=True)]
    assert_scales(inverse_scales(whole), expected)
    assert_scales(inverse_scales(part), fewer)
    assert_scales(inverse_scales(other), fewer)
    traced = jax.jit(
        lambda mask: inverse_scales(
            normax.scale_by_path_sgd(masked, {"x": X[:1], "mask": mask})
        )
    )
    assert_scales(traced(mask), fewer)
    assert_scales(traced(np.array([[True, True]])), expected)


@pytest.mark.slow
def test_random_keys_and_numbers_among_the_inputs():
    def forward(params, inputs):
        keep = jax.random.bernoulli(inputs["key"], 0.5, (1, 2))
        hidden = jnp.where(keep, jax.nn.relu(inputs["x"] @ params[0]), 0)
        return inputs["times"] * hidden @ params[1]

    for seed, times in [(0, 1), (1, 1), (2, 1), (3, 1), (3, 2)]:
        key = jax.random.key(seed)
        keep = np.asarray(jax.random.bernoulli(key, 0.5, (1, 2)))
        inputs = {"x": X[:1], "key": key, "times": times}
        got = inverse_scales(normax.scale_by_path_sgd(forward, inputs))
        scales = [s / times**2 for s in expected_scales()]
        scales = [np.where(keep, scales[0], 0), np.where(keep.T, scales[1], 0)]
        assert_scales(got, scales)


def test_shapes_of_inputs_are_all_that_matters():
    calls = []

    def forward(params, x):
        calls.append(x.shape)
        return chain(params, x)

    for inputs in (X, 2 * X, np.asarray(X), jax.ShapeDtypeStruct((4, 2), jnp.float32)):
        inverse_scales(normax.scale_by_path_sgd(forward, inputs))
    first = len(calls)
    inverse_scales(normax.scale_by_path_sgd(forward, jnp.ones((5, 2))))
    assert calls[:first] == [(4, 2), (1, 2)] and calls[first] == (5, 2)


def test_precision_is_that_of_the_call():
    tx = normax.scale_by_path_sgd(chain, np.ones((1, 2)))
    assert inverse_scales(tx)[0].dtype == jnp.float32
    with jax.enable_x64(True):
        params = [jnp.asarray(w, jnp.float64) for w in PARAMS]
        (got, _) = inverse_scales(tx, params)
        assert got.dtype == jnp.float64
        expected = 1 / np.square(np.asarray(PARAMS[1], np.float64)).sum(1)
        np.testing.assert_allclose(got, np.stack([expected] * 2), rtol=1e-13)
