"""The report on a terminal, as a page and as JSON; the command and its exit codes."""

import html.parser
import inspect
import io
import json
import math
import subprocess
import sys

import ml_dtypes
import numpy as np
import optax
import pytest
import rich.console

import normax
from normax.inspection import inspect_run
from normax.inspection.command_line import _config, main

RNG = np.random.default_rng(0)
CONFIG = "rule=adamw,learning_rate=1e-2,weight_decay=0.1"


def write(folder, healthy=False, steps=(0, 50, 100)):
    folder.mkdir(exist_ok=True)
    for step in steps:
        kernel = RNG.standard_normal((8, 4)).astype(np.float32)
        if step == steps[-1] and not healthy:
            kernel[:, 2] = 0
        arrays = {"<b>[red]/kernel": kernel, "bias": RNG.standard_normal(4)}
        np.savez(folder / f"{step}.npz", **{"mu/bias": np.ones(4)}, **arrays)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write(tmp_path_factory.mktemp("run"))


def test_json_has_the_documented_schema(run, tmp_path):
    file = tmp_path / "report.json"
    assert main(["inspect", str(run), "--json", str(file)]) == 1
    report = json.loads(file.read_text())
    assert [*report] == ["steps", "arrays", "findings"]
    assert report["steps"] == [0, 50, 100]
    assert [*report["arrays"]] == ["<b>[red]/kernel", "bias"]
    array = report["arrays"]["<b>[red]/kernel"]
    keys = "shape dtype axes guess norm spread angle angle_per_step findings"
    assert [*array] == keys.split()
    assert array["shape"] == [8, 4] and array["dtype"] == "float32"
    assert array["axes"] == [0] and report["arrays"]["bias"]["axes"] == []
    assert len(array["norm"]) == len(array["spread"]) == 3 and len(array["angle"]) == 2
    (finding,) = report["findings"]
    assert array["findings"] == [finding]
    assert [*finding] == "severity kind array evidence meaning action".split()


def test_numbers_that_json_lacks_are_null(tmp_path):
    np.savez(tmp_path / "0.npz", w=np.array([np.nan, 1]))
    np.savez(tmp_path / "1.npz", v=np.array([np.inf, 1]))
    report = inspect_run(tmp_path).to_json()
    text = json.dumps(report, allow_nan=False)
    assert json.loads(text)["arrays"]["w"]["norm"] == [None, None]


def test_json_says_how_far_the_equilibrium_is(run):
    rates = {"rule": "adamw", "learning_rate": 1e-2, "weight_decay": 0.1}
    report = inspect_run(run, **rates)
    kernel = report.to_json()["arrays"]["<b>[red]/kernel"]["equilibrium"]
    rule = normax.UPDATE_RULES["adamw"]
    settled = float(rule.equilibrium_norm(1e-2, 0.1, dimension=8))
    norm = report.arrays[0].norm[-1]
    np.testing.assert_allclose(kernel["distance"], norm / settled)
    assert kernel["angle_per_step"] == float(rule.equilibrium_rotation(1e-2, 0.1))
    time = rule.equilibrium_time(1e-2, 0.1, dimension=8, initial_norm=norm)
    np.testing.assert_allclose(kernel["steps_left"], float(time), rtol=1e-4)
    assert kernel["verdict"].endswith("times too large: should shrink")
    assert not kernel["in_equilibrium"]
    assert report.arrays[1].equilibrium.verdict == "no weight vectors"


