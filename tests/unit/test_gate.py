"""The gate: what it promotes, what it refuses and in which words, and how often it is wrong."""

import math

import numpy as np
import pytest

from evaluation.gate import (
    POLICY_FLOORS,
    GateRule,
    Guard,
    calvin_rule,
    decide,
    encoder_rule,
    policy_rule,
    promotion_record,
    training_summary,
)
from evaluation.result import EvaluationResult, Item, Score
from evaluation.rollouts.arms import ORACLE
from evaluation.rollouts.config import ARMS
from evaluation.rollouts.records import SUCCESS_EVER, SUCCESS_LAST
from infra.registry import POLICY
from pipelines.flows.promote import rule_for

GOOD_TRAINING = {"first/loss_future": 1.2, "last/loss_future": 0.7}


def items_of(values, metric=SUCCESS_EVER, **others):
    return tuple(
        Item(
            item_id=f"task-{index % 6}/{10_000 + index // 6}",
            stratum=f"task-{index % 6}",
            metrics={metric: float(value)} | {name: float(column[index]) for name, column in others.items()},
        )
        for index, value in enumerate(values)
    )


def result_of(items, *, digest="a" * 64, primary=SUCCESS_EVER, **changes):
    fields = {
        "suite": "rollouts",
        "suite_version": "1",
        "model": "export",
        "model_digest": digest,
        "data_digest": "d" * 64,
        "code_version": "0",
        "primary_metric": primary,
        "seeds": (10_000, 10_001),
        "items": items,
        "scores": {},
    }
    return EvaluationResult(**(fields | changes))


def successes(count, of=120):
    return [1.0] * count + [0.0] * (of - count)


def champion_of(values=None, *, items=None, **changes):
    measured = items_of(successes(60) if values is None else values) if items is None else items
    return result_of(measured, digest="b" * 64, **changes)


def test_a_clearly_better_candidate_is_promoted_with_numbers():
    decision = decide(result_of(items_of(successes(84))), champion_of(), GateRule())
    assert decision.promote
    assert decision.reasons == (
        "success_ever against the champion gains +0.200 (95 % interval "
        f"{decision.measurements['champion/success_ever'].low:+.3f} to "
        f"{decision.measurements['champion/success_ever'].high:+.3f}, 120 paired items): the interval is above 0.",
    )
    assert 0 < decision.measurements["champion/success_ever"].low < 0.2


def test_equal_worse_and_barely_better_candidates_are_refused():
    for count in (60, 40, 63):
        decision = decide(result_of(items_of(successes(count))), champion_of(), GateRule())
        assert not decision.promote, count
        assert "the interval is not above 0" in decision.reasons[0]


def test_pairs_are_made_by_item_not_by_position():
    candidate = result_of(tuple(reversed(items_of(successes(84)))))
    forward = decide(result_of(items_of(successes(84))), champion_of(), GateRule())
    assert decide(candidate, champion_of(), GateRule()) == forward


def test_the_margin_moves_the_bar():
    candidate = result_of(items_of(successes(84)))
    low = decide(candidate, champion_of(), GateRule()).measurements["champion/success_ever"].low
    assert decide(candidate, champion_of(), GateRule(margin=low - 1e-6)).promote
    assert not decide(candidate, champion_of(), GateRule(margin=low)).promote


def test_lower_can_be_better():
    losses = np.random.default_rng(0).normal(1.0, 0.1, 40)
    champion = champion_of(items=items_of(losses, "loss"), primary="loss", higher_is_better=False)
    for shift, promoted in ((-0.05, True), (0.05, False)):
        items = items_of(losses + shift + np.linspace(-0.02, 0.02, 40), "loss")
        candidate = result_of(items, primary="loss", higher_is_better=False)
        assert decide(candidate, champion, GateRule()).promote is promoted


def test_five_items_are_too_few_and_six_are_enough():
    for count, promoted in ((5, False), (6, True)):
        candidate = result_of(items_of([1.0] * count))
        decision = decide(candidate, champion_of([0.0] * count), GateRule())
        assert decision.promote is promoted
        assert promoted or "5 paired items are too few for a 95 % interval" in decision.reasons[0]
        assert promoted or decision.measurements["champion/success_ever"].low is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"suite_version": "2"}, "differ in suite version: 1 and 2"),
        ({"suite": "other"}, "differ in suite: rollouts and other"),
        ({"data_digest": "e" * 64}, "differ in data digest"),
        ({"seeds": (10_000, 10_002)}, "different seeds: 2 from 10000 to 10001 and 2 from 10000 to 10002"),
        ({"higher_is_better": False}, "differ in higher is better"),
        ({"items": items_of(successes(60))[:-1]}, "1 of 120 items are on one side only, e.g. 'task-5/10019'"),
        ({"items": items_of(successes(60))[:-1] + items_of([1.0])}, "item 'task-0/10000' occurs more than once"),
    ],
)
def test_results_that_were_not_measured_alike_are_refused(changes, words):
    decision = decide(result_of(items_of(successes(120))), champion_of(**changes), GateRule())
    assert not decision.promote
    assert any(words in reason for reason in decision.reasons)


