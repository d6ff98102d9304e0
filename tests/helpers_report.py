"""A small complete run on disk, for report tests. Pictures come from Pillow and PyAV directly."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
from PIL import Image

from evaluation.report import (
    Command,
    DatasetInput,
    GateDecision,
    LineageNode,
    Prediction,
    ReportInputs,
    Stage,
    TrainingRun,
)
from evaluation.result import EvaluationResult, Item, Score
from infra.digests import pretty_json
from ingest.schema import Failure, Manifest, Receipt

TASKS = ("drawer-open", "window-open")


def picture(side: int = 32, *, seed: int = 0) -> np.ndarray:
    """A smooth colour ramp: survives JPEG and H.264."""
    ramp = np.linspace(0, 255, side)
    colour = np.random.default_rng(seed).uniform(0, 255, 3)
    return (
        np.stack([np.add.outer(ramp, ramp) / 2 + level / 2 for level in colour], axis=-1).clip(0, 255).astype(np.uint8)
    )


def write_png(path: Path, *, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(seed=seed)).save(path)


def write_mp4(path: Path, *, num_frames: int = 4, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for _ in range(num_frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(seed=seed), format="rgb24")))
        container.mux(stream.encode(None))


def items(metric: str, values: dict[str, list[float]]) -> tuple[Item, ...]:
    return tuple(
        Item(item_id=f"{task}/{seed}", stratum=task, metrics={metric: value})
        for task, column in values.items()
        for seed, value in enumerate(column)
    )


def result(
    metric: str,
    own: tuple[Item, ...],
    arms: dict[str, tuple[Item, ...]],
    *,
    artefacts: dict[str, str] | None = None,
    counted: bool = False,
    note: str = "",
) -> EvaluationResult:
    """Scores are plain means with a made-up interval: the report shows what it is given."""

    def score(of: tuple[Item, ...]) -> dict[str, Score]:
        values = [item.metrics[metric] for item in of]
        mean = sum(values) / len(values)
        successes = int(sum(values)) if counted else None
        return {metric: Score(value=mean, low=mean / 2, high=mean, count=len(values), successes=successes, method="x")}

    return EvaluationResult(
        suite=f"suite{note}",
        suite_version="1",
        model=f"exports/model{note}",
        model_digest=f"m0de1{note}",
        data_digest=f"da7a{note}",
        code_version=f"0.1.0{note}",
        primary_metric=metric,
        items=own,
        scores=score(own),
        arms=arms,
        arm_scores={name: score(of) for name, of in arms.items()},
        artefacts=artefacts or {},
    )


def encoder_result(
    *, gain: float, spread: float = 0.01, num: int = 12, artefacts: dict[str, str] | None = None, note: str = ""
) -> EvaluationResult:
    """The model beats random initialisation by `gain` +- `spread` on alternating sequences."""
    base = [0.6 + 0.01 * index for index in range(num)]
    mine = [value + gain + (spread if index % 2 else -spread) for index, value in enumerate(base)]
    arms = {
        f"random_initialisation{note}": items("J&F", {f"group{note}": base}),
        f"copy_first_mask{note}": items("J&F", {f"group{note}": [value - 0.3 for value in base]}),
    }
    return result("J&F", items("J&F", {f"group{note}": mine}), arms, artefacts=artefacts, note=note)


def policy_result(*, artefacts: dict[str, str] | None = None, note: str = "") -> EvaluationResult:
    def arm(successes: int) -> tuple[Item, ...]:
        return items("success", {f"{task}{note}": [1.0] * successes + [0.0] * (10 - successes) for task in TASKS})

    arms = {f"proprioception{note}": arm(4), f"random_actions{note}": arm(0)}
    return result("success", arm(9), arms, artefacts=artefacts, counted=True, note=note)


def manifest(*, note: str = "", source: str = "a" * 64) -> Manifest:
    failures = tuple(
        Failure(
            key=f"k{number}",
            source_id=f"broken-{number}{note}",
            path=path,
            sha256=f"{number}" * 64,
            stage="probe",
            reason=reason,
            message=f"what was found in {number}{note}",
        )
        for number, (path, reason) in enumerate(
            [("broken/short.mp4", "short_decode"), ("broken/empty.mp4", "empty"), ("../outside.mp4", "truncated")]
        )
    )
    receipt = Receipt(
        shard=0,
        plan_id="5" * 64,
        tar_sha256="6" * 64,
        idx_sha256="7" * 64,
        tar_bytes=4_200_000,
        num_samples=20,
        num_frames=1600,
        num_members=1620,
        failures=failures,
        engine={"pyav": "18"},
    )
    return Manifest(
        name=f"frames{note}",
        corpus=f"metaworld{note}",
        layout="frames",
        plan_id="5" * 64,
        recipe={},
        receipts=(receipt,),
        num_samples=20,
        num_frames=1600,
        num_failures=3,
        statistics={"labels": {f"drawer-open{note}": 20}},
        inputs=(source,),
    )


def timings(*, note: str = "") -> dict:
    """As an evaluation leaves them: 6 decisions between 5 and 10 ms, 2 between 20 and 50."""
    spread = {
        "median_s": 0.008, "p95_s": 0.04, "max_s": 0.045,
        "histogram": {"edges_ms": [0, 1, 2, 5, 10, 20, 50], "counts": [0, 0, 0, 6, 0, 2]},
    }  # fmt: skip
    arm = spread | {"decisions": 8, "batch_size": 20, "environment_step_ms": 0.7, "picture_ms": 3.0}
    alone = spread | {"parts_ms": {f"features{note}": 6.5}, "actions_per_decision": 4, "control_hz": 500.0}
    idle = {"decisions": 0, "batch_size": 0, "environment_step_ms": 0.7, "picture_ms": 0.0}
    return {"single": alone, "arms": {"policy": arm, f"other{note}": arm, "oracle": idle}}


def full_run(folder: Path, *, note: str = "") -> ReportInputs:
    """Every section has data; `note` is appended to every free text."""
    write_png(folder / "encoder/masks.png", seed=1)
    write_mp4(folder / "policy/clips/a.mp4", seed=2)
    write_mp4(folder / "corpus/broken/short.mp4", seed=3)
    write_mp4(folder / "outside.mp4", seed=5)
    write_png(folder / "pretrain/predictions.png", seed=4)
    masks, clips = {f"masks{note}": "masks.png"}, {f"rollout{note}": "clips/a.mp4", "latency": "latency.json"}
    (folder / "policy/latency.json").write_text(json.dumps(timings(note=note)))
    (folder / "encoder/result.json").write_bytes(
        pretty_json(encoder_result(gain=0.0, artefacts=masks, note=note).to_json())
    )
    (folder / "policy/result.json").write_bytes(pretty_json(policy_result(artefacts=clips, note=note).to_json()))
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data/manifest.json").write_bytes(pretty_json(manifest(note=note).to_json()))
    lines = [
        {"step": step, "loss": 2.0 / step, f"loss_future{note}": 1.0 / step, "lr": 0.1 * step} for step in range(1, 80)
    ]
    (folder / "pretrain/metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return ReportInputs(
        title=f"A run{note}",
        subtitle=f"Subtitle{note}",
        base=str(folder),
        stages=(Stage(name=f"Ingest{note}", seconds=3.0, detail=f"detail{note}", picture="corpus/broken/short.mp4"),),
        runs=(TrainingRun(name=f"pretrain{note}", metrics="pretrain/metrics.jsonl", config={f"lr{note}": f"v{note}"}),),
        predictions=(Prediction(strip="pretrain/predictions.png", caption=f"held out{note}"),),
        encoder_result="encoder",
        policy_result="policy",
        datasets=(DatasetInput(url="data", source="corpus"),),
        decisions=(
            GateDecision(
                model=f"p{note}", candidate=f"c{note}", promote=True, reasons=(f"first{note}", f"second{note}")
            ),
            GateDecision(
                model="p", candidate="bad", champion=f"c{note}", promote=False, note=f"n{note}", reasons=(note,)
            ),
        ),
        lineage=(
            LineageNode(kind=f"policy{note}", id="1" * 64, url=f"exports/policy{note}", inputs=("2" * 64,)),
            LineageNode(kind=f"data set{note}", id="2" * 64, url=f"data{note}", inputs=("a" * 64,)),
        ),
        configs={f"demo{note}": {"seed": 0}},
        versions={f"torch{note}": f"2.14{note}"},
        environment={f"cores{note}": f"2{note}"},
        git_commit=f"abc{note}",
        seeds={f"train_seed{note}": 0},
        commands=(Command(what=f"All of it{note}", command=f"make demo{note}"),),
    )
