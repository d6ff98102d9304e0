"""CALVIN: the published chains and their starts, what a chain counts, and that nothing but the policy decides it."""

import json
import multiprocessing
import signal

import numpy as np
import pytest
import torch

from evaluation.calvin.chains import fnv1_32, read_chains, start_of, state_seed
from evaluation.calvin.config import CalvinConfig
from evaluation.calvin.environment import Checkout, Seen
from evaluation.calvin.suite import evaluate
from evaluation.main import main
from infra.digests import sha256_bytes
from infra.errors import ConfigError, DataError, InputError, MachineError
from infra.media_decode import decode_video
from infra.storage import join, read_json
from tests.helpers_calvin import (
    PRESSES,
    Keyed,
    Scripted,
    Table,
    TableBenchmark,
    evaluate_in_child,
    small_config,
)
from training.export import load_policy, save_export
from training.models.policies import BehaviourCloningConfig, BehaviourCloningHead, BehaviourCloningPolicy


def test_the_file_holds_1000_chains_of_five_of_34_tasks():
    file = read_chains()
    assert len(file.chains) == 1000 and len(set(file.tasks)) == 34
    assert {task for chain in file.chains for task in chain.tasks} == set(file.tasks)
    assert all(len(chain.tasks) == len(set(chain.tasks)) == 5 for chain in file.chains)
    assert [chain.number for chain in file.chains] == list(range(1000))
    first = file.chains[0]
    assert first.state == {
        "led": 1, "lightbulb": 1, "slider": "left", "drawer": "open",
        "red_block": "slider_left", "blue_block": "table", "pink_block": "slider_right", "grasped": 0,
    }  # fmt: skip


def test_every_chain_is_possible_from_its_start():
    """Doors and lights, told plainly: a task that switches one finds it in the other position."""
    switches = {
        "turn_on_led": ("led", 0, 1), "turn_off_led": ("led", 1, 0),
        "turn_on_lightbulb": ("lightbulb", 0, 1), "turn_off_lightbulb": ("lightbulb", 1, 0),
        "open_drawer": ("drawer", "closed", "open"), "close_drawer": ("drawer", "open", "closed"),
        "move_slider_left": ("slider", "right", "left"), "move_slider_right": ("slider", "left", "right"),
    }  # fmt: skip
    counted = 0
    for chain in read_chains().chains:
        state = dict(chain.state)
        for task in chain.tasks:
            if task in switches:
                name, before, after = switches[task]
                assert state[name] == before, chain
                state[name] = after
                counted += 1
            if task in ("place_in_drawer", "push_into_drawer"):
                assert state["drawer"] == "open", chain
    assert counted > 1500


def test_fnv1_gives_the_published_values():
    basis = 0x811C9DC5
    assert [fnv1_32(text, basis=basis) for text in (b"", b"a", b"foobar")] == [basis, 0x050C5D7E, 0x31F0B262]
    # pyhash's own tests, of bytes and of a string, which it hashes as UTF-16
    assert fnv1_32(b"test") == 3698262380 and fnv1_32("test".encode("utf-16-le")) == 3910690890


def test_starts_are_those_of_the_official_function_with_pyhash():
    chains = read_chains().chains
    assert [state_seed(chains[number].state) for number in (0, 2, 42)] == [2138410836, 4009425464, 412142786]
    robot, scene = start_of(chains[42].state)
    assert robot.shape == (15,) and robot[-1] == 1.0
    assert scene.tolist() == [
        0.0, 0.22, 0.0, 0.0, 0.0, 1.0,
        -0.240851662, 0.0924044687, 0.460990009, 0.0, 0.0, 1.2106404610175248,
        0.070341633, 0.0924044687, 0.460990009, 0.0, 0.0, 1.8482270763247668,
        0.0500000896, -0.120000177, 0.459990009, 0.0, 0.0, 1.7119369729745006,
    ]  # fmt: skip
    everything = np.stack([start_of(chain.state)[1] for chain in chains]).round(9)
    assert sha256_bytes(everything.tobytes()) == "a66cd839365095f435f91b69a0f795408d6f75ceef5739ab6f1f1713a3a85771"


