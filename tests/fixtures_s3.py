"""A real S3 endpoint on loopback, in process: `moto_s3` gives the address of an empty bucket."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator

import boto3
import pytest
from moto.server import ThreadedMotoServer

from infra.settings import settings

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
}


@pytest.fixture(scope="session")
def moto_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The server's address; its credentials and endpoint are in the environment while it runs."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    changes = {
        **ENVIRONMENT,
        "AWS_ENDPOINT_URL": endpoint,
        "FOREFRAME_CACHE_FOLDER": str(tmp_path_factory.mktemp("shard-cache")),
    }
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    settings.cache_clear()
    yield endpoint
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    settings.cache_clear()
    server.stop()


@pytest.fixture(scope="session")
def moto_s3(moto_endpoint: str) -> str:
    """`s3://bucket`, empty at the start of the session; use a prefix of your own in it."""
    bucket = f"foreframe-{uuid.uuid4().hex[:8]}"
    boto3.client("s3", endpoint_url=moto_endpoint).create_bucket(Bucket=bucket)
    return f"s3://{bucket}"
