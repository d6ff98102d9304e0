"""An output folder belongs to one evaluation, wherever and however quickly it runs."""

from __future__ import annotations

import pytest

from evaluation.calvin.config import PLACE_FIELDS, CalvinConfig
from evaluation.result import RESULT_NAME, EvaluationResult
from evaluation.suites import CONFIG_NAME, claim_output, finished_result
from infra.errors import InputError
from infra.storage import read_json, write_json


def test_an_output_takes_the_same_evaluation_from_elsewhere_and_no_other(tmp_path):
    config = CalvinConfig(policy="p", calvin_root="/here", dataset="/data", output=str(tmp_path))
    claim_output(config, output=config.output, place_fields=PLACE_FIELDS)
    elsewhere = config.model_copy(update={"calvin_root": "/there", "processes": 2})
    claim_output(elsewhere, output=config.output, place_fields=PLACE_FIELDS)
    with pytest.raises(InputError, match="different: max_steps"):
        claim_output(config.model_copy(update={"max_steps": 10}), output=config.output, place_fields=PLACE_FIELDS)
    # A champion is rated by this file alone, so nothing may be missing from it.
    assert CalvinConfig.parse(read_json(tmp_path / CONFIG_NAME)) == config


def test_a_result_of_other_weights_or_another_protocol_is_not_reused(tmp_path):
    result = EvaluationResult(
        suite="s", suite_version="2-a", model="m", model_digest="d" * 64, data_digest="", code_version="0",
        primary_metric="x", items=(), scores={},
    )  # fmt: skip
    known = {"model": "m", "model_digest": "d" * 64}
    assert finished_result(str(tmp_path), **known) is None
    write_json(tmp_path / RESULT_NAME, result.to_json())
    assert (
        finished_result(str(tmp_path), **known, suite_version="2-a")
        == result
        == finished_result(str(tmp_path), **known)
    )
    with pytest.raises(InputError, match="suite version 2-a, this is 2-b"):
        finished_result(str(tmp_path), **known, suite_version="2-b")
    with pytest.raises(InputError, match="now is eeeeeeeeeeee"):
        finished_result(str(tmp_path), model="m", model_digest="e" * 64)