def test_average_length_and_rates_are_exactly_what_the_script_solves(tmp_path):
    lengths = {0: 5, 1: 0, 2: 3, 3: 1, 4: 5, 5: 2}
    policy = Scripted(lengths)
    result = evaluate(small_config(tmp_path), policy, TableBenchmark())
    assert [item.metrics["average_length"] for item in result.items] == [5, 0, 3, 1, 5, 2]
    scores = result.scores
    assert scores["average_length"].value == pytest.approx(16 / 6) and scores["average_length"].count == 6
    assert scores["average_length"].low < 16 / 6 < scores["average_length"].high
    rates = [scores[f"success_{count}"] for count in range(1, 6)]
    assert [score.successes for score in rates] == [5, 4, 3, 2, 2] and {score.count for score in rates} == {6}
    assert sum(score.value for score in rates) == pytest.approx(scores["average_length"].value)
    tries = [scores[name] for name in scores if name.startswith("task/")]
    assert sum(score.successes for score in tries) == 16 and sum(score.count for score in tries) == 16 + 4
    # A chain stops at its first failure, which costs all its steps; a solved task costs what it took.
    assert result.items[2].details["steps"] == [PRESSES] * 3 + [7]
    assert result.items[2].details["failed"] == read_chains().chains[2].tasks[3]
    assert result.items[0].details["failed"] is None and result.items[0].metrics["steps"] == 5 * PRESSES
    assert set(policy.resets) == {4} and len(policy.resets) == 16 + 4  # a reset before every task
    timed = read_json(join(small_config(tmp_path).output, result.artefacts["latency"]))
    assert timed["single"]["actions_per_decision"] == policy.action_horizon and timed["single"]["control_hz"] > 0
    assert timed["arms"]["policy"]["decisions"] == len(policy.seen) and timed["arms"]["policy"]["batch_size"] == 4


def test_the_policy_sees_chain_task_sentence_and_both_cameras(tmp_path):
    policy = Scripted({0: 1})
    evaluate(small_config(tmp_path, sequences=1), policy, TableBenchmark())
    first, second = read_chains().chains[0].tasks[:2]
    assert [seen.keys[0] for seen in policy.seen] == [f"chain/00000/{first}", f"chain/00000/{second}"]
    assert policy.seen[0].keys[1:] == ("spare/1", "spare/2", "spare/3")
    seen = policy.seen[1]
    assert seen.text == (second.replace("_", " "),) * 4
    assert {name: images.shape for name, images in seen.images.items()} == {
        "static": (4, 200, 200, 3), "gripper": (4, 84, 84, 3),
    }  # fmt: skip
    assert (seen.images["static"] == PRESSES).all()  # the table is not reset between subtasks
    assert np.allclose(seen.proprioception, start_of(read_chains().chains[0].state)[0])


def test_another_seed_names_other_draws_and_another_protocol(tmp_path):
    versions = set()
    for name, values in {"a": {}, "b": {"seed": 3}, "c": {"max_steps": 8}, "d": {"sequences": 2}}.items():
        policy = Scripted({})
        result = evaluate(small_config(tmp_path / name, **({"sequences": 1} | values)), policy, TableBenchmark())
        versions.add(result.suite_version)
        assert policy.seen[0].keys[0].endswith("/seed-3") == (name == "b")
    versions.add(evaluate(small_config(tmp_path / "e", sequences=1), policy, TableBenchmark(name="E")).suite_version)
    assert len(versions) == 5


