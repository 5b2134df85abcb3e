"""Pages are true: code runs and prints what they show, and commands are accepted."""

import argparse
import contextlib
import importlib
import io
import pathlib
import re
import shlex
import textwrap
import unittest.mock

import jax
import pytest

import normax
from normax.paths.primitive_spec import SPECS

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md"]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
every_page = pytest.mark.parametrize(
    "page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES]
)
TOPICS = [n for n in normax.__all__ if hasattr(getattr(normax, n), "__path__")]
EXAMPLES = {path.stem for path in (ROOT / "examples").glob("*.py")}


def blocks(page):
    """Return the languages and texts of the fenced blocks, those in tabs too."""
    fences = r"^( *)```(\w+)[^\n]*\n(.*?)^\1```"
    found = re.findall(fences, page.read_text(), re.MULTILINE | re.DOTALL)
    return [(language, textwrap.dedent(text)) for _, language, text in found]


def assert_same_output(shown, printed):
    """Words are equal, and numbers are equal to 5 %, as rounding and chaos allow."""
    asked, words = (re.split(r"\s+|,\s", text.strip()) for text in (shown, printed))
    assert len(asked) == len(words), f"shown:\n{shown}\nprinted:\n{printed}"
    for one, other in zip(asked, words, strict=True):
        try:
            assert float(one) == pytest.approx(float(other), rel=0.05), printed
        except ValueError:
            assert one == other, f"shown:\n{shown}\nprinted:\n{printed}"


@pytest.mark.few_rows(3)
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(
            page,
            id=str(page.relative_to(ROOT)),
            # The README's example trains.
            marks=[pytest.mark.slow] * (page.name == "README.md"),
        )
        for page in PAGES
        if "python" in dict(blocks(page))
    ],
)
def test_code_runs_and_prints_what_is_shown(page):
    names, printed = {}, ""
    # CONTRIBUTING.md adds a primitive.
    with unittest.mock.patch.dict(SPECS), jax.numpy_rank_promotion("allow"):
        for language, text in blocks(page):
            if language == "python":
                with contextlib.redirect_stdout(io.StringIO()) as out:
                    exec(compile(text, page.name, "exec"), names)
                printed = out.getvalue()
                for words in re.findall(r"# prints (.*)", text):
                    assert words in printed
            elif language == "text":
                assert_same_output(text, printed)


def commands(page):
    lines = "\n".join(text for language, text in blocks(page) if language == "sh")
    return [
        shlex.split(line, comments=True)
        for line in lines.replace("\\\n", " ").splitlines()
    ]


@every_page
def test_every_block_has_a_known_language(page):
    fences = re.findall(r"^ *```(.*)$", page.read_text(), re.MULTILINE)
    assert set(fences[::2]) <= {"python", "sh", "text", "bibtex"}
    assert set(fences[1::2]) <= {""}
    assert len(fences[::2]) == len(blocks(page))


@every_page
def test_commands_name_what_is_there(page):
    cases = re.findall(r"^(\w+)\)", (ROOT / "dev").read_text(), re.MULTILINE)
    benchmarks = {path.stem for path in (ROOT / "tests" / "benchmarks").glob("*.py")}
    for words in commands(page):
        for word in words:
            path = word.partition("=")[0]
            if re.match(r"(examples|tests|normax)/", path):
                assert (ROOT / path).exists(), word
        if words and words[0] == "./dev":
            assert words[1] in cases, words
            if words[1] == "bench":
                assert f"bench_{words[2]}" in benchmarks, words


@every_page
def test_options_in_prose_are_those_of_a_program(page):
    sources = [*(ROOT / "examples").glob("*.py"), *(ROOT / ".ci").iterdir()]
    sources.append(ROOT / "normax" / "inspection" / "command_line.py")
    programs = "\n".join(path.read_text() for path in sources)
    prose = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.DOTALL | re.M)
    for code in re.findall(r"`([^`\n]+)`", prose):
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", code):
            known = option == "--help" or re.search(rf"{option}(?![\w-])", programs)
            assert known, code


class Accepted(Exception):
    """A program has accepted its arguments."""


