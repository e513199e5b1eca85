"""Instruments on things of known cost, with clocks of our own: no wall time decides anything here."""
import json
import math
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
import torch
from hypothesis import given, settings as checks, strategies as st

from llmlab.kit import footprint, machine, measure
from llmlab.kit.geometry import geometry_of
from llmlab.kit.machine import Ceilings, Forecast, Work, ceilings, count_ops, predict, sample, work
from llmlab.kit.measure import compare, generation_times, percentiles, throughput, time_calls
from llmlab.kit.settings import Unavailable, UsageError


class Clock:
    "A clock that moves only when told to."
    def __init__(self): self.now = 0.
    def __call__(self): return self.now
    def costs(self, seconds):
        def fn(): self.now += seconds
        return fn


@pytest.fixture
def clock(): return Clock()


def some_ceilings(**more):
    known = dict(device="cpu", name=machine._device_name("cpu"), threads=torch.get_num_threads(), points=((2.**20, 100., 90.), (2.**30, 10., 9.)),
        rates=dict(float32=100., int8=400.), dispatch_s=1e-5, measured=datetime.now(UTC).isoformat(), seconds=1., torch=torch.__version__)
    return Ceilings(**{**known, **more})


# --- the clock

def test_sample_waits_warms_up_and_divides(clock):
    called = []
    def fn(): called.append(1); clock.now += 2.
    assert sample(fn, n=3, warmup=2, calls=4, clock=clock) == [2., 2., 2.] and len(called) == 2 + 3*4


def test_short_calls_are_repeated_until_the_clock_can_see_them(clock):
    taken = time_calls(clock.costs(1e-6), n=5, unit="us", least_s=1e-4, clock=clock)
    assert taken.value == pytest.approx(1) and taken.n == 5 and taken.unit == "us"
    with pytest.raises(UsageError, match="did you mean|Known"): time_calls(clock.costs(1), unit="minutes", clock=clock)


def test_a_call_of_no_length_ends(clock):
    assert time_calls(lambda: None, n=3, clock=clock).value == 0


# --- comparisons

