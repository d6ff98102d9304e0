"""Exit codes of a heavy step tell the flow whether another attempt may help."""

import json
from pathlib import Path
from typing import Any

import pytest

from infra.errors import ForeframeError, InputError, StorageError
from infra.step import step_main


def exit_code(tmp_path: Path, error: ForeframeError | None) -> int:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"kind": "x"}))

    def run(_: Any) -> None:
        if error:
            raise error

    return step_main([str(path)], stage="training", parse=lambda value: value, run=run)


@pytest.mark.parametrize(
    ("error", "code"), [(None, 0), (InputError("no such file."), 2), (StorageError("the store is away."), 75)]
)
def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str], error: ForeframeError | None, code: int):
    assert exit_code(tmp_path, error) == code
    assert len(capsys.readouterr().err.splitlines()) == (1 if error else 0)


def test_a_config_that_is_no_object_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "list.json"
    path.write_text("[1]")
    assert step_main([str(path)], stage="ingest", parse=lambda value: value, run=print) == 2
    assert "list.json holds a list" in capsys.readouterr().err
