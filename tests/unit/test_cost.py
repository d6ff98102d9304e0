"""What a dry run says of GPUs: counts against sums by hand, memory against a real run, formulas against numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from infra.config import override
from infra.errors import ConfigError
from ingest.windows import ClipSource, WindowRule
from tests.helpers_clips import Take, make_takes
from tests.helpers_data import make_frames_dataset
from tests.helpers_training import small_pretrain
from training.cost import GpuPlan, ParameterCounts, describe_gpus, estimate, replicated_bytes, sharded_bytes
from training.meta_step import StepCost, as_on_gpu, step_cost
from training.plan import describe, dry_run
from training.recipes import rsp, tvp

ROWS, WIDTH, DEPTH = 64, 32, 5


class Chain(nn.Module):
    """Blocks of a product and an activation that keeps its input, with the switch of the video model."""

    def __init__(self, *, shared: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(DEPTH))
        if shared:
            for block in self.blocks:
                block.weight = self.blocks[0].weight
        self.checkpointed = False

    def checkpoint_activations(self, enabled: bool) -> None:
        self.checkpointed = enabled

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:

            def run(value: torch.Tensor, block: nn.Module = block) -> torch.Tensor:
                return torch.sigmoid(nn.functional.gelu(block(value)))

            rows = checkpoint(run, rows, use_reentrant=False) if self.checkpointed else run(rows)
        return rows


class PlainChain(nn.Module):
    """Products only: what is kept can be written down."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(DEPTH)))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.layers(rows)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        query, key, value = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(rows).chunk(3, -1))
        return nn.functional.scaled_dot_product_attention(query, key, value)


@dataclass
class RowsTask:
    """ROWS rows a clip through a model of our choice."""

    model: nn.Module
    shape: tuple[int, ...] = (ROWS, WIDTH)
    num_clips: int = 10
    repeats: int = 1
    data_digest: str = "0"

    def example(self, num_clips: int) -> torch.Tensor:
        return torch.empty(num_clips, *self.shape, device="meta")

    def loss(self, model: nn.Module, batch: torch.Tensor, device: torch.device) -> dict[str, torch.Tensor]:
        return {"loss": model(batch.to(device).flatten(0, 1) if batch.ndim == 3 else batch.to(device)[:, 0]).sum()}


def cost_of(model: nn.Module, precision: str = "float32", *, clips: int = 2, **task) -> StepCost:
    task = RowsTask(model.to("meta"), **task)
    return step_cost(task, task.model, precision, clips)


def test_operations_are_those_of_a_sum_by_hand():
    cost = cost_of(PlainChain())
    product = 2 * (2 * ROWS) * WIDTH * WIDTH
    assert cost.forward_flops == DEPTH * product
    assert cost.step_flops == 3 * DEPTH * product - product  # nobody asks for the gradient of the data


def test_operations_are_those_of_torchs_own_counter():
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.grid, self.attention = nn.Conv2d(1, 2, 3, stride=2), Attention()

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return self.attention(rows).square().sum() * self.grid(rows[:, None]).square().sum()

    model = Small().to("meta")
    task = RowsTask(model, shape=(1, 64, WIDTH))
    with FlopCounterMode(display=False) as counter, as_on_gpu("float32"):
        torch.autograd.backward([task.loss(model, task.example(3), torch.device("meta"))["loss"]])
    found = step_cost(task, model, "float32", 3).step_flops_by
    assert sum(found.values()) == counter.get_total_flops()
    convolved = 3 * 2 * 31 * 15 * 2 * 9  # clips, two per product, places, filters, weights of one
    assert found["tf32"] == 2 * convolved  # forward, and the weights' gradient
    assert found["float32"] > 0


def test_living_bytes_are_those_of_a_sum_by_hand():
    """The data and every layer's output; then, for each output freed, a gradient, and beside them one of a weight."""
    rows = 4 * 2 * ROWS * WIDTH
    weight_gradient = 4 * WIDTH * WIDTH
    kept = (1 + DEPTH) * rows
    assert kept < cost_of(PlainChain()).peak_bytes <= kept + weight_gradient + 16
    assert cost_of(PlainChain()).weight_copy_bytes == 0


