"""The README's example runs, and its commands are those that the checks run."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("code", EXAMPLES, ids=["nnx", "linen"])
def test_example_runs(code, capsys):
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    expected = re.findall(r"# prints (.*)", code)
    assert expected
    for words in expected:
        assert words in printed
    assert len([line for line in code.splitlines() if line.strip()]) <= 20


def test_commands_are_those_of_the_checks():
    script = (ROOT / ".ci" / "run").read_text().replace("--editable", "-e")
    script = script.replace("--quiet ", "").replace(" --quiet", "")
    script = script.replace('"$(interpreter "$1")" -m venv --clear', "python3 -m venv")
    blocks = re.findall(r"```(?:sh|console)\n(.*?)```", README, re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines()]
    assert len(commands) >= 4
    for command in commands:
        if "bench" not in command:
            assert command in script


@pytest.mark.parametrize(
    "folder", [ROOT, ROOT / "examples"], ids=["README", "examples"]
)
def test_linked_files_exist(folder):
    text = (folder / "README.md").read_text()
    targets = re.findall(r"\]\((?!http|#)([^)]+)\)", text)
    assert targets
    for target in targets:
        assert (folder / target).exists(), target
