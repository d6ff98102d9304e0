"""What is set before Ray is imported, and which matmul library is chosen."""

import os

import pytest
import torch

from infra.compute import ComputeConfig, apply_compute, probe_matmul
from infra.ray_runtime import prepare_environment, worker_environment
from infra.settings import QUIET_ENVIRONMENT, settings


@pytest.fixture
def clean(monkeypatch, tmp_path):
    """No Ray variable set, and a home folder without a token."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS", "FOREFRAME_RAY_ADDRESS"):
        # set first, so that what the code under test sets is undone too
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    settings.cache_clear()
    yield monkeypatch
    settings.cache_clear()


def test_authentication_is_explicitly_off_without_a_token(clean):
    prepare_environment()
    assert os.environ["RAY_AUTH_MODE"] == "disabled"


@pytest.mark.parametrize(
    "variables", [{"RAY_AUTH_TOKEN": "t"}, {"RAY_AUTH_TOKEN_PATH": "p"}, {"RAY_AUTH_MODE": "token"}]
)
def test_a_configured_token_is_used(clean, variables):
    for name, value in variables.items():
        clean.setenv(name, value)
    prepare_environment()
    assert os.environ["RAY_AUTH_MODE"] == "token"


def test_a_token_file_counts_only_when_a_cluster_is_joined(clean, tmp_path):
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("t")
    prepare_environment()
    assert os.environ["RAY_AUTH_MODE"] == "disabled"
    clean.delenv("RAY_AUTH_MODE")
    clean.setenv("FOREFRAME_RAY_ADDRESS", "127.0.0.1:6379")
    settings.cache_clear()
    prepare_environment()
    assert os.environ["RAY_AUTH_MODE"] == "token"


def test_the_users_environment_wins(clean):
    name = next(iter(QUIET_ENVIRONMENT))
    clean.setenv(name, "mine")
    prepare_environment()
    assert os.environ[name] == "mine"


def test_workers_get_an_absolute_home_and_no_more_threads_than_asked(clean, tmp_path):
    clean.chdir(tmp_path)
    clean.setenv("FOREFRAME_HOME", "here")
    environment = worker_environment(ComputeConfig(threads=3))
    assert environment["FOREFRAME_HOME"] == str(tmp_path / "here")
    assert environment["OMP_NUM_THREADS"] == "3"


def test_the_probe_is_accurate_and_leaves_the_setting_alone():
    before = torch.get_float32_matmul_precision()
    choice = probe_matmul()
    assert choice in ("default", "onednn")
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize(("choice", "precision"), [("default", "highest"), ("onednn", "medium")])
def test_an_earlier_choice_is_taken_over(choice, precision):
    threads, before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    try:
        assert apply_compute(ComputeConfig(), matmul=choice) == choice
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(before)
