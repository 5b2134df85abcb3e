"""The house stays one that a person can hold in the head: short files and functions."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted((ROOT / "normax").rglob("*.py"))
MOST = {"file": 380, "class": 220, "function": 110}


def docstring_lines(tree):
    """Return the numbers of the lines that docstrings take."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = (node for node in ast.walk(tree) if isinstance(node, documented))
    docs = [node.body[0] for node in nodes if ast.get_docstring(node) is not None]
    return {line for doc in docs for line in range(doc.lineno, doc.end_lineno + 1)}


def lines_of(path):
    """Return the syntax tree, and the numbers of the lines of docstrings and code."""
    text = path.read_text()
    tree = ast.parse(text)
    docs = docstring_lines(tree)
    written = {
        number
        for number, line in enumerate(text.splitlines(), 1)
        if line.strip() and not line.strip().startswith("#")
    }
    return tree, written & docs, written - docs


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_classes_and_functions_are_short(path):
    tree, _, code = lines_of(path)
    assert len(path.read_text().splitlines()) <= MOST["file"]
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            kind = "class" if isinstance(node, ast.ClassDef) else "function"
            length = len(code & set(range(node.lineno, node.end_lineno + 1)))
            assert length <= MOST[kind], f"{kind} {node.name} has {length} lines"


def test_docstrings_are_at_most_half_as_long_as_the_code():
    parts = [lines_of(path)[1:] for path in FILES]
    docs, code = (sum(map(len, lines)) for lines in zip(*parts, strict=True))
    assert docs <= code / 2
