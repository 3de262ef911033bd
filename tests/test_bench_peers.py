"""`onecast bench e2e --peer`: others are measured beside onecast, or left out in one line."""

import argparse
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from stand_in_queue import install

from onecast.runtime import demo
from onecast.runtime.bench import peer_queues, peer_transformers, peers
from onecast.runtime.bench.peer_queues import ARRAYS, MODULES, OWN, TENSORS, Way
from onecast.runtime.bench.peer_transformers import CONTENDERS, PeerTurn

MODEL = Path(demo.__path__[0]) / "checkpoint"
TP1, TP2, GENERATE_1, GENERATE_2, CONTINUOUS_1, CONTINUOUS_2 = CONTENDERS


def turns(rates, tokens=((1, 2), (3, 4))):
    """A turn a round of each contender, with those tokens/s."""
    return [
        PeerTurn(contender, number, rate, [list(one) for one in tokens])
        for contender, of_rounds in rates.items()
        for number, rate in enumerate(of_rounds)
    ]


RATES = {
    TP1: [300.0, 330.0, 270.0],
    TP2: [440.0, 400.0, 400.0],
    GENERATE_1: [200.0, 200.0, 180.0],
    GENERATE_2: [50.0, 60.0, 70.0],
    CONTINUOUS_1: [100.0, 100.0, 100.0],
    CONTINUOUS_2: [250.0, 160.0, 100.0],
}


def test_names_are_read_from_the_command_line():
    parser = argparse.ArgumentParser()
    peers.add_peer_option(parser)
    assert parser.parse_args([]).peer == []
    assert parser.parse_args(["--peer", "vllm", "--peer", "sglang"]).peer == ["vllm", "sglang"]
    with pytest.raises(SystemExit):
        parser.parse_args(["--peer", "another"])


def test_a_peer_that_is_not_there_is_left_out_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = peers.measure_peers([*peers.PEERS, "vllm"], MODEL)
    assert found["rows"] == found["ratios"] == []
    assert [one["peer"] for one in found["skipped"]] == [*peers.PEERS]
    peers.print_peers(found)
    lines = capsys.readouterr().out.splitlines()
    assert "--peer vllm: vllm is not installed (pip install vllm); left out" in lines
    assert len(lines) == 3


def test_each_ratio_is_to_the_fastest_on_as_many_cores():
    ratios = {row["name"]: row for row in peers.make_ratios(turns(RATES))}
    of = {name.removeprefix(peers.RATIO): row for name, row in ratios.items()}
    # Two threads are slower here than one, so that on two cores one thread is the fastest.
    assert [of[n]["value"] for n in ("_1_core", "_2_cores")] == pytest.approx([1.5, 2.2])
    assert of["_1_core"]["spread"] == pytest.approx([1.5, 1.65])
    assert (of[""]["value"], of[""]["target"], of[""]["holds"]) == (1.5, ">= 1.5", True)
    quick = {**RATES, GENERATE_2: [400.0, 400.0, 420.0]}
    ratios = peers.make_ratios(turns(quick))
    assert ratios[0]["value"] == 1.0 and ratios[0]["holds"] is False, "the smaller of both"
    assert ratios[3]["value"] == pytest.approx(2.2), "one thread each"


def test_there_is_no_ratio_to_what_did_not_run():
    rest = {c: rates for c, rates in RATES.items() if c.program == "onecast"}
    assert peers.make_ratios(turns(rest)) == []
    assert peers.make_ratios(turns({c: RATES[c] for c in (TP1, GENERATE_1)})) == []


def test_rows_say_cores_and_spread_and_where_tokens_differ():
    seen = turns(RATES)
    seen[0] = seen[0]._replace(tokens=[[1, 9], [3, 4]])
    rows = {(row["peer"], row["how"], row["threads"]): row for row in peers.make_rows(seen)}
    row = rows["onecast", "TP 1", 1]
    assert row["tokens_per_s"] == {"median": 300.0, "p99": 330.0, "n": 3, "spread": [270.0, 330.0]}
    assert row["equal"] == {"sequences": 1, "of": 2, "first_difference": 1}
    row = rows["onecast", "TP 2", 1]
    assert (row["processes"], row["cores"]) == (2, 2)
    assert row["equal"] == {"sequences": 2, "of": 2, "first_difference": None}
    assert rows["transformers", "generate", 2]["cores"] == 2


