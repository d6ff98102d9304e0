"""Writes the RLDS fixtures: python write_rlds.py OUTPUT, with tensorflow_datasets. Nothing is downloaded."""

import sys

import numpy as np
import tensorflow_datasets as tfds

HEIGHT, WIDTH = 48, 64
LENGTHS = {"train": (5, 7, 3), "val": (4,)}


def picture(episode, frame, camera):
    image = np.full((HEIGHT, WIDTH, 3), (40 + 60 * episode, 10 + 20 * frame, 30 + 90 * camera), np.uint8)
    image[: HEIGHT // 4] = 255 - image[: HEIGHT // 4]
    return image


def depth(episode, frame):
    return np.full((HEIGHT, WIDTH, 1), 1000 * episode + frame, np.uint16)


class DictActions(tfds.core.GeneratorBasedBuilder):
    """Actions in parts, an instruction in the observation, two encoded cameras, one depth map, one grey camera."""

    VERSION = tfds.core.Version("0.1.0")

    def _info(self):
        image = tfds.features.Image(shape=(HEIGHT, WIDTH, 3), dtype=np.uint8, encoding_format="jpeg")
        png = tfds.features.Image(shape=(HEIGHT, WIDTH, 3), dtype=np.uint8, encoding_format="png")
        far = tfds.features.Image(shape=(HEIGHT, WIDTH, 1), dtype=np.uint16, encoding_format="png")
        grey = tfds.features.Image(shape=(HEIGHT, WIDTH, 1), dtype=np.uint8, encoding_format="png")
        steps = tfds.features.Dataset({
            "observation": {
                "image": image, "hand.image": png, "depth": far, "grey": grey,
                "natural_language_instruction": tfds.features.Text(),
                "state": tfds.features.Tensor(shape=(3,), dtype=np.float32),
            },
            "action": {
                "world_vector": tfds.features.Tensor(shape=(3,), dtype=np.float32),
                "gripper": tfds.features.Tensor(shape=(), dtype=np.float32),
                "terminate": tfds.features.Tensor(shape=(3,), dtype=np.int32),
            },
            "is_first": np.bool_, "is_last": np.bool_, "is_terminal": np.bool_,
            "reward": np.float32, "discount": np.float32,
        })  # fmt: skip
        episode = {"file_path": tfds.features.Text(), "success": np.bool_, "seed": np.int64}
        features = tfds.features.FeaturesDict({"steps": steps, "episode_metadata": episode})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, _):
        return {split: self._generate_examples(split) for split in LENGTHS}

    def _generate_examples(self, split):
        for episode, length in enumerate(LENGTHS[split]):
            steps = [{
                "observation": {
                    "image": picture(episode, frame, 0), "hand.image": picture(episode, frame, 1),
                    "depth": depth(episode, frame), "grey": depth(episode, frame).astype(np.uint8),
                    "natural_language_instruction": "" if frame == 0 else f"push block {episode} über die Linie",
                    "state": np.float32([episode, frame, -1.5]),
                },
                "action": {
                    "world_vector": np.float32([frame, 0.5, -frame]), "gripper": np.float32(frame % 2),
                    "terminate": np.int32([0, 1, frame == length - 1]),
                },
                "is_first": frame == 0, "is_last": frame == length - 1, "is_terminal": False,
                "reward": 0.0, "discount": 1.0,
            } for frame in range(length)]  # fmt: skip
            facts = {"file_path": f"lab/{split}-{episode}.h5", "success": episode % 2 == 0, "seed": -episode}
            yield episode, {"steps": steps, "episode_metadata": facts}


class TensorActions(tfds.core.GeneratorBasedBuilder):
    """One camera, one action tensor, an instruction a step, a sentence embedding; float64 state as bytes."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        steps = tfds.features.Dataset({
            "observation": {
                "image": tfds.features.Image(shape=(HEIGHT, WIDTH, 3), dtype=np.uint8, encoding_format="png"),
                "proprio": tfds.features.Tensor(shape=(2, 2), dtype=np.float64),
            },
            "action": tfds.features.Tensor(shape=(7,), dtype=np.float32),
            "language_instruction": tfds.features.Text(),
            "language_embedding": tfds.features.Tensor(shape=(4,), dtype=np.float32),
            "is_first": np.bool_, "is_last": np.bool_,
        })  # fmt: skip
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"steps": steps}))

    def _split_generators(self, _):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for episode in range(2):
            yield episode, {"steps": [{
                "observation": {
                    "image": picture(episode, frame, 0), "proprio": np.float64([[episode, frame], [0.25, 1e-3]]),
                },
                "action": np.float32([frame, 0, 0, 0, 0, 0, episode]),
                "language_instruction": f"open drawer {episode}",
                "language_embedding": np.zeros(4, np.float32),
                "is_first": frame == 0, "is_last": frame == 5,
            } for frame in range(6)]}  # fmt: skip


class CodePoints(tfds.core.GeneratorBasedBuilder):
    """An instruction of numbers, as language_table has it, and actions packed into bytes."""

    VERSION = tfds.core.Version("0.0.1")

    def _info(self):
        steps = tfds.features.Dataset({
            "observation": {
                "rgb": tfds.features.Image(shape=(HEIGHT, WIDTH, 3), dtype=np.uint8),
                "instruction": tfds.features.Tensor(shape=(24,), dtype=np.int32),
            },
            "action": tfds.features.Tensor(shape=(2,), dtype=np.float32, encoding="zlib"),
        })  # fmt: skip
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"steps": steps}))

    def _split_generators(self, _):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        words = [ord(letter) for letter in "push the blue cube"]
        yield 0, {"steps": [{
            "observation": {"rgb": picture(0, frame, 0), "instruction": np.int32(words + [0] * (24 - len(words)))},
            "action": np.float32([frame, 1]),
        } for frame in range(2)]}  # fmt: skip


if __name__ == "__main__":
    for builder in (DictActions, TensorActions, CodePoints):
        builder(data_dir=sys.argv[1]).download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=1))
