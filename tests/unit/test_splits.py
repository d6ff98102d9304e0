"""Held-out clips: exact counts where a paper gives them, a share of every label elsewhere, or the source's own."""

from collections import Counter

import pytest

from infra.errors import ConfigError
from ingest.recipe import Recipe
from ingest.schema import Clip, SourceVideo
from ingest.splits import draw_splits


def clips(data_set: str, number: int, **metadata: str) -> list[Clip]:
    return [
        Clip(
            source_id=f"{data_set}/{n:05d}",
            videos=(),
            label=f"task-{n % 7}",
            metadata={"dataset": data_set, **metadata},
        )
        for n in range(number)
    ]


def held_out(members: list[Clip], **recipe) -> Counter[str]:
    splits = draw_splits(members, Recipe(**recipe), "annotated")
    assert set(splits) == {clip.source_id for clip in members}
    return Counter(str(clip.metadata["dataset"]) for clip in members if splits[clip.source_id] == "validation")


def test_the_papers_counts_are_met_to_the_clip_and_the_rest_gives_three_percent():
    members = clips("bridge", 28_935) + clips("sthv2", 9_000) + clips("rt1", 4_000) + clips("xhand", 150)
    counts = held_out(members, split_by="paper", seed=3)
    assert (counts["bridge"], counts["sthv2"]) == (5558, 2048)
    assert abs(counts["rt1"] - 120) <= 1 and counts["xhand"] in (4, 5)


def test_own_counts_go_before_the_share_and_leave_it_to_the_others():
    members = clips("a", 97) + clips("b", 1000)
    assert held_out(members, validation_counts={"a": 13}, validation_share=0.1) == {"a": 13, "b": 100}
    assert held_out(members, validation_counts={"a": 13}) == {"a": 13}


def test_every_label_gives_its_part_of_a_count():
    members = clips("a", 700)
    splits = draw_splits(members, Recipe(validation_counts={"a": 70}), "annotated")
    labels = Counter(clip.label for clip in members if splits[clip.source_id] == "validation")
    assert sum(labels.values()) == 70 and set(labels.values()) <= {9, 10, 11}


def test_another_seed_holds_out_others_and_the_order_of_clips_does_not_matter():
    members = clips("a", 100)
    first = draw_splits(members, Recipe(validation_share=0.2), "annotated")
    assert draw_splits(members[::-1], Recipe(validation_share=0.2), "annotated") == first
    assert draw_splits(members, Recipe(validation_share=0.2, seed=1), "annotated") != first


def test_the_sources_own_split_is_taken():
    members = clips("a", 4, source_split="train") + clips("b", 3, source_split="validation")
    assert held_out(members, split_by="source") == {"b": 3}


def test_a_count_above_what_is_there_and_an_unknown_data_set_are_named():
    with pytest.raises(ConfigError, match=r"5558 clips of 'bridge' shall be held out, it has 4"):
        held_out(clips("bridge", 4), split_by="paper")
    with pytest.raises(ConfigError, match=r"names 'bridgge'\. Data sets here: bridge"):
        held_out(clips("bridge", 4), validation_counts={"bridgge": 1})


def test_segments_of_one_recording_are_held_out_together():
    video = (SourceVideo(path="talk.mp4"),)
    members = [Clip(source_id=f"talk@{n}", videos=video, start_s=n, end_s=n + 1) for n in range(40)]
    members += [Clip(source_id=f"{n}", videos=(SourceVideo(path=f"{n}.mp4"),)) for n in range(40)]
    for seed in range(5):
        splits = draw_splits(members, Recipe(validation_share=0.3, seed=seed), "folder")
        assert len({splits[f"talk@{n}"] for n in range(40)}) == 1
    shared = [
        Clip(source_id=f"e{n}", videos=(SourceVideo(path="file-000.mp4", start_s=n, end_s=n + 1),)) for n in range(40)
    ]
    assert set(draw_splits(shared, Recipe(validation_share=0.3), "lerobot").values()) == {"train", "validation"}
