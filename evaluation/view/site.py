"""Addresses and what is behind them: the page's files, the JSON it asks for, pictures and videos."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from evaluation.report.text import visible
from evaluation.view.api import Api, NotFoundError
from evaluation.view.media import jpeg, video
from infra.errors import InputError

KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
JSON, TEXT = "application/json", "text/plain; charset=utf-8"
FRESH, KEPT = "no-store", "private, max-age=86400"  # media addresses carry the data set's version
MAX_QUERY_FIELDS = 20


@dataclass(frozen=True)
class Answer:
    """A response before it is written; `body` may come in pieces when `num_bytes` says how many there are."""

    kind: str
    body: bytes | Iterable[bytes]
    status: HTTPStatus = HTTPStatus.OK
    caching: str = FRESH
    num_bytes: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


class Site:
    """A data set's pages. Address segments are only ever looked up, none becomes a path: nothing to climb out of."""

    def __init__(self, url: str) -> None:
        self.api = Api(url)
        self._pages = _static_files()
        self._values: dict[str, Callable[[Mapping[str, str]], Any]] = {
            "dataset": lambda _: self.api.dataset(),
            "samples": self.api.samples,
            "failures": self.api.ledger,
            "sample": lambda query: self.api.sample(query.get("key", "")),
            "arrays": lambda query: self.api.arrays(query.get("key", "")),
        }

    def answer(self, target: str, range_header: str = "") -> Answer:
        """The answer to a GET; a `ForeframeError` for anything that is not there."""
        parts = urlsplit(target)
        match [unquote(segment) for segment in parts.path.split("/")[1:]]:
            case [""]:
                return self._page("index.html")
            case ["static", name] if name in self._pages:
                return self._page(name)
            case ["api", name] if name in self._values:
                return self._json(name, parts.query)
            case ["frame", key, camera, name] if name.endswith(".jpg"):
                return Answer("image/jpeg", jpeg(self.api, key, camera, name.removesuffix(".jpg")), caching=KEPT)
            case ["video", key, name] if name.endswith(".mp4"):
                return self._video(key, name.removesuffix(".mp4"), range_header)
        raise NotFoundError(f"There is nothing at {parts.path}.")

    def _page(self, name: str) -> Answer:
        kind = KINDS[name.rsplit(".", 1)[1]]
        return Answer(f"{kind}; charset=utf-8", self._pages[name])

    def _json(self, name: str, query: str) -> Answer:
        try:
            fields = dict(parse_qsl(query, max_num_fields=MAX_QUERY_FIELDS))
        except ValueError:
            raise InputError("Too many fields in the address.") from None
        value = self._values[name](fields)
        return Answer(JSON, json.dumps(value, allow_nan=False, separators=(",", ":")).encode("ascii"))

    def _video(self, key: str, camera: str, range_header: str) -> Answer:
        span, pieces = video(self.api, key, camera, range_header)
        headers = {"Accept-Ranges": "bytes"}
        if span.is_part:
            headers["Content-Range"] = f"bytes {span.start}-{span.end - 1}/{span.num_bytes}"
        status = HTTPStatus.PARTIAL_CONTENT if span.is_part else HTTPStatus.OK
        return Answer("video/mp4", pieces, status, KEPT, span.end - span.start, headers)


def refusal(text: str, status: HTTPStatus, headers: Mapping[str, str] | None = None) -> Answer:
    """An error as one line of plain text."""
    line = " ".join(visible(text).split())
    return Answer(TEXT, f"{line}\n".encode(), status, headers=headers or {})


def _static_files() -> dict[str, bytes]:
    """The page's own files, the only ones that are served from the package."""
    folder = files("evaluation.view") / "static"
    return {entry.name: entry.read_bytes() for entry in folder.iterdir() if entry.name.rsplit(".", 1)[-1] in KINDS}
