"""Batches of video clips: the same for any ranks, workers and start; sizes, cameras, shares and mixtures."""

from __future__ import annotations

import os
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from infra.errors import ConfigError, DataError, InputError
from ingest import job
from ingest.reader import ShardDataset
from ingest.recipe import IngestConfig, Recipe
from ingest.windows import ClipSource, WindowRule
from tests.helpers_clips import Take, level, make_cache, make_takes
from tests.helpers_data import edit_manifest
from training.data.video_clips import ClipBatch, VideoClipDataset, VideoDataConfig, resize_clip, to_model_range
from training.loop import Group
from training.recipes.mixtures import (
    annotated_sources,
)

RULE = WindowRule(num_frames=4, stride=2, start_every=2)
STEPS, GLOBAL_BATCH = 5, 8


@pytest.fixture(scope="module")
def urls(tmp_path_factory) -> tuple[str, str]:
    """(square pictures of 16 pixels with two cameras, layout frames; wide pictures, layout video)."""
    folder = tmp_path_factory.mktemp("clips")
    square = [Take(9, "push", f"push {number}", cameras=("0", "1")) for number in range(3)]
    wide = [Take(6 + number, "pour", f"pour {number}") for number in range(4)]
    return make_takes(folder / "a", square), make_takes(folder / "b", wide, size=(16, 24), layout="video")


@pytest.fixture(scope="module")
def config(urls) -> VideoDataConfig:
    sources = (
        ClipSource(name="square", url=urls[0], probability=3, cameras={"0": 0.75, "1": 0.25}, rule=RULE),
        ClipSource(name="wide", url=urls[1], probability=1, loss_coefficient=0.5, rule=RULE),
    )
    return VideoDataConfig(sources=sources, image_size=16, block=20, seed=7)


@pytest.fixture(scope="module")
def dataset(config) -> VideoClipDataset:
    return VideoClipDataset(config)


def run(dataset, *, world_size=1, num_workers=0, start=0, micro=GLOBAL_BATCH, stop=STEPS) -> list[list[ClipBatch]]:
    """The micro-batches of every step, those of all ranks put together in rank order."""
    ranks = [
        dataset.batches(
            steps=range(start, stop),
            global_batch_size=GLOBAL_BATCH,
            micro_batch_size=micro,
            group=Group(rank, world_size),
            loader_workers=num_workers,
        )
        for rank in range(world_size)
    ]
    return [[part for rank in step for part in rank] for step in zip(*ranks, strict=True)]


def contents(steps: list[list[ClipBatch]]) -> list[tuple[object, ...]]:
    """Everything of every step's clips, whatever parts they came in."""
    found = []
    for parts in steps:
        pixels = torch.cat([part.pixels.float() for part in parts])
        visits = tuple(visit for part in parts for visit in part.visits)
        texts = tuple(text for part in parts for text in part.texts)
        coefficients = torch.cat([part.coefficients for part in parts]).tolist()
        found.append((visits, texts, coefficients, pixels.numpy().tobytes()))
    return found


@pytest.fixture(scope="module")
def undisturbed(dataset):
    found = contents(run(dataset))
    assert len({step[3] for step in found}) == STEPS
    return found


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 1), (1, 2), (2, 0), (4, 0), (2, 1)])
def test_ranks_and_workers_change_nothing(dataset, undisturbed, world_size, num_workers):
    assert contents(run(dataset, world_size=world_size, num_workers=num_workers)) == undisturbed


@pytest.mark.parametrize("start", range(1, STEPS + 1))
def test_a_resumed_run_goes_on_with_the_same_batches(dataset, undisturbed, start):
    assert contents(run(dataset, world_size=2, start=start)) == undisturbed[start:]


def test_micro_batches_are_parts_in_order(dataset, undisturbed):
    steps = run(dataset, micro=3)
    assert [[len(part) for part in parts] for parts in steps] == [[3, 3, 2]] * STEPS
    assert contents(steps) == undisturbed


def test_a_pickled_data_set_gives_the_same(dataset, undisturbed):
    assert contents(run(pickle.loads(pickle.dumps(dataset)))) == undisturbed


