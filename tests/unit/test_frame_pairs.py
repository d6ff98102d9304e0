"""Frame pairs as the paper draws them: index rule, shared crop and flip, PIL-exact pixels, order-free randomness."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as reference
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from infra.errors import ConfigError, DataError
from ingest.reader import ShardDataset
from ingest.schema import frame_suffix
from ingest.shard import Member
from tests.helpers_data import jpeg, make_frames_dataset, moving_square, sample_record, write_dataset
from training.data.frame_pairs import FramePairConfig, FramePairDataset, draw_pair
from training.data.pixels import IMAGENET_MEAN, IMAGENET_STD, Box, crop_resize, normalise, random_resized_crop
from training.data.rng import ClipRandom

PAPER_CROP = {"scale": (0.5, 1.0), "ratio": (3 / 4, 4 / 3)}


def pairs_of(num_frames: int, draws: int = 3000, stride: int = 1) -> np.ndarray:
    numbers = np.arange(0, num_frames * stride, stride)
    return np.array([draw_pair(ClipRandom(0, epoch=0, clip=clip), numbers) for clip in range(draws)])


@pytest.mark.parametrize("num_frames", [49, 60, 300])
def test_long_clips_draw_start_and_gap_independently(num_frames):
    current, future = pairs_of(num_frames, 20_000).T
    gaps = future - current
    assert (current.min(), current.max()) == (0, num_frames - 49)
    assert (gaps.min(), gaps.max()) == (4, 48)
    assert abs(gaps.mean() - 26) < 0.5
    assert abs(current.mean() - (num_frames - 49) / 2) < 0.02 * num_frames
    late = current > np.median(current)
    assert not late.any() or abs(gaps[late].mean() - gaps[~late].mean()) < 1


@pytest.mark.parametrize("num_frames", [2, 3, 48])
def test_short_clips_draw_two_distinct_frames(num_frames):
    pairs = pairs_of(num_frames)
    assert (pairs[:, 0] < pairs[:, 1]).all()
    assert len(np.unique(pairs, axis=0)) >= min(math.comb(num_frames, 2), 500)


def test_gaps_are_in_source_frames_when_frames_are_stored_at_a_stride():
    current, future = pairs_of(100, stride=3).T
    gaps = 3 * (future - current)
    assert 0 < gaps.min() <= 6
    assert 45 <= gaps.max() <= 51
    assert abs(gaps.mean() - 26) < 1


@given(st.lists(st.integers(0, 400), min_size=2, max_size=30, unique=True), st.integers(0, 1000))
def test_any_stored_frames_give_two_of_them_in_order(numbers, clip):
    current, future = draw_pair(ClipRandom(1, epoch=0, clip=clip), np.array(sorted(numbers)))
    assert 0 <= current < future < len(numbers)


@given(st.integers(1, 500), st.integers(1, 500), st.integers(0, 1000))
def test_crops_lie_inside_the_image(height, width, clip):
    box = random_resized_crop(ClipRandom(0, epoch=0, clip=clip), height, width, **PAPER_CROP)
    assert box.top >= 0 <= box.left
    assert 0 < box.height <= height - box.top
    assert 0 < box.width <= width - box.left


@pytest.mark.parametrize("size", [(100, 100), (60, 200), (200, 60), (7, 7)])
def test_when_ten_tries_fail_the_central_crop_is_torchvisions(size):
    height, width = size
    impossible = {"scale": (1.0, 1.0), "ratio": (1.3, 1.3)} if height == width else {**PAPER_CROP, "scale": (1.0, 1.0)}
    expected = RandomResizedCrop.get_params(
        torch.zeros(3, height, width), list(impossible["scale"]), impossible["ratio"]
    )
    box = random_resized_crop(ClipRandom(0, epoch=0, clip=0), height, width, **impossible)
    assert tuple(box) == tuple(expected)


def test_crops_are_distributed_as_torchvisions():
    torch.manual_seed(0)
    image = torch.zeros(3, 128, 170)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.5, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)])
    stream = ClipRandom(0, epoch=0, clip=0)
    ours = np.array([random_resized_crop(stream, 128, 170, **PAPER_CROP) for _ in range(4000)])
    for column, tolerance in ((0, 1.5), (1, 2), (2, 2), (3, 2.5)):
        levels = np.linspace(0.05, 0.95, 10)
        difference = np.quantile(ours[:, column], levels) - np.quantile(theirs[:, column], levels)
        assert np.abs(difference).max() <= tolerance


def by_pillow(frame: np.ndarray, box: Box, size: int, *, passes: bool) -> np.ndarray:
    """Pillow's bicubic crop; `passes`: horizontally first, as all releases did before some began to choose."""
    picture = Image.fromarray(frame).crop((box.left, box.top, box.left + box.width, box.top + box.height))
    if passes:
        picture = picture.resize((size, box.height), Image.Resampling.BICUBIC)
    return np.array(picture.resize((size, size), Image.Resampling.BICUBIC)).astype(int)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("box", [Box(0, 0, 128, 128), Box(10, 20, 101, 77), Box(3, 0, 61, 80)])
@pytest.mark.parametrize("size", [96, 128])
def test_pixels_equal_pillows_even_on_noise(flip, box, size):
    frames = np.random.default_rng(0).integers(0, 256, (2, 128, 128, 3), dtype=np.uint8)
    ours = crop_resize(frames, box, size, flip=flip).permute(0, 2, 3, 1).numpy().astype(int)
    theirs = np.stack([by_pillow(frame, box, size, passes=True) for frame in frames])
    difference = np.abs(ours - (theirs[:, :, ::-1] if flip else theirs))
    assert difference.mean() <= 0.02
    assert difference.max() <= 2


