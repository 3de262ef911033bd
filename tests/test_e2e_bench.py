"""`onecast bench e2e`: real ranks draw equal tokens over every protocol; figures come from rows."""

import json
import math
import shutil
import statistics

import pytest
import torch
from safetensors import SafetensorError, safe_open

from onecast.runtime.bench import (
    e2e,
    e2e_ablation,
    e2e_cost,
    e2e_machine,
    e2e_measure,
    e2e_report,
    e2e_tables,
    synthetic,
)
from onecast.runtime.bench.e2e_channels import CHANNELS, FUSED, SHM, TWO, Published, TurnChannel
from onecast.runtime.bench.e2e_phases import PhaseRecorder, RecordedStep, Span
from onecast.runtime.bench.e2e_prompts import LEAST, MOST, make_prompts
from onecast.runtime.bench.e2e_rows import (
    BROADCAST_US,
    BROADCASTS,
    METADATA,
    PAIRED,
    PREFILL,
    SHARE,
    STEP,
    TOKENS_PER_S,
    Drawn,
    TokensDiffer,
    check_tokens,
    make_rows,
)
from onecast.runtime.bench.e2e_run import Case, DriverTurn, Plan, Turn, drive, make_engine
from onecast.runtime.bench.e2e_steps import DRIVER_PHASES, WORKER_PHASES, steps_of
from onecast.runtime.bench.e2e_telemetry import ToggledTurn
from onecast.runtime.bench.figures import holds
from onecast.runtime.model_config import ModelConfig
from onecast.runtime.observer import NullObserver
from onecast.runtime.request import SamplingParams
from onecast.runtime.tokenizer import Tokenizer
from onecast.runtime.weights import check_checkpoint

TINY = e2e.Amount(launches=1, rounds=1, drawn=5, telemetry_rounds=1, steps=2, batches=(1, 8))
TARGETS = {
    "e2e_fused_vs_two_broadcast_tp2": ">= 1.3",
    "e2e_shm_vs_two_broadcast_tp2": "reported",
    "broadcast_share_of_step_shm": "<= 0.02",
    "broadcast_share_of_step_fused": "reported",
    "broadcast_share_of_step_two_broadcasts": "reported",
    "telemetry_on_vs_off_tokens": ">= 0.99",
    "cost_model_median_error": "reported",
    "cost_model_held_out_median_error": "reported",
    "cost_model_held_out_max_error": "reported",
}


def run(path, *arguments):
    assert e2e.main(["--quick", "--json", str(path), *arguments]) == 0

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(e2e, "QUICK", TINY)
        return run(tmp_path_factory.mktemp("bench") / "report.json")


def rows_of(report):
    fields = ("tp", "batch", "channel", "rank", "metric")
    rows = {tuple(row[field] for field in fields): row for row in report["rows"]}
    assert len(rows) == len(report["rows"])
    return rows


def check(report, amount, tp=2):
    """Rows of every case, rank and metric; figures with their targets, each from rows."""
    rows = rows_of(report)
    for batch in amount.batches:
        for channel in CHANNELS:
            found = {(rank, of) for t, b, c, rank, of in rows if (t, b, c) == (tp, batch, channel)}
            wanted = {(None, of) for of in (TOKENS_PER_S, PAIRED, STEP, PREFILL, SHARE)}
            wanted |= {(0, f"{phase} us") for phase in DRIVER_PHASES}
            wanted |= {(r, f"{phase} us") for r in range(1, tp) for phase in WORKER_PHASES}
            assert wanted <= found
            decodes = rows[tp, batch, channel, None, STEP]
            assert decodes["n"] == amount.launches * amount.rounds * (amount.drawn - 1)
            counted = rows[tp, batch, channel, None, TOKENS_PER_S]
            assert counted["n"] == amount.launches * amount.rounds
    for row in rows.values():
        low, high = row["spread"]
        assert low <= row["median"] <= high or row["n"] > amount.rounds * amount.launches
        assert math.isfinite(row["p99"]) and row["median"] >= 0
    ratios = {ratio["name"]: ratio for ratio in report["ratios"]}
    assert {name: ratio["target"] for name, ratio in ratios.items()} == TARGETS
    for ratio in ratios.values():
        assert ratio["holds"] is holds(ratio["value"], ratio["target"])
        low, high = ratio["spread"]
        assert 0 <= low <= high and math.isfinite(high)
    values = {
        "e2e_fused_vs_two_broadcast_tp2": rows[tp, 8, FUSED, None, PAIRED],
        "broadcast_share_of_step_shm": rows[tp, 8, SHM, None, SHARE],
        "telemetry_on_vs_off_tokens": rows[tp, 8, SHM, None, e2e_report.ON_VS_OFF],
    }
    assert {name: ratios[name]["value"] for name in values} == {
        name: row["median"] for name, row in values.items()
    }


