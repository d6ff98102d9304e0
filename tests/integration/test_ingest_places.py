"""Slips of the hand: a wrong source or output is one line before any work; a finished data set says what it lacks."""

import logging

import pytest

from evaluation.report.run import build
from infra.errors import ConfigError, InputError
from infra.storage import join
from ingest import job
from ingest.recipe import IngestConfig, Recipe
from ingest.verify import verify
from tests.helpers_media import make_video


@pytest.fixture
def source(tmp_path):
    for name in ("a", "b", "c"):
        make_video(tmp_path / f"source/{name}.mp4", frames=6 + ord(name) % 5)
    return tmp_path / "source"


def config_of(source, output, **values) -> IngestConfig:
    recipe = Recipe(short_side=48, shard_bytes=10_000)
    return IngestConfig(source=str(source), output=str(output), name="t", **{"recipe": recipe, "workers": 0, **values})


def test_places_that_cannot_be_are_named_before_any_work(source, tmp_path):
    (tmp_path / "file").write_text("x")
    cases = [
        (tmp_path / "none", tmp_path / "out", "none does not exist"),
        (source / "a.mp4", tmp_path / "out", "is a file"),
        (source, source, "both SOURCE and OUT"),
        (source, tmp_path / "file", "is a file"),
        (source, tmp_path / "file/below", "no writable folder"),
    ]
    for place, output, words in cases:
        for work in (job.run, job.describe):
            with pytest.raises(InputError, match=words) as caught:
                work(config_of(place, output))
            assert caught.value.remedy and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.s3
def test_buckets_that_are_not_there_are_named(source, moto_s3):
    bucket = "s3://no-bucket-of-this-name"
    for place, output in ((bucket, join(moto_s3, "places")), (source, join(bucket, "out"))):
        with pytest.raises(InputError, match="no-bucket-of-this-name does not exist"):
            job.run(config_of(place, output))


def test_a_finished_data_set_tells_what_the_source_has_beyond_it(source, tmp_path, caplog):
    config = config_of(source, tmp_path / "out")
    first = job.run(config)
    make_video(source / "late.mp4", frames=9)
    with caplog.at_level(logging.WARNING, logger="ingest"):
        assert job.run(config) == first
    assert "1 of 4 clips" in caplog.text and "late.mp4" in caplog.text and "new OUT" in caplog.text
    caplog.clear()
    for video in source.iterdir():
        video.unlink()
    with caplog.at_level(logging.WARNING, logger="ingest"):
        assert job.run(config) == first  # the corpus may go once it is ingested
    assert "not looked at" in caplog.text


def test_a_damaged_data_set_is_mended_as_verify_says(source, tmp_path):
    config = config_of(source, tmp_path / "out")
    job.run(config)
    manifest = (tmp_path / "out/manifest.json").read_bytes()
    damaged = bytearray((tmp_path / "out/shard-00001.tar").read_bytes())
    damaged[700] ^= 1
    (tmp_path / "out/shard-00001.tar").write_bytes(damaged)
    assert any("shard-00001" in problem for problem in verify(str(tmp_path / "out")))
    (tmp_path / "out/manifest.json").unlink()
    (tmp_path / "out/shard-00001.receipt.json").unlink()
    job.run(config)
    assert verify(str(tmp_path / "out")) == []
    assert (tmp_path / "out/manifest.json").read_bytes() == manifest


def test_one_shard_needs_no_ray(source, tmp_path, monkeypatch):
    monkeypatch.setattr("ingest.distribute.build_on_ray", None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    job.run(config_of(source, tmp_path / "out", recipe=Recipe(short_side=48), workers=None))


def test_no_report_of_what_is_no_data_set(tmp_path):
    with pytest.raises(InputError, match=r"no manifest\.json"):
        build("dataset", str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_hardware_options_of_the_other_engine_are_refused():
    with pytest.raises(ConfigError, match="engine=ffmpeg only"):
        Recipe.parse({"video_encoder": "h264_nvenc"})
    assert Recipe(engine="ffmpeg", video_encoder="h264_nvenc").video_encoder == "h264_nvenc"