def test_a_clip_is_what_its_visit_says(dataset, config):
    batch = dataset[(0, 5, 2)]
    (visit,) = batch.visits
    assert (visit.source, visit.epoch, visit.clip) == (0, 5, 2)
    camera = int(visit.camera)
    assert batch.pixels.dtype == torch.uint8 and batch.pixels.shape == (1, 4, 3, 16, 16)
    assert batch.pixels[0, :, 1, 3, 3].tolist() == [level(frame, camera) for frame in (4, 6, 8, 8)]
    assert batch.texts == ("push 0",) and batch.coefficients.tolist() == [1.0]
    other = dataset[(1, 0, 0)]
    assert other.visits[0].camera == "main" and other.coefficients.tolist() == [0.5]
    assert other.pixels.dtype == torch.float32 and other.pixels.shape == (1, 4, 3, 16, 16)
    assert torch.allclose(other.pixels[0, :, :, 8, 8], torch.tensor([4.0, 8, 12, 14])[:, None], atol=3)


def test_neighbours_in_a_batch_change_no_value(dataset):
    alone, together = dataset[(0, 1, 3)], dataset.__getitems__([(1, 0, 2), (0, 1, 3)])
    assert together.pixels.dtype == torch.float32
    assert torch.equal(together.pixels[1], alone.pixels[0].float())
    assert together.visits[1] == alone.visits[0]
    assert len(together) == 2 and len(together.part(1, 2)) == 1
    assert together.part(1, 2).texts == alone.texts


def test_cameras_are_seen_by_their_shares(dataset):
    seen = [dataset.visit(0, epoch, clip).camera for epoch in range(400) for clip in range(10)]
    assert Counter(seen)["0"] / len(seen) == pytest.approx(0.75, abs=0.03)
    assert set(seen) == {"0", "1"}
    assert dataset.visit(0, 17, 3) == dataset.visit(0, 17, 3)


def test_cameras_are_drawn_anew_for_every_source_epoch_and_seed(urls, config):
    twin = config.sources[0].model_copy(update={"name": "twin"})
    twins = VideoClipDataset(config.model_copy(update={"sources": (config.sources[0], twin)}))
    other = VideoClipDataset(config.model_copy(update={"seed": 8}))

    def drawn(dataset, source, epochs):
        return [dataset.visit(source, epoch, clip).camera for epoch in epochs for clip in range(15)]

    assert drawn(twins, 0, range(20)) != drawn(twins, 1, range(20))
    assert drawn(twins, 0, range(20)) != drawn(twins, 0, range(20, 40))
    assert drawn(twins, 0, range(20)) != drawn(other, 0, range(20))


def test_every_clip_once_in_each_epoch_of_its_source_and_exact_shares(dataset):
    steps = 40 * len(dataset) // GLOBAL_BATCH
    sources, epochs, clips = dataset.mixture.slice(0, steps * GLOBAL_BATCH)
    for block in sources[: len(sources) // 20 * 20].reshape(-1, 20):
        assert Counter(block.tolist()) == {0: 15, 1: 5}
    for source, windows in enumerate(dataset.windows):
        mine = epochs[sources == source]
        for epoch in range(mine.max()):
            assert sorted(clips[(sources == source) & (epochs == epoch)]) == list(range(len(windows)))
    assert [len(windows) for windows in dataset.windows] == [15, 3 + 4 + 4 + 5]
    assert dataset.num_clips == 16 and len(dataset) == 31


def test_the_digest_names_all_data(dataset, urls, config):
    versions = tuple(ShardDataset(url).version for url in urls)
    assert dataset.inputs == versions
    alone = VideoClipDataset(config.model_copy(update={"sources": config.sources[:1]}))
    assert alone.inputs == versions[:1] and alone.data_digest == versions[0] != dataset.data_digest


def test_resize_is_plain_bilinear_and_never_rounds():
    frames = np.random.default_rng(0).integers(0, 256, (3, 30, 22, 3), dtype=np.uint8)
    resized = resize_clip(frames, 12)
    assert resized.shape == (3, 3, 12, 12) and resized.dtype == torch.float32
    assert torch.allclose(resized, torch.from_numpy(bilinear(frames, 12)).float(), atol=1e-3)
    plain = F.interpolate(torch.tensor(frames).permute(0, 3, 1, 2).float(), (12, 12), mode="bilinear")
    assert torch.equal(resized, plain)
    assert (resized != resized.round()).float().mean() > 0.5


def bilinear(frames: np.ndarray, size: int) -> np.ndarray:
    """Squash to a square: every output pixel from its four neighbours, pixel centres at halves."""

    def taps(length):
        centres = np.clip((np.arange(size) + 0.5) * length / size - 0.5, 0, length - 1)
        low = np.floor(centres).astype(int)
        return low, np.minimum(low + 1, length - 1), centres - low

    images = frames.transpose(0, 3, 1, 2).astype(np.float64)
    top, bottom, down = taps(images.shape[2])
    left, right, across = taps(images.shape[3])
    rows = images[:, :, top] * (1 - down[:, None]) + images[:, :, bottom] * down[:, None]
    return rows[..., left] * (1 - across) + rows[..., right] * across


def test_a_picture_of_the_right_size_is_left_alone():
    frames = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    kept = resize_clip(frames, 8)
    assert kept.dtype == torch.uint8 and np.array_equal(kept.permute(0, 2, 3, 1).numpy(), frames)
    enlarged = resize_clip(frames, 16)
    assert enlarged.min() >= 0 and enlarged.max() <= 255 and enlarged.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_the_models_range(dtype):
    values = to_model_range(torch.tensor([0, 51, 255], dtype=dtype))
    assert values.dtype == torch.float32
    assert values.tolist() == pytest.approx([-1.0, -0.6, 1.0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "square"}, "share a name"),
        ({"rule": WindowRule(num_frames=5)}, "differ in frames a clip"),
    ],
)
def test_sources_that_do_not_fit_together(config, change, words):
    second = config.sources[1].model_copy(update=change)
    with pytest.raises(ConfigError, match=words):
        VideoDataConfig.parse(config.model_copy(update={"sources": (config.sources[0], second)}).to_json())


