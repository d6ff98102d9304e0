"""A data set on a real S3 endpoint reads as the local one does, through the node's cache of whole shards."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from evaluation.report.run import build
from evaluation.report.samples import MAX_REMOTE_SHARDS
from infra.errors import DataError, InputError
from infra.storage import join, list_names, put_folder, remove, write_bytes
from ingest.cache import ShardCache
from ingest.order import SampleOrder
from ingest.reader import ShardDataset
from tests.helpers_data import make_frames_dataset
from training.data.frame_pairs import FramePairConfig, FramePairDataset
from training.data.loader import step_loader

pytestmark = pytest.mark.s3


@pytest.fixture
def local_url(tmp_path: Path) -> str:
    return make_frames_dataset(tmp_path / "data", num_clips=5, num_frames=10, size=32, clips_per_shard=2)


def upload(local: str, url: str) -> str:
    put_folder(Path(local), url, last="manifest.json")
    return url


def test_remote_frames_are_the_local_ones_and_come_once(moto_s3, local_url, tmp_path):
    url = upload(local_url, join(moto_s3, "once"))
    cache = ShardCache(tmp_path / "cache", quota_bytes=10**8)
    remote, local = ShardDataset(url, cache=cache), ShardDataset(local_url)
    assert remote.version == local.version
    assert remote.jpegs(4, [9, 0]) == local.jpegs(4, [9, 0])
    for name in list_names(url, suffix=".tar"):
        if name != "shard-00002.tar":
            continue
        remove(join(url, name))
    again = ShardDataset(url, cache=cache)
    assert again.jpegs(4, [1]) == local.jpegs(4, [1])


def test_batches_from_s3_with_workers_equal_local_ones(moto_s3, local_url):
    url = upload(local_url, join(moto_s3, "workers"))

    def digest(place: str, num_workers: int) -> str:
        dataset = FramePairDataset(FramePairConfig(url=place, image_size=16))
        order = SampleOrder(len(dataset), seed=1)
        loader = step_loader(dataset, order, global_batch_size=4, stop_step=3, num_workers=num_workers)
        return hashlib.sha256(b"".join(batch.images.numpy().tobytes() for batch in loader)).hexdigest()

    assert digest(url, 2) == digest(url, 0) == digest(local_url, 0)


def test_a_damaged_remote_shard_is_refused(moto_s3, local_url, tmp_path):
    url = upload(local_url, join(moto_s3, "damaged"))
    data = bytearray((Path(local_url) / "shard-00000.tar").read_bytes())
    data[600] ^= 1  # same size, one bit
    write_bytes(join(url, "shard-00000.tar"), bytes(data))
    dataset = ShardDataset(url, cache=ShardCache(tmp_path / "cache", quota_bytes=10**8))
    with pytest.raises(DataError, match="sha256"):
        dataset.jpegs(0, [0])


def test_a_prefix_without_manifest_is_refused(moto_s3):
    with pytest.raises(InputError, match=r"manifest\.json"):
        ShardDataset(join(moto_s3, "nothing-here"))


def test_the_page_of_a_large_remote_data_set_fetches_a_few_shards_only(moto_s3, tmp_path):
    local = make_frames_dataset(tmp_path / "many", num_clips=20, num_frames=4, size=32, clips_per_shard=1)
    (Path(local) / "shard-00000.log.json").write_text('{"seconds": 2.0, "seconds_per_clip": {"clip-00000": 1.5}}')
    url = upload(local, join(moto_s3, "page"))
    # Named by content in the cache: what must not be fetched may as well be absent.
    for shard in set(range(20)) - {number * 20 // MAX_REMOTE_SHARDS for number in range(MAX_REMOTE_SHARDS)}:
        remove(join(url, f"shard-{shard:05d}.tar"))
    page = build("dataset", url, output=tmp_path / "page.html").read_text()
    assert page.count("<img") == MAX_REMOTE_SHARDS
    assert "8 of 20 samples, spread evenly" in page
    assert "could not be read" not in page
    assert "19 of 20 shards have no build log" in page
