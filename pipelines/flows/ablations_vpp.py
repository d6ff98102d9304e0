"""`ablations-vpp`: the paper's ablation tables of the Video Prediction Policy, ours beside them.

Every row is trained with equal steps on equal decisions and rolled out on equal seeds; a row that lacks what only a
user can give is listed with the reason. Stages that exist are skipped, so rows can be added one by one.
"""

from __future__ import annotations

import json
from typing import Any

from prefect import flow

from evaluation.result import RESULT_NAME, EvaluationResult
from infra.digests import sha256_json, short
from infra.errors import ForeframeError
from infra.settings import settings
from infra.storage import absolute, join, read_json, write_bytes, write_json
from pipelines.ablation_tables import AblationOutcome, as_markdown, outcome_of, rows_beside
from pipelines.flows import STOPS_ITS_JOBS
from pipelines.flows.evaluate import demonstrated_tasks, rate, rollouts
from pipelines.flows.finetune_tvp import HELD_OUT, finetune_tvp
from pipelines.flows.ingest_corpus import ingest_corpus
from pipelines.policy_methods import parse_given, resolve_cached, resolve_vpp, train, video_provider, without_place
from pipelines.ray_backend import Backend
from pipelines.tasks import FlowRun, logger, resolve, tracked
from training.launch import EXPORT
from training.providers import FeatureProviderConfig
from training.recipes import mae
from training.recipes.ablations_vpp import FULL, Ablation, find_rows

TABLES = "ablations.md"
OTHER_TASKS = (
    "door-close",
    "faucet-open",
    "plate-slide",
    "reach",
    "push",
    "window-close",
    "drawer-close",
    "sweep-into",
)


@flow(name="ablations-vpp", flow_run_name="ablations-vpp-{preset}", **STOPS_ITS_JOBS)
def ablations_vpp(
    *,
    preset: str = "tiny",
    data: str = "",
    video: str = "",
    internet: list[str] | None = None,
    initial: str = "",
    voltron: str = "",
    rows: list[str] | None = None,
    overrides: list[str] | None = None,
    features: list[str] | None = None,
    finetuning: list[str] | None = None,
    pretraining: list[str] | None = None,
    simulate: list[str] | None = None,
    evaluation: list[str] | None = None,
    backend: Backend | None = None,
    parent_run: str = "",
) -> str:
    """Train and roll out every ablation; returns the url of the folder with `ablations.md` and `ablations.json`.

    `data` are the task's episodes (default: simulated), `video` its video model (default: fine-tuned on `data` and
    `internet`). `internet` are data sets of other videos (default: where `data` is simulated, other tasks of the
    simulator; `[]`: none), `initial` pre-trained weights, `voltron` an encoder's weights: rows that need what is not
    given are listed as not run. `rows` names rows (default: all). The lists of overrides go to every row alike:
    training, feature cache, fine-tuning, masked autoencoder, rollouts.
    """
    chosen = find_rows(rows)
    with tracked("ablations-vpp", backend=backend, parent=parent_run) as run:
        child: dict[str, Any] = {"backend": backend, "parent_run": run.run.run_id}
        if not data:
            data = ingest_corpus(layout="video", overrides=[HELD_OUT], simulate=simulate, **child)
            if internet is None:  # the simulator's other tasks stand for videos of elsewhere
                others = other_tasks(demonstrated_tasks(data))
                wanted = [*(simulate or []), f"tasks={json.dumps(others)}"]
                internet = [
                    ingest_corpus(
                        layout="video", name="other-tasks-video", overrides=[HELD_OUT], simulate=wanted, **child
                    )
                ]
        data = absolute(data)
        bench = _Bench(
            run, preset, data,
            video=absolute(video) if video else "", internet=[absolute(url) for url in internet or []],
            initial=initial, voltron=voltron,
            lists={"overrides": overrides, "features": features, "finetuning": finetuning, "pretraining": pretraining,
                   "evaluation": evaluation},
            child=child,
        )  # fmt: skip
        outcomes = [bench.outcome(row) for row in chosen]
        folder = settings().at("reports", f"ablations-vpp-{short(sha256_json([item.to_json() for item in outcomes]))}")
        write_json(join(folder, "ablations.json"), {"preset": preset, "rows": [item.to_json() for item in outcomes]})
        write_bytes(join(folder, TABLES), as_markdown(outcomes, preset=preset).encode())
        run.table(
            "ablations-vpp", rows_beside(outcomes), f"Ablations of the Video Prediction Policy: {folder}/{TABLES}"
        )
        return folder


