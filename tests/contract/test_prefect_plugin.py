"""The short deployment name, and a canary on the private seam of Prefect that it needs."""

import importlib
import inspect
import subprocess
import sys

import pytest

from pipelines import prefect_plugin


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("pretrain-rsp", "pretrain-rsp/pretrain-rsp"),
        ("pretrain-rsp/other", "pretrain-rsp/other"),
        ("a/b/c", "a/b/c"),
        ("", ""),
    ],
)
def test_only_a_bare_name_is_completed(given, expected):
    assert prefect_plugin.full_name(given) == expected


@pytest.mark.parametrize("class_name", prefect_plugin.CLIENT_CLASSES)
def test_canary_prefect_still_looks_deployments_up_where_the_plugin_wraps_it(class_name):
    module = importlib.import_module(prefect_plugin.CLIENT_MODULE)
    method = getattr(getattr(module, class_name), prefect_plugin.METHOD)
    parameters = list(inspect.signature(inspect.unwrap(method)).parameters)
    assert parameters == ["self", "name"], "Prefect moved its lookup: adapt pipelines/prefect_plugin.py"


def test_the_entry_point_wraps_the_lookup_once_and_stays_light():
    code = (
        "import sys, os; os.environ['PREFECT_PLUGINS_ENABLED'] = '1'\n"
        "import prefect.main\n"
        "from prefect.plugins import run_startup_hooks\n"
        "from prefect.client.orchestration._deployments.client import DeploymentClient as C\n"
        "from pipelines.prefect_plugin import plugin\n"
        "assert hasattr(C.read_deployment_by_name, '__wrapped__'), 'not wrapped: is the package installed?'\n"
        "plugin.setup_environment(ctx=None)\n"
        "assert not hasattr(C.read_deployment_by_name.__wrapped__, '__wrapped__')\n"
        "heavy = [name for name in ('ray', 'torch', 'mlflow') if name in sys.modules]\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_prefect_server_imports_with_the_installed_fastapi():
    code = "import prefect.server.api.server"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]
