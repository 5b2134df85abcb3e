"""The comparison of pruning before and after rescaling, run small."""

import functools
import importlib
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normax
from normax import paths

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
path_pruning: Any = importlib.import_module("path_pruning")

pytestmark = pytest.mark.usefixtures("quick_compilation")
SMALL = "--fractions 0.5 --seeds 1 --width 8 --epochs 1 --fine-tune 1 --images 200"


def test_rounding_is_to_the_nearest_or_towards_zero():
    w = jnp.array([1.0, -0.7519, 0.3])
    for kind in path_pruning.ROUNDINGS:
        rounded = path_pruning.rounded(w, kind)
        step = 1 / 127 if kind.startswith("int8") else 2.0**-8
        most = step if kind.endswith("zero") else step / 2
        change = np.abs(rounded - w)
        assert 0 < np.max(change) <= most * 1.0001
        if kind.endswith("zero"):
            assert np.all(np.abs(rounded) <= np.abs(w))


@pytest.mark.slow
def test_no_scale_has_tighter_certificates_of_int8():
    network = path_pruning.make_networks((4, 4, 3), 8)["mlp"]
    x = jnp.ones((1, 4, 4, 3))
    params = jax.tree.map(lambda w: w + 0.1, network.start(jax.random.key(0)))
    options = {"forward": network.forward, "inputs": x}
    tightest = jax.jit(functools.partial(path_pruning.tightest, network, x))

    @jax.jit
    def certificate(params):
        other = jax.tree.map(lambda w: path_pruning.rounded(w, "int8"), params)
        return paths.path_metric_bound(network.forward, params, other, x)

    keys = jax.random.split(jax.random.key(1), 8)
    drawn = [
        normax.rescaling.random_rescaling(key, params, 1.0, 0.0, 0.1, **options)
        for key in keys
    ]
    drawn += [params, normax.rescaling.balance(params, 1.0, **options)]
    best = certificate(tightest(params))
    assert best < min(map(certificate, drawn))
    # A convex problem has one minimum, from wherever it is sought.
    np.testing.assert_allclose(certificate(tightest(drawn[0])), best, rtol=0.03)


@pytest.mark.slow
def test_both_networks_are_pruned_and_rounded(tmp_path):
    results = path_pruning.main([*SMALL.split(), "--out", str(tmp_path)])
    count = 2 * (2 * 4 + 4 * 4)
    assert {len(column) for column in results.values()} == {count}
    assert np.all(results["change"] <= results["certificate"] * 1.001)
    chosen = {
        scale: (results["scale"] == scale) & (results["change_of"] == "path")
        for scale in ("trained", "rescaled")
    }
    errors = [results["fine_tuned_error"][rows] for rows in chosen.values()]
    np.testing.assert_array_equal(*errors)  # the same masks
    lines = (tmp_path / "path_pruning.csv").read_text().splitlines()
    assert lines[0].split(",") == list(results) and len(lines) == count + 1
    assert (tmp_path / "path_pruning.png").stat().st_size > 10_000
