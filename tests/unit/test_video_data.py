"""Which clips a fine-tuning, its evaluation and its previews see."""

import json

import pytest

from infra.errors import ConfigError, InputError
from ingest.windows import WindowRule
from pipelines.video_data import (
    check_request,
    evaluation_sources,
    frames_of,
    preview_sources,
    probe_sources,
    sources_of_run,
    training_sources,
)
from tests.helpers_clips import Take, make_takes
from tests.helpers_data import edit_manifest

RULE = WindowRule(num_frames=4, stride=3, short="repeat")


def corpus(folder, labels, *, kind="annotated", name="several", held_out=()):
    takes = [Take(20, label=label, text=f"do {label}") for label in labels]
    takes += [Take(20, label=label, text=f"do {label}", split="validation") for label in held_out]
    url = make_takes(folder, takes)
    edit_manifest(folder, lambda manifest: manifest.update(corpus=kind, name=name))
    return url


def run_beside(folder, sources):
    """What a finished fine-tuning leaves beside its export, as far as it is read here."""
    export = folder / "run/export"
    export.mkdir(parents=True)
    (export / "config.json").write_text(json.dumps({"kind": "tvp", "model": {"num_frames": 4}}))
    values = {"kind": "finetune-tvp", "data": {"sources": [source.to_json() for source in sources]}}
    (folder / "run/config.json").write_text(json.dumps(values))
    return str(export)


def test_an_annotated_data_set_is_one_source_per_label_others_are_one_source(tmp_path):
    several = corpus(tmp_path / "several", ["bridge", "xhand", "bridge"])
    single = corpus(tmp_path / "single", ["drawer-open", "window-open"], kind="metaworld", name="demonstrations")
    sources = training_sources([several, single], rule=RULE)
    assert [source.labels for source in sources] == [("bridge",), ("xhand",), ()]
    assert [source.rule.kind for source in sources] == ["linspace", "windows", "windows"]
    assert sources[2].rule == RULE
    assert {source.rule.num_frames for source in sources} == {4}
    assert {source.split for source in sources} == {"train"}


def test_equal_labels_of_two_data_sets_stay_two_sources(tmp_path):
    urls = [corpus(tmp_path / name, ["bridge"]) for name in ("first", "second")]
    sources = training_sources(urls, rule=RULE)
    assert [(source.name, source.url) for source in sources] == [("bridge", urls[0]), ("bridge-2", urls[1])]


def test_a_published_mixture_finds_its_sets_by_label_and_by_name(tmp_path):
    labels = corpus(tmp_path / "several", ["bridge", "rt1", "sthv2"])
    named = corpus(tmp_path / "calvin", [""], kind="folder", name="calvin")
    sources = {source.name: source for source in training_sources([labels, named], rule=RULE, mixture="calvin")}
    shares = {name: source.probability for name, source in sources.items()}
    assert shares == {"sthv2": 0.4, "bridge": 0.2, "rt1": 0.2, "calvin": 0.2}
    assert (sources["rt1"].labels, sources["rt1"].url) == (("rt1",), labels)
    assert (sources["calvin"].labels, sources["calvin"].url) == ((), named)
    with pytest.raises(ConfigError, match="lack calvin"):
        training_sources([labels], rule=RULE, mixture="calvin")
    with pytest.raises(ConfigError, match="calvin, robot, paper-table8"):
        training_sources([labels], rule=RULE, mixture="clavin")


def test_evaluation_takes_the_held_out_clips_of_the_models_own_run(tmp_path):
    url = corpus(tmp_path / "data", ["bridge", "rt1"], held_out=["rt1"])
    sources = [source.model_copy(update={"latents": "a-cache"}) for source in training_sources([url], rule=RULE)]
    export = run_beside(tmp_path, sources)
    assert [source.name for source in sources_of_run(export)] == ["bridge", "rt1"]
    (found,) = evaluation_sources(export)
    assert (found.name, found.split, found.latents) == ("rt1", "validation", "")
    assert found.rule == sources[1].rule


def test_evaluation_on_other_data_cuts_clips_of_the_models_length(tmp_path):
    own = corpus(tmp_path / "own", ["bridge"])
    export = run_beside(tmp_path, training_sources([own], rule=RULE))
    other = corpus(tmp_path / "other", ["a", "b"], kind="folder", held_out=["a"])
    (found,) = evaluation_sources(export, other)
    assert (found.url, found.split, found.rule.num_frames, frames_of(export)) == (other, "validation", 4, 4)
    unseen = corpus(tmp_path / "unseen", ["a", "b"], kind="folder")
    (found,) = evaluation_sources(export, unseen)
    assert (found.url, found.split) == (unseen, None)
    with pytest.raises(InputError, match=r"no episode of .*own is held out.*validation_share"):
        evaluation_sources(export)


def test_other_data_is_cut_by_the_rule_of_the_training(tmp_path):
    rule = WindowRule(kind="linspace", num_frames=4)
    export = run_beside(tmp_path, training_sources([corpus(tmp_path / "own", [""], kind="metaworld")], rule=rule))
    (found,) = evaluation_sources(export, corpus(tmp_path / "other", [""], kind="metaworld"))
    assert found.rule == rule


def test_the_position_probe_never_sees_clips_of_the_evaluation(tmp_path):
    own = corpus(tmp_path / "own", [""], kind="metaworld", held_out=[""])
    export = run_beside(tmp_path, training_sources([own], rule=RULE))
    assert probe_sources(export, evaluation_sources(export)) == ()  # the suite takes the training split itself
    foreign = evaluation_sources(export, corpus(tmp_path / "other", [""], kind="metaworld"))
    (probe,) = probe_sources(export, foreign)
    assert (probe.name, probe.url, probe.split) == (foreign[0].name, own, "train")


def test_a_model_from_elsewhere_needs_a_data_set(tmp_path):
    with pytest.raises(ConfigError, match="--data"):
        evaluation_sources(str(tmp_path / "svd"))
    assert frames_of(str(tmp_path / "svd")) == 16


def test_previews_choose_their_split(tmp_path):
    url = corpus(tmp_path / "data", ["bridge", "rt1"], held_out=["rt1"])
    cached = [source.model_copy(update={"latents": "a-cache"}) for source in training_sources([url], rule=RULE)]
    model = run_beside(tmp_path, cached)
    chosen = {}
    for split in ("validation", "train", "all"):
        sources = preview_sources(url, model=model, num_frames=4, split=split)
        chosen[split] = [(source.name, source.split) for source in sources]
        assert not any(source.latents for source in sources)  # previews are read from pixels
    assert chosen["validation"] == [("rt1", "validation")]
    assert chosen["train"] == [("bridge", "train"), ("rt1", "train")]
    assert chosen["all"] == [("bridge", None), ("rt1", None)]
    with pytest.raises(ConfigError, match="validation, train, all"):
        preview_sources(url, model="m", num_frames=4, split="test")


def test_what_cannot_work_is_said_before_anything_is_done(tmp_path):
    with pytest.raises(ConfigError, match="tiny, svd"):
        check_request("large", [])
    with pytest.raises(ConfigError, match="--initial"):
        check_request("svd", [])
    with pytest.raises(InputError, match=r"neither a folder .*model_index\.json"):
        check_request("svd", [], initial=str(tmp_path))
    with pytest.raises(InputError):
        check_request("tiny", [str(tmp_path / "absent")])
    check_request("svd", [], is_plan=True)
