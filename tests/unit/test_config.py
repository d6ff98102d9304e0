"""Configs refuse what they do not know and say what was meant."""

import pytest

from infra.config import Config, override
from infra.errors import ConfigError, InputError


class Optim(Config):
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)


class Recipe(Config):
    optim: Optim = Optim()
    name: str = "tiny"
    limit: int | None = None


def test_override_reaches_nested_keys_and_leaves_the_original_alone():
    recipe = Recipe()
    changed = override(recipe, ["optim.lr=3e-4", "optim.betas=[0.8, 0.9]", "limit=7", "name=big"])
    assert (changed.optim.lr, changed.optim.betas, changed.limit, changed.name) == (3e-4, (0.8, 0.9), 7, "big")
    assert recipe == Recipe()


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("optim.lrr=1", "Did you mean 'lr'"),
        ("optm.lr=1", "Did you mean 'optim'"),
        ("name.deep=1", "unknown config key"),
        ("optim.lr", "not of the form key=value"),
        ("optim.lr=fast", "optim.lr"),
    ],
)
def test_a_wrong_override_is_named(assignment: str, said: str):
    with pytest.raises(ConfigError, match=said.replace("(", r"\(").replace(")", r"\)")):
        override(Recipe(), [assignment])


def test_unknown_key_in_a_file_gets_a_suggestion(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"optim": {"beta": [0.9, 0.9]}}')
    with pytest.raises(ConfigError, match=r"'optim\.beta'.*Did you mean 'betas'"):
        Recipe.load(path)
    with pytest.raises(InputError, match=r"missing\.json"):
        Recipe.load(tmp_path / "missing.json")


def test_save_spells_out_every_default_and_loads_back(tmp_path):
    path = tmp_path / "deep" / "config.json"
    Recipe(limit=3).save(path)
    assert '"betas"' in path.read_text()
    assert Recipe.load(path) == Recipe(limit=3)


def test_digest_follows_content_and_can_leave_fields_out():
    assert Recipe().digest() == Recipe(optim=Optim()).digest()
    assert Recipe().digest() != Recipe(limit=1).digest()
    assert Recipe().digest(exclude=frozenset({"limit"})) == Recipe(limit=1).digest(exclude=frozenset({"limit"}))


def test_not_a_number_is_refused():
    with pytest.raises(ConfigError):
        override(Recipe(), ["optim.lr=NaN"])