def test_every_variant_has_every_place_equally_often():
    names = list("ABCD")
    for rounds in (4, 8, 12):
        orders = list(measure._orders(names, rounds))
        assert all(sorted(o) == names for o in orders)
        assert all([o[place] for o in orders].count(n) == rounds//4 for n in names for place in range(4))


def test_known_costs_give_known_ratios_in_any_drift(clock):
    pace = iter(range(10**6))
    def costs(units):
        def fn(): clock.now += units*1e-3*(1 + next(pace)//3)  # the machine gets slower all the time; a round of three calls sees one pace
        return fn
    c = compare({"a": costs(4), "b": costs(2), "c": costs(8)}, "a", pairs=6, warmup=0, least_s=0, clock=clock)
    assert c["b"].ratio.value == pytest.approx(2) and c["c"].ratio.value == pytest.approx(.5)
    assert c["a"].ratio.value == 1 and c["a"].time.n == 6 and c["b"].baseline == "a"
    assert c["b"].ratio.low == pytest.approx(2) == pytest.approx(c["b"].ratio.high), "the drift must not enter the ratio"
    assert c["b"].time.high > 2*c["b"].time.low, "and does enter the time"


def test_the_rotation_is_what_happens(clock):
    seen = []
    def fn(name): return lambda: (seen.append(name), clock.costs(1.)())
    compare({n: fn(n) for n in "ABC"}, pairs=4, warmup=1, clock=clock)
    assert "".join(seen[6:]) == "ABC" "BCA" "CAB" "CBA"  # after the warm-up and one call each to see how long it takes


def test_calls_and_throughput(clock):
    c = compare({"short": clock.costs(1e-5), "long": clock.costs(1e-2)}, pairs=3, clock=clock, least_s=1e-3)
    assert c["short"].calls == 128 and c["long"].calls == 1
    assert c["short"].time.value == pytest.approx(.01) and c["long"].per_second(32).value == pytest.approx(3200)
    assert c["long"].per_second(32).n == 3 and c["short"].seconds == pytest.approx(1e-5)
    assert throughput(clock.costs(.5), items=8, n=4, clock=clock).value == pytest.approx(16)
    with pytest.raises(UsageError, match="items"): throughput(clock.costs(1), 0, clock=clock)


def test_forecasts_stand_beside_the_times(clock):
    seen = {"a": Forecast(.004, .003, "bandwidth"), "b": Forecast(.002, .001, "bandwidth")}
    c = compare({"a": clock.costs(.006), "b": clock.costs(.004), "c": clock.costs(.001)}, pairs=3, forecasts=seen, clock=clock)
    assert c["a"].floor_fraction == pytest.approx(.5) and c["b"].predicted_ratio == 2 and c["c"].floor_fraction is None and c["c"].predicted_ratio is None
    assert "predicted" in repr(c) and "25%" in repr(c) and "<table" in c._repr_html_()
    ax = c.plot()
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "b", "c"] and ax.get_xlabel() == "ms a call"


def test_a_comparison_is_a_mapping_that_helps(clock):
    c = compare({"fp32": clock.costs(1), "int8": clock.costs(1)}, pairs=2, clock=clock)
    assert list(c) == ["fp32", "int8"] and len(c) == 2 and "int4" not in c and dict(c)["int8"].name == "int8" and c.get("int4") is None
    with pytest.raises(UsageError, match="int8"): c["int88"]


@pytest.mark.parametrize("variants,more,what", [
    ({}, {}, "empty"), ({"a": len}, dict(baseline="b"), "baseline"), ({"a": print}, dict(pairs=1), "pairs"), ({"a": 3}, {}, "not a function"),
    ({"a": print}, dict(unit="h"), "unit"), ({"a": print}, dict(forecasts={"z": None}), "variant with a forecast")])
def test_mistakes_are_answered_before_anything_runs(variants, more, what):
    with pytest.raises(UsageError, match=what): compare(variants, **more)


def test_a_variant_that_raises_is_named():
    def bad(): raise ZeroDivisionError("no")
    with pytest.raises(ZeroDivisionError) as e: compare({"good": lambda: None, "bad": bad}, pairs=2)
    assert "'bad'" in e.value.__notes__[0]


def test_garbage_collection_is_put_back(clock):
    import gc
    def bad(): assert not gc.isenabled(); raise KeyError
    with pytest.raises(KeyError), measure._undisturbed(): bad()
    assert gc.isenabled()


# --- streams and percentiles

def test_first_and_further_tokens(clock):
    def stream():
        clock.now += .5
        yield 1
        for _ in range(4):
            clock.now += .1
            yield 2
    g = generation_times(stream, runs=3, clock=clock)
    assert g.ttft_ms.value == pytest.approx(500) and g.tpot_ms.value == pytest.approx(100) and g.n_tokens == 5
    assert g.tokens_per_s.value == pytest.approx(5/.9) and g.gaps_ms == pytest.approx([100]*12) and "first token" in repr(g)


def test_streams_of_one_token_and_of_none(clock):
    def one():
        clock.now += 1
        yield 1
    assert generation_times(one, runs=2, clock=clock).tpot_ms is None
    with pytest.raises(UsageError, match="without a token"): generation_times(lambda: iter(()), clock=clock)


@checks(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=60), st.floats(1, 99))
def test_percentiles_lie_within_their_interval(x, q):
    e = percentiles(x, (q,))[q]
    assert e.low <= e.value <= e.high and min(x) <= e.value*(1 + 1e-12) + 1e-12 and e.value <= max(x)*(1 + 1e-12) and e.n == len(x)


def test_percentiles_refuse_and_admit():
    with pytest.raises(UsageError): percentiles([])
    with pytest.raises(UsageError): percentiles([1., math.nan])
    with pytest.raises(UsageError, match="between 0 and 100"): percentiles([1.], (100,))
    assert percentiles(range(20), (99,))[99].high == math.inf, "twenty samples do not bound a p99"


# --- prediction

