"""The commented tree of the README is the tree on disk."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
TREE_LINE = re.compile(r"^(?P<indent> *)(?P<name>[\w.\-/]+)(?:  +(?P<comment>\S.*))?$")


def readme_tree() -> dict[str, str]:
    """Path -> comment of every line between the tree markers."""
    text = (ROOT / "README.md").read_text()
    block = text.split("<!-- tree -->", 1)[1].split("```", 2)[1]
    entries: dict[str, str] = {}
    stack: list[str] = []
    for line in block.splitlines():
        match = TREE_LINE.match(line)
        if not match or not match["name"]:
            continue
        depth = len(match["indent"]) // 4
        stack = [*stack[:depth], match["name"]]
        entries["/".join(part.strip("/") for part in stack)] = match["comment"] or ""
    return entries


def test_every_python_file_is_drawn_and_every_drawn_file_exists():
    drawn = readme_tree()
    assert len(drawn) > 40
    missing = sorted(path for path in drawn if not (ROOT / path).exists())
    assert missing == []
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    code = {path for path in listed if not path.startswith("tests/") and not path.endswith("__init__.py")}
    assert sorted(code - set(drawn)) == []


def test_every_line_says_what_it_is():
    assert [path for path, comment in readme_tree().items() if not comment] == []
