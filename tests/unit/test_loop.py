"""The step loop on a small RSP run in this process: finished runs, micro-batches, broken losses, records."""

import json

import pytest
import torch
from safetensors.torch import load_file

from infra.errors import ConfigError, InputError, TrainingError
from tests.helpers_data import make_frames_dataset
from tests.helpers_training import small_pretrain
from training.callbacks.metrics_file import MetricsFile
from training.checkpoint import list_checkpoints
from training.launch import launch
from training.loop import Group, LoopPlan, accumulate_gradients, run_loop
from training.optim import OptimConfig, ScheduleConfig, build_optimizer, plan_schedule
from training.session import new_state, schedule_of
from training.state import Identity, TrainState


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_frames_dataset(tmp_path_factory.mktemp("frames"), num_clips=6, num_frames=20, size=40)


def batches_of(task, config, *, micro_batch_size, group=None, steps=range(1)):
    return task.batches(
        steps=steps,
        global_batch_size=config.global_batch_size,
        micro_batch_size=micro_batch_size,
        group=group or Group(),
        loader_workers=0,
    )


def gradients(config, task, parts):
    """Gradients of one step whose batch is given as micro-batches."""
    state = new_state(config, task, torch.device("cpu"))
    plan = LoopPlan(schedule_of(config, task), config.global_batch_size, config.seed, "float32")
    module = lambda batch: task.loss(state.model, batch, torch.device("cpu"))  # noqa: E731
    metrics = accumulate_gradients(module, parts, plan, Group())
    return metrics, {name: parameter.grad for name, parameter in state.model.named_parameters()}


def test_micro_batches_and_ranks_add_up_to_the_global_batch(data, tmp_path):
    # Free bits clip a mean over the micro-batch, which does not add up; without them everything does.
    config = small_pretrain(data, tmp_path, "model.free_bits=0", "precision=float32")
    task = config.build_task()
    whole = next(batches_of(task, config, micro_batch_size=4))
    by_two = next(batches_of(task, config, micro_batch_size=2))
    by_rank = [part for r in (0, 1) for part in next(batches_of(task, config, micro_batch_size=4, group=Group(r, 2)))]
    assert [len(parts) for parts in (whole, by_two, by_rank)] == [1, 2, 2]
    metrics, expected = gradients(config, task, whole)
    for parts in (by_two, by_rank):
        other_metrics, found = gradients(config, task, parts)
        assert other_metrics == pytest.approx(metrics, rel=1e-5)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_random_numbers_of_a_pair_depend_on_the_visit_alone(data, tmp_path):
    config = small_pretrain(data, tmp_path)
    task = config.build_task()
    [batch] = next(batches_of(task, config, micro_batch_size=4))
    whole, part = task.draws(batch, torch.device("cpu")), task.draws(batch.part(1, 3), torch.device("cpu"))
    for name in whole._fields:
        assert torch.equal(getattr(whole, name)[2:6], getattr(part, name)), name
        assert not torch.equal(getattr(whole, name)[0], getattr(whole, name)[1]), f"{name}: pairs share numbers"


def test_a_run_leaves_its_records_and_a_rerun_does_nothing(data, tmp_path):
    config = small_pretrain(data, tmp_path)
    summary = launch(config)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert {"loss", "loss_future", "kl", "loss_masked", "lr", "grad_norm", "epoch", "step_s"} <= set(lines[0])
    assert lines[-1]["epoch"] == pytest.approx(12 * 4 / 6)
    assert json.loads((tmp_path / "config.json").read_text()) == config.to_json()
    record = json.loads((tmp_path / "export" / "export.json").read_text())
    assert record["digest"] == summary["export"]
    assert len(list_checkpoints(config.checkpoints_url())) == config.checkpoint.keep
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert launch(config) == summary
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_finished_run_without_export_is_exported_without_training(data, tmp_path, monkeypatch):
    config = small_pretrain(data, tmp_path, "schedule.steps=4")
    summary = launch(config)
    (tmp_path / "export" / "export.json").unlink()
    monkeypatch.setattr("training.launch.train", lambda *_: pytest.fail("trained again"))
    assert launch(config)["export"] == summary["export"]