def test_a_rule_whose_norm_depends_on_gradients_is_judged_by_its_angle(tmp_path):
    # A walk whose steps turn by twice the angle of equilibrium.
    rule, rates = normax.UPDATE_RULES["sgd"], (0.1, 1e-3)
    angle = 2 * float(rule.equilibrium_rotation(*rates))
    phi = math.acos(math.cos(angle) ** 100)
    vector, away = np.eye(2)
    np.savez(tmp_path / "0.npz", w=vector[:, None])
    np.savez(
        tmp_path / "100.npz", w=(np.cos(phi) * vector + np.sin(phi) * away)[:, None]
    )
    report = inspect_run(tmp_path, None, None, "sgd", *rates)
    (array,) = report.arrays
    np.testing.assert_allclose(array.angle_per_step, angle, rtol=1e-5)
    np.testing.assert_allclose(array.equilibrium.distance, 2**-0.5, rtol=1e-5)
    assert array.equilibrium.verdict == "norm 1.4 times too small: should grow"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "axes", "dimension", "hyperparameters"),
    [
        ("muon", (0,), (8, 4), {}),
        ("muon", (0, 1), (8, 4), {"beta": 0.9}),
        ("adafactor", (0, 1), 32, {"multiply_by_parameter_scale": False}),
    ],
)
def test_the_norm_that_counts_is_the_rules(
    name, axes, dimension, hyperparameters, tmp_path
):
    rule, rates = normax.UPDATE_RULES[name], (1e-2, 0.1)
    settled = rule.equilibrium_norm(*rates, dimension=dimension, **hyperparameters)
    w = RNG.standard_normal((8, 4))
    w *= 1.5 * float(settled) / np.linalg.norm(w)
    for step in (0, 100):
        np.savez(tmp_path / f"{step}.npz", w=w, z=np.stack([w, w]))
    report = inspect_run(tmp_path, axes, None, name, *rates, **hyperparameters)
    found = report.arrays[0].equilibrium
    np.testing.assert_allclose(found.distance, 1.5, rtol=1e-5)
    time = rule.equilibrium_time(
        *rates, dimension=dimension, initial_norm=1.5 * settled, **hyperparameters
    )
    np.testing.assert_allclose(found.steps_left, float(time), rtol=1e-2)
    angle = rule.equilibrium_rotation(*rates, None, dimension, **hyperparameters)
    np.testing.assert_allclose(found.angle_per_step, float(angle), rtol=1e-6)


def test_matrices_of_pytorch_have_their_outputs_first(tmp_path):
    rule, rates = normax.UPDATE_RULES["muon"], (1e-2, 0.1)
    w = RNG.standard_normal((8, 4))
    names = {"fc.weight": (4, 8), "fc/kernel": (8, 4), "wte.weight": (8, 4)}
    np.savez(tmp_path / "0.npz", **dict.fromkeys(names, w))
    for axes in (None, (0, 1)):
        for array in inspect_run(tmp_path, axes, None, rule, *rates).arrays:
            settled = rule.equilibrium_norm(*rates, dimension=names[array.name])
            found = array.equilibrium.distance
            expected = np.linalg.norm(w) / float(settled)
            np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_what_is_no_matrix_gets_the_adam_of_muon(tmp_path):
    w = RNG.standard_normal((3, 8, 4))
    for step in (0, 100):
        turned = w + 1e-3 * step / 100 * RNG.standard_normal(w.shape)
        np.savez(tmp_path / f"{step}.npz", **{"conv/kernel": turned})
    rates = {"learning_rate": 1e-2, "weight_decay": 0.1}
    adam = {"adam_b1": 0.8, "adam_weight_decay": 0.3}
    other = {"learning_rate": 1e-2, "weight_decay": 0.3, "b1": 0.8}
    if "adam_learning_rate" in inspect.signature(optax.contrib.muon).parameters:
        adam["adam_learning_rate"] = other["learning_rate"] = 2e-2
    (found,) = inspect_run(tmp_path, rule="muon", **rates, **adam).arrays
    (expected,) = inspect_run(tmp_path, rule="adamw", **other).arrays
    assert found.angle_per_step == expected.angle_per_step
    assert found.equilibrium == expected.equilibrium
    # Without decay too its steps are as much alike.
    (found,) = inspect_run(tmp_path, rule="muon", **rates, adam_b1=0.8).arrays
    np.testing.assert_allclose(found.angle_per_step, expected.angle_per_step, rtol=2e-3)
    assert found.equilibrium.verdict.startswith("muon's Adam has no decay")
    numbers = {"muon_weight_dimension_numbers": lambda params: params}
    (found,) = inspect_run(tmp_path, rule="muon", **rates, **numbers).arrays
    assert "without muon_weight_dimension_numbers" in found.equilibrium.verdict


