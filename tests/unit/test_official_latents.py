"""Published latents become a cache: the good ones are kept, the others recorded, and no file runs code."""

import io
import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from infra.errors import ConfigError, InputError, TooManyFailuresError
from ingest.reader import ShardDataset
from tests.helpers_cache import make_two_cameras, make_vae
from tests.helpers_clips import Take, make_takes
from tests.helpers_data import edit_manifest
from training.cache import LatentCache
from training.models.common.text import TextEncoderConfig
from training.official_latents import LatentsError, OfficialLatentsConfig, import_official, read_latents

SIZE, SHAPE = 32, (4, 4, 4)


class Corpus:
    """One data set `bridge` of episodes 0.., camera `main`, in the published layout beside our ingest of it."""

    def __init__(self, folder: Path, frames: list[int], *, stride: int = 1) -> None:
        self.root, self.data, self.latents = folder / "corpus", folder / "data", {}
        takes = [Take(count, text=f"task {number}", stride=stride) for number, count in enumerate(frames)]
        make_takes(self.data, takes)
        self._rewrite(len(frames))
        for number, count in enumerate(frames):
            generator = torch.Generator().manual_seed(number)
            self.write(number, torch.randn(stride * count, *SHAPE, generator=generator) * 0.75)

    def _rewrite(self, count: int) -> None:
        """Records as an ingest of the annotated layout writes them: names of the corpus's own files."""
        from ingest.shard import Member, ShardWriter, iter_members

        names = {f"clip-{number:05d}": number for number in range(count)}

        def edit(value: dict) -> None:
            value["corpus"] = "annotated"
            for receipt in value["receipts"]:
                path = self.data / f"shard-{receipt['shard']:05d}.tar"
                samples: dict[str, list[Member]] = {}
                for member in iter_members(path):
                    data = member.data
                    if member.suffix == "json":
                        record, number = json.loads(data), names[member.key]
                        record["source_id"] = f"bridge/val/{number}"
                        record["cameras"]["main"]["source"]["path"] = f"bridge/videos/val/{number}/rgb.mp4"
                        data = json.dumps(record).encode()
                    frame = int(member.suffix[1:7]) if member.suffix.endswith("jpg") else -1
                    if frame >= 0:
                        numbers = json.loads(samples[member.key][0].data)["cameras"]["main"]["frame_numbers"]
                        frame = numbers[frame] if numbers else frame
                    samples.setdefault(member.key, []).append(Member(member.suffix, data, frame))
                with ShardWriter(path) as writer:
                    for key, members in samples.items():
                        writer.add(key, members)
                summary = writer.close()
                receipt |= {
                    "tar_sha256": summary.tar_sha256,
                    "idx_sha256": summary.idx_sha256,
                    "tar_bytes": summary.tar_bytes,
                }

        edit_manifest(self.data, edit)

    def file(self, number: int, folder: str = "latent_videos_svd") -> Path:
        return self.root / f"bridge/{folder}/val/{number}/0.pt"

    def write(self, number: int, tensor: torch.Tensor, *, stated: str = "latent_videos") -> None:
        """The annotation says `latent_videos/`, the file lies in `latent_videos_svd/`, as published."""
        path = self.root / f"bridge/annotation/val/{number}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "texts": [f"task {number}"],
            "videos": [{"video_path": f"videos/val/{number}/rgb.mp4"}],
            "latent_videos": [{"latent_video_path": f"{stated}/val/{number}/0.pt"}],
        }
        path.write_text(json.dumps(record))
        self.file(number).parent.mkdir(parents=True, exist_ok=True)
        torch.save(tensor, self.file(number))
        self.latents[number] = tensor

    def config(self, output: Path, **changes: object) -> OfficialLatentsConfig:
        values = {"image_size": SIZE, "text": TextEncoderConfig(max_tokens=8), "max_failure_share": 0.9} | changes
        return OfficialLatentsConfig(data=str(self.data), corpus=str(self.root), output=str(output), **values)


def test_published_latents_are_means_without_deviation(tmp_path):
    corpus = Corpus(tmp_path, [5, 7])
    summary = import_official(corpus.config(tmp_path / "cache"))
    cache = LatentCache(str(tmp_path / "cache"))
    assert (summary["num_samples"], summary["num_frames"], summary["num_failures"]) == (2, 12, 0)
    assert (cache.manifest.posterior, cache.vae_digest, cache.latent_shape) == ("sample", "", SHAPE)
    for number in (0, 1):
        moments = cache.moments(f"clip-{number:05d}", None, [4, 0, 2])
        torch.testing.assert_close(moments[:, 0] * 0.18215, corpus.latents[number][[4, 0, 2]], atol=1e-6, rtol=1e-6)
        assert not moments[:, 1].any()
    assert cache.text_states("clip-00001").shape == (8, 384)
    with pytest.raises(InputError, match="of VAE unknown"):
        cache.require(vae_digest="ab" * 32)
    assert import_official(corpus.config(tmp_path / "cache"))["version"] == summary["version"]


def test_the_stated_folder_wins_where_it_exists(tmp_path):
    corpus = Corpus(tmp_path, [5])
    other = corpus.file(0, "latent_videos")
    other.parent.mkdir(parents=True)
    torch.save(torch.ones(5, *SHAPE), other)
    import_official(corpus.config(tmp_path / "cache"))
    moments = LatentCache(str(tmp_path / "cache")).moments("clip-00000", None, range(5))
    torch.testing.assert_close(moments[:, 0] * 0.18215, torch.ones(5, *SHAPE))


