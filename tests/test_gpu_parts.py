"""Benchmarks of `onecast gpu-check`: as many ranks as can meet, paths of a GPU on the CPU."""

import contextlib
import json
import re
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from racing_cuda import racing_streams
from racing_streams import Machine as GpuMachine
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity

from onecast.comm.testing import RanksHung
from onecast.runtime import gpu_check
from onecast.runtime.bench import (
    blocks_gpu,
    blocks_hidden,
    e2e_gpu,
    gpu,
    gpu_part,
    gpu_profiler,
    nccl,
)
from onecast.telemetry.ring import BEGIN, DEVICE, END, SEQUENCE


@pytest.mark.parametrize(
    ("gpus", "variable", "version", "refusal"),
    [
        (0, "1", (2, 31, 2), "torch sees no GPU"),
        (1, None, (2, 31, 2), "2 ranks of NCCL on 1 GPU need .* is not set, NCCL is 2.31.2$"),
        (1, "1", (2, 28, 9), "2 ranks of NCCL on 1 GPU need .* is set, NCCL is 2.28.9$"),
        (1, "1", (2, 31, 2), None),
        (2, None, (2, 28, 9), None),
    ],
)
def test_ranks_meet_over_nccl_where_it_can_be(monkeypatch, gpus, variable, version, refusal):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(nccl.dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(nccl, "nccl_version", lambda: version)
    monkeypatch.delenv("NCCL_MULTI_RANK_GPU_ENABLE", raising=False)
    if variable is not None:
        monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", variable)
    found = nccl.nccl_refusal(2)
    if refusal is None:
        assert found is None
    else:
        assert found is not None and re.match(refusal, found)


def test_the_version_of_nccl_is_that_of_the_loaded_library(monkeypatch):
    class Library:
        def __init__(self, name):
            assert name is None  # what the process has loaded, the preloaded first

        @staticmethod
        def ncclGetVersion(place):
            place._obj.value = 23102
            return 0

    monkeypatch.setattr(nccl.ctypes, "CDLL", Library)
    monkeypatch.setattr(nccl.dist, "is_nccl_available", lambda: True)
    assert nccl.nccl_version() == (2, 31, 2)
    monkeypatch.setattr(nccl.dist, "is_nccl_available", lambda: False)
    assert nccl.nccl_version() == ()


# ---- what a part is asked and leaves


def test_ranks_that_hang_show_their_stacks_and_earlier_results_stay(capsys, tmp_path):
    path = tmp_path / "part.json"

    def measure(asked, results):
        assert 0 < asked.timeout_s <= 50
        results.add(rows=[{"a": 1}])
        assert json.loads(path.read_text())["rows"] == [{"a": 1}]  # at once
        raise RanksHung([1], "a stack", {})

    arguments = ["--timeout=50", f"--json={path}"]
    assert gpu_part.run_part("x", "", measure, arguments) == gpu_part.HUNG_STATUS
    assert "ranks [1] hung\na stack" in capsys.readouterr().err
    assert json.loads(path.read_text())["rows"] == [{"a": 1}]


def test_a_step_count_that_measures_nothing_is_refused(capsys):
    mains = ((gpu.main, ["copies"]), (blocks_gpu.main, []), (e2e_gpu.main, []))
    for main, arguments in ((gpu_check.main, []), *mains):
        with pytest.raises(SystemExit):
            main([*arguments, "--steps=0"])
        assert "0 is below 1" in capsys.readouterr().err


# ---- parts that ask how many ranks can meet


def asked(device: str = "cuda") -> gpu_part.Asked:
    return gpu_part.Asked(device, 10, time.monotonic() + 100)


def test_nccl_is_measured_by_as_many_ranks_as_can_meet(monkeypatch):
    calls = []

    def measure(backend, device, steps, timeout_s, ranks, only_group):
        calls.append((backend, device, steps, ranks))
        return [{"ranks": ranks}]

    monkeypatch.setattr(gpu, "measure", measure)
    monkeypatch.setattr(gpu, "nccl_refusal", lambda n: f"no {n} ranks" if n > 1 else None)
    results = gpu_part.Results()
    gpu._measure_nccl(asked(), results)
    assert calls == [("nccl", "cuda", 10, 1)]
    assert results.found["rows"] == [{"ranks": 1}]
    assert results.found["skipped"] == ["no 2 ranks", "no 4 ranks"]
    monkeypatch.setattr(gpu, "nccl_refusal", lambda n: None)
    gpu._measure_nccl(asked(), results)
    assert calls[1:] == [("nccl", "cuda", steps, n) for steps, n in ((10, 1), (4, 2), (1, 4))]


@pytest.mark.parametrize(
    ("gpus", "most", "cases"),
    [
        (1, 1, [e2e_gpu.ALONE]),
        (1, 4, [e2e_gpu.ALONE, e2e_gpu.SHARING]),
        (2, 2, [e2e_gpu.ALONE, e2e_gpu.TOGETHER]),
    ],
)
def test_a_model_of_real_shapes_is_run_by_as_many_ranks_as_can_meet(monkeypatch, gpus, most, cases):
    seen = []

    def measure(chosen, amount, timeout_s):
        assert chosen.synthetic == "1b" and chosen.device == "cuda" and 0 < timeout_s <= 100
        seen.append((chosen.tp, chosen.channels, amount))
        row = {"tp": chosen.tp[0], "batch": 8, "metric": e2e_gpu.STEP}
        rows = [row | {"channel": name} for name in reversed(chosen.channels)]
        return {"rows": [*rows, row | {"channel": "x", "metric": "other us"}], "ratios": []}

    monkeypatch.setattr(e2e_gpu, "measure", measure)
    monkeypatch.setattr(e2e_gpu, "synthetic_model", lambda name, cache: Path("/model"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(e2e_gpu, "nccl_refusal", lambda n: None if n <= most else f"no {n}")
    results = gpu_part.Results()
    e2e_gpu._measure_part(asked(), results)
    assert seen == [((case.tp,), case.channels, case.amount._replace(drawn=10)) for case in cases]
    assert results.found["skipped"] == (["no 2"] if most < 2 else [])
    shown = [(row["workload"], row["method"]) for row in results.found["rows"]]
    assert shown == [
        (f"1b, TP {case.tp}, batch 8", name) for case in cases for name in case.channels
    ]


# ---- a profiler beside telemetry


class Event:
    """As torch.profiler has them."""

    def __init__(self, name, start, us, device_type=DeviceType.CUDA):
        self.name, self.device_type = name, device_type
        self.time_range = SimpleNamespace(start=start, elapsed_us=lambda: us)


def test_of_what_a_profiler_saw_the_kernels_and_copies_of_nccl_are_the_collectives():
    events = [
        Event("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 50, 7.5),
        Event("spin_kernel(long)", 20, 200.0),
        Event("nccl:_all_gather_base", 50, 9.0),  # an annotation, shown on the GPU's lane
        Event("Memcpy DtoD (Device -> Device)", 10, 2.5),
        Event("ncclDevKernel_never", 5, 1.0, DeviceType.CPU),
        Event("gloo:all_gather", 60, 11.0, DeviceType.CPU),
    ]
    found = gpu_profiler.collectives_of(events, on_gpu=True)
    assert [us for _, us in found] == [2.5, 7.5]
    assert gpu_profiler.collectives_of(events, on_gpu=False) == [("gloo:all_gather", 11.0)]


def test_the_error_is_of_the_largest_size_operation_by_operation(monkeypatch):
    def times(recorded, profiled):
        largest = {("256 MiB", "recorded"): recorded, ("256 MiB", "torch.profiler"): profiled}
        return {("16 KiB", "recorded"): [9.0], ("16 KiB", "torch.profiler"): [3.0], **largest}

    ranks = [times([110.0, 90.0], [100.0, 100.0]), times([105.0, 101.0], [100.0, 100.0])]
    monkeypatch.setattr(gpu_profiler, "ranks_of", lambda device: 2)
    monkeypatch.setattr(gpu_profiler, "run_ranks", lambda *_, **__: ranks)
    results = gpu_part.Results()
    gpu_profiler._measure_part(asked(), results)
    (figure,) = results.found["ratios"]
    assert figure["value"] == pytest.approx(0.075) and figure["target"] == "<= 0.1"
    assert figure["holds"] is True and figure["spread"] == pytest.approx([0.01, 0.1])
    rows = {(row["workload"], row["method"]): row for row in results.found["rows"]}
    assert rows["256 MiB", "recorded"]["n"] == 4 and rows["16 KiB", "recorded"]["median"] == 9
    ranks[1] = {}
    results = gpu_part.Results()
    gpu_profiler._measure_part(asked(), results)
    (reason,) = results.found["skipped"]
    assert reason.startswith("torch.profiler shows nothing") and not results.found["rows"]


class FakeBench:
    """Records what is done to a GPU that is none; its device times come late, and in any order."""

    device, group = torch.device("cpu"), "nccl"

    def __init__(self):
        self.log = []

    def synchronize(self):
        self.log.append("synchronize")

    def instrument(self, name):
        self.log.append(name)
        return lambda: self.log.append("stop")

    def rows(self, kind):
        assert kind == DEVICE and self.log[-1] == "stop"
        rows = np.zeros((3, 1 + max(BEGIN, END, SEQUENCE)), np.int64)
        rows[:, BEGIN], rows[:, SEQUENCE] = 5000, [12, 10, 11]
        rows[:, END] = rows[:, BEGIN] + [3000, 1000, 2500]
        return rows


def test_the_gpu_spins_before_each_operation_so_that_the_hosts_pace_is_in_neither_time(monkeypatch):
    bench = FakeBench()

    @contextlib.contextmanager
    def profile(activities, acc_events):
        assert activities == [ProfilerActivity.CUDA]
        bench.log.append("profile")
        events = [Event("Memcpy DtoD", start, us) for start, us in ((2, 0.9), (9, 2.4), (30, 2.8))]
        yield SimpleNamespace(events=lambda: events)
        bench.log.append("profiled")

    def gather(gathered, own, group):
        assert gathered.nbytes == own.nbytes == 16 << 10 and group == "nccl"
        bench.log.append("gather")

    monkeypatch.setattr(gpu_profiler, "profile", profile)
    monkeypatch.setattr(gpu_profiler, "_all_gather", lambda: gather)
    monkeypatch.setattr(gpu_profiler.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: bench.log.append("spin"))
    seen, recorded = gpu_profiler._gather(bench, 16 << 10, 3, on_gpu=True)
    assert [us for _, us in seen] == [0.9, 2.4, 2.8] and recorded == [1.0, 2.5, 3.0]
    warm = ["gather"] * 3 + ["synchronize"]
    each = ["spin", "gather", "synchronize"]
    assert bench.log == [*warm, gpu_profiler.TIMED, "profile", *each * 3, "profiled", "stop"]


@pytest.mark.parametrize(("seen", "recorded"), [(2, 3), (4, 3), (3, 2), (3, 4)])
def test_operations_that_one_of_the_two_missed_are_an_error(monkeypatch, seen, recorded):
    bench = contextlib.nullcontext(None)
    monkeypatch.setattr(gpu_profiler, "open_bench", lambda rank, device: bench)
    found = [("ncclDevKernel_AllGather", 1.0)] * seen, [2.0] * recorded
    monkeypatch.setattr(gpu_profiler, "_gather", lambda *_, **__: found)
    with pytest.raises(
        RuntimeError, match=rf"3 all_gathers of 16 KiB: {recorded} were recorded.*{seen}"
    ):
        gpu_profiler._measure(0, "cuda", 3)
    monkeypatch.setattr(gpu_profiler, "_gather", lambda *_, **__: ([], [2.0] * 3))
    assert gpu_profiler._measure(0, "cuda", 3) == {}  # no profiler of this GPU


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_device_times_are_those_of_the_profiler():
    results = gpu_part.Results()
    gpu_profiler._measure_part(asked(), results)
    if results.found["skipped"]:
        pytest.skip(results.found["skipped"][0])
    assert results.found["ratios"][0]["holds"]


# ---- blocks


def test_the_figures_of_a_gpu_have_the_targets_of_the_report():
    from onecast.runtime.bench.blocks_report import FIGURES

    assert {
        name: target for name, (target, _) in FIGURES.items() if name in blocks_gpu.FIGURES
    } == {name: target for name, target in blocks_gpu.FIGURES.items() if name in FIGURES}


def test_the_path_of_a_gpu_over_streams_that_run_late(monkeypatch):
    """All three movers, the GPU's own clock, and what every method says did arrive."""
    kernels = pytest.importorskip("onecast.runtime.kernels", exc_type=ImportError)
    machine = GpuMachine(0)
    monkeypatch.setattr(kernels, "move_rows", machine.move_rows)
    make = blocks_gpu._Bench._make_movers

    def make_movers(self, device_rows, host_rows):
        machine.adopt(device_rows, "device block")
        machine.adopt(host_rows, "host block")
        self._gpu = True
        return make(self, device_rows, host_rows)

    monkeypatch.setattr(blocks_gpu._Bench, "_make_movers", make_movers)
    monkeypatch.setattr(blocks_gpu, "_CELL_S", 0.0)
    with racing_streams(machine):
        bench = blocks_gpu._Bench(blocks_gpu.ON_CPU._replace(counts=(16,)), "cpu")
        assert [*bench.movers] == ["onecast", "copies", "kernel"]
        for op in blocks_gpu.OPS:
            for pattern in blocks_gpu.PATTERNS:
                machine.log.clear()
                rates = bench.rates(op, pattern, 16, 5)
                own = ["onecast"] if op == "copy" else ["onecast", "copies", "kernel"]
                assert [*rates] == [*own, "one copy", "per layer"]
                assert {len(values) for values in rates.values()} == {3}
                # 5 rounds; of each method one copy or kernel at least, per layer 8 a block
                moves = [line for line in machine.log if line.startswith(("copy", "kernel"))]
                assert len(moves) >= 5 * (len(own) + 1 + 16 * 8)
        bench.close()
    assert not any(stream.queue for stream in machine.streams)


def test_the_share_that_is_hidden_is_what_a_step_is_not_longer_by(monkeypatch):
    """Swaps of 2 s beside a load of 5 s, of which the step shows one half second."""
    beside = blocks_hidden._Beside(torch.device("cpu"))
    monkeypatch.setattr(beside, "_least", lambda call: 1.0)
    times = iter([2.0, 5.0, 5.5] * 4)
    monkeypatch.setattr(beside, "_elapsed", lambda call: next(times))
    assert beside.rounds(None, lambda: None, 2) == [75.0, 75.0]
