"""The example of a sick run finds what is wrong with it."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
checkpoint_report: Any = importlib.import_module("checkpoint_report")


@pytest.mark.slow
def test_the_faults_of_the_sick_run_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_report.shutil, "which", lambda name: None)
    found = checkpoint_report.main(["--steps", "500", "--out", str(tmp_path)])
    assert found["quiet_vectors"] == 1 and found["frozen"] == 5
    assert found["frozen_gain"] == 2 and found["decay_rounded_away"] == 2
    assert (tmp_path / "checkpoint_report.html").exists()
