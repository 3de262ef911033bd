"""What a run sends by rank and node count: the model by hand, and the kernel's count against it."""

import json
from pathlib import Path

import pytest

from onecast.runtime.bench import nodes
from onecast.runtime.bench.nodes_model import (
    HEADER,
    Layout,
    all_reduce,
    broadcast,
    depth,
    frame,
    gather,
)


def test_a_broadcast_is_a_tree_whose_source_sends_a_logarithm_of_the_messages() -> None:
    traffic = broadcast(Layout(1, 6), range(6), 1000)
    sent = [
        [(source, to) for to, number in enumerate(row) if number]
        for source, row in enumerate(traffic.messages)
    ]
    # 0 to 1; 0 to 2 and 1 to 3; 0 to 4 and 1 to 5
    assert sent == [[(0, 1), (0, 2), (0, 4)], [(1, 3), (1, 5)], [], [], [], []]
    assert traffic.bytes[0][1] == 1000 + 2 * HEADER
    assert traffic.bytes[1][0] == HEADER
    assert [depth(count) for count in (1, 2, 3, 4, 5, 64, 65)] == [0, 1, 2, 2, 3, 6, 7]


def test_more_ranks_on_a_node_send_no_more_of_a_frame_between_nodes() -> None:
    few, many = (frame(Layout(4, per_node), "two-level", 1000) for per_node in (1, 8))
    assert few.between_nodes() == many.between_nodes() == many.total()
    assert frame(Layout(1, 8), "two-level", 1000).total() == 0
    among_all = frame(Layout(4, 8), "process-group", 1000)
    assert (among_all.num_messages(), many.num_messages()) == (31, 3)
    assert among_all.between_nodes() > many.between_nodes()


def test_a_ring_crosses_each_border_between_nodes_once() -> None:
    traffic = all_reduce(Layout(4, 2), 8000)
    payload = 2 * 7 / 8 * 8000  # of each rank
    overhead = 28 * 3 * HEADER
    assert traffic.total() == 8 * (payload + overhead)
    assert traffic.between_nodes() == 4 * (payload + overhead)
    assert all_reduce(Layout(1, 1), 8000).total() == 0
    assert gather(Layout(2, 2), 500).between_nodes() == 2 * (500 + 3 * HEADER)


def test_what_the_kernel_counts_is_what_the_model_says() -> None:
    report = nodes.measure([Layout(2, 2)], steps=4)
    assert len(report["rows"]) == 4
    for row in report["rows"]:
        assert row["bytes_by_rank"] == row["model_bytes_by_rank"], row
        assert row["between_nodes"] == row["model_between_nodes"], row


def test_the_command_prints_and_writes_its_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "_QUICK", [Layout(2, 1)])
    assert nodes.main(["--quick", "--json", str(tmp_path / "nodes.json")]) == 0
    report = json.loads((tmp_path / "nodes.json").read_text())
    assert report["ratios"][0]["holds"] is True
    printed = capsys.readouterr().out
    assert "frame, two-level" in printed and "the model alone" in printed
    assert "…" not in printed
