"""Words and configs of the simulator, without starting it."""

from __future__ import annotations

import pytest

from infra.errors import ConfigError
from ingest.simulators.config import SimulateConfig
from ingest.simulators.sentences import GOAL_MARKER_TASKS, TASK_SENTENCES


def test_every_task_has_a_sentence_of_its_own():
    assert len(TASK_SENTENCES) == 50
    assert len({sentence.lower() for sentence in TASK_SENTENCES.values()}) == 50
    assert all(sentence[0].isupper() and sentence.endswith(".") for sentence in TASK_SENTENCES.values())
    assert GOAL_MARKER_TASKS.issubset(TASK_SENTENCES)


def test_a_misspelt_task_is_refused_with_the_right_name():
    with pytest.raises(ConfigError, match="'drawer-open'"):
        SimulateConfig.parse({"output": "x", "tasks": ["drawer-opn"]})
    with pytest.raises(ConfigError, match="named twice"):
        SimulateConfig.parse({"output": "x", "tasks": ["reach", "reach"]})


def test_the_episode_digest_ignores_how_many_and_where():
    config = SimulateConfig(output="a", tasks=("reach",), episodes=3)
    assert config.episode_digest() == SimulateConfig(output="b", tasks=("push",), workers=1).episode_digest()
    assert config.episode_digest() != config.model_copy(update={"noise": 0.1}).episode_digest()


def test_the_goal_marker_follows_the_task_unless_told_otherwise():
    def drawn(marker: str, task: str) -> bool:
        return SimulateConfig(output="a", tasks=(task,), goal_marker=marker).render_flags(task).goal_marker

    assert [drawn("auto", task) for task in ("reach", "drawer-open")] == [True, False]
    assert [drawn("hidden", task) for task in ("reach", "drawer-open")] == [False, False]
    assert [drawn("visible", task) for task in ("reach", "drawer-open")] == [True, True]
    config = SimulateConfig(output="a", tasks=("reach",))
    assert config.episode_digest() != config.model_copy(update={"goal_marker": "hidden"}).episode_digest()
    with pytest.raises(ConfigError, match="'auto', 'hidden' or 'visible'"):
        SimulateConfig.parse({"output": "x", "tasks": ["reach"], "goal_marker": "off"})