def test_every_protocol_is_measured_and_every_figure_comes_from_rows(report):
    check(report, TINY)
    assert report["bench"] == "e2e" and "TP 2" in report["machine"]
    assert report["command"].startswith("onecast bench e2e --quick --json ")
    assert report["model"]["parameters"] == 2_885_888 and report["model"]["dtype"] == "float32"
    assert report["versions"]["torch"] == torch.__version__
    assert list(report["channels"]) == list(CHANNELS)


def test_the_protocols_are_what_they_are_called(report):
    rows = rows_of(report)
    assert {name: rows[2, 8, name, None, BROADCASTS]["median"] for name in CHANNELS} == {
        TWO: 2 + 7,  # tensors that are not empty
        "fixed-metadata": 1 + 7,
        "cached-size": 1 + 7,
        FUSED: 1,
        SHM: 0,
    }
    assert rows[2, 8, FUSED, None, METADATA]["median"] < 60
    assert rows[2, 8, TWO, None, METADATA]["median"] > 400


def test_phases_and_the_broadcast_are_within_the_step(report):
    rows = rows_of(report)
    for name in CHANNELS:
        for rank, phases in enumerate((DRIVER_PHASES, WORKER_PHASES)):
            medians = [rows[2, 8, name, rank, f"{phase} us"]["median"] for phase in phases]
            assert sum(medians) < 2 * rows[2, 8, name, None, STEP]["p99"]
        assert rows[2, 8, name, 0, "publish us"]["median"] > 0
        assert rows[2, 8, name, 1, "forward us"]["median"] > 0
        for rank in (0, 1):
            all_reduce = rows[2, 8, name, rank, "all-reduce us"]["median"]
            assert 0 < all_reduce < rows[2, 8, name, rank, "forward us"]["p99"]
        assert 0 < rows[2, 8, name, None, SHARE]["median"] < 1


# Of a step of TINY with batch 8, on rank 0: the step and its phases, its frame, all-reduces of four
# layers and the gather of logits; three of each request, in five steps.
RECORDS = 1 + 6 + 1 + (1 + 2 * 4) + 1 + 8 * 3 / 5


def test_with_telemetry_everything_is_recorded_and_without_nothing(report):
    rows = rows_of(report)
    assert rows[2, 8, SHM, None, e2e_report.RECORDS_ON]["median"] >= RECORDS
    assert rows[2, 8, SHM, None, e2e_report.RECORDS_OFF]["median"] == 0


def test_so_it_is_where_torch_distributed_sums(tmp_path, monkeypatch):
    """There the session is told nothing: it sees the calls, or, taken out, does not."""
    monkeypatch.setattr(e2e, "QUICK", TINY._replace(steps=0, batches=(8,)))
    rows = rows_of(
        run(tmp_path / "report.json", "--channels", SHM, "--all-reduce", "process-group")
    )
    assert rows[2, 8, SHM, None, e2e_report.RECORDS_ON]["median"] >= RECORDS
    assert rows[2, 8, SHM, None, e2e_report.RECORDS_OFF]["median"] == 0