def test_the_champion_itself_is_no_candidate():
    champion = champion_of()
    assert "The candidate is the champion" in decide(champion, champion, GateRule()).reasons[0]


def test_a_guarded_metric_may_fall_by_no_more_than_the_rule_allows():
    champion = champion_of(items=items_of(successes(60), success_last=successes(60)))
    rule = GateRule(guards=(Guard(metric=SUCCESS_LAST, max_regression=0.05),))
    for last, promoted in ((54, True), (53, False)):
        candidate = result_of(items_of(successes(90), success_last=successes(last)))
        decision = decide(candidate, champion, rule)
        assert decision.promote is promoted
    assert decision.reasons == (
        "Guarded success_last gains -0.058 against the champion, beyond the allowed fall of 0.050.",
    )
    missing = decide(result_of(items_of(successes(90))), champion, rule)
    assert missing.reasons == ("The metric 'success_last' is missing from 120 items, e.g. 'task-0/10000'.",)


def test_floors_ask_for_every_control_arm():
    arms = {arm: items_of(successes(20), success_last=successes(20)) for arm in POLICY_FLOORS}
    candidate = result_of(items_of(successes(90), success_last=successes(90)), arms=arms)
    first = decide(candidate, None, policy_rule())
    assert first.promote
    assert set(first.measurements) == {f"floor/{arm}" for arm in POLICY_FLOORS}
    for arm in POLICY_FLOORS:
        level = decide(candidate.model_copy(update={"arms": arms | {arm: candidate.items}}), None, policy_rule())
        assert not level.promote
        assert [f"the arm '{arm}'" in reason for reason in level.reasons] == [True]
        absent = candidate.model_copy(update={"arms": {name: arms[name] for name in arms if name != arm}})
        assert decide(absent, None, policy_rule()).reasons == (
            f"The control arm '{arm}', which the rule asks for, was not evaluated.",
        )


def test_a_better_candidate_that_fails_a_floor_is_refused():
    arms = {arm: items_of(successes(120)) for arm in POLICY_FLOORS}
    decision = decide(result_of(items_of(successes(100)), arms=arms), champion_of(), GateRule(floor_arms=POLICY_FLOORS))
    assert not decision.promote
    assert all("the arm" in reason for reason in decision.reasons)


def test_calvin_has_no_arms_so_the_average_length_itself_must_lie_above_nothing():
    def chains(low: float, length: float):
        score = Score(value=length, low=low, high=length + 0.1, count=120, method="bootstrap")
        items = items_of([length] * 120, "average_length", success_1=[1.0] * 120)
        return result_of(items, suite="calvin", primary="average_length", scores={"average_length": score})

    assert rule_for(POLICY, chains(0.1, 0.2)) == calvin_rule() and rule_for(POLICY, result_of(())) == policy_rule()
    first = decide(chains(0.1, 0.2), None, calvin_rule())
    assert (
        first.promote
        and "average_length is 0.200 (interval 0.100 to 0.300, 120 items), which lies above 0." in first.reasons
    )
    assert not decide(chains(0.0, 0.0), None, calvin_rule()).promote
    champion = chains(0.1, 0.2).model_copy(update={"model_digest": "c" * 64})
    assert decide(chains(0.4, 0.5), champion, calvin_rule()).promote
    assert not decide(champion, chains(0.4, 0.5), calvin_rule()).promote


def test_floor_names_and_metrics_are_those_of_the_rollout_suite():
    assert set(POLICY_FLOORS) == set(ARMS) - {ORACLE}
    assert [guard.metric for guard in policy_rule().guards] == [SUCCESS_LAST]


