"""Tables of addresses: what their columns say, and what is no table."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.errors import InputError
from ingest.corpora import urls
from ingest.downloads import fetch_table, read_table
from tests.helpers_urls import QUICK, write_csv


def test_ids_spans_and_captions_of_parquet_and_folders(web, tmp_path):
    folder = tmp_path / "tables"
    folder.mkdir()
    columns = {
        "address": [web.url("/v0.mp4"), web.url("/v0.mp4"), web.url("/v1.mp4")],
        "text": ["a", None, "c"],
        "label": ["x", "y", None],
        "start_s": [None, 0.5, float("nan")],
        "end_s": [None, 1.5, None],
        "key": [11, 12, 13],
        "other": [b"ignored"] * 3,
    }
    pq.write_table(pa.table(columns), folder / "b.parquet")
    write_csv(folder / "a.CSV", [{"url": web.url("/v2.mp4"), "caption": "d", "id": "e\x1b[2J"}])
    (folder / "README.md").write_text("no table")
    root = str(tmp_path / "root")
    fetch_table(str(folder), root, QUICK)
    clips = {clip.source_id: clip for clip in urls.list_clips(root)}
    assert set(clips) == {"11", "12", "13", "e?[2J"}
    assert (clips["12"].start_s, clips["12"].end_s, clips["12"].text, clips["12"].label) == (0.5, 1.5, "", "y")
    assert (clips["13"].start_s, clips["13"].text, clips["13"].label) == (None, "c", "")
    assert clips["11"].videos == clips["12"].videos
    path = Path(root, clips["11"].videos[0].path)
    assert path.is_file() and path.parent.name == path.name[:2]
    columns["key"] = [11, 11, 13]
    pq.write_table(pa.table(columns), folder / "b.parquet")
    rows = read_table(str(folder)).rows
    assert all(len(row.source_id) == 16 for row in rows) and {row.id for row in rows} == {"11", "13", "e?[2J"}
    assert [row.source_id for row in rows] == [row.source_id for row in read_table(str(folder)).rows]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", b"link,text\nhttp://h/x,a\n", "no column 'url'"),
        ("a.csv", b"", "it has none"),
        ("a.csv", b"url\nhttp://h/\xff\xfe\n", "not UTF-8 text"),
        ("a.csv", b'url\n"' + b"a" * 200_000 + b'"\n', "not a readable table"),
        ("a.parquet", b"PAR1 not at all", "not a readable table"),
        ("a.csv", b"url\n", "no row"),
        ("a.txt", b"http://h/x\n", "no table of addresses"),
    ],
)
def test_what_is_no_table_is_one_line(tmp_path, name, content, said):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(content)
    with pytest.raises(InputError, match=said) as caught:
        fetch_table(str(tmp_path / "in"), str(tmp_path / "out"), QUICK)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cells", [("nan", ""), ("-1", ""), ("1", "1"), ("x", "2"), ("", "inf"), ("3", "2"), ("", "0")])
def test_spans_that_are_none_are_not_fetched(web, tmp_path, cells):
    row = {"url": web.url("/v0.mp4"), "start_s": cells[0], "end_s": cells[1]}
    fetch_table(write_csv(tmp_path / "a.csv", [row]), str(tmp_path / "root"), QUICK)
    (clip,) = urls.list_clips(str(tmp_path / "root"))
    assert "no video's span" in clip.problem and clip.videos == () and not web.hits
