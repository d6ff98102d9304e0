"""One door to every large thing: local paths and `s3://` addresses through fsspec.

A *url* here is a local path or `s3://bucket/key`. Visible means complete: local writes go to a temporary name and
are renamed; on S3 a put is atomic and `create_only` is a conditional put. What may pass on S3 is tried again, a bounded
number of times (`infra.s3`). Credentials and the endpoint come from the environment (`AWS_*`, `AWS_ENDPOINT_URL`) only.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from infra.digests import pretty_json
from infra.errors import InputError, StorageError
from infra.faults import fault_point
from infra.s3 import (
    FINAL_ERRORS,
    s3_create,
    s3_exists,
    s3_get,
    s3_names,
    s3_options,
    s3_put,
    s3_read,
    s3_remove,
    s3_size,
    s3_write,
)

T = TypeVar("T")


def is_remote(url: str | Path) -> bool:
    """True for `s3://`; any other scheme is refused."""
    text = str(url)
    if "://" not in text:
        return False
    if not text.startswith("s3://"):
        raise InputError(f"address {text!r} has an unsupported scheme.", remedy="Use a local path or s3://bucket/key.")
    return True


def join(url: str | Path, *parts: str) -> str:
    """Append path parts to a url."""
    return "/".join([str(url).rstrip("/"), *(part.strip("/") for part in parts)])


def absolute(url: str | Path) -> str:
    """The same place, independent of the working folder of the process that reads it."""
    return str(url) if is_remote(url) else str(Path(url).expanduser().absolute())


def local_path(url: str | Path) -> Path:
    """The path of a local url; refuses a remote one."""
    if is_remote(url):
        raise InputError(f"{url} is remote where a local folder is needed.", remedy="Fetch it first or give a path.")
    return Path(url)


def open_fs(url: str | Path) -> tuple[Any, str]:
    """(fsspec filesystem, path inside it). The s3fs instance is fresh per process: event loops do not survive forks."""
    if is_remote(url):
        return fsspec.filesystem("s3", **s3_options()), str(url).removeprefix("s3://")
    return fsspec.filesystem("file"), str(Path(url).absolute())


def as_arrow(url: str | Path) -> tuple[Any, str]:
    """(pyarrow filesystem, path) for Ray Train's `storage_filesystem` and `storage_path`."""
    import pyarrow.fs

    fs, path = open_fs(url)
    if is_remote(url):
        return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs)), path
    return pyarrow.fs.LocalFileSystem(), path


def read_bytes(url: str | Path) -> bytes:
    """Whole content; `InputError` when it does not exist."""
    try:
        return s3_read(url) if is_remote(url) else _typed(Path(url).read_bytes, url)
    except FileNotFoundError:
        raise InputError(f"{url} does not exist.", remedy="Check the path.") from None


def read_range(url: str | Path, start: int, length: int) -> bytes:
    """`length` bytes from `start`; `StorageError` on a short read."""
    if length == 0:
        return b""
    data = s3_read(url, (start, start + length)) if is_remote(url) else _typed(lambda: _pread(url, start, length), url)
    if len(data) != length:
        raise StorageError(f"{url}: {len(data)} bytes at {start} where {length} were asked for.")
    return data


def read_json(url: str | Path) -> Any:
    """Parsed JSON; `InputError` when missing, malformed, or with half surrogate pairs, which no text holds."""
    data = read_bytes(url)
    try:
        value = json.loads(data)
        if b"\\ud" in data.lower():
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:
        raise InputError(f"{url} is not JSON: {error}.") from None


def write_bytes(url: str | Path, data: bytes) -> None:
    """Replace the content atomically."""
    if is_remote(url):
        s3_write(url, data)
        return
    target = Path(url)
    with _temporary(target) as temporary:
        _write_synced(temporary, data)
        temporary.replace(target)


def write_json(url: str | Path, value: Any) -> None:
    """Write deterministic, readable JSON atomically."""
    write_bytes(url, pretty_json(value))


def create_only(url: str | Path, data: bytes) -> bool:
    """Write unless something is there. True if this call created it; the loser of a race gets False.

    On S3 that holds although answers get lost; if the store cannot be reached at the end, the call raises
    `StorageError`, and whether the object was created is then not known.
    """
    if is_remote(url):
        return s3_create(url, data)
    target = Path(url)
    with _temporary(target) as temporary:
        _write_synced(temporary, data)
        fault_point("storage.before_link", detail=target.name)
        try:
            os.link(temporary, target)  # link fails where rename would overwrite
        except FileExistsError:
            return False
        return True