def test_bf16_halves_what_products_keep_and_copies_every_weight_once():
    full, half = cost_of(PlainChain(), clips=200), cost_of(PlainChain(), "bf16", clips=200)
    rows = 4 * 200 * ROWS * WIDTH
    assert full.peak_bytes == pytest.approx((1 + DEPTH) * rows, rel=0.01)
    # Data and its lower copy, lower outputs, and the last one again in float32 for the sum.
    assert half.peak_bytes == pytest.approx((1 + 0.5 + 0.5 * DEPTH + 1) * rows, rel=0.01)
    assert half.weight_copy_bytes == 2 * DEPTH * WIDTH * WIDTH
    with torch.device("meta"):
        shared = Chain(shared=True)
    assert cost_of(shared, "bf16").weight_copy_bytes == 2 * WIDTH * WIDTH
    checkpointed = Chain()
    checkpointed.checkpoint_activations(True)
    assert cost_of(checkpointed, "bf16").weight_copy_bytes == half.weight_copy_bytes


def test_norms_stay_in_float32_and_regions_without_autocast_too():
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
            self.seen: list[torch.dtype] = []

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            lowered = self.linear(rows)
            with torch.autocast("cpu", enabled=False):
                exact = self.linear(rows)
            self.seen = [lowered.dtype, self.norm(lowered).dtype, (rows @ rows.T).dtype, exact.dtype]
            return lowered + exact

    model = Mixed()
    cost_of(model, "bf16")
    assert model.seen == [torch.bfloat16, torch.float32, torch.bfloat16, torch.float32]


def test_checkpointing_keeps_less_and_computes_a_third_more():
    model = Chain()
    plain = cost_of(model, clips=20)
    model.checkpoint_activations(True)
    saving = cost_of(model, clips=20)
    assert saving.forward_flops == plain.forward_flops
    product = plain.forward_flops // DEPTH
    assert saving.step_flops == plain.step_flops + DEPTH * product  # every product once more
    assert saving.step_flops / plain.step_flops == pytest.approx(4 / 3, rel=0.1)
    rows = 4 * 20 * ROWS * WIDTH
    # Two kept of each block, and two gradients; against one kept of each, then one block's two and two gradients.
    assert plain.peak_bytes == pytest.approx((2 * DEPTH + 2) * rows, rel=0.01)
    assert saving.peak_bytes == pytest.approx((DEPTH + 3) * rows, rel=0.01)


def test_attention_does_not_keep_its_scores():
    tokens = 256
    cost = cost_of(Attention(), shape=(1, tokens, WIDTH), clips=1)
    scores = 4 * 2 * tokens * tokens
    assert cost.peak_bytes < scores
    products = 2 * tokens * WIDTH * 3 * WIDTH + 2 * 2 * tokens * tokens * WIDTH
    assert cost.forward_flops == products


def test_gradients_are_neither_kept_nor_counted():
    model = PlainChain().to("meta")
    cost_of(model)
    assert all(parameter.grad is None for parameter in model.parameters())


def allocated_peak(run) -> int:
    """Largest sum of what torch's CPU allocator gave out and took back."""
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def test_the_peak_is_what_a_real_step_takes(tmp_path_factory):
    """The small RSP step on this CPU, its gradients dropped as they come, through the allocator's own record."""
    data = make_frames_dataset(tmp_path_factory.mktemp("frames"), num_clips=6, num_frames=20, size=40)
    config = small_pretrain(data, "unused", "precision=float32", "global_batch_size=16")
    task = config.build_task()
    model = task.build_model()
    example = task.example(16)
    batch = type(example)(torch.zeros(example.images.shape, dtype=torch.uint8), example.visits, example.repeats)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))

    def step() -> None:
        task.loss(model, batch, torch.device("cpu"))["loss"].backward()

    step()
    counted = step_cost(task, task.build_model().to("meta"), "float32", 16)
    assert counted.peak_bytes == pytest.approx(allocated_peak(step), rel=0.2)


