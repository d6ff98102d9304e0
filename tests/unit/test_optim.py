"""The papers' learning rate, length, weight-decay groups and averages, against their closed forms."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from infra.errors import ConfigError
from infra.settings import Settings
from training.models.rsp import RSP, RSPConfig
from training.optim import OptimConfig, ScheduleConfig, WeightAverage, build_optimizer, plan_schedule, set_lr
from training.recipes import rsp

KINETICS = 240_000


def paper_schedule():
    return plan_schedule(ScheduleConfig(), OptimConfig(), num_clips=KINETICS, global_batch_size=1536, repeats=2)


def test_the_papers_run_is_200_passes_at_a_peak_of_9e_4():
    schedule = paper_schedule()
    assert schedule.total_steps == 31_250
    assert schedule.passes(31_250) == 200
    assert schedule.lr(3125) == pytest.approx(9e-4, rel=1e-12)
    assert max(schedule.lr(step) for step in range(0, 31_250, 25)) == pytest.approx(9e-4, rel=1e-12)


@pytest.mark.parametrize("step", [0, 1, 777, 3124, 3125, 3126, 17_187, 31_249])
def test_the_learning_rate_follows_the_official_rule_on_the_fractional_epoch(step):
    epoch, warmup, epochs = step / (KINETICS / 1536), 40 / 2, 400 / 2
    if epoch < warmup:
        expected = 9e-4 * epoch / warmup
    else:
        expected = 9e-4 * 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))
    assert paper_schedule().lr(step) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_a_run_in_steps_ends_at_the_minimum_and_starts_from_zero():
    config = ScheduleConfig(epochs=None, warmup_epochs=0, steps=100, warmup_steps=10, min_lr=1e-5)
    schedule = plan_schedule(config, OptimConfig(lr=1e-3), num_clips=7, global_batch_size=64)
    assert schedule.total_steps == 100
    assert [schedule.lr(step) for step in (0, 5, 10)] == pytest.approx([0, 5e-4, 1e-3])
    assert schedule.lr(100) == pytest.approx(1e-5)


def tri_stage(**changes):
    """As in the configuration of the Video Prediction Policy: 50,000 steps in three stages."""
    config = {
        "epochs": None, "warmup_epochs": 0, "steps": 60_000, "warmup_steps": 1000, "hold_steps": 4000,
        "decay_steps": 45_000, "start_lr": 1e-5, "min_lr": 1e-10, "shape": "tri-stage",
    }  # fmt: skip
    schedule = ScheduleConfig.parse(config | changes)
    return plan_schedule(schedule, OptimConfig(lr=1e-4), num_clips=700_000, global_batch_size=112)


def test_three_stages_are_the_golden_learning_rates():
    folder = Settings().golden
    if not folder:
        pytest.skip("FOREFRAME_GOLDEN is not set")
    with np.load(Path(folder) / "vpp_lr_reference.npz", allow_pickle=False) as stored:
        steps, expected = stored["step_index"].tolist(), stored["lr"]
    assert [tri_stage().lr(step) for step in steps] == pytest.approx(expected, rel=1e-9)


def test_three_stages_rise_hold_fall_and_stay():
    lr = tri_stage().lr
    assert [lr(step) for step in (0, 250, 500, 1000)] == pytest.approx([1e-5, 3.25e-5, 5.5e-5, 1e-4], rel=1e-12)
    assert {lr(step) for step in (1000, 1001, 3000, 5000)} == {1e-4}
    halfway = 1e-10 + (1e-4 - 1e-10) / 2
    assert [lr(5000 + 22_500), lr(5000 + 15_000)] == pytest.approx([halfway, 1e-10 + (1e-4 - 1e-10) * 0.75], rel=1e-12)
    assert {lr(step) for step in (50_000, 50_001, 59_999)} == {1e-10}


def test_three_stages_without_a_decay_length_fall_until_the_end_of_the_run():
    schedule = tri_stage(decay_steps=None)
    assert schedule.lr(5000 + 27_500) == pytest.approx(1e-10 + (1e-4 - 1e-10) / 2, rel=1e-12)
    assert schedule.lr(60_000) == pytest.approx(1e-10, rel=1e-9)


def test_three_stages_in_epochs_follow_the_data():
    config = ScheduleConfig(epochs=10, warmup_epochs=1, hold_epochs=2, decay_epochs=4, min_lr=1e-6, shape="tri-stage")
    schedule = plan_schedule(config, OptimConfig(lr=1e-3), num_clips=1000, global_batch_size=10, repeats=2)
    assert schedule.total_steps == 500
    assert [schedule.lr(step) for step in (0, 25, 50, 150)] == pytest.approx([0, 5e-4, 1e-3, 1e-3])
    assert [schedule.lr(step) for step in (250, 350, 499)] == pytest.approx([1e-6 + (1e-3 - 1e-6) / 2, 1e-6, 1e-6])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"shape": "constant"}, "hold_steps belongs to shape tri-stage, not constant"),
        ({"shape": "cosine", "hold_steps": 0, "decay_steps": None}, "start_lr belongs to shape tri-stage"),
        ({"hold_steps": 59_000}, "warm-up 1000 and hold 59000 must be shorter than the run 60000"),
        ({"hold_epochs": 1.0}, "hold_epochs is not in the unit of the run's length"),
        ({"start_lr": 2e-4}, "start_lr 0.0002 is above the peak 0.0001"),
        ({"min_lr": 2e-4}, "min_lr 0.0002 is above the peak 0.0001"),
    ],
)
def test_stages_that_contradict_each_other_are_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        tri_stage(**changes)


def test_the_base_rate_rule_scales_with_the_batch_and_can_be_pinned_to_another_one():
    assert OptimConfig().learning_rate(32) == pytest.approx(1.875e-5)
    assert OptimConfig(lr_batch_size=1536).learning_rate(32) == pytest.approx(9e-4)
    assert OptimConfig(lr=1e-3).learning_rate(32) == 1e-3


@pytest.mark.parametrize("lengths", [{"epochs": None}, {"steps": 10}, {"epochs": 10, "warmup_epochs": 10}])
def test_a_schedule_without_one_clear_length_is_refused(lengths):
    with pytest.raises(ConfigError):
        ScheduleConfig.parse(lengths)


def test_class_and_mask_tokens_decay_and_norms_and_biases_do_not():
    config = RSPConfig(
        image_size=32, embed_dim=16, depth=1, num_heads=2, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2
    )
    model = RSP(config)
    optimizer = build_optimizer(model, OptimConfig())
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] == 0.05 for p in group["params"]}
    names = {name: id(parameter) in decayed for name, parameter in model.named_parameters()}
    assert names["cls_token"] and names["mask_token"] and names["blocks.0.attn.qkv.weight"]
    assert not any(names[name] for name in names if name.endswith(".bias") or ".norm" in name or name == "norm.weight")
    assert len(names) == sum(len(group["params"]) for group in optimizer.param_groups)


def test_the_first_update_is_one_learning_rate_along_the_sign_plus_decay():
    layer = nn.Linear(3, 2)
    before = layer.weight.detach().clone(), layer.bias.detach().clone()
    optimizer = build_optimizer(layer, OptimConfig(weight_decay=0.1, eps=1e-12))
    layer.weight.grad, layer.bias.grad = torch.randn(2, 3), torch.randn(2)
    set_lr(optimizer, 0.01)
    optimizer.step()
    torch.testing.assert_close(layer.weight, before[0] * (1 - 0.01 * 0.1) - 0.01 * layer.weight.grad.sign())
    torch.testing.assert_close(layer.bias, before[1] - 0.01 * layer.bias.grad.sign())


def test_the_average_of_a_constant_step_follows_the_geometric_series():
    layer = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(layer.weight)
    average = WeightAverage(layer, decay=0.5)
    nn.init.ones_(layer.weight)
    for _ in range(3):
        average.update(layer)
    average.copy_to(layer)
    assert layer.weight.item() == pytest.approx(1 - 0.5**3)


def flat(value, prefix=""):
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for key, part in value.items() for k, v in flat(part, f"{prefix}.{key}" if prefix else key).items()}


@pytest.mark.parametrize("preset", [rsp.tiny, rsp.vitb16])
def test_presets_differ_from_the_papers_in_sizes_and_counts_only(preset):
    paper, other = (flat(make(data="d", output="o").to_json()) for make in (rsp.vits16, preset))
    different = {key for key in paper.keys() | other.keys() if paper.get(key) != other.get(key)}
    assert {key for key in different if not key.startswith(rsp.SIZES_AND_COUNTS)} == set()
    assert different, "the presets are the same"


def test_the_tiny_learning_rate_is_the_papers_own():
    paper, tiny = (make(data="d", output="o") for make in (rsp.vits16, rsp.tiny))
    assert tiny.optim.learning_rate(tiny.global_batch_size) == paper.optim.learning_rate(paper.global_batch_size)