def test_timelines_show_steps_of_all_ranks_on_one_clock(report):
    timelines = {(t["batch"], t["channel"]): t for t in report["timelines"]}
    assert set(timelines) == {(batch, name) for batch in TINY.batches for name in CHANNELS}
    for timeline in timelines.values():
        steps = timeline["steps"]
        assert [step["step"] for step in steps] == [*range(steps[0]["step"], steps[-1]["step"] + 1)]
        assert len(steps) == 3 and steps[0]["begin_us"] == 0
        for step in steps:
            end = step["begin_us"] + step["step_us"]
            assert step["begin_us"] < step["publish_begin_us"] < step["in_hand_us"] < end
            assert [rank["rank"] for rank in step["ranks"]] == [0, 1]
            for rank in step["ranks"]:
                stamps = [stamp for p in rank["phases"] for stamp in (p["begin_us"], p["end_us"])]
                assert stamps == sorted(stamps) and len(stamps) >= 4


def test_the_ablation_varies_bytes_and_broadcasts_and_fits_a_model(report):
    ablation = report["ablation"]
    points = ablation["points"]
    assert len({(p["broadcasts"], p["rounds"]) for p in points if p["bytes"] == 128}) >= 2
    kept = [point for point in points if point["held_out"]]
    assert len(kept) == len(points) // 4
    errors = [abs(p["predicted_us"] - p["median_us"]) / p["median_us"] for p in kept]
    assert ablation["model"]["held_out"]["median_error"] == statistics.median(errors)
    assert ablation["model"]["held_out"]["max_error"] == max(errors)
    assert all(term["value"] >= 0 for term in ablation["model"]["terms"])
    protocols = {(p["workload"], p["channel"]): p for p in ablation["protocols"]}
    assert set(protocols) == {(w, c) for w in e2e_ablation.WORKLOADS for c in CHANNELS}
    assert protocols["W1", TWO]["broadcasts"] == 5 and protocols["W1", FUSED]["broadcasts"] == 1
    for gain in ablation["gain"]:
        parts = ("fewer broadcasts us", "fewer bytes us", "cheaper encoding us")
        assert sum(gain[part] for part in parts) == pytest.approx(gain["predicted_us"])
    original = {row["what"]: row for row in report["original"]["rows"]}
    metadata = original["metadata of the block message, bytes"]
    assert (metadata["before"], metadata["after"], metadata["ours"][SHM]) == (260, 107, 39)
    broadcasts = original["broadcasts beside the tensors' own"]["ours"]
    assert broadcasts == {TWO: 2, "fixed-metadata": 1, "cached-size": 1, FUSED: 1, SHM: 0}


def test_a_point_is_counted_by_rounds_broadcasts_and_bytes():
    Point, features_of = e2e_ablation.Point, e2e_cost.features_of
    assert features_of(Point(8, 1, 256, pickled=4)) == (1, 7, 2, True, 4, False, 0)
    assert features_of(Point(4, 4, 1024, framed=3)) == (4, 0, 4, False, 0, True, 3)
    message = e2e_ablation.Message(10, 4096, 400, 8)
    assert e2e_cost.features_of_protocol(TWO, message) == (3, 7, 4, 1, 8, 0, 0)
    assert e2e_cost.features_of_protocol(SHM, message._replace(broadcasts=0))[:3] == (0, 0, 0)


def test_the_fit_finds_what_the_times_were_made_of_and_leaves_out_what_costs_nothing():
    truth = [100.0, 50.0, 0.25, 20.0, 5.0, 4.0, 0.5]
    features = [e2e_cost.features_of(point) for point in e2e_ablation.POINTS]
    times = [e2e_cost.predict(truth, one) for one in features]
    assert e2e_cost.fit(features, times) == pytest.approx(truth)
    cheaper = [e2e_cost.predict([*truth[:5], -3.0, 0.5], one) for one in features]
    found = e2e_cost.fit(features, cheaper)
    assert found[5] == 0 and min(found) >= 0 and found[0] == pytest.approx(100, rel=0.1)
    with pytest.raises(ValueError, match="3 measurements for 7 terms"):
        e2e_cost.fit(features[:3], times[:3])


# ---- turns made by hand