def test_decay_of_muon_is_rounded_away_in_matrices_alone(tmp_path):
    arrays = {"a/kernel": (8, 4), "conv/kernel": (3, 8, 4)}
    for step in (0, 100):
        half = {
            name: RNG.standard_normal(shape).astype(ml_dtypes.bfloat16)
            for name, shape in arrays.items()
        }
        np.savez(tmp_path / f"{step}.npz", **half)

    def lost(**given):
        rates = {"learning_rate": 1e-3, "weight_decay": 0.1}
        report = inspect_run(tmp_path, rule="muon", **rates, **given)
        found = report.findings
        return {one.array for one in found if one.kind == "decay_rounded_away"}

    assert lost() == {"a/kernel"}
    assert lost(adam_weight_decay=0.1) == {*arrays}


def test_a_report_of_the_defaults_of_adafactor(run):
    report = inspect_run(run, None, None, "adafactor", 1e-3, 1e-4)
    found = report.arrays[0].equilibrium
    assert found.verdict == "adafactor has no equilibrium: steps scale with the norm"
    assert math.isnan(found.angle_per_step)


def test_what_is_not_there_at_last_or_is_zero_has_its_verdict(tmp_path):
    w = RNG.standard_normal((8, 4))
    for step in (0, 1):
        gone = {} if step else {"gone": w}
        np.savez(tmp_path / f"{step}.npz", zero=w * (1 - step), **gone)
    report = inspect_run(tmp_path, None, None, "adamw", 1e-3, 0.1)
    verdicts = {array.name: array.equilibrium.verdict for array in report.arrays}
    assert verdicts == {"gone": "not at the last step", "zero": "all weights are 0"}


@pytest.mark.parametrize(
    ("rule", "verdict"),
    [
        ("adagrad", "adagrad has no equilibrium"),
        ("adam", "depends on the gradient norm"),
    ],
)
def test_what_theory_does_not_know_is_said(rule, verdict, run):
    report = inspect_run(run, None, None, rule, 1e-3, 0.1)
    assert report.arrays[0].equilibrium.verdict == verdict


