"""Files as rows: every kind, compressed or not, where a row stands, and files that are damaged."""

from __future__ import annotations

import csv
import gzip
import json
import shlex
import sys

import pytest

from minimind.data import reading
from minimind.data.reading import DataError, numbered_rows, place_of, read_rows, split_name

ROWS = [{"q": "你好\u2028吗？", "n": 1}, {"q": "再见，\r\n线", "n": None}, {"q": "😀", "n": 3}]
LINES = [json.dumps(row, ensure_ascii=False) for row in ROWS]


def table(comma):
    return f'q{comma} n\r\n"你好\u2028吗？"{comma}1\r\n"再见，\r\n线"{comma}\r\n😀{comma}3\r\n'


KINDS = {
    "a.jsonl": ("\r\n".join(["", LINES[0], " \t", *LINES[1:]]), [":2", ":4", ":5"]),
    "a.ndjson": ("\n".join(LINES), [":1", ":2", ":3"]),
    "no-ending": ("\n".join(LINES), [":1", ":2", ":3"]),
    "lines.json": ("\n".join(LINES) + "\n", [":1", ":2", ":3"]),
    "array.json": (json.dumps(ROWS, ensure_ascii=False), [":1", ":1", ":1"]),
    "pretty.json": (json.dumps(ROWS, ensure_ascii=False, indent=1), [":2", ":6", ":10"]),
    "array.jsonl": ("\n[" + ",\n".join(LINES) + "\n]\n", [":2", ":3", ":4"]),
    "a.csv": (table(","), [":2", ":3", ":5"]),
    "a.tsv": (table("\t"), [":2", ":3", ":5"]),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("bom", ["", "\ufeff"], ids=["", "bom"])
def test_the_same_rows_of_every_kind(tmp_path, name, packed, bom):
    text, places = KINDS[name]
    path = tmp_path / (name + ".gz" * packed)
    data = (bom + text).encode()
    path.write_bytes(gzip.compress(data) if packed else data)
    found = list(read_rows(path))
    assert [place for place, _ in found] == [f"{path}{line}" for line in places]
    rows = [row for _, row in found]
    if name[-4:] in (".csv", ".tsv"):  # where all is text
        rows = [{**row, "n": int(row["n"]) if row["n"] else None} for row in rows]
    assert rows == ROWS


def test_a_text_a_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff春眠不觉晓，\r\n\r\n  处处闻\r啼鸟。\u2028夜来\n".encode())
    assert list(read_rows(path)) == [
        (f"{path}:1", {"text": "春眠不觉晓，"}),
        (f"{path}:3", {"text": "  处处闻\r啼鸟。\u2028夜来"}),
    ]


def test_one_object_on_many_lines(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("\n" + json.dumps(ROWS[0], indent=2))
    assert list(read_rows(path)) == [(f"{path}:2", ROWS[0])]


def test_rows_come_one_by_one(tmp_path):
    # A damaged end is found when it is reached, and all before it was there.
    for name, text in (
        ("a.jsonl", '{"a": 1}\n{'),
        ("a.json", '[{"a": 1}, {'),
        ("a.csv", 'a\n1\n"'),
    ):
        path = tmp_path / name
        path.write_text(text)
        rows = read_rows(path)
        assert len(next(rows)[1]) == 1
        with pytest.raises(DataError):
            next(rows)


DAMAGED = {
    "object": ("a.jsonl", '{"a": 1}\n\n{"a":\n', r"a\.jsonl:3: not JSON .* each line must be one"),
    "tail": ("a.jsonl", '{"a": 1} x', r"a\.jsonl:1: not JSON"),
    "many lines": ("a.jsonl", '{\n"a": 1}', r"a\.jsonl:1: not JSON"),
    "later object": ("a.json", '{"a": 1}\n{\n"a": 1}', r"a\.json:2: not JSON"),
    "digits": ("a.jsonl", "1" * 5000, r"a\.jsonl:1: not JSON"),
    "depth": ("a.jsonl", '{"a": ' + "[" * 200_000, r"a\.jsonl:1: not JSON"),
    "array cut": ("a.json", '[{"a": 1},\n{"a": ', r"a\.json:2: not a JSON array .*save the file"),
    "array open": ("a.json", '[{"a": 1}\n\n', r"a\.json:3: not a JSON array \(a comma or ] is m"),
    "array, no comma": ("a.json", '[{"a": 1}\n{"a": 2}]', r"a\.json:2: .*a comma or ] is missing"),
    "array, a tail": ("a.json", '[{"a": 1}]\n\n{"a": 2}', r"a\.json:3: .*something follows"),
    "array, depth": ("a.json", "[" * 200_000, r"a\.json:1: not a JSON array"),
    "array, a line deep": ("a.json", '[\n{"a": 1},\n{"b": x}]', r"a\.json:3: not a JSON array"),
    "quote": ("a.csv", 'a,b\n1,2\n3,"4\n5,6\n', r"a\.csv:3: not a table"),
    "more cells": ("a.csv", "a,b\n1,2\n3,4,5\n", r"a\.csv:3: 3 cells, but the header names 2"),
    "fewer cells": ("a.csv", "a,b\n\n1\n", r"a\.csv:3: 1 cells, but the header names 2"),
    "two of a name": ("a.csv", "a,b, a\n1,2,3\n", r"a\.csv:1: the header has 'a' twice; rename"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_named_with_its_line(tmp_path, case):
    name, text, message = DAMAGED[case]
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        list(read_rows(tmp_path / name))
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("case", [case for case in DAMAGED if case.startswith("array")])
@pytest.mark.parametrize("block", [1, 2, 7])
def test_damaged_arrays_are_named_so_however_they_are_read(tmp_path, monkeypatch, case, block):
    if case == "array, depth" and block < 7:
        pytest.skip("it is read again and again")
    monkeypatch.setattr(reading, "_BLOCK", block)
    test_damage_is_named_with_its_line(tmp_path, case)


ITEMS = [
    {"q": "a\\\"b", "n": -1.5e-7}, [], 12345678901234567890, "你\u2028", {"深": [{"[": "]"}]},
    float("-inf"), True, None, {}, "", -0.0, "😀",
]  # fmt: skip


@pytest.mark.parametrize("block", range(1, 40))
def test_an_array_may_be_cut_anywhere_while_it_is_read(tmp_path, monkeypatch, block):
    monkeypatch.setattr(reading, "_BLOCK", block)
    path = tmp_path / "a.json"
    for text in (
        json.dumps(ITEMS),
        json.dumps(ITEMS, indent=2, ensure_ascii=False),
        "\n\n [" + " ,\n ".join(map(json.dumps, ITEMS)) + "\n]  \n",
    ):
        path.write_text(text, encoding="utf-8")
        places, items = zip(*numbered_rows(path), strict=True)
        assert list(items) == ITEMS
        begins = text.splitlines()
        assert list(places) == sorted(places) and places[-1] <= len(begins)


def test_no_more_of_an_array_is_held_than_a_block(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_BLOCK", 1000)
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"q": "x" * 50}] * 5000, indent=1))
    seen, most = [], 0
    for number, _ in numbered_rows(path, read=seen.append):
        ahead = sum(seen) - 70 * number / 3
        most = max(most, ahead)
    assert sum(seen) == path.stat().st_size and most < 300_000


@pytest.mark.parametrize(
    ("name", "text", "good", "wrong"),
    [
        ("a.jsonl", '{"a": 1}\n{\n\n[\n{"a": 2}\n', [1, 5], [2, 4]),
        ("b.json", '{"a" 1}\n{"a": 1}\nx\n{"a": 2}\n', [2, 4], [1, 3]),
        ("c.csv", "a,b\n1\n1,2\n1,2,3\n3,4", [3, 5], [2, 4]),
        ("d.csv", "a,,b\n1,x,2\n1,,2\n", [3], [2]),
    ],
)
def test_bad_rows_are_told_of_and_passed_over(tmp_path, name, text, good, wrong):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(DataError, match=f"^{path}:{wrong[0]}: "):
        list(numbered_rows(path))
    bad = []
    found = list(numbered_rows(path, lambda number, error: bad.append((number, str(error)))))
    assert [number for number, _ in found] == good
    assert [number for number, _ in bad] == wrong
    assert all(message.startswith(f"{path}:{number}: ") for number, message in bad)


@pytest.mark.parametrize("name", ["array.json", "a.json", "a.csv"])
def test_what_cannot_be_read_past_stops_all_the_same(tmp_path, name):
    (tmp_path / name).write_bytes(b"[{},\n}" if name == "array.json" else b'{"a": "\xff"}\n')
    with pytest.raises(DataError):
        list(numbered_rows(tmp_path / name, lambda number, error: None))


def test_places_are_lines_but_of_parquet():
    assert place_of("a/b.jsonl", 7) == "a/b.jsonl:7" and place_of("a.csv.gz", 7) == "a.csv.gz:7"
    assert place_of("a.Parquet", 7) == "a.Parquet, row 7"


@pytest.mark.parametrize("packed", [False, True])
def test_what_has_been_read_is_counted_in_the_files_own_bytes(tmp_path, packed):
    path = tmp_path / ("a.jsonl" + ".gz" * packed)
    text = "".join(f'{{"a": {i}}}\n' for i in range(100_000)).encode()
    path.write_bytes(gzip.compress(text) if packed else text)
    read = []
    rows = numbered_rows(path, read=read.append)
    next(rows)
    assert 0 < sum(read) < path.stat().st_size
    assert len(list(rows)) == 99_999 and sum(read) == path.stat().st_size


GOOD = '{"q": "你好"}\n'.encode()
CHINESE = "问题,回答\n你叫什么名字？,我叫罗宾。\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", CHINESE.encode("gbk"), r"line 1: .* 0xce\); it may be GB18030, of which GBK"),
        ("a.txt", CHINESE.encode("gb18030"), r"iconv -f GB18030 -t UTF-8 \S*a\.txt > utf8\.txt$"),
        ("a.jsonl", GOOD + '{"q": "你"}'.encode("gbk"), r"line 2: .*it may be GB18030"),
        ("a.jsonl", GOOD + b"\xff\xfe\n", r"line 2: invalid start byte 0xff\); save it as UTF-8$"),
        ("a.jsonl", GOOD + "你".encode()[:2], r"line 2: .*; save it as UTF-8$"),
        ("a.csv", CHINESE.encode("utf-16"), r"line 1: .*it may be UTF-16: save it as UTF-8, or: "),
        ("a.csv.gz", gzip.compress(CHINESE.encode("gbk")), "be GB18030.*: save it as UTF-8$"),
    ],
    ids=["GBK table", "GBK text", "GBK line", "no text", "cut short", "UTF-16", "GBK in gzip"],
)  # fmt: skip
def test_other_encodings_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        list(read_rows(path))
    assert str(caught.value).startswith(f"{path} cannot be read as UTF-8 text (line ")


