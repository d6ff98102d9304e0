"""Masked autoencoding runs: what they start from, what they see, and that a killed one ends with the same bits."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from infra.config import override
from infra.digests import sha256_file, sha256_json
from infra.errors import ConfigError, InputError
from ingest.reader import ShardDataset
from tests.helpers_data import make_episode_dataset, make_frames_dataset
from tests.helpers_models import CONFIG as RSP_SIZES
from tests.helpers_models import export_rsp, perturbed
from training.checkpoint import CHECKSUMS, newest_valid
from training.data.frames import FrameConfig, FrameDataset
from training.data.pixels import normalise
from training.export import load_encoder
from training.launch import launch
from training.loop import Group
from training.main import parse_config
from training.models.common.patches import patch_statistics, patchify
from training.models.common.vit import EncoderConfig, VisionTransformer
from training.models.views.mae import MAE
from training.plan import dry_run
from training.recipes import mae

TIMINGS = {"step_s", "wait_s"}
SMALL = (
    "model.image_size=32", "data.image_size=32", "model.embed_dim=48", "model.depth=2", "model.num_heads=4",
    "model.patch_size=8", "model.decoder_embed_dim=16", "model.decoder_depth=1", "model.decoder_num_heads=2",
    "global_batch_size=4", "micro_batch_size=2", "schedule.steps=6", "schedule.warmup_steps=2",
    "checkpoint.every_steps=2", "optim.ema_decay=0.9", "log_every_steps=1", "compute.workers=0",
    "compute.matmul=default",
)  # fmt: skip


def small(data: str, output: object, *assignments: str, initial: str = "") -> mae.MAERunConfig:
    """The tiny recipe, smaller still: 6 steps of 4 clips, saved every 2, in this process."""
    return override(mae.tiny(data=data, output=str(output), initial=initial), (*SMALL, *assignments))


def launch_in_child(value: dict, fault: str) -> None:
    os.environ["FOREFRAME_FAULT"] = fault
    torch.set_num_threads(1)
    launch(parse_config(value))


def run_once(config: mae.MAERunConfig, fault: str = "") -> int | None:
    """Exit code of the run in a process of its own; negative: the signal that ended it."""
    context = multiprocessing.get_context("forkserver")  # torch is imported once, each child is a clean copy
    context.set_forkserver_preload(["training.launch", "training.recipes.mae", "torch._dynamo"])
    child = context.Process(target=launch_in_child, args=(config.to_json(), fault))
    child.start()
    child.join(180)
    return child.exitcode


def fingerprint(config: mae.MAERunConfig) -> dict[str, object]:
    """Everything a run leaves, down to the bit, but for times and addresses."""
    output, last = Path(config.output), Path(str(newest_valid(config.checkpoints_url())))
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((output / "summary.json").read_text())
    return {
        "checkpoint": {path.name: sha256_file(path) for path in sorted(last.iterdir()) if path.name != CHECKSUMS},
        "losses": [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines],
        "summary": {key: value for key, value in summary.items() if key not in ("output", "execution")},
        "export": sha256_file(output / "export" / "model.safetensors"),
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_frames_dataset(tmp_path_factory.mktemp("frames"), num_clips=6, num_frames=12, size=40)


def test_a_killed_run_ends_with_the_same_bits(data: str, tmp_path: Path) -> None:
    initial = str(tmp_path / "rsp")
    export_rsp(initial, perturbed(RSP_SIZES.model_copy(update={"depth": 2})))
    whole = small(data, tmp_path / "whole", initial=initial)
    assert run_once(whole) == 0
    killed = small(data, tmp_path / "killed", initial=initial)
    for fault in ("train.step:3", "export.before:1"):
        assert run_once(killed, fault) == -signal.SIGKILL, f"{fault} was not reached"
    assert run_once(killed) == 0
    assert fingerprint(killed) == fingerprint(whole)


def test_the_export_is_the_trained_encoder_and_names_its_inputs(data: str, tmp_path: Path) -> None:
    first = launch(small(data, tmp_path / "first", "optim.ema_decay=null"))
    again = small(data, tmp_path / "again", "schedule.steps=3", initial=str(tmp_path / "first" / "export"))
    second = launch(again)
    record = json.loads((tmp_path / "again" / "export" / "export.json").read_text())
    assert record["inputs"] == [ShardDataset(data).version, first["export"]] and record["kind"] == "vit-encoder"
    assert second["data_digest"] == sha256_json(record["inputs"])
    encoder = load_encoder(tmp_path / "again" / "export")
    assert type(encoder.config) is EncoderConfig and encoder.digest == second["export"]
    assert "started from" in (tmp_path / "again" / "export" / "README.md").read_text()

    # Decoder and all come back: the same weights, hence the same loss on the same frames.
    task = again.build_task()
    model, batch = task.build_model(), task._dataset.__getitems__([(0, 0), (0, 1)])
    task.prepare(model)
    trained = MAE(again.model)
    trained.load_state_dict(load_weights_of(tmp_path / "first" / "export"))
    assert task.loss(model, batch, torch.device("cpu")) == task.loss(trained, batch, torch.device("cpu"))
    pictures = np.random.default_rng(0).integers(0, 256, (2, 50, 40, 3), dtype=np.uint8)
    images = encoder.preprocess(pictures)
    assert not torch.equal(encoder.encode(images), model.encode(images)), "three steps change the weights"


def test_the_loss_falls_below_that_of_a_grey_guess(data: str, tmp_path: Path) -> None:
    longer = ("schedule.steps=120", "schedule.warmup_steps=12", "micro_batch_size=4", "checkpoint.every_steps=120")
    config = small(data, tmp_path / "o", *longer, "optim.ema_decay=null")
    summary = launch(config)
    task = config.build_task()
    trained = MAE(config.model)
    trained.load_state_dict(load_weights_of(tmp_path / "o" / "export"))
    batch = task._dataset.__getitems__([(1000, clip) for clip in range(6)])  # crops and masks that no step has seen
    with torch.no_grad():
        loss = float(task.loss(trained, batch, torch.device("cpu"))["loss"])
    patches = patchify(normalise(batch.images), config.model.patch_size)
    mean, deviation = patch_statistics(patches)
    grey = float(((patches - mean) / deviation).square().mean())
    assert grey > 0.9 and loss < 0.5 * grey and summary["last"]["loss"] < 0.5 * summary["first"]["loss"]


def load_weights_of(folder: Path) -> dict[str, torch.Tensor]:
    import safetensors.torch

    return safetensors.torch.load_file(folder / "model.safetensors")


def test_a_run_starts_from_official_files_and_other_encoders(data: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    encoder = VisionTransformer(EncoderConfig(image_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=4))
    torch.save({"model": encoder.state_dict()}, tmp_path / "vc1.pth")
    rsp = perturbed(RSP_SIZES.model_copy(update={"depth": 2}))
    export_rsp(tmp_path / "rsp", rsp)
    images = torch.randn(2, 3, 32, 32)
    for place, expected in ((tmp_path / "vc1.pth", encoder), (tmp_path / "rsp", rsp)):
        task = small(data, tmp_path / "o", initial=str(place)).build_task()
        torch.manual_seed(7)
        model = task.build_model()
        drawn = {name: value.clone() for name, value in model.state_dict().items() if name.startswith("decoder")}
        task.prepare(model)
        assert torch.equal(model.encode(images), expected.encode(images))
        assert all(torch.equal(model.state_dict()[name], value) for name, value in drawn.items())
    assert task.inputs[1] == json.loads((tmp_path / "rsp" / "export.json").read_text())["digest"]
    larger = small(data, tmp_path / "o", "model.image_size=40", "data.image_size=40", initial=str(tmp_path / "rsp"))
    model = larger.build_task().build_model()
    larger.build_task().prepare(model)
    assert model.pos_embed.shape == (1, 26, 48)


def test_weights_that_do_not_fit_or_have_changed_are_refused(data: str, tmp_path: Path) -> None:
    export_rsp(tmp_path / "rsp", perturbed())
    config = small(data, tmp_path / "o", initial=str(tmp_path / "rsp"))
    with pytest.raises(ConfigError, match=r"model\.depth is 2, the weights of .* are of 3"):
        config.build_task().prepare(MAE(config.model))
    with pytest.raises(InputError, match="neither a finished export nor a checkpoint"):
        small(data, tmp_path / "o", initial=str(tmp_path / "nowhere.pth")).build_task()

    torch.manual_seed(1)
    state = MAE(config.model).state_dict()
    torch.save({"model": state}, tmp_path / "mae.pth")
    run = small(data, tmp_path / "run", "schedule.steps=3", initial=str(tmp_path / "mae.pth"))
    launch(run)
    assert launch(run)["steps"] == 3
    torch.save({"model": state | {"norm.bias": state["norm.bias"] + 1}}, tmp_path / "mae.pth")
    with pytest.raises(InputError, match="was trained on data"):
        launch(run)


def test_episodes_of_layout_video_are_trained_on(tmp_path: Path) -> None:
    url = make_episode_dataset(tmp_path / "episodes", num_episodes=3, num_frames=8, size=48, layout="video")
    summary = launch(small(url, tmp_path / "o", "schedule.steps=3", "data.repeated_sampling=2"))
    assert summary["steps"] == 3 and np.isfinite(summary["last"]["loss"])
    assert load_encoder(tmp_path / "o" / "export").embed_dim == 48


def test_frames_are_those_of_the_clip_and_depend_on_their_visit_alone(tmp_path: Path) -> None:
    url = make_frames_dataset(tmp_path / "d", num_clips=4, num_frames=5, size=24)
    plain = FrameConfig(url=url, image_size=24, crop_scale=(1, 1), crop_ratio=(1, 1), flip=0, repeated_sampling=2)
    dataset, source = FrameDataset(plain), ShardDataset(url)
    stored = torch.from_numpy(source.frames(3, range(5))).permute(0, 3, 1, 2)
    drawn = [frame for epoch in range(12) for frame in dataset[(epoch, 3)].images]
    assert {frame.numpy().tobytes() for frame in drawn} == {frame.numpy().tobytes() for frame in stored}

    dataset = FrameDataset(plain.model_copy(update={"crop_scale": (0.2, 1.0), "flip": 0.5}))
    alone, together = dataset[(2, 3)], dataset.__getitems__([(0, 0), (2, 3), (1, 1)])
    assert torch.equal(together.images[2:4], alone.images)
    assert torch.equal(together.part(1, 2).images, alone.images) and together.part(1, 2).visits == alone.visits
    assert not torch.equal(alone.images[0], alone.images[1])
    other_seed = FrameDataset(dataset.config.model_copy(update={"seed": 1}))
    assert not torch.equal(other_seed[(2, 3)].images, alone.images)


def test_ranks_and_loader_workers_share_the_same_batches(data: str) -> None:
    dataset = FrameDataset(FrameConfig(url=data, image_size=16, repeated_sampling=2))

    def batches(workers: int = 0, start: int = 0, **group: int) -> list[list[torch.Tensor]]:
        options = {"global_batch_size": 4, "micro_batch_size": 3, "loader_workers": workers}
        steps = dataset.batches(steps=range(start, 5), group=Group(**group), **options)
        return [[torch.tensor(part.visits), part.images] for step in steps for part in step]

    def joined(parts: list[list[torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.cat([visits for visits, _ in parts]), torch.cat([images for _, images in parts])

    visits, images = joined(batches())
    assert visits.shape == (20, 2) and images.shape == (40, 3, 16, 16)
    assert [len(visits) for visits, _ in batches()] == [3, 1] * 5
    for other in (joined(batches(workers=1)), joined([*batches()[:4], *batches(start=2)])):
        assert torch.equal(other[0], visits) and torch.equal(other[1], images)
    ranks = [joined(batches(rank=rank, world_size=2)) for rank in (0, 1)]
    by_step = torch.stack([rank_visits.view(5, 2, 2) for rank_visits, _ in ranks], dim=1).view(20, 2)
    pictures = torch.stack([rank_images.view(5, 4, 3, 16, 16) for _, rank_images in ranks], dim=1).view(40, 3, 16, 16)
    assert torch.equal(by_step, visits) and torch.equal(pictures, images)


def test_masks_follow_the_visit(data: str, tmp_path: Path) -> None:
    task = small(data, tmp_path / "o", "data.repeated_sampling=2").build_task()
    batch = task._dataset.__getitems__([(0, 0), (0, 3), (1, 3)])
    whole = task.mask_noise(batch, torch.device("cpu"))
    part = task.mask_noise(batch.part(1, 3), torch.device("cpu"))
    assert whole.shape == (6, 16)
    assert torch.equal(whole[2:], part) and len(whole.unique(dim=0)) == 6


def flat(value: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(value, dict):
        return {prefix: value}
    parts = (flat(part, f"{prefix}.{key}" if prefix else key) for key, part in value.items())
    return {key: item for part in parts for key, item in part.items()}


def test_presets_differ_from_the_paper_in_sizes_and_counts_only() -> None:
    paper = flat(mae.vitb16(data="d", output="o", initial="i").to_json())
    for preset in (mae.tiny, mae.vc1):
        other = flat(preset(data="d", output="o", initial="i").to_json())
        different = {key for key in paper.keys() | other.keys() if paper.get(key) != other.get(key)}
        assert different and {key for key in different if not key.startswith(mae.SIZES_AND_COUNTS)} == set()


def test_the_published_preset_has_the_published_numbers() -> None:
    config = mae.vitb16(data="d", output="o")
    model, optim, schedule = config.model, config.optim, config.schedule
    assert (model.image_size, model.patch_size, model.embed_dim, model.depth, model.num_heads) == (224, 16, 768, 12, 12)
    assert (model.decoder_embed_dim, model.decoder_depth, model.decoder_num_heads) == (512, 8, 16)
    assert (model.mask_ratio, model.norm_pix_loss) == (0.75, True)
    assert (optim.betas, optim.weight_decay, optim.clip_norm) == ((0.9, 0.95), 0.05, None)
    assert optim.learning_rate(config.global_batch_size) == pytest.approx(1.5e-4 * 4096 / 256)
    assert (schedule.epochs, schedule.warmup_epochs, schedule.shape, schedule.min_lr) == (400, 40, "cosine", 0)
    assert (config.data.crop_scale, config.data.flip, config.data.repeated_sampling) == ((0.2, 1.0), 0.5, 1)
    with torch.device("meta"):
        parameters = sum(value.numel() for value in MAE(model).parameters())
    # Without the fixed position tables: patches, class token, 12 blocks, norm; projection, mask token, 8 blocks, norm,
    # head. A block of width D has 12 D**2 + 13 D.
    encoder = 16 * 16 * 3 * 768 + 768 + 768 + 12 * (12 * 768**2 + 13 * 768) + 2 * 768
    decoder = 768 * 512 + 512 + 512 + 8 * (12 * 512**2 + 13 * 512) + 2 * 512 + 512 * 768 + 768
    assert parameters == encoder + decoder == 111_655_680


def test_a_dry_run_counts_without_computing(data: str, tmp_path: Path) -> None:
    plan = dry_run(small(data, tmp_path / "o"))
    assert (plan["steps"], plan["clips"], plan["micro_batch_clips"]) == (6, 6, 2)
    assert plan["worker_memory_bytes"]["activations"] > 0
    with pytest.raises(ConfigError, match="image_size"):
        small(data, tmp_path / "o", "data.image_size=64")