class Links(html.parser.HTMLParser):
    """Collect the tags of a page, check that they close, and what they refer to."""

    def __init__(self):
        super().__init__()
        self.seen, self.open, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        assert not {"src", "href", "onclick", "srcset"} & dict(attrs).keys()
        if tag not in ("meta", "br", "li", "td", "tr", "th"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("li", "td", "tr", "th"):
            assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("config", [{}, {"rule": "sgd"}])
def test_the_page_needs_nothing_from_elsewhere(config, run):
    rates = {"learning_rate": 0.1, "weight_decay": 0.01} if config else {}
    report = inspect_run(run, **config, **rates)
    text, links = report.to_html(), Links()
    links.feed(text)
    links.close()
    assert not links.open and "script" not in links.seen and "http" not in text
    assert links.seen.count("svg") == 2 and links.seen.count("polyline") == 2
    assert "<b>[red]/kernel" in links.text and report.explanation in links.text
    for finding in report.findings:
        assert finding.evidence in links.text and finding.action in links.text


def test_the_terminal_shows_names_as_they_are(run):
    report = inspect_run(run)
    text = str(report)
    assert "<b>[red]/kernel" in text and "1 of optimizer state" in text
    assert "is not the angle per step" in " ".join(text.split())
    assert "1 of 4 weight vectors are 0 at step 100" in " ".join(text.split())
    assert text.index("zero_vectors") < text.index("bias")
    narrow = rich.console.Console(file=io.StringIO(), width=60)
    narrow.print(report)
    assert max(map(len, narrow.file.getvalue().splitlines())) <= 60


def test_exit_codes(run, tmp_path, capsys):
    healthy = write(tmp_path / "healthy", healthy=True)
    assert main(["inspect", str(healthy)]) == 0
    assert "Nothing found." in capsys.readouterr().out
    assert main(["inspect", str(healthy), "--config", CONFIG]) == 0
    assert "predicted" in capsys.readouterr().out
    assert main(["inspect", str(run), "--html", str(tmp_path / "report.html")]) == 1
    assert "1 warning" in capsys.readouterr().out
    assert main(["inspect", str(run), "--steps", "0,50"]) == 0
    assert main(["inspect", str(run), "--axes", "layer"]) == 0


def test_values_of_config_are_those_of_json_and_python():
    text = (
        "rule=muon, nesterov=False,ns_coeffs=((4.1, -6.9,2.9),(4,-6,2)),eps=.1,b=true,"
        "mask=None,table=[[1,2],[3,4]],mu_dtype=float32,weight_decay=1e-2"
    )
    assert _config(text) == {
        "rule": "muon",
        "nesterov": False,
        "ns_coeffs": ((4.1, -6.9, 2.9), (4, -6, 2)),
        "eps": 0.1,
        "b": True,
        "mask": None,
        "table": [[1, 2], [3, 4]],
        "mu_dtype": "float32",
        "weight_decay": 0.01,
    }
    assert _config("") == {}


def test_a_switch_of_the_command_is_that_of_python(run, tmp_path):
    file = tmp_path / "report.json"
    config = "rule=muon,learning_rate=1e-2,weight_decay=.1,nesterov=False"
    main(["inspect", str(run), "--config", config, "--json", str(file)])
    kernel = json.loads(file.read_text())["arrays"]["<b>[red]/kernel"]
    angle = normax.UPDATE_RULES["muon"].equilibrium_rotation(
        1e-2, 0.1, None, (8, 4), nesterov=False
    )
    found = kernel["equilibrium"]["angle_per_step"]
    np.testing.assert_allclose(found, float(angle), rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--steps", "a"], "got 'a'; write --steps 0,1000"),
        (["--steps", "1,,2"], "--steps must be whole numbers with commas between"),
        (["--axes", "units"], "got 'units'; choose one of these"),
        (["--config", "rule"], "pairs name=value with commas between, got 'rule'"),
        *(
            (["--config", CONFIG + f",{key}=1"], f"got '{key}=1'; DIR, --axes and")
            for key in ("path", "axes", "steps", "progress")
        ),
        (["--steps", "7"], "steps must be among those of the run"),
        (["--axes", "[5]"], "axes must lie within the array's rank"),
        (["--axes", '{"nothing": [0]}'], "no weights at 'nothing'"),
        (["--config", "rule=adamv"], "did you mean"),
        (["--config", "rule=adamw"], "depends on both rates"),
        (["--config", "learning_rate=1"], "rates belong to a rule"),
        (["--config", CONFIG + ",b3=1"], "b3"),
        (["--config", "rule=sgd,learning_rate=-1,weight_decay=1"], "learning_rate"),
        (["--config", "rule=sgd,learning_rate=a,weight_decay=1"], "learning_rate"),
        (["--html", "/nowhere/report.html"], "nowhere"),
    ],
)
def test_what_does_not_fit_is_one_line(options, words, run, capsys):
    assert main(["inspect", str(run), *options]) == 2
    out, error = capsys.readouterr()
    assert not out and words in error and error.count("\n") == 1


@pytest.mark.slow
def test_the_command_reads_what_it_cannot_read_without_a_traceback(run, tmp_path):
    (tmp_path / "0.npz").write_bytes(b"no zip")
    for path, code, words in ((tmp_path, 2, b"cannot be read"), (run, 1, b"")):
        command = [sys.executable, "-m", "normax", "inspect", str(path)]
        done = subprocess.run(command, capture_output=True)
        assert done.returncode == code and words in done.stderr
        assert done.stderr.count(b"\n") == (code == 2)