COUNTS = ParameterCounts(trainable=1000, frozen=100, largest_block=300, outside_blocks=50)
COST = StepCost(
    num_clips=2, forward_flops=10, step_flops_by={"bf16": 624, "float32": 39}, peak_bytes=7000, weight_copy_bytes=2000
)


def test_memory_formulas():
    assert replicated_bytes(COUNTS, COST, averaged=False) == 16 * 1000 + 4 * 100 + 2000 + 7000
    assert replicated_bytes(COUNTS, COST, averaged=True) == 20 * 1000 + 4 * 100 + 2000 + 7000
    gathered = {"bf16": 2 * (50 + 600) + 4 * 300, "float32": 4 * (50 + 600) + 4 * 300}
    for precision, bytes_ in gathered.items():
        sharded = sharded_bytes(COUNTS, COST, averaged=False, num_gpus=8, precision=precision)
        assert sharded == 2000 + 400 + bytes_ + 7000


def test_blocks_are_the_outermost_lists():
    model = nn.Module()
    model.head = nn.Linear(4, 4)  # 20
    model.frozen = nn.Linear(3, 3).requires_grad_(False)  # 12
    model.body = nn.Module()
    model.body.blocks = nn.ModuleList([nn.Linear(2, 2), nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)])])  # 6, 60
    assert ParameterCounts.of(model) == ParameterCounts(trainable=86, frozen=12, largest_block=60, outside_blocks=20)


def chain_estimate(num_gpus: int, **plan) -> dict:
    model = Chain().to("meta")
    return estimate(
        RowsTask(model),
        model,
        GpuPlan(num_gpus=num_gpus, **plan),
        precision="bf16",
        steps=1000,
        global_batch_size=48,
        micro_batch_size=2,
        averaged=False,
    )


def test_more_gpus_never_need_more_time_or_memory_each():
    series = [chain_estimate(count) for count in (1, 2, 5, 8, 48, 64)]
    for name in ("with_checkpointing", "without_checkpointing"):
        hours = [each[name]["hours"] for each in series]
        sharded = [each[name]["sharded"]["bytes"] for each in series]
        assert hours == sorted(hours, reverse=True) and hours[0] > hours[3]
        assert sharded == sorted(sharded, reverse=True) and sharded[0] > sharded[3]


def test_hours_and_price_follow_from_operations_rates_and_utilisation():
    found = chain_estimate(8, gpu="H100-80GB", utilisation=0.5, price_per_gpu_hour=3.0)["without_checkpointing"]
    seconds = 6 * 1e9 * found["step_gflop_per_clip"] / (0.5 * 989e12)
    assert found["of_these_gflop"] == {"bf16": found["step_gflop_per_clip"]}
    assert found["seconds_per_step"] == pytest.approx(seconds)
    assert found["hours"] == pytest.approx(1000 * seconds / 3600)
    assert found["price"] == pytest.approx(3.0 * 8 * found["hours"])
    assert chain_estimate(8)["without_checkpointing"]["price"] is None
    # 624 operations at 312, 39 at 19.5: two and two units of time, of two clips, at half the rate.
    assert GpuPlan(utilisation=0.5).seconds_per_clip(COST) == pytest.approx(4e-12)


def test_an_unknown_gpu_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="A100-80GB"):
        GpuPlan.parse({"gpu": "A100"})