def test_tensors_or_the_same_values_as_arrays_are_put_into_a_queue(monkeypatch):
    queue = SimpleNamespace(MessageQueue=SimpleNamespace(create_from_process_group=lambda *_: None))
    monkeypatch.setitem(sys.modules, MODULES["vllm"], queue)
    mapping = {"step": 3, "input_ids": torch.arange(4)}
    tensors, arrays = (
        peer_queues.QueueMethod(Way("vllm", how), group=None).prepare(mapping)
        for how in (TENSORS, ARRAYS)
    )
    assert tensors == mapping
    assert isinstance(arrays["input_ids"], np.ndarray)
    assert (arrays["step"], arrays["input_ids"].tolist()) == (3, [0, 1, 2, 3])


@pytest.mark.parametrize("peer", MODULES)
def test_a_queue_with_their_face_carries_the_step(tmp_path, monkeypatch, peer):
    install(tmp_path, MODULES[peer])
    monkeypatch.syspath_prepend(tmp_path)
    assert peer_queues.missing(peer) is None
    seen = peer_queues.launch(peer, steps=6)
    assert list(seen) == [*OWN, Way(peer, TENSORS), Way(peer, ARRAYS)]
    assert all(len(values) == 6 and min(values) > 0 for values in seen.values())


def test_a_queue_of_another_make_is_left_out_with_what_it_said(tmp_path, monkeypatch):
    install(tmp_path, MODULES["vllm"])
    broken = tmp_path.joinpath(*MODULES["vllm"].split(".")).with_suffix(".py")
    broken.write_text("raise ImportError('no device of mine')")
    monkeypatch.syspath_prepend(tmp_path)
    found = peers.measure_peers(["vllm"], MODEL, quick=True)
    assert found["rows"] == []
    assert found["skipped"][0]["why"] == (
        "its queue cannot be used: ImportError: no device of mine"
    )


def test_rows_of_a_queue_stand_beside_the_channels_of_the_same_launch(monkeypatch, capsys):
    seen = {
        OWN[0]: [10.0, 12.0, 11.0],
        OWN[1]: [8.0, 8.0, 8.0],
        Way("vllm", TENSORS): [100.0, 110.0, 120.0],
        Way("vllm", ARRAYS): [44.0, 44.0, 44.0],
    }
    monkeypatch.setattr(peer_queues, "missing", lambda peer: None)
    monkeypatch.setattr(peer_queues, "launch", lambda peer, steps: seen)
    found = peers.measure_peers(["vllm"], MODEL)
    assert [row["one_way_us"]["median"] for row in found["rows"]] == [
        statistics.median(values) for values in seen.values()
    ]
    ratios = {row["name"]: row for row in found["ratios"]}
    assert ratios["one_way_vllm_tensors_vs_shared_memory"]["value"] == 10.0
    assert ratios["one_way_vllm_numpy_arrays_vs_shared_memory"]["value"] == 4.0
    assert ratios["one_way_vllm_tensors_vs_shared_memory"]["spread"] == pytest.approx(
        [110 / 12, 120 / 11]
    )
    peers.print_peers(found)
    assert "vllm, numpy arrays" in capsys.readouterr().out


@pytest.mark.slow
def test_transformers_answers_the_same_prompts_with_the_same_tokens(capsys):
    pytest.importorskip("transformers")
    seen = peer_transformers.launch(MODEL, 4, drawn=12, rounds=1, timeout_s=120)
    ran = {turn.contender for turn in seen.turns}
    assert {TP1, TP2, GENERATE_1, GENERATE_2} <= ran
    assert ran | {contender for contender, _ in seen.failed} == {*CONTENDERS}, "or it is said why"
    assert all(turn.tokens == seen.turns[0].tokens for turn in seen.turns)
    assert all(len(one) == 12 for one in seen.turns[0].tokens)
    ratios = peers.make_ratios(seen.turns)
    assert ratios[0]["name"] == "tokens_per_s_vs_transformers_batch32_cpu"
