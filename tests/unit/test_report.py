"""The page: complete, self-contained, honest about what is missing, and deaf to what its inputs try to say."""

import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from evaluation.report import DatasetInput, Prediction, ReportInputs, TrainingRun, render, write
from evaluation.report.inputs import LINE_SECTIONS
from evaluation.report.run import build, save_inputs
from infra.digests import pretty_json
from infra.errors import InputError
from tests.helpers_data import make_frames_dataset
from tests.helpers_report import encoder_result, full_run, picture, policy_result

FETCHING = ("src", "href", "poster", "srcset", "action", "data", "background", "cite", "xlink:href", "formaction")
# Control characters and marks that reorder or hide text.
INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufeff]")


class Page(HTMLParser):
    """Tags with their attribute names, what they would fetch, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.structure: list[tuple[str, tuple[str, ...]]] = []
        self.fetched: list[str] = []
        self.tags: dict[str, int] = {}
        self.words: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.structure.append((tag, tuple(name for name, _ in attributes)))
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.fetched += [value or "" for name, value in attributes if name in FETCHING]

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> ReportInputs:
    return full_run(tmp_path_factory.mktemp("run"))


def test_every_section_has_its_content(full):
    page = Page(render(full))
    for name in LINE_SECTIONS:
        assert f'<section id="{name}">' in render(full)
    for words in (
        "The policy succeeds in 18 of 20 rollouts over 2 tasks: 90.0 %",
        "The gate promoted 1 of 2 candidates.",
        "9/10",  # per task
        "+0.500",  # policy minus proprioception
        "loss_future",
        "what was found in 0",
        "short_decode",
        "data set 222222222222",
        "a" * 64,  # the source hash below the data set
        "make demo",
        "2.14",
        "One robot alone waits 8 ms for a decision (95 of 100 within 40 ms)",
        "and carries out 4 actions of it: at most 500 actions a second",
        "features 6.5 ms",
        "10–20 ms",  # an empty bin between two that hold something
    ):
        assert words in page.text, words
    assert page.tags["video"] == 1
    # stage, prediction, masks, thumbnail of the short video; the empty file and the one outside have none
    assert page.tags["img"] == 4


def test_the_page_fetches_and_runs_nothing(full):
    html = render(full)
    page = Page(html)
    assert page.fetched
    assert all(value.startswith(("data:image/", "data:video/mp4;", "#")) for value in page.fetched)
    assert not page.tags.keys() & {"script", "link", "iframe", "object", "embed", "base", "form"}
    assert "http://" not in html
    assert "https://" not in html
    assert "@import" not in html
    assert "url(" not in html
    assert "default-src &#39;none&#39;" in html


@hypothesis_settings(max_examples=25)
@given(
    st.one_of(
        st.sampled_from(
            [
                "</style><script>alert(1)</script>",
                '" onerror="alert(1)" x="',
                "' autofocus onfocus=alert(1) '",
                "{{ 7 * 7 }}{% include 'x' %}",
                "<!--",
                "]]></svg><img src=https://example.com/x>",
                "\x1b[2J\x00\x07",
                "gpj.\u202e4pm",
                "&lt;b&gt;",
                "</title></head>",
            ]
        ),
        st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=40),
    )
)
def test_foreign_words_stay_words(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("hostile")
    hostile = render(full_run(folder, note=f" {text}."))
    plain = render(full_run(folder, note=" plain."))
    assert Page(hostile).structure == Page(plain).structure
    assert Page(hostile).tags.get("script") is None
    assert not INVISIBLE.search(hostile)


def test_nothing_given_says_so_in_every_section():
    page = Page(render(ReportInputs(title="Empty")))
    for words in (
        "There is no policy result in this report.",
        "No stage timing was given.",
        "No training run was given.",
        "No predicted future was given.",
        "No encoder evaluation was given.",
        "No policy evaluation was given.",
        "No promotion decision was given.",
        "No data set was given",
        "No lineage was given.",
        "No resolved config was given.",
        "Versions: not given.",
        "No command was given.",
    ):
        assert words in page.text


def test_unreadable_inputs_cost_their_section_only(tmp_path):
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\nnot json\n{"step": 2, "loss": 0.5}\n')
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    inputs = ReportInputs(
        title="Broken",
        base=str(tmp_path),
        runs=(TrainingRun(name="lost", metrics="nowhere.jsonl"), TrainingRun(name="half", metrics="metrics.jsonl")),
        predictions=(Prediction(strip="picture.png"), Prediction(strip="lost.npz"), Prediction(current="a.png")),
        encoder_result="nowhere",
        policy_result="also-nowhere/result.json",
        datasets=(DatasetInput(url="no-data"),),
    )
    text = Page(render(inputs)).text
    assert "nowhere.jsonl does not exist" in text
    assert "1 malformed lines" in text
    assert " 1 values that are not finite" in text
    assert "picture.png is a damaged image" in text
    assert "lost.npz does not exist" in text
    assert "lacks a picture" in text
    assert "nowhere/result.json does not exist" in text
    assert "also-nowhere/result.json does not exist" in text
    assert "no complete data set" in text


@pytest.mark.parametrize(
    ("gain", "num", "sentence"),
    [
        (0.002, 12, "Pre-training shows no measurable gain over random initialisation at this scale: "),
        (0.1, 12, "Pre-training gains over random initialisation: J&F differs by +0.100"),
        (-0.1, 12, "Pre-training loses against random initialisation: J&F differs by −0.100"),
        (0.1, 4, "Pre-training shows no measurable gain over random initialisation at this scale: "),  # too few
    ],
)
def test_the_sentence_on_pretraining_follows_the_paired_interval(tmp_path, gain, num, sentence):
    (tmp_path / "result.json").write_bytes(pretty_json(encoder_result(gain=gain, num=num).to_json()))
    text = Page(render(ReportInputs(title="E", encoder_result=str(tmp_path)))).text
    assert sentence in text
    assert text.count("Pre-training ") == 2  # in the summary and in its own section
    assert ("too few for an interval" in text) == (num == 4)


def test_a_spent_budget_names_what_it_left_out(full):
    small = full.model_copy(update={"max_bytes": 3000})
    page = Page(render(small))
    assert "video" not in page.tags
    assert "Left out for size:" in page.text
    assert "a.mp4" in page.text


def test_artefacts_outside_the_result_are_not_read(tmp_path):
    (tmp_path / "secret.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "policy").mkdir()
    outside = {"up": "../secret.png", "root": str(tmp_path / "secret.png"), "far": "s3://bucket/secret.png"}
    result = policy_result(artefacts=outside)
    (tmp_path / "policy/result.json").write_bytes(pretty_json(result.to_json()))
    page = Page(render(ReportInputs(title="P", policy_result=str(tmp_path / "policy"))))
    assert "img" not in page.tags
    assert page.text.count("leaves the result's folder") == 3


def test_given_thumbnails_are_shown(full, tmp_path):
    from io import BytesIO

    from PIL import Image

    stream = BytesIO()
    Image.fromarray(picture(16)).save(stream, "PNG")
    before = Page(render(full)).tags["img"]
    after = Page(render(full, thumbnails={"broken/empty.mp4": stream.getvalue()})).tags["img"]
    assert after == before + 1


def test_build_makes_the_page_of_each_kind(full, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = full.base
    save_inputs(full.model_copy(update={"base": ""}), run)
    assert build("demo", run).read_text() == render(full)
    page = Page(build("result", f"{run}/policy/result.json").read_text())
    assert "9/10" in page.text
    assert "Encoder evaluation" not in page.text
    data = make_frames_dataset(tmp_path / "frames", num_clips=3, num_frames=4)
    page = Page(build("dataset", data).read_text())
    assert "Nothing was quarantined." in page.text
    assert page.tags["img"] == 3
    assert (tmp_path / "frames-report.html").is_file()
    assert not (tmp_path / "frames/report.html").exists()


def test_an_encoder_result_alone_gets_the_encoder_page(tmp_path):
    result = encoder_result(gain=0.0).model_copy(update={"suite": "label-propagation"})
    (tmp_path / "result.json").write_bytes(pretty_json(result.to_json()))
    text = Page(build("result", str(tmp_path)).read_text()).text
    assert "First-frame masks" in text
    assert "Policy evaluation" not in text


def test_wrong_kind_and_unfinished_run_are_refused_with_the_remedy(tmp_path):
    with pytest.raises(InputError, match="demo, video, policy, dataset, result"):
        build("everything", str(tmp_path))
    with pytest.raises(InputError, match=r"report\.json"):
        build("demo", str(tmp_path))


def test_lone_surrogates_of_a_metrics_file_do_not_stop_the_write(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss_\\ud800": 1.0}\n{"step": 2, "loss_\\ud800": 0.5}\n')
    inputs = ReportInputs(title="S", runs=(TrainingRun(name="r", metrics=str(tmp_path / "metrics.jsonl")),))
    write(inputs, tmp_path / "page.html")
    assert r"loss_\ud800" in (tmp_path / "page.html").read_text(encoding="utf-8")
