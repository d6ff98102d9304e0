"""Charts, curves, lineage trees and words of the report, each against a plain statement of what it must be."""

import json
import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.report.assets import AssetBox, media_type
from evaluation.report.charts import Interval, Series, interval_chart, line_chart, nice_ticks, smooth, thin
from evaluation.report.comparison import compare
from evaluation.report.curves import parse_metrics
from evaluation.report.gallery import gallery
from evaluation.report.graph import lineage_view
from evaluation.report.inputs import LineageNode
from evaluation.report.latency import latency_view
from evaluation.report.predictions import load_arrays
from evaluation.report.published import published_tables
from evaluation.report.text import duration, visible
from evaluation.result import Score
from evaluation.statistics import wilson_interval
from infra.errors import InputError
from tests.helpers_report import encoder_result, items, policy_result, result, timings, write_mp4

finite = st.floats(-1e9, 1e9, allow_nan=False)


@given(finite, finite)
def test_ticks_cover_the_values_with_few_round_numbers(one, other):
    low, high = min(one, other), max(one, other)
    ticks = nice_ticks(low, high)
    slack = 1e-6 * max(abs(low), abs(high), 1e-12)
    assert ticks[0] <= low + slack
    assert ticks[-1] >= high - slack
    assert 2 <= len(ticks) <= 12
    mantissa = (ticks[1] - ticks[0]) / 10 ** math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9)
    assert min(abs(mantissa - nice) for nice in (1, 2, 5, 10)) < 1e-3


@given(st.lists(st.tuples(st.integers(0, 10_000), finite), min_size=1, max_size=700))
def test_every_point_of_a_chart_lies_inside_it(points):
    points = sorted((float(x), y) for x, y in points)
    svg = str(line_chart([Series("a", points)], title="t"))
    width, height = map(float, re.search(r'viewBox="0 0 (\d+) (\d+)"', svg).groups())
    drawn = re.search(r' d="M([^"]+)"', svg)
    pairs = drawn.group(1).split("L") if drawn else []
    for pair in pairs:
        x, y = map(float, pair.split())
        assert 0 <= x <= width
        assert 0 <= y <= height


def test_a_line_that_falls_is_drawn_falling():
    svg = str(line_chart([Series("a", [(0, 1.0), (10, 0.0)])], title="t"))
    (x0, y0), (x1, y1) = (map(float, p.split()) for p in re.search(r' d="M([^"]+)"', svg).group(1).split("L"))
    assert x0 < x1
    assert y0 < y1  # SVG counts downwards


def test_interval_rows_are_ordered_on_the_axis():
    rows = [Interval("a", 0.2, 0.1, 0.3), Interval("b", 0.8, 0.5, 0.9)]
    svg = str(interval_chart(rows, title="t", bounds=(0, 1), percent=True))
    centres = [float(x) for x in re.findall(r'cx="([\d.]+)"', svg)]
    ends = [(float(a), float(b)) for a, b in re.findall(r'whisker \w+" x1="([\d.]+)" x2="([\d.]+)"', svg)]
    assert centres[0] < centres[1]
    assert all(low <= centre <= high for centre, (low, high) in zip(centres, ends, strict=True))
    assert "100 %" in svg


def test_smoothing_keeps_a_straight_line_and_thinning_keeps_the_ends():
    line = [(float(step), 3.0 * step) for step in range(1001)]
    np.testing.assert_allclose(smooth(line, half_width=7), line)
    short = thin(line)
    assert len(short) <= 300
    assert (short[0], short[-1]) == (line[0], line[-1])


def test_a_step_logged_twice_counts_once_with_its_later_value():
    text = '{"step": 1, "loss": 9}\n{"step": 2, "loss": 8}\n{"step": 2, "loss": 7, "resumed": true}\n{"step": 3, "lo'
    curves, notes = parse_metrics(text)
    assert curves == {"loss": [(1, 9), (2, 7)]}
    assert len(notes) == 1


def test_per_task_cells_hold_counts_and_wilson_intervals():
    table = compare(policy_result(), model_label="policy")
    assert [row.label for row in table.rows] == ["policy", "proprioception", "random actions"]  # best arm first
    low, high = wilson_interval(4, 10)
    cell = table.strata[0].cells[1]
    assert (cell.main, cell.interval) == ("4/10", f"{100 * low:.0f}–{100 * high:.0f} %")
    assert table.differences[1].value == pytest.approx(0.9)
    assert table.differences[1].low > 0


def test_differences_pair_by_item_and_follow_the_metrics_direction():
    own = items("error", {"t": [0.1] * 8})
    shuffled = tuple(reversed(items("error", {"t": [0.3] * 8})))
    lower = result("error", own, {"arm": shuffled, "elsewhere": items("error", {"other": [1.0]})})
    table = compare(lower.model_copy(update={"higher_is_better": False}), model_label="model")
    assert [round(d.value, 6) for d in table.differences] == [0.2]
    assert table.differences[0].verdict == "better"
    assert "elsewhere: no item in common" in table.notes[0]


def test_arms_whose_names_read_alike_stay_apart():
    own = items("J", {"t": [0.5] * 6})
    arms = {"a_b": items("J", {"t": [0.4] * 6}), "a-b": items("J", {"t": [0.3] * 6}), "model": own}
    table = compare(result("J", own, arms), model_label="model")
    assert len({row.label for row in table.rows}) == 4
    assert sum(row.is_model for row in table.rows) == 1