def test_encoder_floor_is_the_fall_of_the_future_loss_and_finite_metrics():
    candidate = result_of(items_of([0.5] * 8, "J&F"), primary="J&F")
    cases = [
        (GOOD_TRAINING, True, "loss_future went from 1.200 to 0.700, which is at most 0.75 of its start (0.900)."),
        ({"first/loss_future": 1.2, "last/loss_future": 0.91}, False, "is above 0.75 of its start"),
        ({"first/loss_future": 1.2, "last/loss_future": math.nan}, False, "not finite: last/loss_future"),
        (GOOD_TRAINING | {"last/grad_norm": math.inf}, False, "not finite: last/grad_norm"),
        (None, False, "reports no loss_future"),
    ]
    for metrics, promoted, words in cases:
        decision = decide(candidate, None, encoder_rule(), training_metrics=metrics)
        assert decision.promote is promoted
        assert words in decision.reasons[0]


def test_training_summary_is_the_first_row_and_the_mean_of_the_last_tenth():
    rows = [{"step": step, "loss_future": 2.0 - 0.05 * step, "note": "x", "flag": True} for step in range(1, 21)]
    summary = training_summary(rows)
    assert set(summary) == {"first/step", "last/step", "first/loss_future", "last/loss_future"}
    assert summary["first/loss_future"] == pytest.approx(1.95)
    assert summary["last/loss_future"] == pytest.approx((1.05 + 1.0) / 2)
    assert math.isnan(training_summary([{"loss": 1.0}, {"loss": math.nan}])["last/loss"])
    assert training_summary([]) == {}


def test_the_record_names_what_was_compared():
    candidate, champion = result_of(items_of(successes(84))), champion_of()
    decision = decide(candidate, champion, GateRule())
    record = promotion_record(decision, candidate, champion, GateRule())
    assert record == promotion_record(decision, candidate, champion, GateRule())
    assert record.inputs == (record.candidate_digest, record.champion_digest, candidate.model_digest)
    assert record.candidate_digest != record.champion_digest
    first = promotion_record(decision, candidate, None, GateRule())
    assert (first.champion_digest, first.id != record.id) == ("", True)


# How often the gate is wrong. Seeds shared by two models make their successes correlated: `shared` is the share of
# items decided by the seed alone.


def paired_successes(generator, count, champion_rate, candidate_rate, shared):
    rates = np.array([[champion_rate], [candidate_rate]])
    own = generator.random((2, count))
    common = np.where(generator.random(count) < shared, generator.random(count), np.nan)
    return np.where(np.isnan(common), own, common) < rates


def promotion_rate(trials, count, champion_rate, candidate_rate, *, shared, seed):
    generator = np.random.default_rng(seed)
    promoted = 0
    for _ in range(trials):
        champion, candidate = paired_successes(generator, count, champion_rate, candidate_rate, shared)
        promoted += decide(result_of(items_of(candidate)), champion_of(champion), GateRule()).promote
    return promoted / trials


@pytest.mark.parametrize(
    ("count", "rate", "shared"), [(6, 0.5, 0.0), (12, 0.5, 0.0), (30, 0.8, 0.0), (120, 0.75, 0.3), (120, 0.95, 0.0)]
)
def test_at_most_five_percent_of_1000_null_comparisons_are_promoted(count, rate, shared):
    assert promotion_rate(1_000, count, rate, rate, shared=shared, seed=count) <= 0.05


@pytest.mark.parametrize("count", [6, 10, 30])
def test_null_comparisons_of_a_continuous_metric_are_promoted_at_most_five_percent(count):
    generator = np.random.default_rng(count)
    promoted = 0
    for _ in range(1_000):
        # Exchangeable models on items of very different difficulty, with heavy tails.
        difficulty = generator.uniform(0, 1, count)
        champion, candidate = difficulty + 0.1 * generator.standard_t(2, size=(2, count))
        ours, theirs = items_of(candidate, "J&F"), items_of(champion, "J&F")
        promoted += decide(result_of(ours, primary="J&F"), champion_of(items=theirs, primary="J&F"), GateRule()).promote
    assert promoted / 1_000 <= 0.05


def test_ten_points_are_found_in_at_least_80_percent_with_300_rollouts():
    # 6 tasks x 50 seeds, 0.75 against 0.85, no luck shared between the models; sharing the seeds' luck only helps.
    assert promotion_rate(300, 300, 0.75, 0.85, shared=0.0, seed=1) >= 0.80


def test_a_policy_no_better_than_an_arm_passes_its_floor_at_most_five_percent_of_the_time():
    generator = np.random.default_rng(8)
    passed = 0
    for _ in range(1_000):
        mine, proprioception = paired_successes(generator, 60, 0.5, 0.5, 0.0)
        candidate = result_of(items_of(mine), arms={"proprioception": items_of(proprioception)})
        passed += decide(candidate, None, GateRule(floor_arms=("proprioception",))).promote
    assert passed / 1_000 <= 0.05