def test_stored_frames_pick_their_rows(tmp_path):
    """An ingest that keeps every third frame; published files have all of them."""
    corpus = Corpus(tmp_path, [4], stride=3)
    assert ShardDataset(str(corpus.data)).source_frames(0).tolist() == [0, 3, 6, 9]
    import_official(corpus.config(tmp_path / "cache"))
    moments = LatentCache(str(tmp_path / "cache")).moments("clip-00000", None, range(4))
    torch.testing.assert_close(moments[:, 0] * 0.18215, corpus.latents[0][::3], atol=1e-6, rtol=1e-6)


def test_what_cannot_be_used_is_recorded_and_the_rest_is_kept(tmp_path):
    corpus = Corpus(tmp_path, [5, 6, 7, 5, 5, 5, 5])
    corpus.write(1, torch.zeros(9, *SHAPE))
    corpus.write(2, torch.zeros(7, 4, 8, 8))
    corpus.file(3).unlink()
    corpus.file(4).write_bytes(b"no tensor at all")
    corpus.write(5, torch.zeros(5, *SHAPE), stated="../../elsewhere")
    import_official(corpus.config(tmp_path / "cache"))
    cache = LatentCache(str(tmp_path / "cache"))
    assert cache.keys() == ("clip-00000", "clip-00006")
    found = {failure.key[-1]: failure for receipt in cache.manifest.receipts for failure in receipt.failures}
    assert {key: failure.reason for key, failure in found.items()} == {
        "1": "bad_annotation",
        "2": "bad_annotation",
        "3": "unreadable",
        "4": "bad_annotation",
        "5": "bad_annotation",
    }
    assert found["1"].message == "latents have 9 frames, the video 6"
    assert "not (T, (4, 4, 4))" in found["2"].message
    assert "latent_videos_svd/val/3/0.pt exists" in found["3"].message
    assert found["1"].source_id == "bridge/val/1"
    assert not cache.moments("clip-00006", None, [0]).isnan().any()
    with pytest.raises(Exception, match="latents have 9 frames"):
        cache.moments("clip-00001", None, [0])


def test_too_many_failures_commit_nothing(tmp_path):
    corpus = Corpus(tmp_path, [5, 5, 5])
    corpus.file(1).unlink()
    with pytest.raises(TooManyFailuresError, match=r"1 of 3 samples.*mostly unreadable: bridge/val/1"):
        import_official(corpus.config(tmp_path / "cache", max_failure_share=0.1))
    assert not (tmp_path / "cache/manifest.json").exists()
    import_official(corpus.config(tmp_path / "cache", max_failure_share=0.4))


def test_a_named_vae_must_have_their_scale(tmp_path):
    corpus, vae = Corpus(tmp_path, [5]), make_vae(tmp_path / "vae")
    with pytest.raises(ConfigError, match=r"scaled by 0\.18215, the VAE .* by 0\.5"):
        import_official(corpus.config(tmp_path / "cache", vae=vae))
    import_official(corpus.config(tmp_path / "cache", vae=vae, scaling_factor=0.5))
    cache = LatentCache(str(tmp_path / "cache"))
    assert len(cache.vae_digest) == 64
    torch.testing.assert_close(cache.moments("clip-00000", None, [0])[0, 0] * 0.5, corpus.latents[0][0])


def test_a_data_set_of_another_kind_of_corpus(tmp_path):
    data = make_two_cameras(tmp_path / "data", num_clips=1)
    with pytest.raises(InputError, match="corpus of kind 'synthetic'"):
        import_official(OfficialLatentsConfig(data=data, corpus=str(tmp_path), output=str(tmp_path / "cache")))


class Runs:
    """Unpickling it would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.path}",)


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_no_file_runs_code(tmp_path):
    trap = tmp_path / "ran"
    with pytest.raises(LatentsError, match="not a plain tensor"):
        read_latents(saved(Runs(trap)))
    with pytest.raises(LatentsError, match="not a plain tensor"):
        read_latents(pickle.dumps(Runs(trap)))
    with pytest.raises(LatentsError, match="not a plain tensor"):
        read_latents(saved({"latents": torch.zeros(2, *SHAPE), "more": Runs(trap)}))
    assert not trap.exists()


@pytest.mark.parametrize(
    "value",
    [
        {"latents": torch.zeros(2, *SHAPE)},
        [torch.zeros(2, *SHAPE)],
        torch.zeros(2, *SHAPE).to_sparse(),
        torch.zeros(2, 4, 4),
        torch.zeros(0, *SHAPE),
        torch.zeros(2, *SHAPE, dtype=torch.int64),
        torch.full((2, *SHAPE), np.nan),
        torch.nn.Parameter(torch.zeros(2, *SHAPE)),
        torch.zeros(1).expand(10**9, *SHAPE),
    ],
    ids=["dict", "list", "sparse", "three axes", "empty", "integers", "nan", "parameter", "stretched"],
)
def test_only_one_plain_finite_tensor_will_do(value):
    with pytest.raises(LatentsError):
        read_latents(saved(value))


def test_a_file_that_unpacks_to_gigabytes_is_refused_before_it_does(monkeypatch):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 22))
    assert len(packed.getvalue()) < 1 << 16
    monkeypatch.setattr("training.official_latents.MAX_TENSOR_BYTES", 1 << 20)
    with pytest.raises(LatentsError, match="unpacks to"):
        read_latents(packed.getvalue())