def test_a_difference_with_too_few_pairs_has_no_verdict():
    difference = compare(encoder_result(gain=0.5, num=3), model_label="m").differences[0]
    assert difference.verdict == "too few items"


def test_lineage_reaches_the_sources_and_draws_shared_parts_once():
    nodes = [
        LineageNode(kind="policy", id="p", inputs=("e", "d")),
        LineageNode(kind="encoder", id="e", inputs=("d",)),
        LineageNode(kind="data set", id="d", inputs=("s1", "s2")),
    ]
    view = lineage_view(nodes)
    assert [root.kind for root in view.roots] == ["policy"]
    encoder, repeated = view.roots[0].children
    assert [leaf.id for leaf in encoder.children[0].leaves[0][1]] == ["s1", "s2"]
    assert repeated.repeated
    assert view.num_sources == 2


def test_lineage_with_a_circle_ends_and_says_so():
    circle = [LineageNode(kind="x", id="a", inputs=("b",)), LineageNode(kind="x", id="b", inputs=("a",))]
    assert lineage_view(circle).roots
    beside = [*circle, LineageNode(kind="y", id="top", inputs=("s",))]
    assert "2 records" in lineage_view(beside).notes[0]


def test_clips_of_the_model_come_before_those_of_its_arms(tmp_path):
    artefacts = {}
    for task in ("a", "b"):
        for arm in ("oracle", "policy"):
            write_mp4(tmp_path / f"clips/{task}/{arm}-7.mp4")
            artefacts[f"{task}, {arm}, seed 7: solved"] = f"clips/{task}/{arm}-7.mp4"
    shown = gallery(str(tmp_path), artefacts, AssetBox(max_bytes=1_000_000), arms=("oracle",))
    assert [clip.title for clip in shown.own_clips] == ["a, policy, seed 7: solved", "b, policy, seed 7: solved"]
    assert [clip.title for clip in shown.arm_clips] == ["a, oracle, seed 7: solved", "b, oracle, seed 7: solved"]
    assert all(clip.poster.uri for clip in shown.clips)
    for_two = shown.clips[0].asset.uri, shown.clips[0].poster.uri
    tight = gallery(str(tmp_path), artefacts, AssetBox(max_bytes=2 * len("".join(for_two))), arms=("oracle",))
    assert len(tight.own_clips) == 2
    assert not tight.arm_clips


def test_only_known_pictures_are_inlined():
    assert media_type(b"<svg onload=alert(1)>") == ""
    box = AssetBox(max_bytes=100)
    assert "not an image" in box.inline(b"<svg/>", name="x.png", kind="image").missing
    assert "not an mp4 clip" in box.inline(b"\xff\xd8\xff", name="x.mp4", kind="video").missing
    assert box.spent_bytes == 0


def test_prediction_arrays_of_another_form_are_refused(tmp_path):
    good = np.zeros((2, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "good.npz", current=good, predicted=good, true=good)
    assert [array.shape for array in load_arrays(str(tmp_path / "good.npz"))] == [(2, 8, 8, 3)] * 3
    np.savez(tmp_path / "lacks.npz", current=good, predicted=good)
    np.savez(tmp_path / "float.npz", current=good, predicted=good, true=good.astype(np.float32))
    np.savez(tmp_path / "objects.npz", current=good, predicted=good, true=np.array([{}], dtype=object))
    for name, words in (("lacks", "no array 'true'"), ("float", "float32"), ("objects", "not a readable npz")):
        with pytest.raises(InputError, match=words):
            load_arrays(str(tmp_path / f"{name}.npz"))


def test_timings_of_another_form_or_place_cost_their_own_part(tmp_path):
    assert latency_view(str(tmp_path), {}) is None
    for name, content in (("broken.json", "{"), ("empty.json", "{}"), ("words.json", json.dumps(words_as_times()))):
        (tmp_path / name).write_text(content)
        with pytest.raises(InputError, match=name):
            latency_view(str(tmp_path), {"latency": name})
    with pytest.raises(InputError, match="leaves the result's folder"):
        latency_view(str(tmp_path), {"latency": "../broken.json"})


def words_as_times() -> dict:
    value = timings()
    value["single"]["median_s"] = "<b>quick</b>"
    return value


def test_published_numbers_stand_beside_ours_in_a_row_of_their_own():
    rate = Score(value=0.5, low=0.4, high=0.6, count=100, successes=50, method="wilson")
    scores = {"success_ever": rate, "split/easy": rate.model_copy(update={"value": 0.75})}
    mine = policy_result().model_copy(
        update={"suite": "metaworld-rollouts", "primary_metric": "success_ever", "scores": scores}
    )
    (table,) = published_tables(mine)
    assert table.columns == ("easy", "middle", "hard", "average")
    rows = {row.name: row for row in table.rows}
    assert rows["this evaluation"].cells == ("0.750", "", "", "0.500") and rows["this evaluation"].is_ours
    assert rows["VPP"].cells[3] == "0.682 [?]" and not rows["VPP"].is_ours  # arXiv 2412.14803, table 2
    assert published_tables(policy_result()) == ()


def test_words():
    assert visible("a\x1b[1m\u202eb\ud800\n") == "a\\x1b[1m\\u202eb\\ud800\n"
    assert visible("naïve − 日本語") == "naïve − 日本語"
    assert [duration(s) for s in (None, 1.25, 61, 3725)] == ["–", "1.2 s", "1 min 01 s", "1 h 02 min"]