def test_time_is_the_larger_part_and_dispatch():
    c = some_ceilings()
    f = predict(Work(bytes=2**30, flops=1e9, ops=100), c)
    assert f.floor_seconds == pytest.approx(2**30/10e9) and f.seconds == pytest.approx(f.floor_seconds + 1e-3) and f.bound == "bandwidth"
    assert predict(Work(1e3, 1e12), c).bound == "arithmetic" and predict(Work(1e3, 1e3, 10**6), c).bound == "dispatch"
    assert predict(Work(0, 4e11, dtype="int8"), c).seconds == pytest.approx(1) and predict(Work(0, 0), c).seconds == 0
    assert predict(Work(2**20, 0, working_set_bytes=2**30), c).seconds == pytest.approx(2**20/10e9), "what decides is the working set"


@checks(max_examples=50, deadline=None)
@given(st.floats(1, 1e12), st.floats(0, 1e15), st.integers(0, 10**6), st.floats(1, 10))
def test_more_work_never_takes_less(b, f, ops, more):
    c = some_ceilings()
    t = predict(Work(b, f, ops, working_set_bytes=b), c)
    u = predict(Work(b*more, f*more, ops, working_set_bytes=b), c)
    assert t.seconds >= t.floor_seconds >= 0 and u.seconds >= t.seconds*(1 - 1e-12)


@checks(max_examples=50, deadline=None)
@given(st.floats(1, 1e13))
def test_bandwidth_stays_between_its_neighbours(b):
    c = some_ceilings(points=((1e6, 80., 80.), (1e7, 100., 90.), (1e9, 10., 9.)))
    assert 10 - 1e-9 <= c.bandwidth(b) <= 100 + 1e-9
    for size, g, _ in c.points: assert c.bandwidth(size) == pytest.approx(g)


def test_several_forecasts_make_a_table():
    f = predict({"a": Work(2**30, 0), "b": Work(2**29, 0, working_set_bytes=2**30)}, some_ceilings())
    assert "2.00×" in repr(f) and "<table" in f._repr_html_() and list(f) == ["a", "b"]


@pytest.mark.parametrize("make,what", [
    (lambda: Work(math.nan, 0), "bytes"), (lambda: Work(0, -1), "flops"), (lambda: some_ceilings().rate("int3"), "int8"),
    (lambda: some_ceilings().bandwidth(0), "working set"), (lambda: some_ceilings().bandwidth(math.inf), "working set"),
    (lambda: machine.reader(0), "size_bytes")])
def test_impossible_numbers_are_refused(make, what):
    with pytest.raises(UsageError, match=what): make()


# --- work from a geometry

@pytest.fixture(scope="module")
def llama(): return geometry_of("llama-tiny")
@pytest.fixture(scope="module")
def bert(): return geometry_of("minilm")


def test_a_decoding_step_reads_weights_and_cache(llama):
    w = work(llama, phase="decode", context=99)
    assert w.bytes == llama.weight_bytes() + llama.kv_cache_bytes(100) == w.working_set_bytes and w.flops == llama.flops_per_token(100)
    many = work(llama, tokens=11, phase="decode", context=99)
    assert many.bytes == pytest.approx(sum(work(llama, phase="decode", context=99 + i).bytes for i in range(11))) and many.ops == 11*w.ops
    assert many.flops == pytest.approx(sum(work(llama, phase="decode", context=99 + i).flops for i in range(11)))


def test_types_of_weights_and_of_arithmetic(llama):
    w = work(llama, phase="decode", dtype="bfloat16", weight_dtype="int4")
    assert w.dtype == "bfloat16" and w.bytes == llama.weight_bytes("int4") + llama.kv_cache_bytes(1, dtype="bfloat16")
    assert work(llama, phase="decode", dtype="int8").bytes == llama.weight_bytes("int8") + llama.kv_cache_bytes(1, dtype="float32")


def test_an_encoder_reads_only_the_embeddings_it_looks_up(bert):
    small, large = work(bert, 1, 8), work(bert, 64, 8)
    table = bert.parameters["embedding"]*4
    assert small.bytes == bert.weight_bytes() - table + 8*bert.d_model*4 and large.flops == 64*small.flops
    assert work(bert, 10**4, 512).bytes == bert.weight_bytes(), "never more than the table"
    assert work(bert, 8, 32, phase="train").flops == 3*bert.flops(8, 32) and work(bert, phase="train").bytes == 10*bert.weight_bytes()