@pytest.mark.parametrize(
    "content",
    [GOOD, gzip.compress(GOOD)[:-9], gzip.compress(GOOD)[:10] + b"\0\xff" * 20],
    ids=["none", "cut short", "damaged"],
)
def test_what_is_no_whole_gzip(tmp_path, content):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.jsonl\.gz cannot be read: .*; fetch or pack it again"):
        list(read_rows(path))


def test_no_file_and_no_lines(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl; check the path.* base, identity, t"):
        list(read_rows(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match=f"^{tmp_path} is a directory; name one data file in it$"):
        list(read_rows(tmp_path))
    for name in ("a.jsonl", "a.json", "a.csv", "a.txt"):
        (tmp_path / name).write_text("\n \r\n")
        assert list(read_rows(tmp_path / name)) == []


def test_the_remedy_for_an_encoding_can_be_pasted_into_a_shell(tmp_path):
    path = tmp_path / "it's 我的 $HOME.csv"
    path.write_bytes(CHINESE.encode("gbk"))
    with pytest.raises(DataError) as caught:
        list(read_rows(path))
    words = shlex.split(str(caught.value).partition(", or: ")[2])
    assert words == ["iconv", "-f", "GB18030", "-t", "UTF-8", str(path), ">", "utf8.csv"]


def test_cells_of_any_length_and_the_limit_of_others_stays(tmp_path):
    (tmp_path / "a.csv").write_text(f"text\n{'春' * 50}\n{'夏' * 60}\n", encoding="utf-8")
    before = csv.field_size_limit(40)
    try:
        rows = read_rows(tmp_path / "a.csv")
        assert next(rows)[1] == {"text": "春" * 50}
        assert csv.field_size_limit() == 40  # while the file is still being read, too
        assert next(rows)[1] == {"text": "夏" * 60}
    finally:
        csv.field_size_limit(before)


def test_columns_without_a_name(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("q,,a,\nx,,y,\n,,,\n", encoding="utf-8")
    assert list(read_rows(path)) == [(f"{path}:2", {"q": "x", "a": "y"})]
    path.write_text("q,,a,\nx,,y,\nx,,y,z\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.csv:3: 'z' is in a column without a name; name it"):
        list(read_rows(path))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jsonl", ("a", ".jsonl")),
        ("a.b.jsonl.gz", ("a.b", ".jsonl.gz")),
        ("a.CSV.GZ", ("a", ".CSV.GZ")),
        ("a.gz", ("a", ".gz")),
        ("a", ("a", "")),
    ],
)
def test_names_and_their_endings(tmp_path, name, expected):
    assert split_name(tmp_path / name) == expected


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="reading Parquet needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    turns = [
        [{"role": "user", "content": "你好", "weight": None}],
        [{"role": "assistant", "content": "好！", "weight": 0}],
    ]
    rows = [{"conversations": turns[i % 2], "id": i} for i in range(1500)]
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=400)
    found = list(read_rows(path))
    assert [row for _, row in found] == rows
    assert found[1402][0] == f"{path}, row 1403"
    (tmp_path / "b.parquet.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert [row for _, row in read_rows(tmp_path / "b.parquet.gz")] == rows
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(DataError, match=r"a\.parquet cannot be read as Parquet"):
        list(read_rows(path))


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r'a\.parquet: .* pip install "lora-kernels\[data\]"'):
        list(read_rows(tmp_path / "a.parquet"))
