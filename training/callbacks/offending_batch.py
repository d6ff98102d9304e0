"""Keeps the batch on which a loss or gradient was not finite."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from safetensors.torch import save

from infra.storage import join, write_bytes, write_json
from training.loop import Batch, Callback, StepEvent

log = logging.getLogger(__name__)


class OffendingBatch(Callback):
    """Writes each rank's share of the batch as safetensors, with the metrics beside it."""

    def __init__(self, folder: str, *, rank: int, to_tensors: Callable[[Batch], dict[str, torch.Tensor]]) -> None:
        self._folder = folder
        self._rank = rank
        self._to_tensors = to_tensors

    def at_failure(self, event: StepEvent, batches: Sequence[Batch]) -> None:
        """Write `step-S-rank-R.safetensors` and `.json`."""
        stem = join(self._folder, f"step-{event.step:08d}-rank-{self._rank}")
        tensors = {
            f"{index}/{name}": tensor.detach().cpu().contiguous()
            for index, batch in enumerate(batches)
            for name, tensor in self._to_tensors(batch).items()
        }
        write_bytes(f"{stem}.safetensors", save(tensors))
        write_json(f"{stem}.json", {name: repr(value) for name, value in event.metrics.items()})
        log.error("the batch of step %d is in %s.safetensors", event.step, stem)