@pytest.mark.parametrize("more,what", [(dict(phase="dream"), "phase"), (dict(batch=0), "at least 1"),
    (dict(context=-1), "at least"), (dict(phase="decode"), "generates nothing")])
def test_impossible_work_is_refused(bert, more, what):
    with pytest.raises(UsageError, match=what): work(bert, **more)


def test_ops_are_counted_as_dispatched():
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 4))
    x = torch.ones(1, 4)
    assert count_ops(lambda: net(x)) == 3


# --- the ceilings and where they are kept

@pytest.fixture
def measured(monkeypatch, fresh_home):
    "Ceilings that take no time, and how often they were measured."
    times = []
    def instead(device, quick, threads): times.append(quick); return some_ceilings(device=device, quick=quick, threads=threads, seconds=len(times))
    monkeypatch.setattr(machine, "measure_ceilings", instead)
    return times


def test_ceilings_are_measured_once(measured, fresh_home):
    assert ceilings() == ceilings() and len(measured) == 1
    assert [f.name.endswith(".json") for f in (fresh_home/"machine").glob("*.json")] == [True]
    assert ceilings(fresh=True).seconds == 2 and ceilings().seconds == 2


def test_coarse_ones_serve_where_coarse_is_asked_for(measured):
    ceilings(quick=True); ceilings(quick=True)
    assert measured == [True]
    ceilings(); ceilings(quick=True)
    assert measured == [True, False], "the fine ones replace the coarse and serve both"


def test_another_number_of_threads_is_another_machine(measured):
    ceilings(threads=1); ceilings(threads=2); ceilings(threads=1)
    assert len(measured) == 2


@pytest.mark.parametrize("change", [dict(torch="1.0"), dict(name="another processor"), dict(threads=99),
    dict(measured=(datetime.now(UTC) - timedelta(hours=25)).isoformat()), dict(measured=(datetime.now(UTC) + timedelta(hours=2)).isoformat())],
    ids=["torch", "processor", "threads", "old", "from the future"])
def test_stale_ceilings_are_measured_again(measured, fresh_home, change):
    ceilings()
    file = next((fresh_home/"machine").glob("*.json"))
    file.write_text(json.dumps(replace(Ceilings.from_dict(json.loads(file.read_text())), **change).to_dict()))
    ceilings()
    assert len(measured) == 2


def test_what_a_busy_machine_said_is_soon_forgotten(monkeypatch, fresh_home):
    times = []
    def instead(device, quick, threads):
        times.append(1)
        return some_ceilings(device=device, quick=quick, threads=threads, others=.5, measured=(datetime.now(UTC) - timedelta(minutes=11)).isoformat())
    monkeypatch.setattr(machine, "measure_ceilings", instead)
    assert "Others used 50%" in repr(ceilings())
    ceilings(quick=True)
    assert len(times) == 1, "a test is content"
    ceilings()
    assert len(times) == 2


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"points": 3}', "null"])
def test_a_damaged_file_is_measured_again_and_said(measured, fresh_home, text):
    ceilings()
    next((fresh_home/"machine").glob("*.json")).write_text(text)
    with pytest.warns(UserWarning, match="measured again"): ceilings()
    assert len(measured) == 2
    ceilings()
    assert len(measured) == 2


def test_a_store_that_cannot_be_written_costs_only_the_memory(measured, tmp_path, monkeypatch):
    (tmp_path/"file").write_text("in the way")
    monkeypatch.setenv("LLMLAB_HOME", str(tmp_path/"file"))
    with pytest.warns(UserWarning, match="could not be kept"): assert ceilings().device == "cpu"


