"""Runs a recipe to its end: in this process, or on Ray Train workers that are restarted when they die.

The run's name follows from its config, so the same command continues what an earlier one left, whether a worker, the
driver or the machine went away. A finished run is recognised by its export record and left alone.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

from infra import errors
from infra.errors import CheckpointError, ConfigError, ForeframeError, InputError, TrainingError
from infra.faults import fault_point
from infra.ray_runtime import connect, worker_environment
from infra.storage import absolute, as_arrow, exists, join, read_bytes, remove, write_json
from training.callbacks.metrics_file import METRICS_NAME
from training.checkpoint import folder_name, newest_valid, prune_checkpoints, publish_checkpoint
from training.follow import following
from training.loop import Group, Task
from training.session import NOT_IDENTITY, ExportableTask, RunConfig, load_trained, schedule_of, train

log = logging.getLogger(__name__)

CONFIG = "config.json"
SUMMARY = "summary.json"
EXPORT = "export"
EXPORT_RECORD = "export.json"
FAILURE = "failed.json"


def launch(config: RunConfig) -> dict[str, Any]:
    """Train and export; returns the summary. A finished run returns its summary at once.

    Raises `ConfigError` when the output folder belongs to another config, `TrainingError` when training cannot go on,
    and Ray's `TrainingFailedError` when workers kept dying.
    """
    output = absolute(config.output)
    task = config.build_task()
    _claim_output(config, output)
    if exists(join(output, EXPORT, EXPORT_RECORD)) and exists(join(output, SUMMARY)):
        summary: dict[str, Any] = json.loads(read_bytes(join(output, SUMMARY)))
        _require_same_data(summary, task, output)
        log.info("%s is complete: export %s", output, summary["export"])
        return summary
    timing = _train(config, task)
    return _export(config, task, output, timing)


def _claim_output(config: RunConfig, output: str) -> None:
    """Write the resolved config, or refuse a folder that holds another run."""
    url = join(output, CONFIG)
    if not exists(url):
        write_json(url, config.to_json())
        return
    found = json.loads(read_bytes(url))
    mine = config.to_json()
    different = [key for key in sorted({*found, *mine} - NOT_IDENTITY) if found.get(key) != mine.get(key)]
    if different:
        raise ConfigError(
            f"{output} holds a run with another {', '.join(different)}.", remedy="Choose another output folder."
        )


def _require_same_data(summary: dict[str, Any], task: Task, output: str) -> None:
    if summary["data_digest"] != task.data_digest:
        raise InputError(
            f"{output} was trained on data {summary['data_digest'][:12]}, the data set is now {task.data_digest[:12]}.",
            remedy="Choose another output folder.",
        )


def _train(config: RunConfig, task: Task) -> dict[str, Any]:
    """Bring the run to its last step; returns what only this execution knows (empty when nothing was left to do)."""
    total_steps = schedule_of(config, task).total_steps
    newest = newest_valid(config.checkpoints_url())
    if newest and newest.endswith(folder_name(total_steps)):
        log.info("training is complete at step %d; the export is missing", total_steps)
        return {}
    log.info("training %s to step %d", config.run_name(), total_steps)
    summary = _train_inline(config, task) if config.compute.workers == 0 else _train_on_ray(config, total_steps)
    return {key: summary[key] for key in ("first_step", "seconds") if key in summary}


def _export(config: RunConfig, task: ExportableTask, output: str, timing: dict[str, Any]) -> dict[str, Any]:
    """Publish the final weights; safe to repeat. The summary is a function of the run, apart from its `execution`."""
    newest = newest_valid(config.checkpoints_url())
    total_steps = schedule_of(config, task).total_steps
    if newest is None or not newest.endswith(folder_name(total_steps)):
        raise CheckpointError(
            f"{config.checkpoints_url()} has no valid checkpoint of the last step {total_steps}, newest is {newest}.",
            remedy="Run the same command again: it continues.",
        )
    model, summary = load_trained(config, task, newest)
    summary |= {"data_digest": task.data_digest, "total_steps": total_steps}
    fault_point("export.before")
    digest = task.export(join(output, EXPORT), model, summary=summary)
    fault_point("export.after")
    summary |= {"export": digest, "output": output, "execution": timing}
    write_json(join(output, SUMMARY), summary)
    prune_checkpoints(config.checkpoints_url(), keep=config.checkpoint.keep)
    log.info("exported %s to %s", digest, join(output, EXPORT))
    return summary


def _train_inline(config: RunConfig, task: Task) -> dict[str, Any]:
    """One process, no Ray."""

    def publish(folder: Path | None, name: str, metrics: dict[str, float]) -> None:
        assert folder is not None, "the only rank writes"
        publish_checkpoint(folder, join(config.checkpoints_url(), name))
        shutil.rmtree(folder)
        prune_checkpoints(config.checkpoints_url(), keep=config.checkpoint.keep)

    return train(config, task, Group(), publish)


def _train_on_ray(config: RunConfig, total_steps: int) -> dict[str, Any]:
    compute = config.compute
    failure_url = join(config.checkpoints_url(), FAILURE)
    remove(failure_url)
    with connect(math.ceil(compute.workers * compute.cpus_per_worker) + 1):
        from ray.train import CheckpointConfig, FailureConfig, ScalingConfig
        from ray.train import RunConfig as RayRunConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        filesystem, path = as_arrow(join(absolute(config.output), "checkpoints"))
        trainer = TorchTrainer(
            _worker,
            train_loop_config={"config": config},
            scaling_config=ScalingConfig(
                num_workers=compute.workers,
                use_gpu=compute.use_gpu,
                resources_per_worker={"CPU": compute.cpus_per_worker} | ({"GPU": 1} if compute.use_gpu else {}),
            ),
            torch_config=TorchConfig(backend="nccl" if compute.use_gpu else "gloo"),
            run_config=RayRunConfig(
                name=config.run_name(),
                storage_path=path,
                storage_filesystem=filesystem,
                failure_config=FailureConfig(max_failures=compute.max_failures),
                checkpoint_config=CheckpointConfig(num_to_keep=config.checkpoint.keep),
                worker_runtime_env={"env_vars": worker_environment(compute)},
            ),
        )
        try:
            with following(join(absolute(config.output), METRICS_NAME), total_steps=total_steps):
                result = trainer.fit()
        finally:
            _raise_recorded(failure_url)
    return result.return_value or {}


def _worker(arguments: dict[str, Any]) -> dict[str, Any] | None:
    """What Ray Train runs on every rank.

    Ray restarts the group for any exception. An error that another attempt cannot mend is therefore recorded for the
    driver; where all ranks have it they simply return, else the restarted group finds the record and returns.
    """
    from ray.train import get_context
    from ray.train.torch import get_device

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    config: RunConfig = arguments["config"]
    failure_url = join(config.checkpoints_url(), FAILURE)
    if exists(failure_url):
        return None
    context = get_context()
    group = Group(context.get_world_rank(), context.get_world_size(), get_device())
    try:
        return train(config, config.build_task(), group, _report)
    except ForeframeError as error:
        if error.retryable:
            raise
        kinds = [kind.__name__ for kind in type(error).__mro__]
        write_json(failure_url, {"kinds": kinds, "message": error.message, "remedy": error.remedy})
        if isinstance(error, TrainingError) or group.world_size == 1:
            return None
        raise


def _report(folder: Path | None, name: str, metrics: dict[str, float]) -> None:
    """Hand a checkpoint to Ray Train: uploaded in the background by us, registered and pruned by the controller."""
    from ray.train import Checkpoint, CheckpointUploadMode, get_context, report

    storage = get_context().get_storage()

    def upload(checkpoint: Any, checkpoint_name: str) -> Any:
        path = f"{storage.experiment_fs_path}/{checkpoint_name}"
        scheme = "" if storage.storage_filesystem.type_name == "local" else "s3://"
        publish_checkpoint(Path(checkpoint.path), f"{scheme}{path}")
        return Checkpoint(path=path, filesystem=storage.storage_filesystem)

    report(
        metrics,
        checkpoint=None if folder is None else Checkpoint.from_directory(folder),
        checkpoint_dir_name=name,
        checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
        checkpoint_upload_fn=upload,
    )


def _raise_recorded(failure_url: str) -> None:
    """Raise the error that a worker recorded, as the nearest of its types that all of the project shares."""
    if not exists(failure_url):
        return
    record = json.loads(read_bytes(failure_url))
    kind = next(name for name in record["kinds"] if hasattr(errors, name))
    raise getattr(errors, kind)(record["message"], remedy=record["remedy"])
