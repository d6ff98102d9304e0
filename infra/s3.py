"""Operations on `s3://` addresses that may fail on the way, each made of requests that are safe to repeat.

s3fs and botocore retry by default, without jitter, and together up to a hundred times. Here they do not: what is
repeated is in `retried` alone, but for the parts of a large file, which s3fs repeats a few times before the whole is.
"""

from __future__ import annotations

import errno
import http.client
import os
import random
import time
import uuid
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from infra.errors import StorageError

T = TypeVar("T")
MAX_ATTEMPTS = 8
FIRST_DELAY_S, MAX_DELAY_S = 0.1, 5.0
PART_ATTEMPTS = 4  # of each part of a file that is moved in parts, at every attempt
DELETED_AT_ONCE = 1000
WRITER = "foreframe-writer"  # names of the object's metadata
# "Missing" and "forbidden" are answers, not faults.
FINAL_ERRORS = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
_TRANSIENT_STATUS = {408, 409, 425, 429}  # 409: two conditional puts met; 5xx as well
_TRANSIENT_CODES = {"RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch"}
_TRANSIENT_ERRNO = {
    *(errno.EIO, errno.EBUSY, errno.EAGAIN, errno.ETIMEDOUT, errno.EPIPE, errno.ENETUNREACH, errno.EHOSTUNREACH),
    getattr(errno, "EREMOTEIO", errno.EIO),
}


def open_s3(url: str | Path, *, in_parts: bool = False) -> tuple[Any, str]:
    """(s3fs filesystem that does not retry, path inside it); `in_parts` repeats the requests of one large transfer."""
    # Another user agent makes another instance of s3fs, which shares one between equal options.
    config = {"retries": {"total_max_attempts": 1}, "user_agent_extra": "parts" if in_parts else "whole"}
    fs = fsspec.filesystem("s3", **s3_options(), config_kwargs=config)
    fs.retries = PART_ATTEMPTS if in_parts else 1
    return fs, str(url).removeprefix("s3://")


def s3_options() -> dict[str, Any]:
    """No cached listings, and the endpoint of the environment."""
    options: dict[str, Any] = {"use_listings_cache": False}
    if endpoint := os.environ.get("AWS_ENDPOINT_URL"):
        options["endpoint_url"] = endpoint
    return options


def retried(call: Callable[[], T], url: str | Path) -> T:
    """Bounded attempts with random pauses between them, after transient errors only. Raises `StorageError`."""
    for attempt in range(1, MAX_ATTEMPTS + 1):
        try:
            return call()
        except FINAL_ERRORS:
            raise
        except _s3_errors() as error:
            if not is_transient(error):
                raise StorageError(f"{url}: {error}.", remedy="The store refuses this; it was not repeated.") from error
            if attempt == MAX_ATTEMPTS:
                raise StorageError(f"{url}: {error} (after {attempt} attempts).", remedy="Is the store up?") from error
        pause_s = min(MAX_DELAY_S, FIRST_DELAY_S * 2**attempt)
        time.sleep(pause_s * (0.5 + random.random()))  # noqa: S311  (jitter, not a draw)
    raise AssertionError("unreachable")


def is_transient(error: BaseException) -> bool:
    """Whether another attempt may help: the store's trouble or the network's, never a refusal."""
    if isinstance(error, FINAL_ERRORS):
        return False
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        code = response.get("Error", {}).get("Code", "")
        return status >= 500 or status in _TRANSIENT_STATUS or code in _TRANSIENT_CODES or code == "SlowDown"
    return isinstance(error, _network_errors()) or getattr(error, "errno", None) in _TRANSIENT_ERRNO


def s3_read(url: str | Path, span: tuple[int, int] | None = None) -> bytes:
    """Whole content, or that of a half-open range of bytes."""
    fs, path = open_s3(url)
    start, end = span or (None, None)
    return bytes(retried(lambda: fs.cat_file(path, start=start, end=end, max_concurrency=1), url))


def s3_write(url: str | Path, data: bytes) -> None:
    """Replace an object's content."""
    fs, path = open_s3(url, in_parts=True)
    retried(lambda: fs.pipe_file(path, data), url)