def test_errors_of_a_source_come_through_in_one_line(config):
    def opened(**change):
        return VideoClipDataset(config.model_copy(update={"sources": (config.sources[1].model_copy(update=change),)}))

    with pytest.raises(InputError, match="no label 'fold'"):
        opened(labels=("fold",))
    with pytest.raises(DataError, match="no camera '1', only main"):
        opened(cameras={"1": 1.0})
    with pytest.raises(DataError, match=r"take/00000 .* has 6 frames, a clip has 7"):
        opened(rule=WindowRule(num_frames=7))


def cached(config: VideoDataConfig, *caches: str, **changes) -> VideoDataConfig:
    sources = tuple(
        source.model_copy(update={"latents": cache, **changes})
        for source, cache in zip(config.sources, caches, strict=True)
    )
    return config.model_copy(update={"sources": sources})


@pytest.fixture(scope="module")
def caches(urls, tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("caches")
    return make_cache(folder / "a", urls[0]), make_cache(folder / "b", urls[1], dtype="float16")


def test_cached_clips_are_those_of_the_pixels(dataset, config, caches):
    latents = VideoClipDataset(cached(config, *caches))
    for pixel_steps, latent_steps in zip(run(dataset), run(latents, world_size=2, num_workers=1), strict=True):
        pixels, halves = pixel_steps[0], latent_steps
        assert pixels.visits == tuple(visit for half in halves for visit in half.visits)
        assert pixels.texts == tuple(text for half in halves for text in half.texts)
        assert all(half.pixels is None for half in halves)
        moments = torch.cat([half.moments for half in halves])
        assert moments.shape == (GLOBAL_BATCH, 4, 2, 4, 2, 2) and moments.dtype == torch.float32
        for row, visit in enumerate(pixels.visits):
            windows = latents.windows[visit.source]
            offset = 100 if visit.camera == "1" else 0
            expected = [frame + offset for frame in windows.frame_indices(visit.clip)]
            assert moments[row, :, 0, 3, 1, 1].tolist() == expected
            assert torch.equal(moments[row, :, 1], torch.full((4, 4, 2, 2), 0.5))
        states = torch.cat([half.text_states for half in halves])
        assert states.shape == (GLOBAL_BATCH, 3, 6)
        samples = [latents.windows[visit.source].locate(visit.clip)[0] for visit in pixels.visits]
        assert states[:, 2, 5].tolist() == samples


def test_a_cache_belongs_to_what_the_model_is_made_from(dataset, config, caches):
    latents = VideoClipDataset(cached(config, *caches))
    assert latents.inputs == (*dataset.inputs, *(cache.version for cache in latents.caches))
    assert latents.data_digest != dataset.data_digest
    part = latents.__getitems__([(0, 0, 1), (1, 0, 1)]).part(1, 2)
    assert part.moments.shape[0] == part.text_states.shape[0] == len(part) == 1 and part.pixels is None


def test_episodes_that_a_cache_records_as_failed_are_left_out(config, urls, caches, tmp_path):
    partial = make_cache(tmp_path / "c", urls[1], failed=["clip-00001", "clip-00003"])
    windows = VideoClipDataset(cached(config, caches[0], partial)).windows[1]
    assert windows.samples.tolist() == [0, 2]
    assert [windows.key(clip) for clip in (0, 3)] == ["clip-00000/00000", "clip-00002/00000"]
    assert len(windows) == 3 + 4


def test_a_failure_of_a_camera_that_is_not_seen_leaves_nothing_out(config, urls, caches, tmp_path):
    folder = tmp_path / "c"
    make_cache(folder, urls[0], cameras=["0"])
    failure = {"key": "clip-00001", "source_id": "", "path": "", "sha256": "", "stage": "read", "message": ""}
    edit_manifest(
        folder, lambda manifest: manifest["receipts"][0].update(failures=[{**failure, "reason": "short_decode"}])
    )
    only_first = cached(config, str(folder), caches[1])
    sources = (only_first.sources[0].model_copy(update={"cameras": {}}), only_first.sources[1])
    whole = VideoClipDataset(only_first.model_copy(update={"sources": sources}))
    assert whole.windows[0].samples.tolist() == [0, 1, 2]
    assert whole[(0, 0, 5)].moments[0, :, 0, 0, 0, 0].tolist() == [0, 2, 4, 6]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data_version": "c" * 64}, "is of data set cccc"),
        ({"vae_digest": "c" * 64}, "is of VAE cccc.*, asked for is aaaa"),
        ({"text_digest": "c" * 64}, "is of text encoder cccc.*, asked for is bbbb"),
        ({"image_size": 32}, "is of image size 32, asked for is 16"),
    ],
)
def test_a_cache_of_something_else_is_one_line(config, caches, tmp_path, changes, words):
    wrong = make_cache(tmp_path / "c", config.sources[1].url, **changes)
    with pytest.raises(InputError, match=words) as caught:
        VideoClipDataset(cached(config, caches[0], wrong))
    assert "\n" not in str(caught.value)


