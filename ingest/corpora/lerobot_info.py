"""`meta/info.json` of a LeRobot data set, checked: its templates of paths are foreign words that become addresses."""

from __future__ import annotations

import math
import re
import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, TypeGuard

from infra.errors import InputError
from infra.media import MAX_FPS, MIN_FPS
from infra.storage import join
from ingest.corpora.cameras import safe_name
from ingest.corpora.tables import read_object

INFO = "meta/info.json"
VERSIONS = ("v2.0", "v2.1", "v3.0")
ACTIONS, PROPRIOCEPTION = ("action", "actions"), ("observation.state", "state")
OWN_COLUMNS = frozenset({"timestamp", "frame_index", "episode_index", "index", "task_index"})
PLACEHOLDERS = frozenset({"episode_chunk", "episode_index", "chunk_index", "file_index", "video_key"})
NUMBER_FORMAT = re.compile(r"(0?[1-9]d?|d)?")


@dataclass(frozen=True)
class Info:
    """What `meta/info.json` says. `features` have a `dtype` and a `shape` each; `record` is all of it."""

    root: str
    version: str
    fps: float
    features: Mapping[str, Mapping[str, Any]]
    templates: Mapping[str, str]  # of "data_path" and "video_path"
    chunks_size: int
    record: Mapping[str, Any]

    @property
    def one_file_each(self) -> bool:
        """Whether every episode has files of its own (2.x), or shares them with others (3.0)."""
        return self.version != "v3.0"

    @property
    def cameras(self) -> list[str]:
        """Keys of the colour pictures, sorted."""
        return sorted(key for key, feature in self.features.items() if _is_colour(feature))

    @property
    def left_out(self) -> list[str]:
        """Keys of depth maps and other pictures without three channels, sorted."""
        pictures = {key for key, feature in self.features.items() if feature.get("dtype") in ("video", "image")}
        return sorted(pictures - set(self.cameras))

    @property
    def arrays(self) -> dict[str, str]:
        """Array name -> feature key: actions, proprioception, and the further features of floats."""
        found: dict[str, str] = {}
        for name, keys in (("actions", ACTIONS), ("proprioception", PROPRIOCEPTION)):
            if known := [key for key in keys if _is_numbers(self.features.get(key, {}))]:
                found[name] = known[0]
        for key in sorted(set(self.features) - OWN_COLUMNS - set(found.values())):
            if _is_numbers(self.features[key]) and str(self.features[key]["dtype"]).startswith("float"):
                found.setdefault(safe_name(key, blank="_").replace("-", "_"), key)
        return found

    def path(self, template: str, **values: int | str) -> str:
        """A file's path in the data set. `InputError` for one that leads out of it."""
        try:
            path = self.templates[template].format(**values)
        except KeyError as error:
            raise InputError(f"{join(self.root, INFO)}: {template} has {error}, which {self.version} lacks.") from None
        parts = PurePosixPath(path).parts
        if not parts or path.startswith("/") or ".." in parts or "#" in path or "\\" in path:
            raise InputError(f"{join(self.root, INFO)}: {template} leads to {path!r}, out of the data set.")
        return str(PurePosixPath(path))

    def split_of(self, episode: int) -> str:
        """The split an episode is in by `{"train": "0:50"}`, "" if in none."""
        splits = self.record.get("splits")
        for name, span in splits.items() if isinstance(splits, dict) else ():
            bounds = re.fullmatch(r"(\d{1,9}):(\d{1,9})", str(span))
            if bounds and int(bounds[1]) <= episode < int(bounds[2]):
                return str(name)
        return ""


def read_info(root: str) -> Info:
    """Raises `InputError` when the file is not there, is of another version, or holds what cannot be used."""
    try:
        record = read_object(join(root, INFO))
    except InputError as error:
        raise InputError(error.message, remedy=f"A LeRobotDataset has a {INFO}.") from None
    version = record.get("codebase_version")
    if version not in VERSIONS:
        raise InputError(
            f"{join(root, INFO)} has the codebase_version {version!r}.", remedy=f"Supported: {', '.join(VERSIONS)}."
        )
    fps, features, chunk = record.get("fps"), record.get("features"), record.get("chunks_size", 1000)
    if not is_number(fps) or not MIN_FPS <= fps <= MAX_FPS:
        raise InputError(f"{join(root, INFO)} has the fps {fps!r}.")
    if not isinstance(features, dict) or not all(isinstance(item, dict) for item in features.values()):
        raise InputError(f"{join(root, INFO)} has no features.")
    if not is_index(chunk) or chunk < 1:
        raise InputError(f"{join(root, INFO)} has the chunks_size {chunk!r}.")
    kinds = {feature.get("dtype") for feature in features.values()}
    needed = ["data_path", *(["video_path"] if "video" in kinds else [])]
    templates = {key: _checked_template(root, key, record.get(key)) for key in needed}
    return Info(root, version, float(fps), features, templates, chunk, record)


def is_number(value: Any) -> TypeGuard[float]:
    """A finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_index(value: Any) -> TypeGuard[int]:
    """An integer from 0 on."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _checked_template(root: str, key: str, template: Any) -> str:
    """A template with known placeholders alone, none of which can do anything but be filled in."""
    try:
        parts = list(string.Formatter().parse(template))
    except (TypeError, ValueError):
        raise InputError(f"{join(root, INFO)}: {key} {template!r} is no template of paths.") from None
    for _, field, spec, conversion in parts:
        if field is None:
            continue
        if field not in PLACEHOLDERS or conversion or (spec and field == "video_key"):
            known = ", ".join(sorted(PLACEHOLDERS))
            raise InputError(f"{join(root, INFO)}: {key} has the placeholder {field!r}.", remedy=f"Known: {known}.")
        if not NUMBER_FORMAT.fullmatch(spec or ""):
            raise InputError(f"{join(root, INFO)}: {key} formats {field!r} as {spec!r}.")
    return str(template)


def _is_colour(feature: Mapping[str, Any]) -> bool:
    if feature.get("dtype") not in ("video", "image"):
        return False
    facts = [known for key in ("info", "video_info") if isinstance(known := feature.get(key), dict)]
    if any(known.get("video.is_depth_map") or known.get("is_depth_map") for known in facts):
        return False
    shape = feature.get("shape")
    return isinstance(shape, list) and len(shape) == 3 and 3 in (shape[0], shape[2])


def _is_numbers(feature: Mapping[str, Any]) -> bool:
    """Whether a feature holds numbers in one or two dimensions."""
    kind, shape = str(feature.get("dtype")), feature.get("shape")
    numeric = kind.startswith(("float", "int", "uint"))
    return numeric and isinstance(shape, list) and len(shape) in (1, 2) and all(is_index(size) for size in shape)
