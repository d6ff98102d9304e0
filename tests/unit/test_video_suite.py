"""The video prediction suite end to end, on textures that travel the way their sentence says."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from evaluation.gate import decide, video_rule
from evaluation.main import parse_config
from evaluation.result import EvaluationResult, Item
from evaluation.suites import find_suite
from evaluation.video_quality import parts
from evaluation.video_quality import suite as suite_module
from evaluation.video_quality.clips import ClipSet
from evaluation.video_quality.config import VideoQualityConfig
from evaluation.video_quality.suite import evaluate, run
from evaluation.video_quality.text import score_part, wrong_arms
from infra.errors import ConfigError, DataError, InputError
from infra.media_decode import decode_video
from ingest.schema import frame_suffix
from ingest.shard import Member
from ingest.windows import ClipSource, WindowRule
from tests.helpers_data import jpeg, npz, pretty_json, sample_record, write_dataset
from tests.helpers_tvp import tiny_model
from training.export import save_video_export

SIDE, NUM_FRAMES, CLIP = 24, 12, 5
WAYS = {"move left": -2, "move right": 2, "stay a little left": -1}
LABELS = {"move left": "left", "move right": "right", "stay a little left": "slow"}


class Traveller:
    """A video predictor that knows what the sentences mean: it carries the first picture along, `gain` too far."""

    num_frames, image_size = CLIP, SIDE

    def __init__(self, gain=0, digest="a" * 64):
        self.gain, self.digest = gain, digest
        self.calls = []

    def predict(self, images_BHWC, text, *, num_steps=30, guidance=(1.0, 3.0), unit_noise=None, seed=0):
        self.calls.append((num_steps, guidance, len(text)))
        error = self.gain + (num_steps == 1)
        return np.stack([travel(image, WAYS[told] + error) for image, told in zip(images_BHWC, text, strict=True)])

    def reconstruct(self, videos_BTHWC):
        return (videos_BTHWC // 8) * 8 + 4

    def validation_losses(self, videos_BTHWC, text, *, keys, num_draws=8, seed=0, copy_first_frame=False):
        assert len(videos_BTHWC) == len(text) == len(keys)
        if copy_first_frame:
            shown = np.repeat(videos_BTHWC[:, :1], CLIP, axis=1)
        else:
            shown = self.predict(videos_BTHWC[:, 0], text)
        noise = [np.random.default_rng([seed, *key.encode()]).normal(size=num_draws).mean() for key in keys]
        errors = np.square(shown / 255 - videos_BTHWC / 255).mean(axis=(1, 2, 3, 4))
        return (errors + 0.001 * np.abs(noise)).astype(np.float32)


def travel(image, step, count=CLIP):
    return np.stack([np.roll(image, step * frame, axis=1) for frame in range(count)])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """18 episodes, three sentences at equal first pictures; every third start is held out."""
    texts = list(WAYS)

    def sample(number):
        start, text = number // 3, texts[number % 3]
        random = np.random.default_rng(start)
        blob = np.zeros((SIDE, SIDE, 3))
        column = int(random.integers(6, 18))
        blob[8:16, column - 2 : column + 3] = 160
        image = (blob + random.uniform(20, 60, (1, 1, 3))).astype(np.uint8)
        frames = travel(image, WAYS[text], NUM_FRAMES)
        position = np.stack([(column + WAYS[text] * np.arange(NUM_FRAMES)) % SIDE / 100] * 3, axis=1)
        rows = np.concatenate([position, np.zeros((NUM_FRAMES, 1))], axis=1).astype(np.float32)
        split = "validation" if start % 3 == 0 else "train"
        record = sample_record(
            number, "frames", NUM_FRAMES, SIDE, metadata={"split": split}, text=text, has_arrays=True
        ).model_copy(update={"label": LABELS[text]})
        return [
            Member("json", pretty_json(record.to_json())),
            *(Member(frame_suffix(index), jpeg(frame), index) for index, frame in enumerate(frames)),
            Member("txt", text.encode()),
            Member("npz", npz({"proprioception": rows})),
        ]

    return write_dataset(tmp_path_factory.mktemp("travel"), 54, NUM_FRAMES, sample, clips_per_shard=27)


def config_of(data, output, **changes):
    rule = WindowRule(num_frames=CLIP, stride=1, start_every=6)
    fields = {"sources": (ClipSource(name="travel", url=data, split="validation", rule=rule),)}
    fields |= {"model": "traveller", "num_clips": 18, "num_steps": 4, "num_resamples": 20, "output": str(output)}
    fields |= {"counts": (6, 1000), "num_pictures": 1, "wrong_text": "all", "batch_size": 4}
    return VideoQualityConfig(**(fields | changes))


@pytest.fixture(scope="module")
def rated(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("rated")
    config = config_of(data, output)
    return config, evaluate(config, Traveller()), output


def test_the_model_beats_copying_and_the_arms_bracket_it(rated):
    config, result, _ = rated
    assert (result.suite, result.primary_metric, result.higher_is_better) == (
        "video-prediction",
        "validation_loss",
        False,
    )
    assert len(result.items) == 18
    copy, ceiling = result.arm_scores["copy-first-frame"], result.arm_scores["autoencoder"]
    assert result.scores["validation_loss"].value < copy["validation_loss"].value
    for metric in ("psnr", "ssim", "moving_psnr", "change_cosine"):
        score = result.scores[metric]
        assert score.value > copy[metric].value
        assert score.low <= score.value <= score.high
        assert score.value > result.scores[f"{metric}_one_step"].value
    assert copy["change_cosine"].value == 0.0
    assert "validation_loss" not in ceiling
    assert ceiling["psnr"].value > 10 * np.log10(255**2 / 4**2)  # no level is off by more than 4
    assert result.scores["psnr"].method == "stratified bootstrap over clips"
    assert config.digest() and result.seeds == (0,)


def test_motion_error_has_its_floor_on_true_frames(rated):
    _, result, _ = rated
    floor = result.arm_scores["true-frames"]
    assert set(floor) == {"motion_error_m"}
    copied = result.arm_scores["copy-first-frame"]["motion_error_m"].value
    assert floor["motion_error_m"].value < result.scores["motion_error_m_one_step"].value
    assert floor["motion_error_m"].value < 0.5 * copied
    assert result.scores["motion_error_m"].value < 0.6 * copied


def test_each_wrong_sentence_is_a_paired_arm(rated):
    _, result, _ = rated
    wrong = result.arms["text:move left"]
    assert {item.stratum for item in wrong} == {"right", "slow"}
    assert len(wrong) == 12
    right = {item.item_id: item.metrics["validation_loss"] for item in result.items}
    score = result.scores["text/right-minus-wrong:left"]
    assert score.value == pytest.approx(
        np.mean([item.metrics["validation_loss"] - right[item.item_id] for item in wrong])
    )
    assert 0 < score.low <= score.value <= score.high
    assert score.count == 12
    pairs = {name for name in result.scores if name.startswith("text/right-minus-wrong:") and "/" in name[5:]}
    assert "text/right-minus-wrong:left/right" in pairs and len(pairs) == 6
    assert result.scores["text/right-minus-wrong"].count == 18


def test_set_scores_are_named_after_their_features_and_say_what_they_rest_on(rated):
    _, result, _ = rated
    name = "frechet/random-conv3d-v1"
    score = result.scores[name]
    assert score.count == 18
    assert score.method.endswith("frame 0 left out; not possible with 18 clips: 1000")
    assert result.scores[f"{name}/6"].count == 6
    assert f"{name}/1000" not in result.scores
    assert score.value < result.scores[f"{name}/one-step"].value
    assert score.value < result.arm_scores["copy-first-frame"][name].value
    assert "kernel/random-conv3d-v1" in result.scores
    assert not {"FVD", "KVD", "lpips"} & set(result.scores)


def test_pictures_and_clips_are_there(rated):
    _, result, output = rated
    titles = list(result.artefacts)
    assert len(titles) == 2 and all("travel/clip-" in title for title in titles)
    strip, clip = (output / path for path in result.artefacts.values())
    assert strip.read_bytes()[:4] == b"\x89PNG"
    assert decode_video(clip.read_bytes()).shape[0] == CLIP


def test_clips_cover_labels_and_episodes_before_they_repeat_one(data):
    rule = WindowRule(num_frames=CLIP, stride=1, start_every=6)
    source = ClipSource(name="travel", url=data, split="validation", rule=rule)
    few, many = ClipSet([source], num_clips=9), ClipSet([source])
    assert len(many) == 36
    assert few.chosen == many.chosen[:9]
    assert [clip.stratum for clip in few.chosen] == ["left", "right", "slow"] * 3
    episodes = [clip.item_id.rsplit("/", 1)[0] for clip in many.chosen]
    assert len(set(episodes[:18])) == 18
    assert {clip.item_id.rsplit("/", 1)[1] for clip in many.chosen[:18]} == {"00000"}
    assert few.digest != many.digest
    dense = source.model_copy(update={"rule": rule.model_copy(update={"start_every": 2})})
    first = [clip.item_id[-5:] for clip in ClipSet([dense]).chosen if clip.item_id.startswith("travel/clip-00000/")]
    assert first == ["00000", "00004", "00002", "00001", "00005", "00003"]


def test_items_do_not_depend_on_the_batch(data, rated, tmp_path):
    _, result, _ = rated
    alone = evaluate(config_of(data, tmp_path, batch_size=1), Traveller())
    assert alone.items == result.items
    assert alone.arms == result.arms
    assert alone.suite_version == result.suite_version and alone.data_digest == result.data_digest


def test_a_finished_output_is_read_and_belongs_to_one_model_and_one_config(rated, data):
    config, result, output = rated
    silent = Traveller()
    assert evaluate(config, silent) == result
    assert silent.calls == []
    with pytest.raises(InputError, match="rates aaaaaaaaaaaa, but traveller now is bbbbbbbbbbbb"):
        evaluate(config, Traveller(digest="b" * 64))
    assert EvaluationResult.parse(json.loads((output / "result.json").read_text())) == result


def test_a_killed_evaluation_resumes_at_its_last_part(data, rated, tmp_path, monkeypatch):
    _, result, _ = rated
    monkeypatch.setattr(suite_module, "PART_CLIPS", 6)
    config = config_of(data, tmp_path)

    class Dies(Traveller):
        def reconstruct(self, videos_BTHWC):
            if sum(steps == 4 for steps, _, _ in self.calls) > 2:
                raise KeyboardInterrupt
            return super().reconstruct(videos_BTHWC)

    with pytest.raises(KeyboardInterrupt):
        evaluate(config, Dies())
    assert parts.load_part(str(tmp_path), 0, model_digest="a" * 64) is not None
    assert not (tmp_path / "result.json").exists()
    with pytest.raises(InputError, match="holds parts of a rating of aaaaaaaaaaaa, the model is bbbbbbbbbbbb"):
        evaluate(config, Traveller(digest="b" * 64))
    second = Traveller()
    resumed = evaluate(config, second)
    assert resumed.items == result.items and resumed.scores == result.scores
    assert sum(count for steps, _, count in second.calls if steps == 1) == 12


def test_frame_0_counts_only_when_asked(data, tmp_path, rated):
    _, without, _ = rated
    result = evaluate(config_of(data, tmp_path, include_first_frame=True, num_pictures=0), Traveller())
    assert result.arm_scores["copy-first-frame"]["psnr"].value > without.arm_scores["copy-first-frame"]["psnr"].value
    assert "frame 0 included" in result.scores["frechet/random-conv3d-v1"].method
    assert result.suite_version != without.suite_version


def test_next_and_no_wrong_sentence(data, tmp_path, rated):
    chosen = ClipSet(rated[0].sources, num_clips=18).chosen
    (arm,) = wrong_arms(chosen, "next", max_sentences=2)
    assert arm.sentences["move left"] == "move right"
    assert arm.sentences["stay a little left"] == "move left"
    assert wrong_arms(chosen, "none", max_sentences=2) == []
    assert wrong_arms(chosen, "auto", max_sentences=2) == [arm]
    assert len(wrong_arms(chosen, "auto", max_sentences=3)) == 3
    assert wrong_arms(chosen[::3], "all", max_sentences=2) == []
    with pytest.raises(ConfigError, match="with 3 sentences, more than 2"):
        wrong_arms(chosen, "all", max_sentences=2)


def test_names_of_scores_are_what_trackers_accept():
    assert score_part("pick 7up can, don't spill") == "pick 7up can_ don_t spill"
    assert score_part("") == "none"
    long = score_part("put " * 40)
    assert len(long) < 80 and long != score_part("put " * 41)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"features": ["fvd"]}, "feature 'fvd': set i3d_weights"),
        ({"features": ["inception"]}, "unknown feature 'inception'"),
        ({"lpips_weights": "alex.pth"}, "lpips needs both"),
        ({"counts": [1]}, "hold a number below 2"),
        ({"colour": 1}, "unknown config key 'colour'"),
    ],
)
def test_names_without_their_weights_are_refused(changes, words):
    source = {"name": "a", "url": "data"}
    fields = {"kind": "video-prediction", "model": "m", "sources": [source], "output": "out"}
    assert parse_config(fields).num_draws == 8
    with pytest.raises(ConfigError, match=words):
        parse_config(fields | changes)


def test_errors_are_one_line(data, tmp_path, rated):
    with pytest.raises(InputError, match="holds no finished export") as caught:
        run(config_of(data, tmp_path / "a", model=str(tmp_path / "no-model")))
    assert "\n" not in str(caught.value)
    longer = Traveller()
    longer.num_frames = 16
    with pytest.raises(ConfigError, match="cuts clips of 5 frames, the model predicts 16"):
        evaluate(config_of(data, tmp_path / "b"), longer)
    save_file({"conv": torch.zeros(1)}, tmp_path / "no-i3d.safetensors")
    with pytest.raises(InputError, match=r"no-i3d\.safetensors does not fit: Conv3d_1a_7x7\.conv3d\.weight is missing"):
        evaluate(config_of(data, tmp_path / "c", i3d_weights=str(tmp_path / "no-i3d.safetensors")), Traveller())

    class Broken(Traveller):
        def validation_losses(self, videos_BTHWC, text, *, keys, **options):
            return np.full(len(keys), np.nan, np.float32)

    with pytest.raises(DataError, match="validation loss of clip travel/clip-00000/00000 is nan"):
        evaluate(config_of(data, tmp_path / "d"), Broken())


def test_without_recorded_hands_there_is_no_motion_error(data, tmp_path):
    result = evaluate(config_of(data, tmp_path, probe={"max_frames": 0}, num_clips=6, num_pictures=0), Traveller())
    assert "true-frames" not in result.arms
    assert not any(name.startswith("motion") for name in result.scores)


def test_a_real_model_is_rated_and_read_again(data, tmp_path):
    model = str(tmp_path / "model")
    digest = save_video_export(model, tiny_model(), card="A test.", inputs=["data"])
    rule = WindowRule(num_frames=4, stride=2, start_every=12)
    source = ClipSource(name="travel", url=data, split="validation", rule=rule)
    config = config_of(
        data, tmp_path / "a", model=model, sources=(source,), num_clips=2, num_steps=2, num_draws=1,
        guidance=(1.0, 1.0), wrong_text="next", num_pictures=0,
    )  # fmt: skip
    result = run(config)
    assert result.model_digest == digest and digest in result.inputs
    assert set(result.arms) == {"copy-first-frame", "autoencoder", "true-frames", "text:next"}
    assert run(config) == result
    alone = run(config.model_copy(update={"output": str(tmp_path / "b"), "batch_size": 1}))
    for together, single in zip(result.items, alone.items, strict=True):
        assert together.metrics["validation_loss"] == pytest.approx(single.metrics["validation_loss"], rel=1e-4)
        assert together.metrics["psnr"] == pytest.approx(single.metrics["psnr"], abs=0.02)


def rating(losses, *, digest, copied=1.0, psnr=20.0):
    items = tuple(
        Item(item_id=f"c/{n}", stratum="a", metrics={"validation_loss": float(loss), "psnr": psnr})
        for n, loss in enumerate(losses)
    )
    arm = tuple(item.model_copy(update={"metrics": {"validation_loss": copied}}) for item in items)
    return EvaluationResult(
        suite="video-prediction", suite_version="1", model="m", model_digest=digest * 64, data_digest="d" * 64,
        code_version="0", primary_metric="validation_loss", higher_is_better=False, seeds=(0,), items=items, scores={},
        arms={"copy-first-frame": arm},
    )  # fmt: skip


def test_the_gate_wants_a_lower_loss_than_the_champion_and_than_copying():
    losses = np.random.default_rng(0).normal(0.3, 0.05, 30)
    champion = rating(losses, digest="c")
    better, worse = rating(losses - 0.05, digest="a"), rating(losses + 0.05, digest="b")
    assert decide(better, champion, video_rule()).promote
    refused = decide(worse, champion, video_rule())
    assert not refused.promote and "the interval is not above 0" in refused.reasons[0]
    assert not decide(rating(losses - 0.05, digest="a", psnr=19.0), champion, video_rule()).promote
    lazy = decide(rating(losses, digest="a", copied=0.2), None, video_rule())
    assert not lazy.promote and "copy-first-frame" in lazy.reasons[0]
    assert decide(rating(losses, digest="a"), None, video_rule()).promote


def test_the_suite_is_known_by_name():
    suite = find_suite("video-prediction")
    assert (suite.rates, suite.primary_metric) == ("video", "validation_loss")
