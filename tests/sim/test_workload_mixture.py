"""Mixtures of sources, and tenants."""

from collections import Counter
from pathlib import Path

import pytest

from sim.workload import WorkloadError, make_workload

LENGTHS = "prompt_tokens,output_tokens\n"


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "table.csv"
    path.write_text(LENGTHS + "".join(f"{row},10\n" for row in range(1, 4001)))
    return path


def test_parts_come_by_weight_in_their_own_order_with_their_tenant(table: Path) -> None:
    workload = make_workload(f"chat={table}*3+code=uniform:9000x1*1", limit=2000, rate=5)
    assert workload.name == "table.csv+uniform:9000x1"
    counts = Counter(item.tenant for item in workload.items)
    assert counts["chat"] == pytest.approx(1500, rel=0.05)
    rows = [item.prompt_tokens for item in workload.items if item.tenant == "chat"]
    assert rows == list(range(1, len(rows) + 1))


def test_a_mixture_ends_with_its_shortest_table(table: Path) -> None:
    workload = make_workload(f"{table}*1+{table}*3", clients=1)
    assert 4000 <= len(workload.items) < 8000


def test_traces_without_weights_are_laid_over_each_other(tmp_path: Path) -> None:
    for name, times in (("a", (3, 9)), ("b", (1, 5))):
        rows = "".join(f"{time},{time},1\n" for time in times)
        (tmp_path / f"{name}.csv").write_text(f"arrival_s,{LENGTHS}{rows}")
    workload = make_workload(f"{tmp_path}/a.csv+{tmp_path}/b.csv")
    assert [item.prompt_tokens for item in workload.items] == [1, 3, 5, 9]
    assert [item.arrival_s for item in workload.items] == [0.0, 2.0, 4.0, 8.0]


def test_shuffled_rows_are_a_sample_of_the_whole_table(table: Path) -> None:
    rows = [
        item.prompt_tokens
        for item in make_workload(table, limit=200, clients=1, shuffle=True).items
    ]
    assert len(set(rows)) == 200
    assert max(rows) > 3000


def test_tenants_share_the_requests(table: Path) -> None:
    equal = make_workload(table, clients=1, tenants="4").items
    counts = Counter(item.tenant for item in equal)
    assert sorted(counts) == ["tenant-1", "tenant-2", "tenant-3", "tenant-4"]
    assert min(counts.values()) > 900
    skewed = Counter(item.tenant for item in make_workload(table, rate=1, tenants="8:1:1").items)
    assert skewed["tenant-1"] == pytest.approx(3200, rel=0.05)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("dist-1*0", "a number above 0"),
        ("dist-1*x", "a number above 0"),
        ("dist-1+", "with \\+ between"),
        ("dist-1+none.csv", "none.csv: no such file"),
    ],
)
def test_what_is_no_mixture_says_why(source: str, message: str) -> None:
    with pytest.raises(WorkloadError, match=message):
        make_workload(source, rate=1)