@pytest.mark.few_rows(1)
@pytest.mark.parametrize(
    "command",
    {shlex.join(c): c for p in PAGES for c in commands(p) if "examples/" in str(c)},
)
def test_commands_of_examples_are_accepted(command, monkeypatch):
    words = shlex.split(command)
    (script,) = (word for word in words if word.startswith("examples/"))
    parse_args = argparse.ArgumentParser.parse_args

    def stop(parser, arguments=None, namespace=None):
        parse_args(parser, arguments, namespace)
        raise Accepted

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    program = importlib.import_module(pathlib.Path(script).stem)
    with pytest.raises(Accepted):
        program.main(words[words.index(script) + 1 :])


@every_page
def test_linked_files_exist(page):
    text = page.read_text()
    targets = re.findall(r"\]\((?!http|#|mailto)([^)#]+)(?:#[^)]*)?\)", text)
    for target in targets:
        assert (page.parent / target).exists(), target


def test_every_picture_is_made_by_a_command_of_the_gallery():
    shown = {
        pathlib.Path(target).name
        for page in PAGES
        for target in re.findall(r"\]\(([^)]+\.png)\)", page.read_text())
    }
    gallery = (ROOT / "docs" / "examples.md").read_text()
    made = {}
    for command, text in re.findall(
        r"```sh\n[^`]*examples/(\w+)\.py[^`]*```\n(.*?)(?=```sh|\Z)", gallery, re.DOTALL
    ):
        made |= dict.fromkeys(re.findall(r"pictures/(\w+)\.png", text), command)
    assert shown == {f"{picture}.png" for picture in made}
    for picture, command in made.items():
        assert picture.startswith(command), f"{command}.py does not write {picture}"
        assert (ROOT / "examples" / "results" / f"{picture}.png").exists()


def test_every_example_is_in_the_gallery():
    gallery = (ROOT / "docs" / "examples.md").read_text()
    programs = {
        name
        for name in EXAMPLES
        if "__main__" in (ROOT / "examples" / f"{name}.py").read_text()
    }
    assert programs == set(re.findall(r"examples/(\w+)\.py", gallery))


@pytest.mark.parametrize("topic", TOPICS)
def test_every_public_name_has_a_place_in_the_api(topic):
    page = (ROOT / "docs" / "api" / f"{topic}.md").read_text()
    documented = re.findall(rf"^::: normax\.{topic}\.(\w+)$", page, re.MULTILINE)
    public = {
        name
        for name in getattr(normax, topic).__all__
        if getattr(
            getattr(getattr(normax, topic), name), "__module__", "normax"
        ).partition(".")[0]
        == "normax"
    }
    assert len(documented) == len(set(documented))
    assert set(documented) == public


def test_the_flat_names_are_those_of_the_api():
    page = (ROOT / "docs" / "api" / "index.md").read_text()
    flat = page.partition("## The flat namespace")[2].partition("\n## ")[0]
    assert set(re.findall(r"`(\w+)`", flat)) == set(normax.__all__) - set(TOPICS)
    assert set(re.findall(r"\[`normax\.(\w+)`\]", page)) == set(TOPICS)


def test_commands_are_those_of_the_checks():
    script = (ROOT / ".ci" / "run").read_text().replace("--editable", "-e")
    script = script.replace("--quiet ", "").replace(" --quiet", "")
    script = script.replace('"$(interpreter "$1")" -m venv --clear', "python3 -m venv")
    readme = [shlex.join(command) for command in commands(ROOT / "README.md")]
    assert len(readme) >= 4
    for command in readme:
        if "bench" not in command and "serve" not in command:
            assert command.replace("'", '"') in script


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 150
    (code,) = (
        text for language, text in blocks(ROOT / "README.md") if language == "python"
    )
    assert len([line for line in code.splitlines() if line.strip()]) <= 20


def test_versions_agree():
    for name in ("CITATION.cff", "CHANGELOG.md", "docs/citation.md"):
        text = (ROOT / name).read_text()
        found = re.search(
            r"(?:^version[:= {]+|^## \[)(\d+\.\d+\.\d+)", text.replace("  ", ""), re.M
        )
        assert found and found.group(1) == normax.__version__, name


def test_dates_of_the_release_agree():
    dates = [
        re.search(pattern + r"(\d{4}-\d\d-\d\d)", (ROOT / name).read_text())
        for name, pattern in (
            ("CITATION.cff", "date-released: "),
            ("CHANGELOG.md", re.escape(f"## [{normax.__version__}] - ")),
            ("docs/citation.md", "date = {"),
        )
    ]
    assert len({date and date.group(1) for date in dates}) == 1
    assert all(dates)
