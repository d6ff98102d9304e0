"""`evaluate`: an encoder by label propagation, a video model by its predictions, a policy in closed loop.

Each stands beside its control arms. A policy is an export, or an address that speaks openpi's websocket convention.
"""

from __future__ import annotations

from typing import Any, Literal

from prefect import flow

from evaluation.calvin.config import CalvinConfig
from evaluation.label_propagation.config import LabelPropagationConfig
from evaluation.result import RESULT_NAME, EvaluationResult
from evaluation.rollouts.config import ARMS, MEAN_DEMONSTRATION, PROPRIOCEPTION, RolloutsConfig
from evaluation.rollouts.policies import is_served
from evaluation.video_quality.config import ProbeConfig, VideoQualityConfig
from infra.config import Config
from infra.errors import ConfigError, InputError
from infra.registry import ENCODER, POLICY, RESULT_TAG, VIDEO, Registry
from infra.storage import absolute, join, read_json
from ingest.reader import ShardDataset
from pipelines.flows import STOPS_ITS_JOBS
from pipelines.flows.ingest_corpus import TASKS
from pipelines.ray_backend import Backend
from pipelines.tasks import FlowRun, logger, resolve, tracked
from pipelines.video_data import evaluation_sources, probe_sources
from training.export import read_record

Suite = Literal["label-propagation", "video-prediction", "rollouts", "calvin"]
MODEL_OF = {"label-propagation": ENCODER, "video-prediction": VIDEO, "rollouts": POLICY, "calvin": POLICY}
SUITE_OF = {ENCODER: "label-propagation", VIDEO: "video-prediction", POLICY: "rollouts"}


@flow(name="evaluate", flow_run_name="evaluate-{suite}", **STOPS_ITS_JOBS)
def evaluate(
    *,
    suite: Suite = "rollouts",
    model: str = "",
    control: str = "",
    others: dict[str, str] | None = None,
    data: str = "",
    overrides: list[str] | None = None,
    backend: Backend | None = None,
    parent_run: str = "",
) -> str:
    """Evaluate an export (default: the registry's candidate); returns the url of the result's folder.

    `data`: for rollouts the episodes the policy was trained on, for label propagation a folder in DAVIS layout
    (default: simulated sequences), for video prediction a data set (default: those of the model's own run), of which
    the held-out episodes are used, for calvin a checkout of the simulator. `control`: a policy trained without
    pictures, the proprioception arm; `others`: further policies to report beside it, by name.
    """
    with tracked("evaluate", backend=backend, parent=parent_run) as run:
        url = address(model) if model else candidate_url(run, MODEL_OF[suite])
        if suite == "label-propagation":
            config: Config = LabelPropagationConfig(encoder=url, data=data, output="unplaced")
        elif suite == "video-prediction":
            sources = evaluation_sources(url, data)
            probe = ProbeConfig(sources=probe_sources(url, sources))
            config = VideoQualityConfig(model=url, sources=sources, probe=probe, output="unplaced")
        elif suite == "calvin":
            config = CalvinConfig(policy=url, calvin_root=data, output="unplaced")
        else:
            config = rollouts(url, control=control, others=others, data=data)
        return rate(run, resolve(config, overrides, folder="results", name=suite))


def address(model: str) -> str:
    """An export's absolute url; the address of a served policy as it is."""
    return model if is_served(model) else absolute(model)


def rollouts(
    policy: str, *, control: str, others: dict[str, str] | None, data: str, controls: bool = True
) -> RolloutsConfig:
    """Every control arm that what is given allows, on unseen seeds of the demonstrated tasks; without `controls` none.

    A policy of ours is gated on its arms, so it needs all of them; one that is served elsewhere may come alone.
    """
    if controls and not is_served(policy) and not (control and data):
        raise ConfigError(
            "rollouts need `control` (a policy trained without pictures) and `data` (the training episodes).",
            remedy="Use the train-policy flow, which makes both.",
        )
    given = {PROPRIOCEPTION: bool(control), MEAN_DEMONSTRATION: bool(data)}
    return RolloutsConfig(
        policy=policy,
        proprioception_policy=absolute(control) if control else "",
        other_policies={name: address(url) for name, url in (others or {}).items()},
        episodes=absolute(data) if data else "",
        arms=tuple(arm for arm in ARMS if controls and given.get(arm, True)),
        tasks=demonstrated_tasks(data) if data else TASKS,
        output="unplaced",
    )