def turn(channel, step_ns, tokens=((7, 8, 9),), number=0):
    """Three steps of 1 ms: a prompt, and two decodes in which publishing takes `step_ns`."""
    steps, ranks = [], ([], [])
    for index in range(3):
        begin = index * 1_000_000
        publish = begin + 10_000
        steps.append((begin, begin + 1_000_000))
        spans = [
            Span("schedule", begin, publish),
            Span("step.publish", publish, publish + step_ns),
            Span("model.forward", publish + step_ns, begin + 900_000),
        ]
        ranks[0].append(RecordedStep(begin + 500, begin + 999_000, spans, 1000))
        spans = [
            Span("step.receive", begin - 50_000, publish + 2 * step_ns),
            Span("model.forward", publish + 2 * step_ns, begin + 900_000),
        ]
        ranks[1].append(RecordedStep(begin - 50_000, begin + 950_000, spans, 2000))
    published = [Published(900, 90, 30, 1), Published(100, 10, 1, 1), Published(100, 10, 1, 1)]
    driver = DriverTurn(steps, published, 27, [list(one) for one in tokens])
    return Turn(Case(2, 1, channel), number, driver, [*ranks])


def test_the_broadcast_lasts_from_publish_to_the_last_rank_in_hand():
    rows = {(row["rank"], row["metric"]): row for row in make_rows([[turn(TWO, 100_000)]])}
    medians = {key: row["median"] for key, row in rows.items()}
    assert medians[None, BROADCAST_US] == 200 and medians[None, SHARE] == 0.2
    assert medians[0, "publish us"] == 100 and medians[0, "forward us"] == 790
    assert medians[0, "other us"] == 100 and medians[1, "other us"] == 50
    assert medians[1, "wait us"] == 60 and medians[1, "broadcast us"] == 200
    assert medians[1, "forward us"] == 690 and medians[1, "all-reduce us"] == 2
    assert medians[None, BROADCASTS] == 9 and medians[None, METADATA] == 10
    assert medians[None, STEP] == 1000 and rows[None, STEP]["n"] == 2
    assert medians[None, TOKENS_PER_S] == 1000 and rows[None, PREFILL]["n"] == 1


def test_a_receiver_that_comes_late_has_not_waited():
    late = turn(TWO, 100_000)
    step = late.ranks[1][1]
    begin = step.spans[0].end_ns - 30_000  # 170 us after the driver began to publish
    late.ranks[1][1] = step._replace(spans=[step.spans[0]._replace(begin_ns=begin), step.spans[1]])
    found = list(steps_of(late))[1].phase_us(1)
    assert found["wait"] == 0 and found["broadcast"] == 30


def test_throughputs_are_compared_within_a_round():
    def faster(of, factor):
        steps = [(int(b / factor), int(e / factor)) for b, e in of.driver.steps]
        return of._replace(driver=of.driver._replace(steps=steps))

    turns = [turn(TWO, 1000), faster(turn(FUSED, 1000), 2.0)]
    turns += [faster(turn(TWO, 1000, number=1), 10.0), faster(turn(FUSED, 1000, number=1), 30.0)]
    rows = {(row["channel"], row["metric"]): row for row in make_rows([turns])}
    assert rows[TWO, PAIRED]["spread"] == [1, 1]
    assert rows[FUSED, PAIRED]["median"] == pytest.approx(2.5, rel=1e-3)
    assert rows[FUSED, PAIRED]["spread"] == pytest.approx([2, 3], rel=1e-3)


@pytest.mark.parametrize(
    ("tokens", "difference"),
    [
        ([[1, 2, 3], [4, 5, 9]], "sequence 1, token 2: process-group drew 9, two-broadcasts 6"),
        ([[1, 2], [4, 5, 6]], "sequence 0, token 2: process-group drew none, two-broadcasts 3"),
    ],
)
def test_a_protocol_that_changes_a_token_is_named(tokens, difference, capsys, monkeypatch):
    expected = Drawn("TP 2, batch 2", TWO, [[1, 2, 3], [4, 5, 6]])
    check_tokens([expected, expected, expected._replace(group="TP 1, batch 2", tokens=[[0], [0]])])
    with pytest.raises(TokensDiffer, match=difference) as raised:
        check_tokens([expected, expected._replace(by=FUSED, tokens=tokens)])
    monkeypatch.setattr(e2e, "measure", lambda *_: (_ for _ in ()).throw(raised.value))
    assert e2e.main([]) == 1
    assert difference in capsys.readouterr().err