def test_two_at_once_measure_once(measured, monkeypatch):
    instead = machine.measure_ceilings
    monkeypatch.setattr(machine, "measure_ceilings", lambda *a: (time.sleep(.2), instead(*a))[1])
    threads = [threading.Thread(target=ceilings) for _ in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(measured) == 1


def test_measured_for_real_the_ceilings_are_of_this_planet():
    c = machine.measure_ceilings(quick=True, threads=1)
    assert 0 <= c.others <= 1 and all(.05 < low <= best < 1e5 for _, best, low in c.points) and [p[0] for p in c.points] == sorted(p[0] for p in c.points)
    assert .05 < c.rate("float32") < 1e6 and 1e-8 < c.dispatch_s < 1e-2 and c.threads == 1
    assert Ceilings.from_dict(json.loads(json.dumps(c.to_dict()))) == c and "float32" in repr(c) and "<table" in c._repr_html_()
    assert c.plot().get_xlabel() == "working set, MiB"


def test_every_reader_reads_every_byte():
    x = torch.zeros(2*machine._columns)
    assert set(machine._readers(x)) == {"sum", "dot", "gemv", "linear"}
    x[-1] = 3.
    readers = machine._readers(x)
    assert readers["sum"]() == 3 and readers["gemv"]().sum() == 3 and readers["linear"]().sum() == 3
    x[machine._columns - 1] = 2.
    assert readers["dot"]() == 6


def test_hardware_is_json_and_stable():
    h = machine.hardware()
    assert json.loads(json.dumps(h)) == h == machine.hardware() and h["cpu"] and h["cores"] >= 1 and h["memory_bytes"] > 2**28


# --- memory

MIB = 2**20


@pytest.mark.parametrize("mark", [True, False], ids=["kernel's mark", "looking"])
def test_the_peak_of_a_block_is_what_it_held(mark):
    with footprint.peak_memory(mark=mark) as peak:
        block, until = torch.ones(64*MIB//4), time.monotonic() + 20
        while not mark and peak.bytes < 60*MIB and time.monotonic() < until: time.sleep(.01)  # the looking thread may have to wait for its turn
        del block
    assert 60*MIB < peak.bytes < 90*MIB and peak.peak_bytes == peak.start_bytes + peak.bytes and peak.how


def test_a_block_that_raises_still_has_its_peak():
    with pytest.raises(KeyError), footprint.peak_memory() as peak:
        block = torch.ones(32*MIB//4)
        raise KeyError
    del block
    assert peak.bytes > 30*MIB and peak.seconds > 0


def test_memory_that_was_freed_before_is_not_free_of_charge():
    block = torch.ones(64*MIB//4)
    del block
    with footprint.peak_memory() as peak: torch.ones(64*MIB//4)
    assert peak.bytes > 60*MIB


@pytest.fixture
def probes(tmp_path, monkeypatch):
    "A module that only this test knows."
    (tmp_path/"probes.py").write_text("""
import os, sys, signal, time
def hold(mib=1): print("noise"); block = b"x"*(mib*2**20); return dict(length=len(block))
def fails(): raise RuntimeError("the reason")
def killed(): os.kill(os.getpid(), signal.SIGKILL)
def hangs(): time.sleep(60)
def odd(): return object()
""")
    monkeypatch.syspath_prepend(tmp_path)


def test_a_fresh_process_tells_its_peak(probes):
    p = footprint.fresh_process_peak("probes:hold", mib=50)
    assert 49*MIB < p.bytes < 60*MIB and p.result == {"length": 50*MIB} and p.start_bytes > MIB
    assert footprint.fresh_process_peak("probes:odd").result is None


@pytest.mark.parametrize("name,error,what", [
    ("probes:fails", Unavailable, "status 1.*the reason"), ("probes:killed", Unavailable, "signal 9.*memory"), ("probes:hangs", Unavailable, "more than 2 s"),
    ("probes:nothing", UsageError, "has no attribute"), ("no_such_module:f", UsageError, "No module named"), ("probes", UsageError, "package.module:function")])
def test_a_process_that_dies_says_why(probes, name, error, what):
    with pytest.raises(error, match=what): footprint.fresh_process_peak(name, timeout_s=2 if "hangs" in name else 120)


def test_arguments_must_travel(probes):
    with pytest.raises(UsageError, match="JSON"): footprint.fresh_process_peak("probes:hold", mib=object())


# --- counters, energy, monitor

def test_the_instruments_cost_something():
    cost = measure.overhead(n=5)
    assert 0 <= cost.clock_share and 0 <= cost.monitor_share and float(cost) == cost.share == max(cost.clock_share, cost.monitor_share) and "%" in repr(cost)


def test_no_gpu_is_none():
    assert footprint.gpu_counters("cpu") is None
    if not torch.cuda.is_available(): assert footprint.gpu_counters() is None


def rapl(folder, name, energy, most=10**7):
    (folder/name).mkdir(exist_ok=True)
    (folder/name/"energy_uj").write_text(str(energy)); (folder/name/"max_energy_range_uj").write_text(str(most))


def test_joules_add_over_packages_and_wrap_around(tmp_path):
    rapl(tmp_path, "intel-rapl:0", 9_000_000); rapl(tmp_path, "intel-rapl:1", 1_000_000); rapl(tmp_path, "intel-rapl:0:0", 5)
    with footprint.energy(powercap=tmp_path) as used:
        rapl(tmp_path, "intel-rapl:0", 999_999); rapl(tmp_path, "intel-rapl:1", 3_000_000); rapl(tmp_path, "intel-rapl:0:0", 10**6)
    assert used.joules == pytest.approx(2 + 2) and used.source == "RAPL" and used.watts > 0 and not used.reason


def test_energy_without_a_counter_says_why(tmp_path):
    with footprint.energy(powercap=tmp_path/"none") as used: pass
    assert used.joules is None and used.watts is None and "no RAPL" in used.reason and "not known" in repr(used)
    rapl(tmp_path, "intel-rapl:0", "nonsense")
    with footprint.energy(powercap=tmp_path) as used: pass
    assert used.joules is None and "cannot be read" in used.reason


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the administrator may read everything")
def test_a_counter_for_the_administrator(tmp_path):
    rapl(tmp_path, "intel-rapl:0", 1)
    (tmp_path/"intel-rapl:0"/"energy_uj").chmod(0)
    with footprint.energy(powercap=tmp_path) as used: pass
    assert "administrator" in used.reason


def test_a_monitor_reads_marks_and_ends():
    before = threading.active_count()
    with footprint.Monitor(interval_s=.01) as m:
        m.mark("now")
        block = torch.ones(32*MIB//4)
        time.sleep(.1)
    del block
    assert threading.active_count() == before and len(m.seconds) == len(m.cores) == len(m.rss) == len(m.gpu) >= 2
    assert m.seconds == sorted(m.seconds) and m.cores[0] is None and max(m.rss) - m.rss[0] > 28*MIB and m.marks[0][1] == "now"
    assert len(m.plot()) == 2 and "memory" in repr(m) and "<table" in m._repr_html_()


def test_a_monitor_ends_when_the_block_raises():
    before = threading.active_count()
    with pytest.raises(KeyError), footprint.Monitor(interval_s=.01): raise KeyError
    assert threading.active_count() == before
    with pytest.raises(UsageError, match="interval_s"): footprint.Monitor(0)


def test_a_monitor_does_not_keep_a_process_alive():
    code = "from llmlab.kit.footprint import Monitor; Monitor(.01).__enter__(); raise SystemExit(7)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 7


def test_the_counter_has_everything():
    for name in ("ceilings", "work", "Work", "predict", "Forecast", "compare", "time_calls", "percentiles", "throughput", "generation_times", "peak_memory",
        "fresh_process_peak", "gpu_counters", "energy", "Monitor", "hardware", "overhead", "reader"): assert name in measure.__all__ and hasattr(measure, name)


def test_a_forecast_without_a_floor_leaves_it_out():
    told = Forecast(2e-3, None, "dispatch")
    assert told.floor_ms is None and "floor" not in repr(told) and "–" in str(machine.Forecasts(a=told))
    c = compare({"a": lambda: None, "b": lambda: None}, pairs=3, warmup=0, forecasts=dict(a=told, b=told))
    assert c["a"].floor_fraction is None and str(c).count("–") == 2 + 1  # and the baseline foretells no speed-up of itself
    assert not [o for o in c.plot().lines if o.get_label() == "floor"]
