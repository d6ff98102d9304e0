"""Writes the LeRobot fixtures: python write_lerobot.py OUTPUT, with lerobot 0.4.4 (v3.0) or 0.3.3 (v2.1)."""

import sys
from pathlib import Path

import numpy as np
from lerobot.datasets.lerobot_dataset import CODEBASE_VERSION, LeRobotDataset

HEIGHT, WIDTH = 48, 64
LENGTHS = (8, 12, 9)
TASKS = ("pick up the cube", "open the drawer", "pick up the cube")
CAMERAS = {"observation.images.front": "video", "observation.images.wrist": "video", "observation.image": "image"}


def picture(episode, frame, camera):
    """One colour that tells the episode (red), the frame (green) and the camera (blue)."""
    return np.full((HEIGHT, WIDTH, 3), (40 + 70 * episode, 20 + 18 * frame, 30 + 90 * camera), np.uint8)


axes = ["height", "width", "channels"]
features = {key: {"dtype": kind, "shape": (HEIGHT, WIDTH, 3), "names": axes} for key, kind in CAMERAS.items()}
features |= {
    "observation.state": {"dtype": "float32", "shape": (3,), "names": ["x", "y", "z"]},
    "observation.force": {"dtype": "float64", "shape": (2, 2), "names": None},
    "next.reward": {"dtype": "float32", "shape": (1,), "names": None},
    "action": {"dtype": "float32", "shape": (2,), "names": ["dx", "dy"]},
}
data = LeRobotDataset.create("foreframe/tiny", fps=10, features=features, root=Path(sys.argv[1]), robot_type="arm")
if CODEBASE_VERSION == "v3.0":
    data.meta.update_chunk_settings(video_files_size_in_mb=0.0024)  # two episodes fit into a file
for episode, length in enumerate(LENGTHS):
    for frame in range(length):
        values = {key: picture(episode, frame, camera) for camera, key in enumerate(CAMERAS)}
        values |= {
            "observation.state": np.float32([episode, frame, -0.5]),
            "observation.force": np.float64([[episode, frame], [0.25, 1.0]]),
            "next.reward": np.float32([frame == length - 1]),
            "action": np.float32([frame, -episode]),
        }
        if CODEBASE_VERSION == "v3.0":
            data.add_frame(values | {"task": TASKS[episode]})
        else:
            data.add_frame(values, task=TASKS[episode])
    data.save_episode()
if CODEBASE_VERSION == "v3.0":
    data.finalize()