def test_a_recorder_keeps_phases_by_step_and_forgets_what_was_none():
    recorder = PhaseRecorder()
    with recorder.step(0) as step:
        with recorder.phase("step.receive"):
            pass
        step.discard()
    with recorder.step(1), recorder.phase("model.forward"):
        recorder.time_all_reduce(torch.Tensor.neg_)(torch.ones(1000))
    (taken,) = recorder.take()
    assert [span.name for span in taken.spans] == ["model.forward"]
    (span,) = taken.spans
    assert taken.begin_ns <= span.begin_ns <= span.end_ns <= taken.end_ns
    assert 0 < taken.all_reduce_ns <= span.end_ns - span.begin_ns
    assert recorder.take() == []


def test_a_turn_asks_for_greedy_tokens_whatever_they_mean_and_looks_nothing_up():
    plan = Plan(e2e_measure.DEMO, "cpu", (4,), (SHM,), rounds=1, drawn=6)
    tokenizer = Tokenizer(e2e_measure.DEMO)

    class Cache:
        num_blocks = 64
        name, sequence, broadcasts = SHM, 0, 0

    channel = TurnChannel(Cache())  # neither is asked for anything before the first step
    engine = make_engine(plan, channel, None, tokenizer, Cache(), NullObserver())
    assert not engine.scheduler.config.prefix_caching
    asked = []

    class Engine:
        add = asked.append
        has_unfinished = False

    assert drive(Engine, channel, [(1, 2), (3,)], 6).tokens == [[], []]
    assert [request.prompt_token_ids for request in asked] == [(1, 2), (3,)]
    assert {request.params for request in asked} == {
        SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    }


def test_telemetry_is_compared_in_pairs_and_targets_are_those_of_the_shipped_model():
    def toggled(number, on, rate):
        return ToggledTurn(8, number, on, [[1]] * 8, rate, [1.0], 0)

    pairs = [(0, 90.0, 100.0), (1, 40.0, 50.0), (2, 990.0, 1000.0)]
    telemetry = [
        toggled(n, on, rate)
        for n, *rates in pairs
        for on, rate in zip((True, False), rates, strict=True)
    ]
    seen = e2e_report.Seen([], [(2, SHM, telemetry)], [])
    for has_targets, target in ((True, ">= 0.99"), (False, "reported")):
        (ratio,) = e2e_report.make_ratios(seen, has_targets)
        assert ratio["name"] == "telemetry_on_vs_off_tokens" and ratio["target"] == target
        assert ratio["value"] == 0.9 and ratio["spread"] == [0.9, 0.9]


# ---- prompts and models


def test_prompts_differ_from_their_first_block_on_and_repeat_in_every_run():
    tokenizer = Tokenizer(e2e_measure.DEMO)
    prompts = make_prompts(tokenizer, 300)
    assert prompts == make_prompts(tokenizer, 300) and prompts[:8] == make_prompts(tokenizer, 8)
    assert len({prompt[:16] for prompt in prompts}) == 300
    assert {len(prompt) for prompt in prompts} == set(range(LEAST, MOST + 1))
    for most in range(MOST, MOST + 12):
        assert len({prompt[:LEAST] for prompt in make_prompts(tokenizer, 1000, most=most)}) == 1000
    text = tokenizer.decode(prompts[0])
    assert text.startswith("In the beginning")


def test_a_synthetic_model_is_made_once_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(synthetic, "_SHARD_BYTES", 2 << 20)
    made = synthetic.synthetic_model("small", tmp_path / "cache")
    assert [*(tmp_path / "cache").iterdir()] == [made]
    config = ModelConfig.from_dir(made)
    tensors = check_checkpoint(made, config)
    assert len({tensor.file for tensor in tensors.values()}) > 1
    assert f"{2 * synthetic.count_parameters(config):,} bytes" in capsys.readouterr().err
    query = tensors["model.layers.0.self_attn.q_proj.weight"]
    with safe_open(query.file, framework="pt") as file:
        weights = file.get_tensor("model.layers.0.self_attn.q_proj.weight").float()
    assert weights.std().item() == pytest.approx(256**-0.5, rel=0.02)
    tokenizer = Tokenizer(made)
    assert tokenizer.decode(tokenizer.encode("naïve ")) == "naïve "
    before = {path.name: path.stat().st_mtime_ns for path in made.iterdir()}
    assert synthetic.synthetic_model("small", tmp_path / "cache") == made
    assert capsys.readouterr().err == ""  # nothing was written
    assert {path.name: path.stat().st_mtime_ns for path in made.iterdir()} == before

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(synthetic, "_write_weights", fail)
    with pytest.raises(KeyboardInterrupt):
        synthetic.synthetic_model("1b", tmp_path / "cache")
    assert [*(tmp_path / "cache").iterdir()] == [made]