def s3_create(url: str | Path, data: bytes) -> bool:
    """Conditional put. True if this call created the object, whatever became of the answers; else False.

    An answer may be lost after the store has acted, and the next attempt is then refused because of our own object.
    So each call leaves its name in the object's metadata, and whose the object is decides, not the last answer: of
    two calls with equal content one gets True.
    """
    fs, path = open_s3(url)
    writer = uuid.uuid4().hex

    def attempt() -> bool:
        try:
            fs.pipe_file(path, data, mode="create", Metadata={WRITER: writer})
        except _s3_errors() as error:
            found = _head(fs, path)
            if found is not None:
                return bool(found.get("Metadata", {}).get(WRITER) == writer)
            if isinstance(error, FileExistsError):
                return False  # it was there, and has gone since
            raise
        return True

    return retried(attempt, url)


def s3_put(local: Path, url: str | Path) -> None:
    """Upload a file."""
    fs, path = open_s3(url, in_parts=True)
    retried(lambda: fs.put_file(str(local), path), url)


def s3_get(url: str | Path, local: Path) -> None:
    """Download to a file."""
    fs, path = open_s3(url, in_parts=True)
    retried(lambda: fs.get_file(path, str(local)), url)


def s3_size(url: str | Path) -> int | None:
    """Size of an object; None if there is none."""
    fs, path = open_s3(url)
    found = retried(lambda: _head(fs, path), url)
    return None if found is None else int(found["ContentLength"])


def s3_names(url: str | Path, *, recursive: bool) -> Iterator[str]:
    """Names below a prefix, relative to it, page by page.

    s3fs would leave out, without a word, what it failed to list.
    """
    fs, path = open_s3(url)
    bucket, key, _ = fs.split_path(path)
    prefix = f"{key.rstrip('/')}/" if key else ""
    options: dict[str, Any] = {} if recursive else {"Delimiter": "/"}
    while True:
        page = retried(lambda: fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, **options), url)
        for entry in page.get("Contents", []):
            name = entry["Key"][len(prefix) :]
            if name and not name.endswith("/"):  # some tools mark folders with empty objects
                yield name
        if not page.get("IsTruncated"):
            return
        options["ContinuationToken"] = page["NextContinuationToken"]


def s3_exists(url: str | Path) -> bool:
    """Whether there is an object, or any below it."""
    fs, path = open_s3(url)
    bucket, key, _ = fs.split_path(path)
    if key and s3_size(url) is not None:
        return True
    prefix = f"{key.rstrip('/')}/" if key else ""
    try:
        page = retried(lambda: fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=1), url)
    except FileNotFoundError:  # there is no such bucket
        return False
    return not key or bool(page.get("KeyCount") or page.get("Contents"))


def s3_remove(url: str | Path, *, recursive: bool) -> None:
    """Delete an object, or with `recursive` also those below it."""
    fs, path = open_s3(url)
    bucket, key, _ = fs.split_path(path)
    if not recursive:
        retried(lambda: fs.call_s3("delete_object", Bucket=bucket, Key=key), url)
        return
    prefix = f"{key.rstrip('/')}/" if key else ""
    keys = [*([key] if key else []), *(prefix + name for name in s3_names(url, recursive=True))]
    for start in range(0, len(keys), DELETED_AT_ONCE):
        chunk = [{"Key": name} for name in keys[start : start + DELETED_AT_ONCE]]

        def delete(chunk: list[dict[str, str]] = chunk) -> None:
            answer = fs.call_s3("delete_objects", Bucket=bucket, Delete={"Objects": chunk, "Quiet": True})
            if errors := answer.get("Errors"):
                raise OSError(errno.EBUSY, f"{len(errors)} objects were not deleted: {errors[0]}")

        retried(delete, url)


def _head(fs: Any, path: str) -> Any | None:
    bucket, key, _ = fs.split_path(path)
    try:
        return fs.call_s3("head_object", Bucket=bucket, Key=key)
    except FileNotFoundError:
        return None


@cache
def _network_errors() -> tuple[type[BaseException], ...]:
    import aiohttp
    from botocore import exceptions, parsers

    return (
        *(ConnectionError, TimeoutError, http.client.HTTPException, aiohttp.ClientError),
        *(exceptions.HTTPClientError, exceptions.ConnectionError, exceptions.IncompleteReadError),
        *(exceptions.ChecksumError, exceptions.FlexibleChecksumError, parsers.ResponseParserError),
    )


@cache
def _s3_errors() -> tuple[type[BaseException], ...]:
    from botocore import exceptions

    return (OSError, exceptions.BotoCoreError, exceptions.ClientError, *_network_errors())