def test_a_dry_run_of_any_recipe_can_be_asked_about_gpus(tmp_path):
    data = make_frames_dataset(tmp_path / "frames", num_clips=6, num_frames=20, size=40)
    config = small_pretrain(data, tmp_path / "run")
    assert "gpus" not in dry_run(config)
    plan = dry_run(config, GpuPlan(gpu="RTX4090-24GB", num_gpus=2, price_per_gpu_hour=0.5))
    assert plan["gpus"]["clips_per_gpu"] == 2 and plan["gpus"]["with_checkpointing"] is None
    assert plan["gpus"]["without_checkpointing"]["replicated"]["fits"]
    text = describe(plan)
    assert "2 x RTX4090-24GB" in text and "GPU hours" in text and "not a run" in text
    paper = override(rsp.vits16(data=data, output=str(tmp_path / "run")), ["model.depth=2", "global_batch_size=64"])
    assert dry_run(paper)["gpus"]["num_gpus"] == 8  # it asks for GPUs itself


def test_bf16_is_seen_without_storage(tmp_path):
    """Autocast ignores tensors without storage; the plan must not."""
    data = make_frames_dataset(tmp_path / "frames", num_clips=6, num_frames=20, size=40)
    kept = {
        precision: dry_run(small_pretrain(data, tmp_path, f"precision={precision}"))["worker_memory_bytes"]
        for precision in ("float32", "bf16")
    }
    assert kept["bf16"]["activations"] < 0.9 * kept["float32"]["activations"]  # weights' copies are kept, too


@pytest.fixture(scope="module")
def takes(tmp_path_factory) -> str:
    return make_takes(tmp_path_factory.mktemp("takes") / "data", [Take(20, text="move the square")] * 3)


def test_a_video_run_of_any_size_is_estimated_with_and_without_checkpointing(takes):
    sources = (ClipSource(name="takes", url=takes, rule=WindowRule(num_frames=8)),)
    config = override(
        tvp.tiny(vae="", data=sources, output="unused"),
        ["data.image_size=32", "model.image_size=32", "checkpoint_activations=true"],
    )
    plan = dry_run(config, GpuPlan(num_gpus=2))
    saving, plain = plan["gpus"]["with_checkpointing"], plan["gpus"]["without_checkpointing"]
    assert "  with checkpointing (as configured): " in describe(plan)
    assert saving["forward_gflop_per_clip"] == plain["forward_gflop_per_clip"]
    assert saving["step_gflop_per_clip"] > plain["step_gflop_per_clip"]
    assert saving["activation_bytes"] < plain["activation_bytes"]
    other = dry_run(override(config, ["checkpoint_activations=false"]))
    assert plan["worker_memory_bytes"]["activations"] < other["worker_memory_bytes"]["activations"]


def test_the_published_training_at_full_size(takes):
    """Six clips a GPU were trained on 80 GB with checkpointing: that fits by this estimate, without it does not."""
    task = tvp.svd(initial="", data=takes, output="unused").build_task()
    task.from_cache = True  # the published default; only the shapes of a cache are needed
    with torch.device("meta"):
        model = task.build_model().to("meta")
    found = estimate(
        task,
        model,
        GpuPlan(gpu="A100-80GB", num_gpus=8),
        precision="bf16",
        steps=100_000,
        global_batch_size=48,
        micro_batch_size=None,
        averaged=False,
    )
    saving, plain = found["with_checkpointing"], found["without_checkpointing"]
    assert found["trainable_parameters"] == pytest.approx(1.5246e9, rel=1e-3)
    # Counted from the shapes by hand: 4960, of which 254 are keys and values of the text for every single pixel.
    assert 4960 - 255 < saving["forward_gflop_per_clip"] < 4960 + 1
    assert plain["step_gflop_per_clip"] == pytest.approx(3 * plain["forward_gflop_per_clip"], rel=0.02)
    assert 3.3 < saving["step_gflop_per_clip"] / saving["forward_gflop_per_clip"] <= 4
    assert saving["replicated"]["fits"] and not plain["replicated"]["fits"]
    assert saving["sharded"]["bytes"] < saving["replicated"]["bytes"]
    published_hours = (48, 72)
    assert 1.5 < published_hours[0] / saving["hours"] < published_hours[1] / saving["hours"] < 3.5
    assert len(describe_gpus(found)) == 6
    assert math.isclose(plain["gpu_hours"], 8 * plain["hours"])
