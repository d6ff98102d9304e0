"""DAVIS folders: what is written is what an independent reader sees, and a wrong folder is refused by its first gap."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation.label_propagation.layouts import read_davis, write_davis_sequence, write_davis_split
from infra.errors import InputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for name, num_frames in (("cup", 3), ("drawer", 4)):
        frames = np.repeat(random.integers(0, 256, (num_frames, 1, 1, 3), dtype=np.uint8), 24, axis=1).repeat(
            32, axis=2
        )
        labels = random.integers(0, 3, (num_frames, 24, 32), dtype=np.uint8)
        write_davis_sequence(tmp_path, name, frames_THW3=frames, labels_THW=labels)
    write_davis_split(tmp_path, ("cup", "drawer"))
    return tmp_path


def test_an_independent_reader_sees_the_layout(folder: Path):
    assert (folder / "ImageSets/2017/val.txt").read_text() == "cup\ndrawer\n"
    davis = read_davis(folder)
    assert davis.names == ("cup", "drawer")
    labels, frames = davis.labels("drawer"), davis.frames("drawer")
    for index in range(4):
        with Image.open(folder / f"Annotations/480p/drawer/{index:05d}.png") as annotation:
            assert annotation.mode == "P"
            assert annotation.getpalette()[:12] == [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0]  # the VOC colours
            assert np.array_equal(np.asarray(annotation), labels[index])
        with Image.open(folder / f"JPEGImages/480p/drawer/{index:05d}.jpg") as picture:
            assert np.array_equal(np.asarray(picture), frames[index])
    random = np.random.default_rng(0)
    random.integers(0, 256, (3, 1, 1, 3), dtype=np.uint8)
    assert np.array_equal(davis.labels("cup"), random.integers(0, 3, (3, 24, 32), dtype=np.uint8))


def test_void_is_background(folder: Path):
    path = folder / "Annotations/480p/cup/00001.png"
    Image.fromarray(np.full((24, 32), 255, np.uint8)).save(path)
    assert not read_davis(folder).labels("cup")[1].any()


@pytest.mark.parametrize(
    "missing", ["ImageSets/2017/val.txt", "JPEGImages/480p/drawer", "Annotations/480p/drawer/00002.png"]
)
def test_the_first_missing_file_is_named(folder: Path, missing: str):
    path = folder / missing
    named = missing if path.is_file() else f"{missing}/00000.jpg"
    for file in [path] if path.is_file() else list(path.iterdir()):
        file.unlink()
    with pytest.raises(InputError, match=rf"{named} is missing.*ROOT/JPEGImages"):
        read_davis(folder)


def test_coloured_or_broken_annotations_and_escaping_names_are_refused(folder: Path):
    path = folder / "Annotations/480p/cup/00000.png"
    Image.new("RGB", (32, 24)).save(path)
    with pytest.raises(InputError, match="RGB"):
        read_davis(folder).labels("cup")
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(InputError, match="cannot be read"):
        read_davis(folder).labels("cup")
    (folder / "ImageSets/2017/val.txt").write_text("../cup\n")
    with pytest.raises(InputError, match="no folder name"):
        read_davis(folder)
