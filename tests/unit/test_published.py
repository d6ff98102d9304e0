"""Published numbers are data: typed, sourced, consistent where arithmetic can tell, and never passed off as ours."""

import pytest

from evaluation.calvin.suite import scores_of
from evaluation.published import as_markdown, beside, load_table, table_ids
from evaluation.result import Item
from infra.errors import ConfigError

SUCCESSES = [f"success_{count}" for count in range(1, 6)]


def test_every_table_has_sourced_values_in_its_own_columns():
    assert table_ids() == (
        "vpp-1", "vpp-2", "vpp-3", "vpp-4", "vpp-5", "vpp-7", "vpp-9", "vpp-12", "vpp-13",
        "vpp-latency", "vpp-layers", "vpp-steps",
    )  # fmt: skip
    for table in map(load_table, table_ids()):
        assert table.primary in table.columns and table.rows and table.setting
        assert len({row.name for row in table.rows}) == len(table.rows)
        for row in table.rows:
            assert row.values and set(row.values) <= set(table.columns), row.name
            assert "/" not in row.name
            assert all(value.source for value in row.values.values())


def test_every_chain_row_sums_to_its_average_length():
    """Five rates of three digits and an average of two, one of them cut instead of rounded."""
    rows = load_table("vpp-1").rows
    assert len(rows) == 12
    for row in rows:
        total = sum(row.values[name].value for name in SUCCESSES)
        assert total == pytest.approx(row.values["average_length"].value, abs=5 * 0.0005 + 0.01), row.name
        rates = [row.values[name].value for name in SUCCESSES]
        assert rates == sorted(rates, reverse=True), row.name


def test_only_what_was_confirmed_says_so():
    table = load_table("vpp-1")
    confirmed = {row.name: {name for name, value in row.values.items() if value.confirmed} for row in table.rows}
    average = {"average_length"}
    assert confirmed == {
        "RT-1": set(), "Robo-Flamingo": set(), "VidMan": set(), "RoboUniview": set(), "GR-1, 10 % data": set(),
        "Diffusion Policy": average, "Uni-Pi": average, "MDT": average, "Susie": average, "GR-1": average,
        "VPP, 10 % data": average, "VPP": {*SUCCESSES, *average},
    }  # fmt: skip
    states = {
        table_id: {value.confirmed for row in load_table(table_id).rows for value in row.values.values()}
        for table_id in table_ids()
    }
    assert {table_id for table_id, found in states.items() if found == {False}} == {"vpp-2", "vpp-12", "vpp-13"}
    assert {table_id for table_id, found in states.items() if found == {True, False}} == {"vpp-1"}


def test_numbers_agree_between_tables():
    def value(table_id, row, column):
        return load_table(table_id).row(row).values[column].value

    best = value("vpp-1", "VPP", "average_length")
    assert (
        best == 4.33 and [value(t, r, "average_length") for t, r in (("vpp-3", "VDM"), ("vpp-4", "VPP"))] == [best] * 2
    )
    assert value("vpp-4", "VPP", "latency_ms") == value("vpp-latency", "VPP", "latency_ms") == 140
    easy, middle, hard = (value("vpp-2", "VPP", column) for column in ("easy", "middle", "hard"))
    assert (28 * easy + 11 * middle + 11 * hard) / 50 == pytest.approx(value("vpp-2", "VPP", "average"), abs=5e-4)
    tools = [value("vpp-7", tool, "tool") for tool in ("spoon", "hammer", "drill", "pipette")]
    assert sum(tools) / 4 == pytest.approx(value("vpp-5", "hand, tool use", "VPP"), abs=0.006)
    assert value("vpp-13", "policy condition", "value") == "225x384"


def test_ours_stand_beside_and_say_that_the_setting_differs():
    rows = beside("vpp-3", {"VDM": 0.8, "Stable-VAE/average_length": 0.5, "RSP": 0.6})
    assert [row.name for row in rows] == ["VDM", "Stable-VAE", "VC-1", "Voltron", "RSP"]
    assert [dict(row.ours) for row in rows] == [
        {"average_length": 0.8}, {"average_length": 0.5}, {}, {}, {"average_length": 0.6},
    ]  # fmt: skip
    assert rows[0].published["average_length"].value == 4.33 and not rows[4].published
    assert all(row.settings_differ == load_table("vpp-3").setting for row in rows)
    text = as_markdown("vpp-1", {"VPP": 1.25, "VPP/success_1": 0.5})
    assert "| VPP | 0.965 | 0.909 | 0.866 | 0.82 | 0.769 | 4.33 | 0.5 | 1.25 |" in text
    assert "| RT-1 | 0.533 [?] |" in text and "another setting" in text and "[?] = not confirmed" in text
    assert "another setting" not in as_markdown("vpp-3") and "[?]" not in as_markdown("vpp-3")


def test_scores_of_the_suite_fit_the_table():
    metrics = {"average_length": 2.0, **{name: float(count < 2) for count, name in enumerate(SUCCESSES)}}
    items = [Item(item_id="c", stratum="s", metrics=metrics, details={"tasks": list("abcde"), "steps": [1, 2, 3]})]
    scores = scores_of(items)
    ours = {f"VPP/{column}": scores[column].value for column in load_table("vpp-1").columns}
    row = next(row for row in beside("vpp-1", ours) if row.name == "VPP")
    assert row.ours == metrics


@pytest.mark.parametrize(
    ("table_id", "ours", "message"),
    [
        ("vpp-33", {}, "Did you mean 'vpp-"),
        ("vpp-1", {"VPP/sucess_1": 0.5}, "Did you mean 'success_1'"),
        ("vpp-1", {"VPP": float("nan")}, "not a number"),
    ],
)
def test_wrong_requests_are_one_line(table_id, ours, message):
    with pytest.raises(ConfigError, match=message):
        beside(table_id, ours)
    with pytest.raises(ConfigError, match="Did you mean 'GR-1'"):
        load_table("vpp-1").row("GR1")
