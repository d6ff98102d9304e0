"""The plan: pure, shuffled, balanced, and complete."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingest.inspected import InspectedClip, VideoHeader
from ingest.plan import Plan, make_plan
from ingest.recipe import NOT_IDENTITY, Recipe
from ingest.schema import Clip, SourceVideo


def inspected(
    name: str, frames: int = 100, *, content: str = "", label: str = "", broken: bool = False
) -> InspectedClip:
    video = SourceVideo(path=f"{name}.mp4", sha256=content or f"sha-{name}", size_bytes=0 if broken else 9)
    header = None if broken else VideoHeader(width=640, height=480, fps=30.0, num_frames=frames)
    return InspectedClip(clip=Clip(source_id=name, videos=(video,), label=label), headers=(header,))


def plan_of(items, **recipe) -> Plan:
    return make_plan(items, corpus="folder", name="test", recipe=Recipe(**recipe))


def samples(plan: Plan):
    return [clip for shard in plan.shards for clip in shard.clips]


MANY = [inspected(f"{index:03d}", 40 + 37 * index % 260, label=f"task-{index % 4}") for index in range(120)]


@given(st.permutations(MANY[:20]))
def test_the_order_of_inputs_does_not_matter(items):
    assert plan_of(items, shard_bytes=30 << 20) == plan_of(MANY[:20], shard_bytes=30 << 20)


def test_identity_follows_content_and_recipe_only():
    base = plan_of(MANY).plan_id
    assert plan_of(MANY[1:]).plan_id != base
    assert plan_of(MANY, jpeg_quality=80).plan_id != base
    assert plan_of(MANY, seed=1).plan_id != base
    changed = {"max_failure_share": 0.9, "item_timeout_s": 5.0, "item_memory_bytes": 1 << 30}
    assert set(changed) == NOT_IDENTITY
    assert plan_of(MANY, **changed) == plan_of(MANY)


def test_every_clip_is_planned_once_in_shards_of_equal_size():
    plan = plan_of(MANY, shard_bytes=40 << 20)
    assert Counter(clip.clip.source_id for clip in samples(plan)) == {item.clip.source_id: 1 for item in MANY}
    sizes = [shard.estimated_bytes for shard in plan.shards]
    assert len(sizes) > 8
    assert max(sizes) - min(sizes) <= max(clip.estimated_bytes for clip in samples(plan))
    assert max(sizes) < 1.3 * (40 << 20)
    order = [clip.clip.source_id for clip in plan.shards[0].clips]
    assert order != sorted(order)


def test_long_sources_are_cut_into_even_spans_that_cover_them():
    plan = plan_of([inspected("long", 1001)], max_frames_per_clip=300)
    spans = sorted((clip.first_frame, clip.end_frame) for clip in samples(plan))
    assert spans == [(0, 250), (250, 500), (500, 750), (750, None)]
    assert len({clip.key for clip in samples(plan)}) == 4
    assert len({clip.split for clip in samples(plan_of([inspected("long", 1001)], validation_share=0.5))}) == 1


def test_only_the_first_of_equal_contents_is_kept():
    items = [inspected("b", content="x"), inspected("a", content="x"), inspected("c", content="y")]
    plan = plan_of(items)
    failures = [failure for shard in plan.shards for failure in shard.failures]
    assert sorted(clip.clip.source_id for clip in samples(plan)) == ["a", "c"]
    assert [(failure.source_id, failure.reason, failure.stage) for failure in failures] == [("b", "duplicate", "plan")]
    assert plan.num_clips == 3


def test_broken_files_are_left_to_the_build_even_when_equal():
    """Two empty files are two empty files, not one and its copy."""
    plan = plan_of([inspected("a", content="e3b0", broken=True), inspected("b", content="e3b0", broken=True)])
    assert len(samples(plan)) == 2


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25])
def test_validation_takes_its_share_of_every_label(share):
    plan = plan_of(MANY, validation_share=share)
    held = Counter(clip.clip.label for clip in samples(plan) if clip.split == "validation")
    assert sum(held.values()) == pytest.approx(share * len(MANY), abs=1)
    for label in ("task-0", "task-1", "task-2", "task-3"):
        assert held[label] == pytest.approx(share * len(MANY) / 4, abs=1)


def test_another_seed_gives_another_split():
    chosen = [
        {
            clip.clip.source_id
            for clip in samples(plan_of(MANY, validation_share=0.2, seed=seed))
            if clip.split != "train"
        }
        for seed in range(3)
    ]
    assert len({frozenset(names) for names in chosen}) == 3


def test_plan_survives_its_file():
    plan = plan_of([*MANY, inspected("dup", content="sha-000")], validation_share=0.1)
    assert Plan.parse(plan.to_json()) == plan
    assert plan.summary()["clips"] == 121 and plan.summary()["refused"] == 1