def demonstrated_tasks(data: str) -> tuple[str, ...]:
    """The tasks of a data set's episodes, each once, in its order."""
    dataset = ShardDataset(absolute(data))
    records = (dataset.record(index) for index in range(len(dataset)))
    return tuple(dict.fromkeys(str(record.metadata.get("task") or record.label) for record in records))


def rate(run: FlowRun, config: Any, *, name: str = "", registered: bool = True) -> str:
    """Run a suite, note its scores on the flow's page and, if `registered`, on the version of the registry that the
    gate will judge by them; returns the result's folder. A flow that rates several models names each step.
    """
    step = f"evaluate-{name or config.kind}"
    child = run.step("evaluation.main", config, name=step)
    result = EvaluationResult.parse(read_json(join(config.output, RESULT_NAME)))
    scores = {name: score.value for name, score in result.scores.items()}
    tracked_run = run.tracker.open(child)
    tracked_run.log_metrics(scores)
    tracked_run.flush()
    registry = Registry(run.tracker)
    model = MODEL_OF[config.kind]
    version = registry.by_digest(model, result.model_digest) if registered else None
    if version is not None:
        registry.tag(model, version.version, {RESULT_TAG: config.output})
        registry.log_metrics(model, version.version, scores)
    run.table(step, score_rows(result), f"{result.suite} of {result.model}: {config.output}")
    primary = result.scores[result.primary_metric]
    logger().info(
        "%s: %s %.3f [%.3f, %.3f], n = %d: %s",
        *(result.suite, result.primary_metric, primary.value, primary.low, primary.high, primary.count, config.output),
    )
    return str(config.output)


def evaluate_like(run: FlowRun, model: str, result_url: str) -> EvaluationResult:
    """Another model by the very protocol that made `result_url`, read from there when it is done already."""
    saved = read_json(join(result_url, "config.json"))
    kind = saved.get("kind")
    if kind not in MODEL_OF:
        raise InputError(f"{result_url} was made by {kind!r}.", remedy=f"Known suites: {', '.join(MODEL_OF)}.")
    values = {**saved, "output": "unplaced"}
    if kind == "label-propagation":
        config: Config = LabelPropagationConfig.parse(values | {"encoder": model})
    elif kind == "video-prediction":
        config = VideoQualityConfig.parse(values | {"model": model})
    else:
        config = (CalvinConfig if kind == "calvin" else RolloutsConfig).parse(values | {"policy": model})
    url = rate(run, resolve(config, None, folder="results", name=str(kind)))
    return EvaluationResult.parse(read_json(join(url, RESULT_NAME)))


def candidate_url(run: FlowRun, name: str) -> str:
    """The export of the registry's candidate."""
    found = Registry(run.tracker).alias(name, "candidate")
    if found is None:
        raise InputError(f"{name} has no candidate.", remedy="Name an export with --model.")
    read_record(found.url)  # one clear line now rather than a failed job later
    return found.url


def score_rows(result: EvaluationResult) -> list[dict[str, Any]]:
    """One row an arm: the primary metric with its interval and count."""
    arms = {"model": result.scores, **result.arm_scores}
    rows = []
    for name, scores in arms.items():
        score = scores.get(result.primary_metric)
        if score is not None:
            rows.append(
                {
                    "arm": name,
                    result.primary_metric: round(score.value, 4),
                    "low": round(score.low, 4),
                    "high": round(score.high, 4),
                    "n": score.count,
                }
            )
    return rows
