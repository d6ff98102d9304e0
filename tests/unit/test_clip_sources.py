"""Named mixtures of clips, the rule that a data set's name decides, and what annotated corpora give."""

from __future__ import annotations

import pytest

from infra.errors import ConfigError
from ingest.windows import WindowRule
from tests.helpers_clips import Take, make_takes
from training.data.video_clips import VideoClipDataset, VideoDataConfig
from training.recipes.mixtures import (
    PAPER_TABLE8,
    annotated_sources,
    calvin_mix,
    cameras_of,
    paper_table8,
    robot_mix,
    rule_of,
)
from training.recipes.sources import clip_sources, with_latents

CALVIN_URLS = {name: f"data/{name}" for name in ("calvin", "rt1", "bridge", "sthv2")}
LINSPACE = WindowRule(kind="linspace", num_frames=16, max_source_frames=100, short="repeat")
EVERY_SECOND = WindowRule(num_frames=16, stride=2, start_every=2, short="repeat")


def test_the_calvin_mixture():
    mix = {source.name: source for source in calvin_mix(CALVIN_URLS)}
    assert {name: source.probability for name, source in mix.items()} == {
        "sthv2": 0.4,
        "bridge": 0.2,
        "rt1": 0.2,
        "calvin": 0.2,
    }
    assert [mix[name].rule for name in ("sthv2", "bridge", "rt1", "calvin")] == [*[LINSPACE] * 3, EVERY_SECOND]
    assert mix["calvin"].cameras == {"0": 0.75, "1": 0.25} and not mix["bridge"].cameras
    assert mix["rt1"].url == "data/rt1" and {source.loss_coefficient for source in mix.values()} == {1.0}
    with pytest.raises(ConfigError, match="urls lack calvin"):
        calvin_mix({"sthv2": "a", "bridge": "b", "rt1": "c"})
    with pytest.raises(ConfigError, match="no data set droid"):
        calvin_mix({**CALVIN_URLS, "droid": "d"})


def test_the_robot_mixture():
    names = [f"xbot_{number:04d}" for number in (318, *range(401, 412))]
    mix = robot_mix({name: name for name in names})
    assert [source.name for source in mix] == names
    assert [round(100 * source.probability) for source in mix] == [8, 8, 9, 6, 6, 6, 9, 9, 9, 9, 9, 12]
    assert not mix[0].cameras and mix[1].cameras == {"0": 0.5, "1": 0.25, "2": 0.25}
    with pytest.raises(ConfigError, match="12 data sets, 1 are given"):
        robot_mix({"xbot": "a"})


def test_table_8_says_what_is_not_confirmed():
    assert sum(row.share for row in PAPER_TABLE8) == pytest.approx(1.0)
    assert not any(row.share_confirmed or row.num_episodes_confirmed for row in PAPER_TABLE8)
    episodes = {row.name: row.num_episodes for row in PAPER_TABLE8}
    assert episodes["sthv2"] + 2048 == 193_690
    robots = ("rt1", "bridge", "bcz", "taco_play", "jaco_play", "calvin", "metaworld")
    assert sum(episodes[name] for name in robots) == 179_074
    assert len(paper_table8({row.name: "d" for row in PAPER_TABLE8})) == 10


@pytest.mark.parametrize(
    ("name", "stride", "kind"),
    [
        ("xbot_0318_cloth", 5, "windows"),
        ("xhand_1125_pour", 2, "windows"),  # 10 in the official list, which a later line there overrules
        ("bridge", 2, "linspace"),
        ("metaworld", 2, "windows"),
    ],
)
def test_the_name_decides_the_rule(name, stride, kind):
    rule = rule_of(name, num_frames=8)
    assert (rule.kind, rule.num_frames, rule.short) == (kind, 8, "repeat")
    assert kind == "linspace" or (rule.stride, rule.start_every) == (stride, stride)
    assert set(cameras_of(name)) == ({"0", "1"} if "xhand" in name else set())


def test_several_annotated_sets_in_one_data_set(tmp_path):
    takes = [
        Take(24, "bridge"),
        Take(20, "xhand", cameras=("0", "1", "2")),
        Take(9, "xhand_left"),
        Take(101, "bridge"),
    ]
    url = make_takes(tmp_path / "d", takes)
    sources = annotated_sources(url)
    assert [(source.name, source.probability, source.cameras) for source in sources] == [
        ("bridge", 1.0, {}),
        ("xhand", 1.0, {"0": 0.75, "1": 0.25}),
        ("xhand_left", 1.0, {}),
    ]
    dataset = VideoClipDataset(VideoDataConfig(sources=sources, image_size=16))
    assert [len(windows) for windows in dataset.windows] == [1, 10, 5]
    assert dataset.inputs == (dataset.windows[0].dataset.version,)
    shares = dict.fromkeys(("bridge", "xhand", "xhand_left"), 2.0)
    assert {source.probability for source in annotated_sources(url, probabilities=shares)} == {2.0}
    assert annotated_sources(url, rules={"xhand": EVERY_SECOND})[1].rule == EVERY_SECOND
    with pytest.raises(ConfigError, match="probabilities lack xhand"):
        annotated_sources(url, probabilities={"bridge": 1.0})
    with pytest.raises(ConfigError, match=r"rules name droid; .* has the labels bridge, xhand, xhand_left"):
        annotated_sources(url, rules={"droid": EVERY_SECOND})


def test_addresses_become_sources_named_after_their_folders():
    sources = clip_sources(["/a/bridge", "s3://b/rt1", "/c/rt1"])
    assert [source.name for source in sources] == ["bridge", "s3://b/rt1", "/c/rt1"]
    assert with_latents(sources[:1], {"/a/bridge": "/cache"})[0].latents == "/cache"
    with pytest.raises(ConfigError, match="/c/rt1"):
        with_latents(sources, {"/a/bridge": "/cache"})
    with pytest.raises(ConfigError, match="no data set"):
        clip_sources([])
