"""`foreframe report KIND PATH`: of the whole line, a video model, a policy, one data set, or one evaluation result."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath

from evaluation.report.inputs import DATASET_SECTIONS, Command, DatasetInput, ReportInputs
from evaluation.report.page import write
from evaluation.report.sections import read_result
from infra import storage
from infra.errors import InputError
from ingest.reader import MANIFEST_NAME, load_manifest

log = logging.getLogger(__name__)

INPUTS_NAME = "report.json"
REPORT_NAME = "report.html"
ENCODER_SUITES = ("label-propagation", "label_propagation")
VIDEO_SUITES = ("video-prediction",)


def build(kind: str, path: str, *, output: Path | None = None, source: str = "") -> Path:
    """Write the report of what lies at `path`, a local folder or an `s3://` address, and return the file.

    `demo`, `video`, `policy`: a finished run's report folder, which holds `report.json` (the saved `ReportInputs`);
    `dataset`: such a folder, or a data set, whose refused sources are shown from its corpus at `source`; `result`: an
    evaluation's folder or its `result.json`. The page goes beside a local run or result; for a data set, which never
    changes, and for a remote place it goes into the working folder. Raises `InputError`.
    """
    readers: dict[str, Callable[[str], tuple[ReportInputs, str]]] = {
        "demo": _saved,
        "video": _saved,
        "policy": _saved,
        "dataset": partial(_dataset, source=source),
        "result": _result,
    }
    if kind not in readers:
        raise InputError(f"unknown report kind {kind!r}.", remedy=f"Use one of {', '.join(readers)}.")
    if source and kind != "dataset":
        raise InputError(f"a {kind} has no single source folder.", remedy="Give --source with kind dataset only.")
    inputs, folder = readers[kind](path)
    target = output or _target(folder, beside=not storage.exists(storage.join(folder, MANIFEST_NAME)))
    write(inputs, target)
    log.info("report written to %s", target)
    return target


def _target(folder: str, *, beside: bool) -> Path:
    if beside and not storage.is_remote(folder):
        return Path(folder) / REPORT_NAME
    return Path(f"{PurePosixPath(folder.rstrip('/')).name or 'report'}-{REPORT_NAME}")


def save_inputs(inputs: ReportInputs, folder: str) -> str:
    """Save what a report is made of, so that `build("demo", folder)` makes it again; returns the file's address."""
    url = storage.join(folder, INPUTS_NAME)
    storage.write_json(url, inputs.to_json())
    return url


def _saved(path: str) -> tuple[ReportInputs, str]:
    url = storage.join(path, INPUTS_NAME)
    if not storage.exists(url):
        raise InputError(f"{path} holds no {INPUTS_NAME}.", remedy="Give the report folder that a finished run names.")
    inputs = ReportInputs.parse(storage.read_json(url))
    if not inputs.base:
        inputs = inputs.model_copy(update={"base": path})
    return inputs, path


def dataset_inputs(url: str, *, source: str = "", name: str = "", folder: str = "") -> ReportInputs:
    """What the page of one data set is made of; `folder` is where it is kept, if it is."""
    shown = PurePosixPath(url.rstrip("/")).name
    again = f"foreframe report dataset {folder or url}" + (f" --source {source}" if source and not folder else "")
    return ReportInputs(
        title=f"Data set {name or shown}",
        sections=DATASET_SECTIONS,
        datasets=(DatasetInput(url=url, source=source),),
        commands=(
            Command(what="every hash, name and count against the manifest", command=f"foreframe verify {url}"),
            Command(what="this page again", command=again),
        ),
    )


def _dataset(path: str, *, source: str) -> tuple[ReportInputs, str]:
    if not storage.exists(storage.join(path, INPUTS_NAME)):
        load_manifest(path)  # raises where there is no complete data set
        return dataset_inputs(path, source=source), path
    inputs, folder = _saved(path)
    if source:
        given = tuple(data.model_copy(update={"source": storage.absolute(source)}) for data in inputs.datasets)
        inputs = inputs.model_copy(update={"datasets": given})
    return inputs, folder


def _result(path: str) -> tuple[ReportInputs, str]:
    result, folder = read_result(path)
    title = f"{result.suite} {result.suite_version}".strip()
    versions = {"code": result.code_version} if result.code_version else {}
    if result.suite.startswith(VIDEO_SUITES):
        inputs = ReportInputs(title=title, sections=("video", "versions"), video_result=folder, versions=versions)
    elif result.suite.startswith(ENCODER_SUITES):
        inputs = ReportInputs(title=title, sections=("encoder", "versions"), encoder_result=folder, versions=versions)
    else:
        inputs = ReportInputs(title=title, sections=("policy", "versions"), policy_result=folder, versions=versions)
    return inputs, folder