def put_file(local: Path, url: str | Path) -> None:
    """Publish a complete local file. A local target on the same disk is a rename."""
    if is_remote(url):
        s3_put(local, url)
        local.unlink()
        return
    target = Path(url)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        local.replace(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        with _temporary(target) as temporary:
            shutil.copyfile(local, temporary)
            temporary.replace(target)
        local.unlink()


def get_file(url: str | Path, local: Path) -> None:
    """Copy to a local path, complete or not at all."""
    with _temporary(local) as temporary:
        try:
            if is_remote(url):
                s3_get(url, temporary)
            else:
                _typed(lambda: shutil.copyfile(url, temporary), url)
        except FileNotFoundError:
            raise InputError(f"{url} does not exist.", remedy="Check the path.") from None
        temporary.replace(local)


def put_folder(local: Path, url: str | Path, *, last: str | None = None) -> None:
    """Copy a folder's files; `last` names the file written last, the commit record of the folder."""
    names = sorted(str(path.relative_to(local)) for path in local.rglob("*") if path.is_file())
    for name in sorted(names, key=lambda item: item == last):
        write_bytes(join(url, name), (local / name).read_bytes())


def get_folder(url: str | Path, local: Path) -> Path:
    """Local copy of a folder; a local folder is returned as it is."""
    if not is_remote(url):
        return Path(url)
    for name in list_names(url, recursive=True):
        get_file(join(url, name), local / name)
    return local


def exists(url: str | Path) -> bool:
    """Whether a file or folder is there."""
    return s3_exists(url) if is_remote(url) else Path(url).exists()


def size_bytes(url: str | Path) -> int:
    """Size of one file; `InputError` when missing."""
    try:
        size = s3_size(url) if is_remote(url) else _typed(lambda: Path(url).stat().st_size, url)
    except FileNotFoundError:
        size = None
    if size is None:
        raise InputError(f"{url} does not exist.", remedy="Check the path.")
    return size


def list_names(url: str | Path, *, suffix: str = "", recursive: bool = False) -> list[str]:
    """Sorted names of the files below a folder, relative to it; empty when the folder does not exist."""
    try:
        names = list(s3_names(url, recursive=recursive)) if is_remote(url) else _local_names(Path(url), recursive)
    except FileNotFoundError:
        return []
    return sorted(name for name in names if name.endswith(suffix) and not _is_temporary(name))


def remove(url: str | Path, *, recursive: bool = False) -> None:
    """Delete a file, or a folder with `recursive`; nothing there is fine."""
    if is_remote(url):
        s3_remove(url, recursive=recursive)
        return
    fs, path = open_fs(url)
    if fs.exists(path):
        with contextlib.suppress(FileNotFoundError):  # another process was quicker
            fs.rm(path, recursive=recursive)


def _pread(url: str | Path, start: int, length: int) -> bytes:
    with Path(url).open("rb") as stream:
        stream.seek(start)
        return stream.read(length)


def _local_names(folder: Path, recursive: bool) -> list[str]:
    fs, path = open_fs(folder)
    root = path.rstrip("/") + "/"
    found = fs.find(path, maxdepth=None if recursive else 1)
    return [item[len(root) :] for item in found if item.startswith(root)]


def _typed(call: Callable[[], T], url: str | Path) -> T:
    """The disk's troubles as `StorageError`; what is missing or forbidden as Python says it."""
    try:
        return call()
    except FINAL_ERRORS:
        raise
    except OSError as error:
        raise StorageError(f"{url}: {error}.", remedy="Is the disk well?") from error


class _temporary:  # noqa: N801  (reads as a verb at its use)
    """A sibling name that readers never list; removed if the write did not get as far as its rename."""

    def __init__(self, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        self.path = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        self.path.unlink(missing_ok=True)


def _is_temporary(name: str) -> bool:
    base = name.rsplit("/", 1)[-1]
    return base.startswith(".") and base.endswith(".part")


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(memoryview(data)[: len(data) // 2])
        fault_point("storage.half_written", detail=path.name)
        stream.write(memoryview(data)[len(data) // 2 :])
        stream.flush()
        os.fsync(stream.fileno())