def test_a_camera_that_was_not_cached_is_missed_at_once(config, urls, caches, tmp_path):
    narrow = make_cache(tmp_path / "c", urls[0], cameras=["0"])
    with pytest.raises(InputError, match=r"has no camera '1', only \['0'\]"):
        VideoClipDataset(cached(config, narrow, caches[1]))


def test_all_sources_are_cached_or_none(config, caches):
    with pytest.raises(ConfigError, match="latent cache, but not wide"):
        VideoClipDataset(cached(config, caches[0], ""))


def test_a_cache_without_a_record_of_what_it_lacks_is_refused(config, urls, caches, tmp_path):
    folder = tmp_path / "c"
    make_cache(folder, urls[1], failed=["clip-00002"])
    edit_manifest(folder, lambda manifest: manifest["receipts"][0].update(failures=[]))
    with pytest.raises(DataError, match="lacks 1 of 4 episodes of source 'wide', the first is clip-00002"):
        VideoClipDataset(cached(config, caches[0], str(folder)))


@pytest.mark.skipif(not os.environ.get("FOREFRAME_CORPUS"), reason="FOREFRAME_CORPUS names no annotated corpus")
def test_clips_of_the_real_corpus(tmp_path):
    job.run(
        IngestConfig(
            corpus="annotated",
            source=os.environ["FOREFRAME_CORPUS"],
            output=str(tmp_path / "d"),
            name="real",
            recipe=Recipe(layout="video"),
            workers=0,
        )
    )
    stored = ShardDataset(str(tmp_path / "d"))
    lengths: dict[str, list[int]] = {}
    for index in range(len(stored)):
        lengths.setdefault(stored.record(index).label, []).append(stored.num_frames(index))
    sources = annotated_sources(str(tmp_path / "d"), num_frames=8)
    dataset = VideoClipDataset(VideoDataConfig(sources=sources, image_size=64))
    assert {source.name for source in sources} == set(lengths)
    for source, windows in zip(sources, dataset.windows, strict=True):
        whole = source.name in ("bridge", "rt1", "sthv2")
        expected = [1 if whole else len(range(0, count, 2)) for count in lengths[source.name]]
        assert len(windows) == sum(expected)
    for (batch,) in run(dataset, stop=2):
        assert batch.pixels.shape == (GLOBAL_BATCH, 8, 3, 64, 64) and all(batch.texts)
        assert to_model_range(batch.pixels).std() > 0.1
        assert all(0 <= value <= 255 for value in (batch.pixels.min(), batch.pixels.max()))