def bytes_of(output) -> dict[str, bytes]:
    """Records and result; how long decisions took differs from run to run."""
    found = (path for path in sorted(output.rglob("*.json")) if path.name != "latency.json")
    return {str(path.relative_to(output)): path.read_bytes() for path in found}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Records and result of the keyed policy, chain after chain in this process."""
    output = tmp_path_factory.mktemp("straight")
    result = evaluate(small_config(output), Keyed(), TableBenchmark())
    lengths = {item.metrics["average_length"] for item in result.items}
    assert len(lengths) > 2, "the policy must make chains differ"
    return bytes_of(output)


@pytest.mark.parametrize("processes", [1, 3])
def test_any_number_of_processes_gives_the_same_bytes(tmp_path, straight, processes):
    evaluate(small_config(tmp_path, processes=processes), Keyed(), TableBenchmark())
    assert bytes_of(tmp_path) == straight


def test_a_killed_evaluation_resumes_to_the_same_bytes(tmp_path, straight):
    context = multiprocessing.get_context("spawn")
    child = context.Process(target=evaluate_in_child, args=(str(tmp_path), "calvin.after_chain:3"))
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL
    before = bytes_of(tmp_path)
    assert len(before) == 3 and not (tmp_path / "result.json").exists()
    evaluate(small_config(tmp_path, processes=2), Keyed(), TableBenchmark())
    after = bytes_of(tmp_path)
    assert after == straight and before.items() <= after.items()


def test_finished_chains_are_not_played_again_nor_mixed_with_other_policies(tmp_path):
    evaluate(small_config(tmp_path, sequences=2), Scripted({0: 2}), TableBenchmark())
    again = Scripted({0: 5, 1: 5})
    assert evaluate(small_config(tmp_path, sequences=2), again, TableBenchmark()).scores["success_2"].successes == 1
    assert again.seen == []
    with pytest.raises(InputError, match="holds chains of policy"):
        evaluate(small_config(tmp_path, sequences=2), Scripted({}, digest="9" * 64), TableBenchmark())
    with pytest.raises(InputError, match="holds chains of protocol"):
        evaluate(small_config(tmp_path, sequences=2), Scripted({}), TableBenchmark(name="other"))


def test_the_first_chains_are_filmed(tmp_path):
    config = small_config(tmp_path, sequences=2, num_clips=1, clip_stride=2)
    result = evaluate(config, Scripted({0: 5, 1: 5}), TableBenchmark())
    assert result.artefacts == {"chain/00000: 5 of 5 solved": "clips/chain-00000.mp4", "latency": "latency.json"}
    assert decode_video(tmp_path / "clips/chain-00000.mp4").shape == (5 * PRESSES // 2, 200, 200, 3)


def test_a_process_that_dies_or_refuses_is_one_error(tmp_path):
    config = small_config(tmp_path, sequences=2, processes=2)
    with pytest.raises(MachineError, match=r"chain/0000[01] ended with code 41"):
        evaluate(config, Scripted({}), TableBenchmark(dies_at=2))
    with pytest.raises(DataError, match="the table is sticky"):
        evaluate(config, Scripted({}), TableBenchmark(refuses_at=2))
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(("broken", "message"), [("shape", r"\(4, 10, 6\)"), ("value", "not finite at chain/00000/")])
def test_wrong_actions_are_named(tmp_path, broken, message):
    class Broken(Scripted):
        def act(self, observation):
            chunk = super().act(observation)
            return chunk[..., :6] if broken == "shape" else chunk * np.nan

    with pytest.raises(DataError, match=message):
        evaluate(small_config(tmp_path, sequences=1), Broken({}), TableBenchmark())


def test_an_observation_without_a_camera_and_a_task_without_a_sentence_are_named(tmp_path):
    table = Table()
    observation = table.reset(*start_of(read_chains().chains[0].state))
    del observation["rgb_obs"]["rgb_gripper"]
    with pytest.raises(DataError, match="lacks rgb_gripper"):
        Seen.of(observation)
    with pytest.raises(InputError, match="no sentence for open_drawer"):
        evaluate(small_config(tmp_path, sequences=20), Scripted({}), TableBenchmark(without=("open_drawer",)))


def test_rows_must_suffice_for_the_processes():
    with pytest.raises(ConfigError, match="5 processes need a batch_size of at least 5"):
        CalvinConfig.parse({"policy": "p", "calvin_root": "r", "output": "o", "processes": 5})


@pytest.fixture(scope="module")
def policy_url(tmp_path_factory):
    torch.manual_seed(0)
    config = BehaviourCloningConfig(feature="none", proprioception_dim=15, action_dim=7, text_dim=0)
    policy = BehaviourCloningPolicy(BehaviourCloningHead(config))
    folder = tmp_path_factory.mktemp("policy")
    save_export(
        folder, kind="bc-policy", model_config=policy.config, weights=policy.weights(),
        preprocessing=policy.preprocessing, card="# Policy\n", inputs=["data"],
    )  # fmt: skip
    return str(folder)


def test_a_stored_policy_plays(tmp_path, policy_url):
    result = evaluate(small_config(tmp_path, sequences=1), load_policy(policy_url), TableBenchmark())
    assert result.items[0].metrics["average_length"] in range(6)


def run_main(tmp_path, **values) -> int:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"kind": "calvin", "output": str(tmp_path / "out")} | values))
    return main([str(path)])


def checkout_layout(root):
    """The files by which a checkout is known, without CALVIN in them."""
    for name in (
        "calvin_env/calvin_env/envs/play_table_env.py",
        "calvin_env/calvin_env/__init__.py",
        "calvin_env/conf/scene/calvin_scene_D.yaml",
        "calvin_models/conf/callbacks/rollout/tasks/new_playtable_tasks.yaml",
        "calvin_models/conf/annotations/new_playtable_validation.yaml",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("")
    return root


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("empty", "is no CALVIN checkout: it has no calvin_env/calvin_env/envs/play_table_env.py"),
        ("annotations", "has no calvin_models/conf/annotations/new_playtable_validation.yaml"),
        ("scene", "Scenes: calvin_scene_D."),
        ("dataset", "has no validation/.hydra/merged_config.yaml"),
    ],
)
def test_what_a_checkout_lacks_is_one_line(tmp_path, policy_url, capsys, change, words):
    root = checkout_layout(tmp_path / "calvin") if change != "empty" else tmp_path / "nothing"
    values = {"policy": policy_url, "calvin_root": str(root)}
    if change == "annotations":
        (root / "calvin_models/conf/annotations/new_playtable_validation.yaml").unlink()
    elif change == "scene":
        values["scene"] = "calvin_scene_E"
    elif change == "dataset":
        values["dataset"] = str(tmp_path)
    assert run_main(tmp_path, **values) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert words in error and error.startswith(("InputError: ", "MachineError: "))


def test_missing_packages_are_named_with_the_command_that_brings_them(tmp_path, monkeypatch):
    monkeypatch.setattr("evaluation.calvin.environment.NEEDED", {"json": "json", "left_behind": "left-behind"})
    with pytest.raises(MachineError, match=r"not installed: left-behind\. pip install left-behind$"):
        Checkout(checkout_layout(tmp_path)).check()


def test_the_sentence_of_a_task_is_the_first_annotation(tmp_path):
    checkout = Checkout(checkout_layout(tmp_path))
    path = tmp_path / "calvin_models/conf/annotations/new_playtable_validation.yaml"
    path.write_text('# doors\nopen_drawer: [ "open the drawer", "pull the drawer"]\nturn_on_led: ["turn on the led"]\n')
    assert checkout.sentences() == {"open_drawer": "open the drawer", "turn_on_led": "turn on the led"}
    path.write_text("open_drawer: open the drawer\n")
    with pytest.raises(InputError, match="not a list of sentences"):
        checkout.sentences()
