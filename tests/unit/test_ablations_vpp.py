"""The ablation rows, and the table that puts the paper's numbers beside ours."""

from __future__ import annotations

import pytest

from evaluation.result import EvaluationResult, Item, Score
from infra.errors import ConfigError
from pipelines.ablation_tables import as_markdown, outcome_of, published_value, rows_beside
from training.recipes.ablations_vpp import FULL, ROWS, find_rows


def result(solved: list[int]) -> EvaluationResult:
    items = tuple(
        Item(item_id=f"task/{seed}", stratum="task", metrics={"success_ever": float(value)})
        for seed, value in enumerate(solved)
    )
    share = sum(solved) / len(solved)
    return EvaluationResult(
        suite="s", suite_version="1", model="m", model_digest="d", data_digest="", code_version="0",
        primary_metric="success_ever", items=items,
        scores={"success_ever": Score(value=share, low=0.1, high=0.9, count=len(solved))},
    )  # fmt: skip


def test_every_switch_of_the_papers_tables_has_a_row():
    names = {row.name for row in ROWS}
    assert names >= {
        "encoder-stable-vae", "encoder-vc1", "encoder-voltron", "without-internet", "without-task-video",
        "without-initial", "without-video-former", "without-temporal-attention", "without-aggregation", "layer-0",
        "sigma-80", "two-step", "single-view", "tenth-of-data",
    }  # fmt: skip
    assert len(names) == len(ROWS)


def test_published_numbers_are_found_and_unconfirmed_ones_marked():
    assert published_value("vpp-4/without Video-Former") == "3.86 (average length)"
    assert published_value("vpp-12/single view") == "3.58 ? (average length)"
    assert all(published_value(row.published) for row in ROWS if row.published)


def test_asking_for_some_rows_keeps_the_full_run_and_the_order():
    assert [row.name for row in find_rows(["sigma-80", "encoder-stable-vae"])] == [
        FULL,
        "encoder-stable-vae",
        "sigma-80",
    ]
    with pytest.raises(ConfigError, match="unknown ablation sigma-81"):
        find_rows(["sigma-81"])


def test_a_row_is_compared_with_the_full_run_on_equal_seeds(tmp_path):
    full, worse = result([1] * 8), result([1, 0] * 4)
    first = outcome_of(ROWS[0], full, str(tmp_path), full=full)
    second = outcome_of(find_rows(["sigma-80"])[1], worse, str(tmp_path), full=full)
    missing = outcome_of(find_rows(["single-view"])[1], None, None, reason="needs a second camera")
    assert first.difference is None
    few = outcome_of(find_rows(["sigma-80"])[1], result([0] * 5), str(tmp_path), full=result([1] * 5))
    assert few.value == 0 and few.difference is None  # five pairs allow no interval
    assert second.difference is not None and second.difference[0] == -0.5
    rows = rows_beside([first, second, missing])
    assert rows[1]["against full"].startswith("-0.500 [")
    page = as_markdown([first, second, missing], preset="tiny")
    assert "| single-view |" in page and "needs a second camera" in page and "3.58 ?" in page
    lines = [line for line in page.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
