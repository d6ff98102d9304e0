"""Each section of the page from its inputs; a section whose data is absent or unreadable carries the reason."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from evaluation.report.assets import Asset, AssetBox
from evaluation.report.comparison import Comparison, compare, pretraining_sentence, random_initialisation
from evaluation.report.curves import RunView, run_view
from evaluation.report.dataset import DatasetPage, Part
from evaluation.report.frames import first_frame_at
from evaluation.report.gallery import Gallery, gallery
from evaluation.report.graph import lineage_view
from evaluation.report.inputs import ReportInputs, SectionName, Stage
from evaluation.report.latency import LatencyView, latency_view
from evaluation.report.ledger import DatasetView, dataset_view
from evaluation.report.predictions import prediction_rows
from evaluation.report.published import PublishedTableView, published_tables
from evaluation.report.text import duration, grouped, rate, show, span
from evaluation.report.video import TextUse, previews, text_sentence, text_use, without_wrong_texts
from evaluation.result import RESULT_NAME, EvaluationResult
from infra import storage
from infra.errors import ForeframeError
from infra.media import VIDEO_SUFFIXES

log = logging.getLogger(__name__)

TITLES: dict[SectionName, str] = {
    "overview": "Overview",
    "sheets": "Contact sheets",
    "distributions": "Distributions",
    "captions": "Captions, labels, splits",
    "failures": "Failures",
    "filtered": "Set aside by rule",
    "times": "Build times",
    "summary": "Summary",
    "line": "The line",
    "training": "Loss curves",
    "predictions": "Predicted futures",
    "video": "Video model",
    "encoder": "Encoder evaluation",
    "policy": "Policy evaluation",
    "gate": "Promotion gate",
    "data": "Data and quarantine",
    "lineage": "Lineage",
    "configs": "Resolved configs",
    "versions": "Versions and environment",
    "reproduce": "Reproduce",
}
ENCODER_LABEL = "pre-trained encoder"
POLICY_LABEL = "policy"
VIDEO_LABEL = "video model"
STAGE_PICTURE_SIDE = 320


@dataclass(frozen=True)
class Section:
    """One section of the page. `view` is None when there is nothing to show; `problems` says why or what is partial."""

    name: SectionName
    view: Any = None
    problems: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """The heading."""
        return TITLES[self.name]

    @property
    def template(self) -> str:
        """The template that draws `view`."""
        return f"{self.name}.html.j2"


@dataclass(frozen=True)
class ResultView:
    """One evaluation result with its pictures, seeds and digests."""

    result: EvaluationResult
    comparison: Comparison
    gallery: Gallery
    sentence: str = ""
    headline: str = ""
    latency: LatencyView | None = None
    published: tuple[PublishedTableView, ...] = ()

    @property
    def seeds(self) -> str:
        """The seeds, as a range where they are consecutive."""
        seeds = self.result.seeds
        if len(seeds) > 2 and seeds == tuple(range(seeds[0], seeds[-1] + 1)):
            return f"{seeds[0]} to {seeds[-1]}"
        return ", ".join(str(seed) for seed in seeds) or "none recorded"


@dataclass(frozen=True)
class VideoView:
    """A video model: its evaluation, the wrong-sentence arms in a table of their own, the previews of its training."""

    result: ResultView | None
    previews: Gallery
    reconstruction: Asset | None = None
    text_use: tuple[TextUse, ...] = ()
    text_sentence: str = ""


@dataclass(frozen=True)
class StageView:
    """A stage of the line with its share of the total time."""

    stage: Stage
    duration: str
    share: float
    picture: Asset | None


@dataclass
class _Built:
    """What the summary needs from sections built before it."""

    encoder: ResultView | None = None
    policy: ResultView | None = None
    datasets: list[DatasetView] = field(default_factory=list)


def build_sections(inputs: ReportInputs, box: AssetBox, *, thumbnails: Mapping[str, bytes]) -> list[Section]:
    """All sections asked for, in page order. Clips are inlined last: they are what may not fit."""
    built = _Built()
    builders: dict[SectionName, Callable[[], Section]] = {
        "line": lambda: _line(inputs, box),
        "training": lambda: _training(inputs),
        "predictions": lambda: _predictions(inputs, box),
        "data": lambda: _data(inputs, box, thumbnails, built),
        "gate": lambda: _plain("gate", inputs.decisions, "No promotion decision was given."),
        "lineage": lambda: _lineage(inputs),
        "configs": lambda: _configs(inputs),
        "versions": lambda: _versions(inputs),
        "reproduce": lambda: _plain("reproduce", inputs.commands, "No command was given."),
        "video": lambda: _video(inputs, box),
        "encoder": lambda: _encoder(inputs, box, built),
        "policy": lambda: _policy(inputs, box, built),
        "summary": lambda: _summary(inputs, built),
    }
    page = DatasetPage(inputs, box, thumbnails=thumbnails)
    builders |= {name: partial(_part, name, builder) for name, builder in page.builders().items()}
    made = {name: _guarded(name, builder) for name, builder in builders.items() if name in inputs.sections}
    return [made[name] for name in TITLES if name in made]


def _guarded(name: SectionName, builder: Callable[[], Section]) -> Section:
    """One unreadable input costs its own section, not the report."""
    try:
        return builder()
    except (ForeframeError, OSError) as error:
        log.warning("report section %s: %s", name, error)
        return Section(name, problems=(str(error),))


def _part(name: SectionName, builder: Callable[[], Part]) -> Section:
    return Section(name, *builder())


def _plain(name: SectionName, values: tuple[Any, ...], absent: str) -> Section:
    return Section(name, view=values) if values else Section(name, problems=(absent,))


def _line(inputs: ReportInputs, box: AssetBox) -> Section:
    if not inputs.stages:
        return Section("line", problems=("No stage timing was given.",))
    total = sum(stage.seconds or 0.0 for stage in inputs.stages) or 1.0
    pictures = [_stage_picture(inputs.at(stage.picture), box) if stage.picture else None for stage in inputs.stages]
    views = tuple(
        StageView(
            stage, duration(stage.seconds), (stage.seconds or 0.0) / total, picture if picture and picture.uri else None
        )
        for stage, picture in zip(inputs.stages, pictures, strict=True)
    )
    return Section("line", view={"stages": views, "total": duration(sum(s.seconds or 0.0 for s in inputs.stages))})


def _stage_picture(url: str, box: AssetBox) -> Asset | None:
    """An image file, or the first frame of a video file."""
    if not url.endswith(VIDEO_SUFFIXES):
        return box.fetch(url)
    frame = first_frame_at(url)
    return None if frame is None else box.pixels(frame, name=url.rsplit("/", 1)[-1], max_side=STAGE_PICTURE_SIDE)


def _training(inputs: ReportInputs) -> Section:
    views: list[RunView] = []
    problems: list[str] = []
    for run in inputs.runs:
        try:
            views.append(run_view(run.name, inputs.at(run.metrics)))
        except (ForeframeError, OSError) as error:
            problems.append(f"{run.name}: {error}")
    if not inputs.runs:
        problems.append("No training run was given.")
    return Section("training", view=views or None, problems=tuple(problems))


def _predictions(inputs: ReportInputs, box: AssetBox) -> Section:
    rows, problems = prediction_rows(inputs, box)
    if not inputs.predictions:
        problems.append("No predicted future was given.")
    return Section("predictions", view=rows or None, problems=tuple(problems))


def _data(inputs: ReportInputs, box: AssetBox, thumbnails: Mapping[str, bytes], built: _Built) -> Section:
    problems: list[str] = []
    for data in inputs.datasets:
        try:
            built.datasets.append(dataset_view(data, inputs, box, thumbnails=thumbnails))
        except (ForeframeError, OSError) as error:
            problems.append(f"{data.name or data.url}: {error}")
    if not inputs.datasets:
        problems.append("No data set was given, so there is no quarantine table.")
    return Section("data", view=built.datasets or None, problems=tuple(problems))


def _lineage(inputs: ReportInputs) -> Section:
    if not inputs.lineage:
        return Section("lineage", problems=("No lineage was given.",))
    view = lineage_view(inputs.lineage)
    return Section("lineage", view=view, problems=view.notes)


def _configs(inputs: ReportInputs) -> Section:
    configs = {run.name: run.config for run in inputs.runs if run.config} | inputs.configs
    if not configs:
        return Section("configs", problems=("No resolved config was given.",))
    view = {name: json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) for name, config in configs.items()}
    return Section("configs", view=view)


def _versions(inputs: ReportInputs) -> Section:
    groups = {
        "Code": {"git commit": inputs.git_commit} if inputs.git_commit else {},
        "Seeds": {name: str(seed) for name, seed in inputs.seeds.items()},
        "Versions": inputs.versions,
        "Environment": inputs.environment,
    }
    given = {title: values for title, values in groups.items() if values}
    absent = tuple(f"{title}: not given." for title, values in groups.items() if not values)
    return Section("versions", view=given or None, problems=absent)


def read_result(url: str) -> tuple[EvaluationResult, str]:
    """A result and its folder, from the folder or the `result.json` in it."""
    folder = url.removesuffix(RESULT_NAME).rstrip("/") or "."
    return EvaluationResult.parse(storage.read_json(storage.join(folder, RESULT_NAME))), folder


def _encoder(inputs: ReportInputs, box: AssetBox, built: _Built) -> Section:
    if not inputs.encoder_result:
        return Section("encoder", problems=("No encoder evaluation was given.",))
    result, folder = read_result(inputs.at(inputs.encoder_result))
    comparison = compare(result, model_label=ENCODER_LABEL)
    against_random = random_initialisation(comparison.differences)
    sentence = pretraining_sentence(against_random) if against_random else ""
    built.encoder = ResultView(result, comparison, gallery(folder, result.artefacts, box, arms=result.arms), sentence)
    absent = () if against_random else ("No arm with random initialisation: the gain of pre-training is not known.",)
    return Section("encoder", view=built.encoder, problems=(*absent, *comparison.notes))


def _policy(inputs: ReportInputs, box: AssetBox, built: _Built) -> Section:
    if not inputs.policy_result:
        return Section("policy", problems=("No policy evaluation was given.",))
    result, folder = read_result(inputs.at(inputs.policy_result))
    comparison = compare(result, model_label=POLICY_LABEL)
    problems = list(comparison.notes)
    try:
        latency = latency_view(folder, result.artefacts)
    except (ForeframeError, OSError) as error:
        latency, problems = None, [*problems, str(error)]
    built.policy = ResultView(
        result,
        comparison,
        gallery(folder, result.artefacts, box, arms=result.arms),
        headline=_success_sentence(result),
        latency=latency,
        published=published_tables(result),
    )
    return Section("policy", view=built.policy, problems=tuple(problems))


def _video(inputs: ReportInputs, box: AssetBox) -> Section:
    shown = previews(inputs.at(inputs.preview_folder), box) if inputs.preview_folder else Gallery()
    rebuilt = box.fetch(inputs.at(inputs.reconstruction)) if inputs.reconstruction else None
    if not inputs.video_result:
        has_pictures = bool(shown.pictures or shown.clips)
        view = VideoView(None, shown, rebuilt) if has_pictures else None
        return Section("video", view=view, problems=("No evaluation of a video model was given.",))
    result, folder = read_result(inputs.at(inputs.video_result))
    comparison = compare(without_wrong_texts(result), model_label=VIDEO_LABEL)
    rows = text_use(result)
    own = ResultView(result, comparison, gallery(folder, result.artefacts, box, arms=result.arms))
    view = VideoView(own, shown, rebuilt, rows, text_sentence(rows, result.primary_metric))
    return Section("video", view=view, problems=comparison.notes)


def _success_sentence(result: EvaluationResult) -> str:
    score = result.scores.get(result.primary_metric)
    if score is None or score.successes is None:
        return ""
    tasks = len({item.stratum for item in result.items})
    return (
        f"The policy succeeds in {score.successes} of {score.count} rollouts over {tasks} "
        f"{'task' if tasks == 1 else 'tasks'}: {rate(score.value)}, 95 % interval {span(score.low, score.high)}."
    )


def _gate_sentence(inputs: ReportInputs) -> str:
    promoted = sum(decision.promote for decision in inputs.decisions)
    total = len(inputs.decisions)
    if not total:
        return ""
    return f"The gate promoted {promoted} of {total} {'candidate' if total == 1 else 'candidates'}."


def _summary(inputs: ReportInputs, built: _Built) -> Section:
    view = {
        "sentences": [
            sentence for sentence in (built.policy and built.policy.headline, _gate_sentence(inputs)) if sentence
        ],
        "policy": built.policy,
        "encoder": built.encoder,
        "decisions": inputs.decisions,
        "figures": _figures(inputs, built),
    }
    absent = [
        sentence
        for value, sentence in (
            (built.policy, "There is no policy result in this report."),
            (inputs.decisions, "The promotion gate was not asked, or its record was not given."),
        )
        if not value
    ]
    return Section("summary", view=view, problems=tuple(absent))


def _figures(inputs: ReportInputs, built: _Built) -> list[tuple[str, str, str]]:
    """(number, what it is, what it rests on) of the cards at the top."""
    figures: list[tuple[str, str, str]] = []
    if built.policy and (score := built.policy.result.scores.get(built.policy.result.primary_metric)):
        counts = f"{score.successes} of {score.count} rollouts" if score.successes is not None else f"n = {score.count}"
        value = rate(score.value) if score.successes is not None else show(score.value)
        figures.append((value, built.policy.comparison.metrics[0], counts))
    if built.encoder and (score := built.encoder.result.scores.get(built.encoder.result.primary_metric)):
        figures.append((f"{score.value:.3f}", built.encoder.comparison.metrics[0], f"{score.count} sequences"))
    for data in built.datasets:
        facts = dict(data.facts)
        figures.append((facts["samples"], f"samples, {data.name}", f"{grouped(data.num_failures)} quarantined"))
    if inputs.stages:
        total = sum(stage.seconds or 0.0 for stage in inputs.stages)
        figures.append((duration(total), "all stages", f"{len(inputs.stages)} stages"))
    return figures
