"""The style card, held by machine: sizes, and words that do not belong in package code."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("pipelines", "ingest", "training", "evaluation", "infra")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
BROAD_CATCH_ALLOWED = {"pipelines/cli.py", "pipelines/tasks.py"}


def functions(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_there_is_code_to_check():
    assert len(FILES) > 40


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_file_is_short(path: Path):
    assert len(path.read_text().splitlines()) <= 400


def test_functions_are_short():
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name} ({node.end_lineno - node.lineno + 1} lines)"
        for path in FILES
        for node in functions(path)
        if node.end_lineno - node.lineno + 1 > 60
    ]
    assert long == []


def test_broad_catches_stay_at_the_boundary():
    broad = []
    for path in FILES:
        name = str(path.relative_to(ROOT))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler) and name not in BROAD_CATCH_ALLOWED:
                caught = ast.unparse(node.type) if node.type else "everything"
                if caught in {"everything", "Exception", "BaseException"}:
                    broad.append(f"{name}:{node.lineno} catches {caught}")
    assert broad == []