def test_weights_are_the_same_in_every_run_and_others_in_every_tensor():
    once, again = (synthetic._draw("model.layers.0.mlp.up_proj.weight", (64, 32)) for _ in range(2))
    other = synthetic._draw("model.layers.1.mlp.up_proj.weight", (64, 32))
    assert torch.equal(once, again) and not torch.equal(once, other)
    assert synthetic._draw("model.norm.weight", (8,)).tolist() == [1.0] * 8


def test_another_shape_is_another_directory(tmp_path, monkeypatch):
    made = synthetic.synthetic_model("small", tmp_path)
    monkeypatch.setitem(
        synthetic.SHAPES, "small", {**synthetic.SHAPES["small"], "num_hidden_layers": 1}
    )
    assert synthetic.synthetic_model("small", tmp_path) != made


def test_a_model_is_written_where_the_disk_just_holds_it(tmp_path, monkeypatch):
    nbytes = 2 * 4_196_608
    for free, fits in ((nbytes - 1, False), (nbytes, True)):
        usage = shutil._ntuple_diskusage(1 << 40, 0, free)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
        if fits:
            assert synthetic.synthetic_model("small", tmp_path).is_dir()
            continue
        with pytest.raises(ValueError, match=f"'small' are {nbytes:,} bytes; {free:,} are free"):
            synthetic.synthetic_model("small", tmp_path)


def test_whoever_was_quicker_has_made_the_model(tmp_path, monkeypatch):
    made = synthetic.synthetic_model("small", tmp_path / "first")
    target = tmp_path / "second" / made.name
    write = synthetic._write_weights

    def quicker(directory, config):
        write(directory, config)
        shutil.copytree(made, target)

    monkeypatch.setattr(synthetic, "_write_weights", quicker)
    assert synthetic.synthetic_model("small", tmp_path / "second") == target
    shutil.rmtree(target)
    monkeypatch.setattr(synthetic, "_write_weights", lambda *_: target.write_text("no directory"))
    with pytest.raises(NotADirectoryError):
        synthetic.synthetic_model("small", tmp_path / "second")


def test_a_disk_that_is_full_by_then_is_told_in_one_line(tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(synthetic, "save_file", full)
    assert e2e.main(["--synthetic", "small", "--cache", str(tmp_path)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"onecast: --cache: {tmp_path}: I/O error: No space left on device (os error 28)"
    assert [*tmp_path.iterdir()] == []


def test_shapes_are_those_of_the_models_they_are_named_after(tmp_path):
    counts = {}
    for name, shape in synthetic.SHAPES.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({**synthetic._LLAMA, **shape}))
        counts[name] = synthetic.count_parameters(ModelConfig.from_dir(tmp_path / name))
    assert counts == {"small": 4_196_608, "1b": 1_235_814_400, "8b": 8_030_261_248}


def test_what_cannot_run_here_is_refused_in_one_line(tmp_path, capsys, monkeypatch):
    def refused(*arguments):
        status = e2e.main([*arguments])
        out, err = capsys.readouterr()
        assert status == 2 and out == ""
        return err

    monkeypatch.setattr(e2e_measure, "launch", lambda *_: pytest.fail("ranks were started"))
    cache = ("--cache", str(tmp_path))
    assert "model directory /nowhere does not exist" in refused("--model", "/nowhere")
    assert "--channels: 'mpi' is none of two-broadcasts, " in refused("--channels", "mpi")
    assert "tensor-parallel size 3 does not divide num_attention_heads 8" in refused("--tp", "3")
    assert "--drawn: sequences of 1040 tokens exceed the model's context of 512" in refused(
        "--drawn", "1000"
    )
    assert "--device cuda, --tp 2: torch sees no GPU" in refused("--device", "cuda")
    monkeypatch.setattr(e2e_machine, "available_host_bytes", lambda: 1 << 20)
    assert (
        "need 12,002,304 bytes" in refused("--batch", "1") and "machine has 1,048,576" in refused()
    )
    assert "bytes of torch.float32 weights" in refused("--synthetic", "8b", *cache)
    assert [*tmp_path.iterdir()] == []  # it was not written first
    monkeypatch.setattr(e2e_machine, "available_host_bytes", lambda: 1 << 50)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 8, 1000))
    assert "the weights of '8b' are 16,060,522,496 bytes; 1,000 are free" in refused(
        "--synthetic", "8b", *cache
    )
    assert [*tmp_path.iterdir()] == []
    (tmp_path / "file").touch()
    for arguments, words in (
        (["--tp", "two"], "--tp: 'two' is no whole number"),
        (["--batch", "1,0"], "--batch: 0 is below 1"),
        (["--json", f"{tmp_path}/absent/x.json"], "--json: no file can be made at "),
        (["--report", f"{tmp_path}/file/pages"], "--report: no folder can be made at "),
    ):
        with pytest.raises(SystemExit):
            e2e.main(arguments)
        assert words in capsys.readouterr().err


