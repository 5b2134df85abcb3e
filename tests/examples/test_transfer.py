"""The transfer of rates, run small."""

import csv
import dataclasses
import importlib
import re
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import normax

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
example: Any = importlib.import_module("transfer")

pytestmark = pytest.mark.usefixtures("quick_compilation")
SMALL = "--rates 0.01 0.02 --seeds 1 --steps 8 --width 8 --depth 1 --heads 2"
SMALL += " --context 8 --batch-size 2 --epochs 2 --images 260 --channels 4 4 4 4"
SMALL += " --widths 16"


def parabolas(best):
    """Return results whose losses are 1 + (octave - best)^2 / 10 for each way."""
    octaves, seeds = np.meshgrid(np.arange(-9, -2), range(3), indexing="ij")
    columns: dict[str, list[np.ndarray]] = {}
    for (change, method), (centre, lowest) in best.items():
        noise = np.array([-0.01, 0.0, 0.01])[seeds]
        row = {
            "task": np.full(octaves.size, "text"),
            "change": np.full(octaves.size, change),
            "method": np.full(octaves.size, method),
            "base_rate": 2.0 ** octaves.ravel(),
            "seed": seeds.ravel(),
            "loss": (lowest + (octaves - centre) ** 2 / 10 + noise).ravel(),
        }
        for key, column in row.items():
            columns.setdefault(key, []).append(column)
    return {key: np.concatenate(parts) for key, parts in columns.items()}


def test_drift_and_excess_of_known_losses():
    results = parabolas(
        {
            ("base", "as it is"): (-6.0, 1.0),
            ("batch", "as it is"): (-4.5, 1.0),
            ("batch", "transfer"): (-6.2, 1.1),
            ("muon", "as it is"): (-1.0, 1.0),
        }
    )
    found = example.find(results, "text", "batch", "as it is")
    assert found.drift == pytest.approx(1.5) and not found.open
    # The seeds agree on the best rate, and differ in the loss alike.
    assert found.low == pytest.approx(1.5) and found.high == pytest.approx(1.5)
    # At the octave -6, beside the lowest loss on the grid, at the octave -4 or -5.
    assert found.excess == pytest.approx((1.5**2 - 0.5**2) / 10)
    assert found.error == pytest.approx(0)
    found = example.find(results, "text", "batch", "transfer")
    assert found.drift == pytest.approx(-0.2)
    assert found.excess == pytest.approx(1.1 + 0.2**2 / 10 - 1.025)
    assert example.find(results, "text", "muon", "as it is").open
    text = example.table(results)
    assert len(text.splitlines()) == 4 and " +1.50 " in text
    example.picture(results).canvas.draw()


def test_a_parabola_is_lowest_near_the_lowest_loss():
    x = np.arange(-9.0, -2.0)
    assert example.lowest(x, (x + 5.3) ** 2 / 10) == pytest.approx(-5.3)
    # A run that diverged is no reason to leave the basin.
    losses = np.where(x > -5, np.nan, (x + 5.3) ** 2 / 10)
    assert example.lowest(x, losses) == pytest.approx(-5.3, abs=0.8)


@pytest.mark.slow
def test_the_usual_rules_and_the_transferred_rates():
    base = normax.theory.Setting(rule="adamw", steps=400, dimension=32, batch_size=4)
    task: Any = None
    places = {
        "batch": example.large_batch(task, base),
        "duration": example.longer(example.Place("base", task, base)),
    }
    ways = {
        name: {
            w[0]: w[1:] for w in example.ways(example.Place("", task, base), p, 0.01)
        }
        for name, p in places.items()
    }
    assert len(ways["batch"]["usual rule"][0]) == 100
    peak = {k: {w: float(v[0].max()) for w, v in x.items()} for k, x in ways.items()}
    decay = {k: {w: float(v[1]) for w, v in x.items()} for k, x in ways.items()}
    assert peak["batch"]["usual rule"] == pytest.approx(2 * peak["batch"]["as it is"])
    assert peak["batch"]["transfer"] == pytest.approx(0.02, rel=0.1)
    assert decay["batch"] == pytest.approx(
        {"as it is": 1, "usual rule": 1, "transfer": 2}, rel=1e-3
    )
    assert decay["duration"] == pytest.approx(
        {"as it is": 1, "usual rule": 0.25, "transfer": 0.5}, rel=1e-3
    )
    rates = example.curve(0.01, 60)(jnp.arange(60))
    assert rates[0] < rates[2] == pytest.approx(0.01, rel=0.01)
    assert rates[-1] < 1e-4
    assert dataclasses.replace(base, steps=1600) == places["duration"].setting


