"""The command line: one line and exit code 2 for a wrong value, no traceback, nothing heavy before it is needed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from infra.errors import ServiceError
from infra.settings import settings
from ingest.corpora import CORPORA
from pipelines import cli, cli_ingest
from pipelines.cli_calls import by_stage

VERBS = {
    "demo", "doctor", "up", "down", "deploy", "run", "ingest", "pretrain", "train-policy", "evaluate", "promote",
    "report", "view", "lineage", "verify", "serve", "convert-policy",
}  # fmt: skip

TOOLS = {"preview", "convert", "cache"}  # of finetune


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("FOREFRAME_HOME", str(tmp_path / "home"))
    settings.cache_clear()
    yield tmp_path / "home"
    settings.cache_clear()


def test_the_help_names_every_corpus():
    assert set(cli_ingest.CORPORA) == set(CORPORA)


def call(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(arguments))
    captured = capsys.readouterr()
    return int(stopped.value.code or 0), captured.out, captured.err


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("ingest", "folder", "/nowhere", "out"), "/nowhere"),
        (("ingest", "folder", "/tmp", "out", "-o", "recipe.jpeg_qality=3"), "jpeg_quality"),
        (("ingest", "folder", "/tmp", "out", "-o", "recipe"), "key=value"),
        (("run", "pretrain"), "pretrain-rsp"),
        (("demo", "-o", "steps=3"), "names no stage"),
        (("lineage", "abcdef0123"), "abcdef0123"),
        (("report", "page", "/nowhere"), "page"),
        (("verify", "/nowhere"), "/nowhere"),
        (("deploy",), "foreframe up"),
        (("finetune", "--preset", "tinny"), "tinny"),
        (("finetune", "--preset", "svd"), "--initial"),
        (("finetune", "--initial", "/nowhere"), "/nowhere"),
        (("finetune", "--data", "/nowhere", "--corpus", "/tmp"), "Give one"),
        (("finetune", "--dry-run", "--data", "/nowhere"), "/nowhere"),
        (("finetune", "--dry-run", "-o", "model.num_frame=4"), "num_frames"),
        (("finetune", "--dry-run", "--clips-override", "strid=4"), "stride"),
        (("finetune", "preview", "--model", "/nowhere", "--data", "/tmp", "--output", "out"), "/nowhere"),
        (("finetune", "--initial", "/nowhere", "cache", "--data", "/tmp", "--output", "out"), "stands before 'cache'"),
        (("finetune", "cache", "--data", "/nowhere", "--vae", "/elsewhere", "--output", "out"), "/nowhere"),
        (("finetune", "convert", "/nowhere", "out"), "/nowhere"),
        (("train-policy", "--method", "vqp", "--dry-run"), "unknown method 'vqp'"),
        (("train-policy", "--method", "vpp", "--preset", "tinny", "--dry-run"), "unknown preset 'tinny'"),
        (("train-policy", "--method", "vpp", "--provider", "kind=tvq", "--dry-run"), "unknown kind of features 'tvq'"),
        (("serve", "/nowhere"), "/nowhere"),
        (("convert-policy", "/nowhere", "out"), "/nowhere"),
        (("convert-policy", "pyproject.toml", "out"), "--video and --clip"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_wrong_value_is_one_line_and_code_2(capsys, monkeypatch, arguments, names):
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    code, _, err = call(capsys, *arguments)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2
    assert len(lines) == 1
    assert names in lines[0]
    assert "Traceback" not in err


def test_debug_shows_the_traceback_wherever_it_stands(monkeypatch):
    with pytest.raises(Exception, match="nowhere"):
        cli.main(["verify", "/nowhere", "--debug"])


def test_a_bug_is_one_line_and_code_1(capsys, monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("infra.lineage.trace", broken)
    code, _, err = call(capsys, "lineage", "abcdef0123")
    assert code == 1
    assert err.strip().splitlines()[-1] == "error: ZeroDivisionError: division by zero (--debug shows more)"


def test_every_verb_has_help_and_no_other_verb_is_there():
    assert {command.name or command.callback.__name__ for command in cli.app.registered_commands} == VERBS
    (finetune,) = cli.app.registered_groups
    assert finetune.name == "finetune"
    assert {command.callback.__name__ for command in finetune.typer_instance.registered_commands} == TOOLS
    for verb in [*VERBS, "finetune"]:
        assert CliRunner().invoke(cli.app, [verb, "--help"]).exit_code == 0


def test_overrides_of_the_demo_name_their_stage():
    assert by_stage(["pretraining.schedule.steps=3", "rollouts.seeds=[1]", "pretraining.seed=1"]) == {
        "pretraining": ["schedule.steps=3", "seed=1"],
        "rollouts": ["seeds=[1]"],
    }


def test_the_command_starts_without_torch_ray_prefect_or_mlflow():
    code = (
        "import sys; from pipelines.cli import main\n"
        "try: main(['--version'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'ray', 'prefect', 'mlflow', 'mujoco', 'av'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("foreframe ")


def test_doctor_prints_the_command_that_mends_a_failing_line(capsys, monkeypatch):
    import importlib.metadata

    versions = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.165.0" if name == "fastapi" else versions(name))
    monkeypatch.setattr(cli, "_check_rendering", list)
    code, out, _ = call(capsys, "doctor")
    assert code == 1
    assert "0.165.0 is outside <0.151" in out
    assert "-> pip install 'fastapi<0.151'" in out


def test_doctor_never_shows_a_credential(monkeypatch):
    from infra.doctor import check_storage, report

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIA-canary")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-canary")
    monkeypatch.setenv("FOREFRAME_HOME", "s3://bucket/home")
    settings.cache_clear()
    text = report(check_storage())
    assert "AWS_ACCESS_KEY_ID" in text
    assert "canary" not in text
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("HOME", "/nowhere")
    for name in ("AWS_PROFILE", "AWS_ROLE_ARN"):
        monkeypatch.delenv(name, raising=False)
    (missing,) = check_storage()
    assert missing.verdict == "fail"
    assert "export AWS_ACCESS_KEY_ID" in missing.remedy


def test_a_proxy_in_front_of_loopback_is_found(monkeypatch):
    from infra.doctor import check_proxy

    monkeypatch.setenv("HTTP_PROXY", "http://proxy:3128")
    monkeypatch.setenv("NO_PROXY", "example.org")
    (found,) = check_proxy()
    assert (found.verdict, found.remedy) == ("fail", "export NO_PROXY=127.0.0.1,localhost")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert check_proxy() == []


def test_the_console_hides_the_traceback_of_our_errors_only():
    import logging

    from pipelines.console import _without_our_traceback

    def record(error: Exception) -> logging.LogRecord:
        return logging.LogRecord("x", 40, "f", 1, "m", (), (type(error), error, None))

    mine, bug = record(ServiceError("away")), record(ValueError("bug"))
    assert _without_our_traceback(mine)
    assert _without_our_traceback(bug)
    assert (mine.exc_info, bug.exc_info is None) == (None, False)


def test_the_profile_is_restored(tmp_path):
    code = (
        "from pipelines.deployments import activate_profile, restore_profile\n"
        "from prefect.settings.profiles import load_profiles, save_profiles\n"
        "from prefect.settings import Profile\n"
        "profiles = load_profiles(include_defaults=False)\n"
        "profiles.add_profile(Profile(name='mine', settings={}))\n"
        "profiles.set_active('mine'); save_profiles(profiles)\n"
        "previous = activate_profile('http://127.0.0.1:1/api')\n"
        "assert activate_profile('http://127.0.0.1:2/api') == ''\n"
        "now = load_profiles(include_defaults=False)\n"
        "assert (previous, now.active_name) == ('mine', 'foreframe'), (previous, now.active_name)\n"
        "assert ':2/' in str(now['foreframe'].settings)\n"
        "restore_profile(previous)\n"
        "after = load_profiles(include_defaults=False)\n"
        "assert (after.active_name, after.names) == ('mine', {'mine'}), after.to_dict()\n"
    )
    env = {**os.environ, "PREFECT_HOME": str(tmp_path / "prefect")}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