def test_drawn_crops_of_pictures_equal_pillows_to_a_tenth_of_a_level():
    frame = moving_square(1, 256, seed=3)[0]
    differences = []
    for clip in range(40):
        box = random_resized_crop(ClipRandom(0, epoch=0, clip=clip), 256, 256, **PAPER_CROP)
        ours = crop_resize(frame[None], box, 224)[0].permute(1, 2, 0).numpy().astype(int)
        differences.append(np.abs(ours - by_pillow(frame, box, 224, passes=False)).mean())
    assert np.mean(differences) <= 0.1


def test_normalisation_is_torchvisions():
    images = torch.randint(0, 256, (2, 2, 3, 8, 8), dtype=torch.uint8)
    expected = reference.normalize(images.double() / 255, list(IMAGENET_MEAN), list(IMAGENET_STD))
    ours = normalise(images.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3))
    assert ours.dtype == torch.float32
    assert ours.is_contiguous()
    torch.testing.assert_close(ours.double(), expected, atol=1e-5, rtol=0)


def grey_frames(folder, num_clips: int, num_frames: int) -> str:
    """Frame t of every clip is uniformly grey with level 2 t."""

    def sample(number: int) -> list[Member]:
        record = sample_record(number, "frames", num_frames, 32, metadata={"split": "train"})
        pictures = [np.full((32, 32, 3), 2 * frame, np.uint8) for frame in range(num_frames)]
        members = [Member(frame_suffix(index), jpeg(picture), index) for index, picture in enumerate(pictures)]
        return [Member("json", record.model_dump_json().encode()), *members]

    return write_dataset(folder, num_clips, num_frames, sample)


def test_batches_hold_the_frames_they_name(tmp_path):
    dataset = FramePairDataset(FramePairConfig(url=grey_frames(tmp_path / "d", 2, 120), image_size=16))
    batch = dataset.__getitems__([(0, 1), (3, 0), (0, 0)])
    assert batch.images.shape == (6, 2, 3, 16, 16)
    assert batch.images.dtype == torch.uint8
    assert batch.visits.tolist() == [[0, 1], [3, 0], [0, 0]]
    assert len(batch) == 3
    levels = batch.images.double().mean((2, 3, 4))
    torch.testing.assert_close(levels, 2.0 * batch.source_frames.double(), atol=1.0, rtol=0)
    assert len(np.unique(batch.source_frames.numpy(), axis=0)) == 6  # each draw, clip and epoch its own


def test_both_frames_of_a_pair_share_crop_and_flip_and_the_draws_do_not(tmp_path):
    still = moving_square(1, 48, seed=5)

    def sample(number: int) -> list[Member]:
        record = sample_record(number, "frames", 60, 48, metadata={"split": "train"})
        members = [Member(frame_suffix(index), jpeg(still[0]), index) for index in range(60)]
        return [Member("json", record.model_dump_json().encode()), *members]

    dataset = FramePairDataset(FramePairConfig(url=write_dataset(tmp_path / "d", 1, 60, sample), image_size=32))
    images = dataset.__getitems__([(epoch, 0) for epoch in range(8)]).images
    assert torch.equal(images[:, 0], images[:, 1])
    assert len({image.numpy().tobytes() for image in images[:, 0]}) == len(images)


def test_half_of_the_pairs_are_mirrored(tmp_path):
    ramp = np.broadcast_to(np.linspace(0, 255, 32).astype(np.uint8)[None, :, None], (32, 32, 3))

    def sample(number: int) -> list[Member]:
        record = sample_record(number, "frames", 2, 32, metadata={"split": "train"})
        members = [Member(frame_suffix(index), jpeg(ramp), index) for index in range(2)]
        return [Member("json", record.model_dump_json().encode()), *members]

    config = FramePairConfig(url=write_dataset(tmp_path / "d", 1, 2, sample), image_size=16)
    images = FramePairDataset(config).__getitems__([(epoch, 0) for epoch in range(200)]).images.int()
    mirrored = (images[:, 0, 0, 8, 0] > images[:, 0, 0, 8, -1]).float().mean()
    assert 0.4 < mirrored < 0.6


def test_a_sample_depends_on_its_key_and_not_on_its_company(tmp_path):
    url = make_frames_dataset(tmp_path / "d", num_clips=4, size=32)
    dataset = FramePairDataset(FramePairConfig(url=url, image_size=16))
    alone = dataset[(2, 3)].images
    together = dataset.__getitems__([(0, 0), (2, 3), (1, 1)]).images
    assert torch.equal(together[2:4], alone)
    assert not torch.equal(dataset[(1, 3)].images, alone)
    other_seed = FramePairDataset(FramePairConfig(url=url, image_size=16, seed=1))
    assert not torch.equal(other_seed[(2, 3)].images, alone)


def test_a_clip_of_one_frame_is_an_error_that_names_it(tmp_path):
    url = make_frames_dataset(tmp_path / "d", num_clips=1, num_frames=1, size=16)
    with pytest.raises(DataError, match="clip-00000"):
        FramePairDataset(FramePairConfig(url=url))[(0, 0)]


def test_an_empty_split_is_an_error(tmp_path):
    url = make_frames_dataset(tmp_path / "d", num_clips=1, num_frames=2, size=16)
    with pytest.raises(DataError, match="validation"):
        FramePairDataset(FramePairConfig(url=url, split="validation"))
    assert len(FramePairDataset(FramePairConfig(url=url, split=None), ShardDataset(url))) == 1


@pytest.mark.parametrize(
    "wrong", [{"gap_min": 9, "gap_max": 8}, {"crop_scale": (0.9, 0.5)}, {"crop_scale": (0.0, 1.0)}, {"gap": 3}]
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ConfigError):
        FramePairConfig.parse({"url": "x", **wrong})
