"""The episodes of a batch, spread over processes; with one process they are played here.

Shape letters: N places of a batch, T steps of a chunk, A action.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Self

from evaluation.rollouts.environments import Actions, MakeEnvironment
from evaluation.rollouts.player import News, Player, Rules, Scene
from ingest.simulators.workers import Host, LocalHost, ProcessHost


@dataclass
class _Part:
    """The places that one process plays, and whether any of them goes on."""

    host: Host
    places: tuple[int, ...]
    goes_on: bool = True


class Fleet:
    """Plays one scene at a time on `processes` players. Which player has an episode changes nothing in it."""

    def __init__(self, make: MakeEnvironment, *, processes: int) -> None:
        kind = LocalHost if processes == 1 else ProcessHost
        self._hosts: list[Host] = [kind(partial(Player, make)) for _ in range(processes)]
        self._parts: list[_Part] = []

    def start(self, scene: Scene, rules: Rules) -> Iterator[News]:
        """Begin the episodes of a scene, whose places count from 0; every player's first news."""
        self._parts = []
        for number, host in enumerate(self._hosts):
            places = scene.places[number :: len(self._hosts)]
            if places:
                seeds = tuple(scene.seeds[place] for place in places)
                host.ask("start", replace(scene, seeds=seeds, places=places), rules)
                self._parts.append(_Part(host, places))
        yield from self._news(self._parts)

    def advance(self, chunk_NTA: Actions | None, *, num_steps: int) -> Iterator[News]:
        """Execute `num_steps` of a chunk with a row for every place; without a chunk the scripted expert acts."""
        asked = [part for part in self._parts if part.goes_on]
        for part in asked:
            chunk = None if chunk_NTA is None else chunk_NTA[list(part.places)]
            part.host.ask("advance", chunk, num_steps=num_steps)
        yield from self._news(asked)

    def close(self) -> None:
        """End all players."""
        for host in self._hosts:
            host.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _news(self, parts: list[_Part]) -> Iterator[News]:
        for part in parts:
            news: News = part.host.answer()
            part.goes_on = bool(news.places)
            yield news