@pytest.mark.slow
@pytest.mark.parametrize("task", ["text", "images"])
def test_all_settings_train(task, tmp_path, monkeypatch):
    monkeypatch.setattr(example, "OTHERS", ("hyperball", "muon", "momentum"))
    out = ["--task", task, "--out", str(tmp_path)]
    results = example.main([*SMALL.split(), *out])
    changes = ["base", "batch", "duration", "hyperball", "momentum", "muon"]
    changes += ["width 16"] if task == "text" else []
    assert set(results["change"]) == set(changes)
    assert np.isfinite(results["loss"]).all()
    name = "transfer" if task == "text" else "transfer_images"
    lines = (tmp_path / f"{name}.csv").read_text().splitlines()
    assert lines[0].split(",") == list(results)
    assert len(lines) == 1 + len(results["loss"])
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--seeds 0", "--seeds, --steps and --batch-size must be at least 1"),
        ("--heads 3", "--heads must divide --width"),
        ("--widths 48", "--width all --widths"),
        ("--rates 0.1", "--rates must be two or more"),
        ("--rates 0.1 -1", "--rates must be two or more"),
    ],
)
def test_arguments_that_cannot_be_right(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        example.main([*arguments.split(), "--out", str(tmp_path)])
    assert message in capsys.readouterr().err


CHANGES = {
    "batch × 4, as many epochs": "batch",
    "steps × 4": "duration",
    "width × 2": "width 64",
    "width × 4": "width 128",
    "width × 8": "width 256",
    "AdamW to Lion": "lion",
    "AdamW to hyperball": "hyperball",
    "AdamW to momentum SGD": "momentum",
    "AdamW to Muon": "muon",
}


@pytest.mark.parametrize("page", ["docs/which_rate.md", "examples/README.md"])
def test_the_published_table_is_that_of_the_results(page):
    root = Path(__file__).parents[2]
    files = {"text": "transfer.csv", "images": "transfer_images_cifar10.csv"}
    results = {}
    for task, name in files.items():
        with (root / "examples/results" / name).open() as file:
            rows = list(csv.DictReader(file))
        table = {key: np.array([row[key] for row in rows]) for key in rows[0]}
        numbers = ("base_rate", "seed", "loss")
        results[task] = table | {key: table[key].astype(float) for key in numbers}
    row = re.compile(r"^\| (.+) \| (text|images) \| (.+) \|$", re.MULTILINE)
    lines = row.findall((root / page).read_text())
    assert len(lines) == 15
    for change, task, cells in lines:
        ways = ("as it is", "usual rule", "transfer")
        for way, cell in zip(ways, cells.split(" | "), strict=True):
            mine = results[task]["change"] == CHANGES[change]
            if cell == "–":
                assert way not in results[task]["method"][mine]
                continue
            found = example.find(results[task], task, CHANGES[change], way)
            drift, excess = cell.replace("−", "-").split(" / ")
            assert drift.endswith("*") == found.open
            assert float(drift.rstrip("*")) == pytest.approx(found.drift, abs=0.051)
            assert float(excess) == pytest.approx(found.excess, abs=5.1e-4)
