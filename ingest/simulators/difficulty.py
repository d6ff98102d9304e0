"""How hard the 50 Meta-World tasks are held to be: the split by which multi-task results are published.

The four levels are those of LeRobot's `metaworld_config.json` (28, 11, 6 and 5 tasks). The Video Prediction Policy
reports three: easy (28), middle (11), and hard (11), which are LeRobot's hard and very hard together.
"""

from __future__ import annotations

from typing import Literal, get_args

Level = Literal["easy", "middle", "hard", "very-hard"]
LEVELS: tuple[Level, ...] = get_args(Level)

LEVEL_OF_TASK: dict[str, Level] = {
    "assembly": "hard",
    "basketball": "middle",
    "bin-picking": "middle",
    "box-close": "middle",
    "button-press": "easy",
    "button-press-topdown": "easy",
    "button-press-topdown-wall": "easy",
    "button-press-wall": "easy",
    "coffee-button": "easy",
    "coffee-pull": "middle",
    "coffee-push": "middle",
    "dial-turn": "easy",
    "disassemble": "very-hard",
    "door-close": "easy",
    "door-lock": "easy",
    "door-open": "easy",
    "door-unlock": "easy",
    "drawer-close": "easy",
    "drawer-open": "easy",
    "faucet-close": "easy",
    "faucet-open": "easy",
    "hammer": "middle",
    "hand-insert": "hard",
    "handle-press": "easy",
    "handle-press-side": "easy",
    "handle-pull": "easy",
    "handle-pull-side": "easy",
    "lever-pull": "easy",
    "peg-insert-side": "middle",
    "peg-unplug-side": "easy",
    "pick-out-of-hole": "hard",
    "pick-place": "hard",
    "pick-place-wall": "very-hard",
    "plate-slide": "easy",
    "plate-slide-back": "easy",
    "plate-slide-back-side": "easy",
    "plate-slide-side": "easy",
    "push": "hard",
    "push-back": "hard",
    "push-wall": "middle",
    "reach": "easy",
    "reach-wall": "easy",
    "shelf-place": "very-hard",
    "soccer": "middle",
    "stick-pull": "very-hard",
    "stick-push": "very-hard",
    "sweep": "middle",
    "sweep-into": "middle",
    "window-close": "easy",
    "window-open": "easy",
}

# Name of a split -> its levels. The first three partition the tasks as the paper does, the last two divide its hard.
SPLITS: dict[str, tuple[Level, ...]] = {
    "easy": ("easy",),
    "middle": ("middle",),
    "hard": ("hard", "very-hard"),
    "hard-only": ("hard",),
    "very-hard": ("very-hard",),
}


def tasks_of(split: str) -> frozenset[str]:
    """The tasks of one of the `SPLITS`."""
    return frozenset(task for task, level in LEVEL_OF_TASK.items() if level in SPLITS[split])
