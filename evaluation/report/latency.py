"""How long a policy's decisions took: `latency.json` of an evaluation as rows and a histogram."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from evaluation.report.charts import bar_chart
from evaluation.report.comparison import arm_title
from evaluation.report.frames import stays_inside
from infra import storage
from infra.errors import InputError

LATENCY = "latency"  # the artefact's name in a result


@dataclass(frozen=True)
class LatencyView:
    """A sentence about one robot, the parts of its decision, all decisions by arm, and the policy's histogram."""

    sentence: str
    parts: tuple[tuple[str, str], ...]
    arms: tuple[tuple[str, tuple[str, ...]], ...]  # (arm, values of COLUMNS)
    chart: Markup

    COLUMNS = ("Decisions", "Asked at once", "Median", "95 of 100", "Greatest", "A simulator step", "A picture")


def latency_view(folder: str, artefacts: Mapping[str, str], *, model: str = "policy") -> LatencyView | None:
    """The view of a result's timings; None where the result keeps none. `InputError` if the file is not what it says.

    An evaluation that resumed tells only of the decisions of its last execution.
    """
    if LATENCY not in artefacts:
        return None
    if not stays_inside(artefacts[LATENCY]):
        raise InputError(f"the timings' path {artefacts[LATENCY]} leaves the result's folder and was not read.")
    record = storage.read_json(storage.join(folder, artefacts[LATENCY]))
    try:
        alone, arms = record["single"], record["arms"]
        own = arms.get(model, {}).get("histogram", alone["histogram"])
        return LatencyView(
            sentence=_sentence(alone),
            parts=_parts({name: float(value) for name, value in alone["parts_ms"].items()}),
            arms=tuple((arm_title(name), _row(arm)) for name, arm in arms.items() if "median_s" in arm),
            chart=_histogram(own),
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"{artefacts[LATENCY]} of {folder} is no record of timings: {error!r}.") from None


def _sentence(alone: Mapping[str, Any]) -> str:
    median, slow = (_ms(1e3 * float(alone[name])) for name in ("median_s", "p95_s"))
    horizon = int(alone["actions_per_decision"])
    return (
        f"One robot alone waits {median} for a decision (95 of 100 within {slow}) "
        f"and carries out {horizon} {'action' if horizon == 1 else 'actions'} of it: "
        f"at most {float(alone['control_hz']):.0f} actions a second."
    )


def _parts(milliseconds: Mapping[str, float]) -> tuple[tuple[str, str], ...]:
    """The longest first."""
    return tuple(
        (arm_title(name), _ms(value)) for name, value in sorted(milliseconds.items(), key=lambda part: -part[1])
    )


def _row(arm: Mapping[str, Any]) -> tuple[str, ...]:
    times = (_ms(1e3 * float(arm[name])) for name in ("median_s", "p95_s", "max_s"))
    simulator = (_ms(float(arm[name])) if arm[name] else "–" for name in ("environment_step_ms", "picture_ms"))
    return (str(arm["decisions"]), str(arm["batch_size"]), *times, *simulator)


def _histogram(histogram: Mapping[str, Any]) -> Markup:
    """Only the bins between the first and the last that hold something."""
    edges, counts = histogram["edges_ms"], [int(count) for count in histogram["counts"]]
    filled = [place for place, count in enumerate(counts) if count]
    if not filled:
        return Markup("")
    bars = [(f"{edges[place]:g}–{edges[place + 1]:g} ms", counts[place]) for place in range(filled[0], filled[-1] + 1)]
    return bar_chart(bars, title="Decisions by the time they took")


def _ms(value: float) -> str:
    return f"{value:.3g} ms" if value < 1000 else f"{value / 1000:.2f} s"
