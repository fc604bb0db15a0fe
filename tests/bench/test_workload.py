"""Workload files become items with the arrivals and caps that were asked for."""

import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from sim.workload import WorkloadError, make_workload

HEADER = "arrival_s,prompt_tokens,output_tokens\n"
TRACE = "arrival_s,prompt_tokens,output_tokens,tenant\n5,100,10,a\n7,2000,20,b\n11,30,3000,a\n"


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text(TRACE)
    return path


def test_a_trace_starts_at_zero_and_can_be_sped_up(trace: Path) -> None:
    assert [i.arrival_s for i in make_workload(trace).items] == [0.0, 2.0, 6.0]
    assert [i.arrival_s for i in make_workload(trace, rate_scale=2).items] == [0.0, 1.0, 3.0]


def test_caps_and_limit(trace: Path) -> None:
    items = make_workload(trace, limit=2, max_prompt_tokens=500, max_output_tokens=15).items
    assert [(i.prompt_tokens, i.output_tokens, i.tenant) for i in items] == [
        (100, 10, "a"),
        (500, 15, "b"),
    ]


def test_poisson_arrivals_have_the_rate_and_repeat_with_the_seed(tmp_path: Path) -> None:
    path = tmp_path / "lengths.csv"
    path.write_text("prompt_tokens,output_tokens\n" + "10,5\n" * 4000)
    first = make_workload(path, rate=8.0, seed=3)
    assert first == make_workload(path, rate=8.0, seed=3)
    assert first != make_workload(path, rate=8.0, seed=4)
    assert first.offered_rps == pytest.approx(8.0, rel=0.05)


def test_parquet_equals_csv(trace: Path, tmp_path: Path) -> None:
    table = pa.table(
        {
            "arrival_s": [5.0, 7.0, 11.0],
            "prompt_tokens": [100, 2000, 30],
            "output_tokens": [10, 20, 3000],
            "tenant": ["a", "b", "a"],
        }
    )
    parquet.write_table(table, tmp_path / "trace.parquet")
    assert make_workload(tmp_path / "trace.parquet").items == make_workload(trace).items


def test_parquet_without_pyarrow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)  # as if it were not installed
    path = tmp_path / "trace.parquet"
    path.touch()
    with pytest.raises(WorkloadError, match=r"pip install .*pyarrow"):
        make_workload(path)


def test_prompts_of_each_known_shape(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"question": "b"}\n{"turns": ["c", "d"]}\n')
    workload = make_workload(path, clients=2)
    assert [item.prompt for item in workload.items] == ["a", "b", "c"]
    assert workload.offered_rps is None


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("prompt_tokens,output_tokens\n1,1\n", {}, "give --rate or --clients"),
        (TRACE, {"rate": 1.0, "clients": 2}, "give one of"),
        (TRACE, {"rate": 0.0}, "above 0"),
        (TRACE + ",9,9,a\n", {}, "1 without arrival_s"),
        ("arrival_s,prompt_tokens\n1,1\n", {}, "found are 'arrival_s', 'prompt_tokens'$"),
        ("arrival_s;prompt_tokens;output_tokens\n1;1;1\n", {}, "semicolons.*with commas"),
        ("arrival_s, prompt_tokens,output_tokens\n1,1,1\n", {}, "' prompt_tokens' to prompt_"),
        (
            "TIMESTAMP,ContextTokens,GeneratedTokens\n1,1,1\n",
            {},
            "'ContextTokens' to prompt_tokens, 'GeneratedTokens' to output_tokens, and write arr",
        ),
        (f"{HEADER}1,x,1\n", {}, r"bad.csv, row 2: prompt_tokens is 'x', which is no number"),
        (f"{HEADER}1,1,1\n1,1,-4\n", {}, "row 3: output_tokens is '-4'; it must be at least 1"),
        (f"{HEADER}1,0,1\n", {}, "row 2: prompt_tokens is '0'; it must be at least 1"),
        (f"{HEADER}1,1.5,1\n", {}, "row 2: prompt_tokens is '1.5', which is no whole number"),
        (f"{HEADER}1,nan,1\n", {}, "row 2: prompt_tokens is 'nan', which is no number"),
        (f"{HEADER}1,1,inf\n", {}, "row 2: output_tokens is 'inf', which is no number"),
        (f"{HEADER}-1,1,1\n", {}, "row 2: arrival_s is '-1'; it must not be negative"),
        (f"{HEADER}1,,1\n", {}, "row 2: prompt_tokens is empty"),
        (f"{HEADER}1,1,000,1\n", {}, "row 2: more values than columns"),
        (HEADER, {}, "no rows"),
    ],
)
def test_what_makes_no_workload_says_why(
    tmp_path: Path, content: str, options: dict[str, float], message: str
) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(content)
    with pytest.raises(WorkloadError, match=message):
        make_workload(path, **options)  # type: ignore[arg-type]


def test_whole_numbers_may_be_written_as_decimals_and_a_mark_may_stand_first(
    tmp_path: Path,
) -> None:
    path = tmp_path / "from_a_spreadsheet.csv"
    path.write_bytes(b"\xef\xbb\xbf" + f"{HEADER}0.0,100.0,20.0\n".encode())
    (item,) = make_workload(path).items
    assert (item.prompt_tokens, item.output_tokens) == (100, 20)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"\xff\xfe\x00a", r"is not text \(UTF-8\)"),
        ("a.parquet", b"no such thing", "is no Parquet file"),
        ("a.jsonl", b'{"prompt": "a"}\n[1]\n', "row 2 is no JSON object"),
        ("a.jsonl", b'{"prompt": "a"}\n\n{"prompt', "row 3 is not JSON"),
        ("a.jsonl", b'{"words": "a"}\n', "found are 'words'"),
    ],
)
def test_other_files_are_told_apart(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WorkloadError, match=message):
        make_workload(tmp_path / name, clients=1)


def test_a_synthetic_set_needs_arrivals() -> None:
    with pytest.raises(WorkloadError, match=r"^dist-1 has no arrivals: give --rate or --clients"):
        make_workload("dist-1")


def test_a_missing_file_or_suffix_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="no such file"):
        make_workload(tmp_path / "none.csv")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(WorkloadError, match=r"\.csv, \.parquet or \.jsonl"):
        make_workload(tmp_path / "a.txt", clients=1)