def test_no_steps_left_is_a_normal_case(data, tmp_path):
    config = small_pretrain(data, tmp_path)
    task = config.build_task()
    state = new_state(config, task, torch.device("cpu"))
    state.step = 12
    plan = LoopPlan(schedule_of(config, task), 4, 0)
    run_loop(task, state, plan=plan, group=Group(), batches=iter(()), callbacks=[])
    assert state.step == 12


def test_an_output_folder_keeps_its_config_and_its_data(data, tmp_path):
    launch(small_pretrain(data, tmp_path, "schedule.steps=4"))
    with pytest.raises(ConfigError, match="schedule"):
        launch(small_pretrain(data, tmp_path, "schedule.steps=5"))
    summary = json.loads((tmp_path / "summary.json").read_text())
    (tmp_path / "summary.json").write_text(json.dumps(summary | {"data_digest": "0" * 64}))
    with pytest.raises(InputError, match="data set is now"):
        launch(small_pretrain(data, tmp_path, "schedule.steps=4"))


def test_a_loss_that_is_not_finite_stops_before_the_update_and_keeps_the_batch(data, tmp_path):
    config = small_pretrain(data, tmp_path, "optim.lr=1e30", "schedule.warmup_steps=0")
    with pytest.raises(TrainingError, match=r"at step 2 of 12.*not updated"):
        launch(config)
    [kept] = (tmp_path / "failed").glob("*.safetensors")
    tensors = load_file(kept)
    assert tensors["0/images"].shape == (8, 2, 3, 32, 32) and tensors["0/visits"].shape == (4, 2)
    assert list_checkpoints(config.checkpoints_url()) == []


def test_the_weights_are_untouched_after_a_broken_step(data, tmp_path):
    config = small_pretrain(data, tmp_path)
    task = config.build_task()
    state = new_state(config, task, torch.device("cpu"))
    with torch.no_grad():
        state.model.decoder_pred.weight[0, 0] = torch.inf
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    plan = LoopPlan(schedule_of(config, task), 4, 0)
    with pytest.raises(TrainingError):
        run_loop(
            task, state, plan=plan, group=Group(), batches=batches_of(task, config, micro_batch_size=4), callbacks=[]
        )
    assert state.step == 0
    assert all(torch.equal(before[name], value) for name, value in state.model.state_dict().items())


def test_lines_beyond_the_checkpoint_are_dropped(tmp_path, data):
    config = small_pretrain(data, tmp_path)
    state = new_state(config, config.build_task(), torch.device("cpu"))
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 9)))
    state.step = 6
    metrics = MetricsFile(str(path), every_steps=1, checkpoint_steps=3)
    metrics.at_start(state)
    metrics.at_end(state)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5, 6]


class DropoutTask:
    """The least that the loop can train, with draws that the model makes itself."""

    num_clips, data_digest, repeats = 4, "d", 1

    def build_model(self):
        return torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))

    def loss(self, model, batch, device):
        return {"loss": model(batch).square().mean()}


def dropout_run(*, stops):
    task = DropoutTask()
    torch.manual_seed(0)
    model = task.build_model()
    state = TrainState(model, build_optimizer(model, OptimConfig()), Identity("c", "d", 0))
    for stop in stops:
        torch.manual_seed(stop)  # whatever happened in between
        schedule = plan_schedule(
            ScheduleConfig(epochs=None, warmup_epochs=0, steps=stop, shape="constant"),
            OptimConfig(lr=1e-2),
            num_clips=4,
            global_batch_size=4,
        )
        plan = LoopPlan(schedule, 4, seed=7, precision="float32")
        batches = iter([[torch.ones(4, 3)]] * (stop - state.step))
        run_loop(task, state, plan=plan, group=Group(), batches=batches, callbacks=[])
    return state


def test_a_models_own_draws_continue_after_a_stop():
    whole, stopped = dropout_run(stops=[6]), dropout_run(stops=[2, 5, 6])
    assert stopped.tail == whole.tail
    assert len({item["loss"] for item in whole.tail}) == 6
