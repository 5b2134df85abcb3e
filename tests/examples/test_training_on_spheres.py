"""The comparison of rules with fixed norms, run small."""

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
hyperball: Any = importlib.import_module("hyperball")

pytestmark = pytest.mark.usefixtures("quick_compilation")
SMALL = "--rates 2 --seeds 2 --steps 3 --width 8 --depth 1 --heads 2 --context 8"
SMALL += " --batch-size 2 --epochs 2 --images 130 --channels 4 4 4 4"


def parabolas(centres, widths):
    """Return results whose losses are 1 + ((log2 rate - centre) / width)^2."""
    rate, decay, seed = np.meshgrid(
        2.0 ** np.arange(-10, 1), [0.1, 1.0], range(3), indexing="ij"
    )
    x = np.log2(rate)
    losses = [
        np.where(decay == 1, 1, 1.2) + ((x - centre) / width) ** 2 * 0.05
        for centre, width in zip(centres, widths, strict=True)
    ]
    rules = np.repeat([*hyperball.RULES], rate.size)
    columns = {"rate": rate, "decay": decay, "seed": seed, "error": 0 * rate}
    results = {name: np.tile(x.ravel(), len(losses)) for name, x in columns.items()}
    loss = np.concatenate([loss.ravel() for loss in losses])
    results |= {"loss": loss, "rule": rules, "task": np.full(rules.size, "text")}
    return results


def test_a_basin_is_the_range_of_rates_near_the_lowest_loss():
    results = parabolas([-5, -6, -5, -1], [1, 2, 3, 3])
    found = [hyperball.find_basin(results, "text", rule) for rule in hyperball.RULES]
    assert [basin.decay for basin in found] == [1.0] * 4
    assert [basin.rates[basin.best] for basin in found] == [2**-5, 2**-6, 2**-5, 2**-1]
    widths = [basin.octaves for basin in found]
    np.testing.assert_allclose(widths, [2, 4, 6, 4], atol=0.01)
    assert [basin.open for basin in found] == [False, False, False, True]
    assert " >4.0" in hyperball.table(results)
    results["loss"][(results["rule"] == "adamw") & (results["rate"] > 2**-4.5)] = np.nan
    assert hyperball.find_basin(results, "text", "adamw").octaves < 2
    hyperball.picture(results).canvas.draw()


@pytest.mark.slow
def test_both_networks_train_by_a_rule(tmp_path, monkeypatch):
    for rule in ("adamw", "rotational_adamw"):
        monkeypatch.delitem(hyperball.RULES, rule)
    results = hyperball.main([*SMALL.split(), "--out", str(tmp_path)])
    assert {len(column) for column in results.values()} == {2 * 2 * 2 * 2}
    assert np.isfinite(results["loss"]).all()
    lines = (tmp_path / "hyperball.csv").read_text().splitlines()
    assert lines[0].split(",") == list(results) and len(lines) == 17
    assert (tmp_path / "hyperball.png").stat().st_size > 10_000