def other_tasks(tasks: tuple[str, ...]) -> list[str]:
    """As many tasks that are none of these, as far as there are."""
    return [task for task in OTHER_TASKS if task not in tasks][: len(tasks)]


class _Bench:
    """What all rows share: data, video models made once, the control they are rolled out with."""

    def __init__(
        self,
        run: FlowRun,
        preset: str,
        data: str,
        *,
        video: str,
        internet: list[str],
        initial: str,
        voltron: str,
        lists: dict[str, list[str] | None],
        child: dict[str, Any],
    ) -> None:
        self._run, self._preset, self._data, self._child, self._lists = run, preset, data, child, lists
        self._internet, self._initial = internet, initial
        self._cameras = video_provider(preset, "any").cameras
        self._given = {
            "internet": bool(internet), "initial": bool(initial), "voltron": bool(voltron), "mae": True,
            "a second camera": len(self._cameras) > 1,
        }  # fmt: skip
        self._urls = {"voltron": voltron}
        self._videos = {"full": video} if video else {}
        self._full: EvaluationResult | None = None

    def outcome(self, row: Ablation) -> AblationOutcome:
        """Train and roll out one row; a row that cannot be made here says why."""
        if row.needs and not self._given.get(row.needs, False):
            return outcome_of(row, None, None, reason=f"needs {row.needs}")
        try:
            result = self._rolled_out(row)
        except ForeframeError as error:
            if row.name == FULL:
                raise
            logger().warning("row %s: %s", row.name, error)
            return outcome_of(row, None, None, reason=str(error))
        if row.name == FULL:
            self._full = result[0]
        return outcome_of(row, *result, full=self._full)

    def _rolled_out(self, row: Ablation) -> tuple[EvaluationResult, str]:
        wanted = [*without_place(self._lists["overrides"]), *row.overrides]
        see = self._provider(row)
        planned = resolve_vpp(self._preset, see, self._data, wanted)
        if planned.schedule.epochs and planned.data.share < 1:  # as many steps as the rows with all of the data
            wanted.append(f"schedule.epochs={round(planned.schedule.epochs / planned.data.share)}")
        config = resolve_cached(
            self._run, self._preset, see, self._data, overrides=wanted, features=self._lists["features"]
        )
        export, _ = train(self._run, row.name, config, self._data)
        suite = rollouts(export, control="", others=None, data=self._data, controls=False)
        url = rate(
            self._run, resolve(suite, self._lists["evaluation"], folder="results", name="rollouts"), registered=False
        )
        return EvaluationResult.parse(read_json(join(url, RESULT_NAME))), url

    def _provider(self, row: Ablation) -> FeatureProviderConfig:
        changes = {key: self._filled(value) for key, value in row.provider.items()}
        if "kind" in changes:
            found = parse_given({"cameras": self._cameras, **changes})
            assert found is not None
            return found
        return video_provider(self._preset, self._video(row.video), changes)

    def _filled(self, value: Any) -> Any:
        if value == ["{first-camera}"]:
            return list(self._cameras[:1])
        if value == "{video}":
            return self._video("full")
        if value == "{mae}":
            return self._masked_autoencoder()
        return self._urls[value.strip("{}")] if isinstance(value, str) and value.startswith("{") else value

    def _video(self, name: str) -> str:
        """The video model of a row, fine-tuned when it is first asked for."""
        if name not in self._videos:
            sources = {
                "full": [self._data, *self._internet],
                "without-internet": [self._data],
                "without-task-video": self._internet,
                "without-initial": [self._data],
            }[name]
            initial = "" if name == "without-initial" else self._initial
            self._videos[name] = finetune_tvp(
                data=sources, initial=initial, overrides=self._lists["finetuning"], evaluation=["num_clips=16"],
                candidate=False, **self._child,
            )  # fmt: skip
        return self._videos[name]

    def _masked_autoencoder(self) -> str:
        if "mae" not in self._urls:
            config = resolve(
                mae.tiny(data=self._data, output="unplaced"), self._lists["pretraining"], folder="runs", name="mae-tiny"
            )
            self._run.step("training.main", config, name="pretrain-mae")
            self._urls["mae"] = join(config.output, EXPORT)
        return self._urls["mae"]
