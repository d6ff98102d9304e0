"""Storage on an object store of which a fifth of all answers fail: `python -m tests.faults.s3_faults --rate 0.2`.

A proxy before a real S3 endpoint on loopback answers 500, 503, 409, breaks the connection before or after the deed,
cuts bodies, or is late. A thousand operations are held one by one against a dictionary, and the store at the end; then
pairs of writers race to create objects of equal content, and a corpus on S3 is ingested to S3. Nothing may be lost or
changed, `create_only` may not claim what is not so, and the manifest must be that of an undisturbed run.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from infra import storage
from infra.errors import ForeframeError, InputError
from ingest import job
from ingest.recipe import IngestConfig, Recipe
from ingest.verify import verify
from tests.helpers_media import break_corpus, make_corpus
from tests.helpers_s3_faults import faulty, make_bucket, own_moto

NAMES = [f"{folder}object-{number}.bin" for folder in ("", "a/", "a/b/") for number in range(6)]
WRITERS = 2


@dataclass
class Ledger:
    """What the operations came to."""

    operations: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


class Player:
    """Plays random operations on a prefix of the store and holds each answer against a dictionary."""

    def __init__(self, url: str, folder: Path, seed: int) -> None:
        self.url, self.folder, self.random = url, folder, Random(seed)
        self.model: dict[str, bytes] = {}
        self.ledger = Ledger()
        self._plays: list[Callable[[str], bool]] = [
            *(self.write_bytes, self.read_bytes, self.create_only, self.put_file, self.get_file),
            *(self.list_names, self.read_range, self.exists, self.size_bytes, self.remove, self.remove_folder),
        ]
        self._weights = [3, 3, 3, 2, 2, 2, 2, 2, 1, 2, 0.3]

    def play(self, count: int) -> Ledger:
        """`count` operations; those that end in an error are listed as failed."""
        for number in range(count):
            play = self.random.choices(self._plays, self._weights)[0]
            name = self.random.choice(NAMES)
            self.ledger.operations[play.__name__] += 1
            try:
                right = play(name)
            except ForeframeError as error:
                self.ledger.failed.append(f"{number} {play.__name__} {name}: {error}")
            else:
                self.ledger.wrong += [] if right else [f"{number} {play.__name__} {name}"]
        return self.ledger

    def left_over(self) -> tuple[list[str], list[str]]:
        """(names lost or changed, names that should not be there), read without faults."""
        found = {name: storage.read_bytes(self._at(name)) for name in storage.list_names(self.url, recursive=True)}
        lost = [name for name, data in self.model.items() if found.get(name) != data]
        return lost, sorted(set(found) - set(self.model))

    def write_bytes(self, name: str) -> bool:
        self.model[name] = self._content()
        storage.write_bytes(self._at(name), self.model[name])
        return True

    def read_bytes(self, name: str) -> bool:
        return self._found(name, lambda: storage.read_bytes(self._at(name))) == self.model.get(name)

    def create_only(self, name: str) -> bool:
        data = self._content()
        created = storage.create_only(self._at(name), data)
        free = name not in self.model
        if free:
            self.model[name] = data
        return created == free

    def put_file(self, name: str) -> bool:
        local = self.folder / "out"
        local.write_bytes(self._content())
        self.model[name] = local.read_bytes()
        storage.put_file(local, self._at(name))
        return not local.exists()

    def get_file(self, name: str) -> bool:
        local = self.folder / "in"
        local.unlink(missing_ok=True)
        self._found(name, lambda: storage.get_file(self._at(name), local))
        return (local.read_bytes() if local.exists() else None) == self.model.get(name)

    def list_names(self, name: str) -> bool:
        below = [key for key in self.model if key.startswith("a/")]
        direct = sorted(key[2:] for key in below if "/" not in key[2:])
        everything = sorted(key[2:] for key in below)
        place = self._at("a")
        return storage.list_names(place) == direct and storage.list_names(place, recursive=True) == everything

    def read_range(self, name: str) -> bool:
        if len(self.model.get(name, b"")) < 3:
            return self.read_bytes(name)
        start = self.random.randrange(len(self.model[name]) - 1)
        length = self.random.randint(1, len(self.model[name]) - start)
        return storage.read_range(self._at(name), start, length) == self.model[name][start : start + length]

    def exists(self, name: str) -> bool:
        return storage.exists(self._at(name)) == (name in self.model)

    def size_bytes(self, name: str) -> bool:
        found = self._found(name, lambda: storage.size_bytes(self._at(name)))
        return found == (len(self.model[name]) if name in self.model else None)

    def remove(self, name: str) -> bool:
        storage.remove(self._at(name))
        self.model.pop(name, None)
        return True

    def remove_folder(self, name: str) -> bool:
        storage.remove(self._at("a/b"), recursive=True)
        self.model = {key: data for key, data in self.model.items() if not key.startswith("a/b/")}
        return True

    def _found(self, name: str, read: Callable[[], object]) -> object:
        """None where the object is said to be missing, and is."""
        try:
            return read()
        except InputError:
            if name in self.model:
                raise
            return None

    def _at(self, name: str) -> str:
        return storage.join(self.url, name)

    def _content(self) -> bytes:
        return self.random.randbytes(self.random.choice([0, 1, 100, 5_000, 200_000]))


def race(url: str, rounds: int) -> int:
    """In how many rounds the writers of one object with equal content did not have exactly one winner."""
    with ThreadPoolExecutor(WRITERS) as pool:
        wrong = 0
        for number in range(rounds):
            place = storage.join(url, f"race/{number}")
            won = list(pool.map(lambda _, place=place: storage.create_only(place, b"the same"), range(WRITERS)))
            wrong += sum(won) != 1
    return wrong


def ingest(url: str, output: str) -> str:
    """sha256 of the manifest of the corpus at `url`/corpus, built at `url`/`output`."""
    recipe = Recipe(short_side=48, shard_bytes=60_000, max_failure_share=0.7)
    config = IngestConfig(
        source=storage.join(url, "corpus"), output=storage.join(url, output), name="faults", recipe=recipe, workers=0
    )
    job.run(config)
    return job.manifest_version(config.output)


def main() -> int:
    """Print the table; 1 if anything was lost, duplicated, wrong or failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=float, default=0.2)
    parser.add_argument("--operations", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, own_moto() as endpoint:
        folder, url = Path(name), make_bucket(endpoint, "faults")
        make_corpus(folder / "corpus")
        break_corpus(folder / "corpus")
        storage.put_folder(folder / "corpus", storage.join(url, "corpus"))
        undisturbed = ingest(url, "undisturbed")
        started = time.monotonic()
        player = Player(storage.join(url, "model"), folder, arguments.seed)
        with faulty(endpoint, rate=arguments.rate, seed=arguments.seed) as proxy:
            ledger = player.play(arguments.operations)
            wrong_races = race(url, arguments.rounds)
            disturbed = ingest(url, "disturbed")
        lost, surplus = player.left_over()
        damaged = verify(storage.join(url, "disturbed"))
        seconds = time.monotonic() - started
    faults = ", ".join(f"{kind} {count}" for kind, count in sorted(proxy.faults.items()))
    print(f"seed {arguments.seed}, rate {arguments.rate:g}: {sum(proxy.faults.values())} of {proxy.requests} requests")
    print(f"failed ({faults}) in {seconds:.0f} s\n")
    print("\n".join([*ledger.wrong, *ledger.failed, *damaged]))
    print("| what | tried | wrong | gave up | lost or changed | duplicated |\n| --- | --- | --- | --- | --- | --- |")
    total = sum(ledger.operations.values())
    print(f"| operations | {total} | {len(ledger.wrong)} | {len(ledger.failed)} | {len(lost)} | {len(surplus)} |")
    print(f"| of them `create_only` | {ledger.operations['create_only']} | {_count(ledger.wrong)} | | | |")
    print(f"| creators of equal content, {WRITERS} at once | {arguments.rounds} | {wrong_races} | | | |")
    same = disturbed == undisturbed
    print(f"| ingest S3 to S3, manifest {disturbed[:8]} | 1 | {int(not same)} | | | |")
    return int(bool(ledger.wrong or ledger.failed or lost or surplus or wrong_races or damaged or not same))


def _count(wrong: list[str]) -> int:
    return sum(" create_only " in line for line in wrong)


if __name__ == "__main__":
    sys.exit(main())