def test_on_a_gpu_memory_of_all_ranks_that_share_it_counts(monkeypatch):
    monkeypatch.setattr(e2e_machine, "nccl_refusal", lambda ranks: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(e2e_machine, "total_gpu_bytes", lambda: [6 << 20])
    e2e_machine.check_model(e2e_measure.DEMO, "cuda", 1, 100, 1)  # 5.8 MB in half precision
    with pytest.raises(ValueError, match="a GPU here has 6,291,456"):
        e2e_machine.check_model(e2e_measure.DEMO, "cuda", 2, 100, 40)


def test_the_tables_fit_120_columns_and_nothing_is_cut(report, capsys):
    batches = list(e2e.FULL.batches)
    rows = [
        {**row, "batch": batch}
        | ({"median": 12345.6, "p99": 67890.1} if row["metric"].endswith("us") else {})
        for row in report["rows"]
        for batch in batches
        if row["batch"] == 8
    ]
    e2e_tables.print_report(
        {**report, "rows": rows, "plan": {**report["plan"], "batches": batches}}
    )
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    text = "\n".join(lines)
    assert "…" not in text
    for name in (*TARGETS, *CHANNELS, "1 wait", "0 publish", "all-reduce"):
        assert name in text


@pytest.mark.slow
def test_one_rank_alone_and_four_are_measured_too(tmp_path, monkeypatch):
    monkeypatch.setattr(e2e, "QUICK", TINY)
    report = run(tmp_path / "report.json", "--tp", "1,4", "--batch", "8", "--drawn", "8")
    rows = rows_of(report)
    assert rows[1, 8, TWO, None, STEP]["median"] > 0 and rows[4, 8, SHM, 3, "wait us"]["n"] == 7
    assert rows[1, 8, SHM, None, e2e_report.ON_VS_OFF]["n"] == 1
    assert {ratio["name"] for ratio in report["ratios"]} == {t for t in TARGETS if "model" in t}


@pytest.mark.slow
def test_a_synthetic_model_and_channels_that_are_named_are_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(e2e, "QUICK", TINY)
    arguments = ("--synthetic", "small", "--cache", str(tmp_path), "--channels", f"{SHM},{TWO}")
    report = run(tmp_path / "report.json", *arguments, "--all-reduce", "process-group")
    assert report["model"]["synthetic"] == "small" and report["model"]["dtype"] == "float32"
    assert report["plan"]["channels"] == [TWO, SHM]
    assert {row["channel"] for row in report["rows"]} == {TWO, SHM}
    ratios = {ratio["name"]: ratio for ratio in report["ratios"]}
    assert "e2e_fused_vs_two_broadcast_tp2" not in ratios
    assert ratios["broadcast_share_of_step_shm"]["target"] == "reported"


@pytest.mark.slow
def test_the_quick_run_measures_the_shipped_model(tmp_path):
    check(run(tmp_path / "report.json"), e2e.QUICK)
