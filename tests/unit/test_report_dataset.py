"""The page of one data set: right counts, pictures, decisions apart from failures, and deaf to its captions."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from evaluation.report import DatasetInput, ReportInputs, render
from evaluation.report.captions import caption_view
from evaluation.report.charts import bar_chart, histogram, histogram_chart
from evaluation.report.distributions import distributions
from evaluation.report.inputs import DATASET_SECTIONS
from evaluation.report.run import build, dataset_inputs, save_inputs
from evaluation.report.samples import read_samples, spread
from evaluation.report.sheets import frame_positions, strip_of
from infra.digests import pretty_json
from infra.errors import InputError
from ingest.reader import ShardDataset
from ingest.schema import Failure, frame_suffix
from ingest.shard import Member
from tests.helpers_data import (
    edit_manifest,
    jpeg,
    make_episode_dataset,
    make_frames_dataset,
    moving_square,
    sample_record,
    write_dataset,
)
from tests.helpers_report import write_mp4

INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufeff]")
HOSTILE = "<img src=x onerror=alert(1)>\x1b[31m\u202e{{ 7*7 }}"


def text_of(html: str) -> str:
    body = re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", body).split())


def page_of(url: str, **changes) -> str:
    return render(dataset_inputs(url).model_copy(update=changes))


def labelled(folder: Path, texts: list[str], *, label: str = "sort", motion: float | None = None) -> str:
    """One clip of four frames for each text; the first has motion where it is given."""

    def sample(number: int) -> list[Member]:
        frames = moving_square(4, 32, number)
        record = sample_record(number, "frames", 4, 32, metadata={"split": "train"}, text=texts[number])
        if motion is not None and number == 0:
            moving = record.cameras["main"].model_copy(update={"motion": motion, "length": "annotated"})
            record = record.model_copy(update={"cameras": {"main": moving}})
        record = record.model_copy(update={"label": label})
        pictures = [Member(frame_suffix(index), jpeg(frame), index) for index, frame in enumerate(frames)]
        return [Member("json", pretty_json(record.to_json())), *pictures]

    return write_dataset(folder, len(texts), 4, sample, clips_per_shard=3)


def refuse(folder: Path, *failures: tuple[str, str, str]) -> None:
    """Put (path, reason, message) into the first receipt."""
    entries = [
        Failure(
            key=f"k{number}", source_id=path, path=path, sha256=f"{number}" * 64,
            stage="decode", reason=reason, message=message,
        ).to_json()
        for number, (path, reason, message) in enumerate(failures)
    ]  # fmt: skip

    def edit(manifest):
        manifest["receipts"][0]["failures"] = entries
        manifest["num_failures"] = len(entries)

    edit_manifest(folder, edit)


def write_log(folder: Path, shard: int, **values) -> None:
    (folder / f"shard-{shard:05d}.log.json").write_text(json.dumps(values))


def test_each_section_is_there_with_what_it_promises(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data"
    make_episode_dataset(data, num_episodes=5, num_frames=20, validation_every=2)
    write_mp4(tmp_path / "corpus/short.mp4")
    write_mp4(tmp_path / "corpus/again.mp4")
    refuse(data, ("short.mp4", "truncated", "ends at 1 s"), ("again.mp4", "duplicate", "same content as x"))
    write_log(data, 0, attempt=1, host="left", seconds=4.0, finished_unix_s=104.0, seconds_per_clip={"clip-00001": 3.5})
    html = build("dataset", str(data), source=str(tmp_path / "corpus")).read_text()
    for name in DATASET_SECTIONS:
        assert f'<section id="{name}">' in html
    text = text_of(html)
    for words in (
        "5 samples 3 shards",
        "100 frames, all cameras",
        "1 set aside by rule 14.3 %",
        "move the square",
        "5 samples have one caption; all have one.",
        "median 0.667",  # 20 frames at 30 a second
        "64 × 64",
        "declared 5 as many frames",
        "Not measured",
        "train 2 40.0 %",
        "ends at 1 s",
        "same content as x",
        "square/00001",  # the slowest clip by its name in the corpus
        "10/s frames per worker",  # 40 frames of the first shard in 4 s
        "2 of 3 shards have no build log",
        "These logs do not tell the stages apart",
        "foreframe verify",
    ):
        assert words in text, words
    failures, filtered = html.split('<section id="filtered">')
    assert "duplicate" not in text_of(failures.split('<section id="failures">')[1])
    assert "truncated" not in text_of(filtered.split("</section>")[0])
    assert html.count("<img") == 5 + 2  # five strips, two refused sources


def test_without_a_source_nothing_of_it_is_shown(tmp_path):
    make_frames_dataset(tmp_path / "data", num_clips=2, num_frames=4)
    refuse(tmp_path / "data", ("short.mp4", "truncated", "ends at 1 s"))
    html = page_of(str(tmp_path / "data"))
    assert "No source folder was given" in html
    assert "First frame</th>" not in html


def test_a_source_is_never_read_outside_its_folder(tmp_path):
    make_frames_dataset(tmp_path / "data", num_clips=2, num_frames=4)
    write_mp4(tmp_path / "secret.mp4")
    (tmp_path / "corpus").mkdir()
    refuse(tmp_path / "data", ("../secret.mp4", "truncated", "m"))
    inputs = dataset_inputs(str(tmp_path / "data"), source=str(tmp_path / "corpus"))
    assert render(inputs).count("<img") == 2


@hypothesis_settings(max_examples=25, deadline=None)
@given(text=st.text(min_size=1, max_size=60) | st.just(HOSTILE))
def test_foreign_words_stay_words(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("hostile")
    text = text.encode("utf-8", "replace").decode()
    labelled(folder, [text, "plain"], label=text)
    refuse(folder, (text, "truncated", text), (f"{text}2", "black", text))
    write_log(folder, 0, host=text, seconds=1.0, stages={text: 0.5}, seconds_per_clip={text: 0.25}, attempt=2)
    hostile, plain = page_of(str(folder)), tmp_path_factory.mktemp("plain")
    labelled(plain, ["word", "plain"], label="word")
    refuse(plain, ("word", "truncated", "word"), ("word2", "black", "word"))
    write_log(plain, 0, host="word", seconds=1.0, stages={"word": 0.5}, seconds_per_clip={"word": 0.25}, attempt=2)
    assert set(re.findall(r"<(\w+)", hostile)) <= set(re.findall(r"<(\w+)", page_of(str(plain))))
    assert not INVISIBLE.search(hostile)


def test_the_hostile_caption_is_shown_as_it_is_written(tmp_path):
    labelled(tmp_path, [HOSTILE], label=HOSTILE)
    html = page_of(str(tmp_path))
    assert "<img src=x" not in html
    assert html.count("&lt;img src=x onerror=alert(1)&gt;\\x1b[31m\\u202e{{ 7*7 }}") >= 3  # sheet, caption table, label
    assert "49" not in text_of(html.split('<section id="captions">')[1])


def test_captions_are_counted_and_a_long_one_is_cut(tmp_path):
    labelled(tmp_path, ["pick the red cup", "Pick up", "pick the  red cup", "", " \n", "x" * 5000])
    data = ShardDataset(str(tmp_path))
    view = caption_view(data.manifest, read_samples(data))
    assert (view.num_distinct, view.num_without, view.share_without) == (3, 2, "33.3 %")
    assert (view.sentences[0].what, view.sentences[0].count) == ("pick the red cup", 2)
    assert {row.what: row.count for row in view.words}["pick"] == 3
    assert "the" not in {row.what for row in view.words}
    assert "x" * 200 not in page_of(str(tmp_path))


def test_motion_that_some_records_lack_says_so(tmp_path):
    labelled(tmp_path, ["a", "b", "c"], motion=2.5)
    data = ShardDataset(str(tmp_path))
    made = {panel.name: panel for panel in distributions(data.manifest, read_samples(data))}
    assert made["Motion"].facts == "median 2.5, from 2.5 to 2.5; 2 of 3 without"
    assert made["Brightness"].absent
    assert "annotated 1 as many" in text_of(page_of(str(tmp_path)))


def test_a_large_data_set_is_sampled_and_says_so(tmp_path):
    make_frames_dataset(tmp_path, num_clips=10, num_frames=4)
    data = ShardDataset(str(tmp_path))
    samples = read_samples(data, limit=5)
    assert [sample.index for sample in samples.facts] == [0, 2, 4, 6, 8]
    assert "5 of 10 samples, spread evenly" in samples.notes[0]
    assert not samples.is_complete
    assert read_samples(data).notes == ()


@given(
    sizes=st.lists(st.integers(0, 9), max_size=12),
    limit=st.integers(1, 40),
    max_shards=st.none() | st.integers(1, 5),
)
def test_samples_are_spread_over_the_shards_they_belong_to(sizes, limit, max_shards):
    starts = [sum(sizes[:shard]) for shard in range(len(sizes))]
    places = spread(sizes, limit, max_shards=max_shards)
    assert len(set(places)) == len(places) <= limit
    assert places == sorted(places)
    assert all(starts[shard] <= index < starts[shard] + sizes[shard] for shard, index in places)
    assert len({shard for shard, _ in places}) <= (max_shards or len(sizes))
    if max_shards is None:
        assert len(places) == min(limit, sum(sizes))


def test_a_damaged_shard_costs_its_own_samples(tmp_path):
    make_frames_dataset(tmp_path, num_clips=8, num_frames=4)
    (tmp_path / "shard-00001.idx").write_bytes(b"not an index")
    html = page_of(str(tmp_path))
    assert html.count("<img") == 4
    assert "Samples could not be read" in html
    assert '<section id="times">' in html


@pytest.mark.parametrize(
    "content",
    [
        "not json", "[]", "null", '{"seconds": "x", "stages": 3, "seconds_per_clip": [1]}',
        '{"seconds": -1, "attempt": -5, "host": {"a": 1}}', '{"seconds": 1e999, "stages": {"decode": NaN}}',
        '{"seconds": 0, "finished_unix_s": true, "attempt": true}',
    ],
)  # fmt: skip
def test_a_log_of_another_form_costs_no_page(tmp_path, content):
    make_frames_dataset(tmp_path, num_clips=2, num_frames=4)
    (tmp_path / "shard-00000.log.json").write_text(content)
    assert '<section id="times">' in page_of(str(tmp_path))


def test_stages_stand_in_the_order_of_the_work_with_the_rest_last(tmp_path):
    make_frames_dataset(tmp_path, num_clips=8, num_frames=5)
    for shard in (0, 1):
        stages = {"encode": 6.0, "read": 1.0, "novel": 0.5, "decode": 2.0}
        write_log(tmp_path, shard, seconds=10.0, finished_unix_s=100.0 + shard, stages=stages, host="h", attempt=0)
    text = text_of(page_of(str(tmp_path)).split('<section id="times">')[1])
    assert "Per frame read 2 s 10.0 % 50 ms decode 4 s 20.0 % 100 ms encode 12.0 s 60.0 % 300 ms" in text
    assert "novel 1 s 5.0 % 25 ms anything else 1 s 5.0 %" in text
    assert "11.0 s first start to last shard" in text
    assert "Every shard was built at the first attempt." in text


def test_the_ledger_groups_by_reason_and_folds_clips_of_one_source(tmp_path):
    make_frames_dataset(tmp_path, num_clips=2, num_frames=4)
    refuse(
        tmp_path,
        ("a.mp4", "truncated", "ends early"),
        ("a.mp4", "truncated", "ends early"),
        ("b.mp4", "empty", "zero bytes"),
        ("c.mp4", "truncated", "ends earlier"),
    )
    section = page_of(str(tmp_path)).split('<section id="failures">')[1].split("</section>")[0]
    assert "truncated 3 : the container" in text_of(section) or "truncated 3: the container" in text_of(section)
    assert "2 clips of this source" in section
    assert section.index('id="reason-truncated"') < section.index('id="reason-empty"')
    assert section.count('<td class="path">') == 3


def test_a_spent_budget_leaves_pictures_out_by_name(tmp_path):
    make_frames_dataset(tmp_path, num_clips=4, num_frames=4)
    html = page_of(str(tmp_path), max_bytes=1)
    assert "<img" not in html
    assert "Left out for size: frames of clip-00000 (main)" in html


def test_saved_inputs_make_the_same_page_beside_them(tmp_path):
    data = make_frames_dataset(tmp_path / "data", num_clips=2, num_frames=4)
    folder = str(tmp_path / "reports/one")
    inputs = dataset_inputs(data, name="mine", folder=folder)
    save_inputs(inputs, folder)
    page = build("dataset", folder)
    assert page == Path(folder) / "report.html"
    assert page.read_text() == render(inputs.model_copy(update={"base": folder}))
    with pytest.raises(InputError, match="--source"):
        build("demo", folder, source="x")


def test_the_section_of_a_whole_line_stays_as_it_was(tmp_path):
    data = make_frames_dataset(tmp_path / "data", num_clips=2, num_frames=4)
    html = render(ReportInputs(title="t", sections=("data",), datasets=(DatasetInput(url=data),)))
    assert "Nothing was quarantined." in html
    assert 'id="overview"' not in html
    assert "No data set was given" in render(ReportInputs(title="t", sections=("overview", "times")))


def test_an_empty_data_set_and_none_at_all_make_a_page(tmp_path):
    write_dataset(tmp_path / "data", 0, 4, lambda number: [])
    assert "The data set holds no sample." in page_of(str(tmp_path / "data"))
    assert "holds no manifest.json" in page_of(str(tmp_path / "nothing"))


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=200), st.booleans())
def test_every_value_is_in_one_bin(values, whole):
    values = [float(round(value)) for value in values] if whole else values
    made = histogram(values, whole=whole)
    assert sum(made.counts) == len(values)
    assert len(made.edges) == len(made.counts) + 1
    assert list(made.edges) == sorted(set(made.edges))
    rounding = 1e-6 * (made.edges[1] - made.edges[0])
    assert made.edges[0] <= min(values) + rounding
    assert made.is_open or max(values) <= made.edges[-1] + rounding
    assert len(made.counts) <= 40
    chart = histogram_chart(made, title="t", x_label="x")
    heights = [float(text) for text in re.findall(r'height="([\d.]+)"', chart)]
    tops = [float(text) for text in re.findall(r'rect class="count" x="[\d.]+" y="([-\d.]+)"', chart)]
    assert all(top >= -0.1 for top in tops) and max(heights) <= 200


@pytest.mark.parametrize("values", [[0.0, 5e-324], [1.0, 1.0 + 1e-15], [30.0] * 50, [0.0]])
def test_values_that_hardly_differ_are_one_column(values):
    made = histogram(values)
    assert sorted(made.counts)[-1] == len(values)
    assert histogram_chart(made, title="t", x_label="x")


def test_one_very_long_clip_does_not_hide_the_others():
    made = histogram([float(1 + number % 10) for number in range(1000)] + [36_000.0])
    assert made.is_open
    assert sum(count > 0 for count in made.counts) >= 9
    assert "and more" in histogram_chart(made, title="t", x_label="s")
    assert histogram_chart(histogram([]), title="t", x_label="s") == ""


def test_small_bars_fit_a_panel():
    chart = bar_chart([("640 × 480", 10), ("320 × 240", 5)], title="t", is_small=True)
    assert 'viewBox="0 0 320 44"' in chart


def test_a_strip_begins_with_the_first_frame_and_ends_with_the_last():
    assert frame_positions(100) == [0, 20, 40, 59, 79, 99]
    assert frame_positions(3) == [0, 1, 2]
    assert frame_positions(1) == [0]
    assert frame_positions(0) == []
    frames = np.stack([np.full((64, 128, 3), level, np.uint8) for level in (10, 200)])
    strip = strip_of(frames)
    assert strip.shape == (112, 2 * 224 + 2, 3)
    assert (strip[0, 0, 0], strip[0, 225, 0], strip[0, -1, 0]) == (10, 255, 200)
