"""Cases, contenders, tables and goals of the margin softmax part of the GPU report. All times here are made up."""

import sys
import types

import gpu_comparison
import gpu_margin_softmax as operator
import pytest
import torch
from gpu_comparison import Contender, Outcome
from harness import Timing

LARGE = "512,512,100000,bfloat16"


def test_jobs_with_goals_come_first_and_none_is_missing():
    jobs = operator.jobs(quick=False)
    assert jobs[:3] == ["256,512,64,float32", "256,640,351,float32", LARGE]
    assert len(jobs) == len(set(jobs)) == 5 * 4
    assert set(operator.jobs(quick=True)) < set(jobs)
    case, dtype = operator.parse(jobs[1])
    assert (case.samples, case.dimensions, case.classes, dtype) == (256, 640, 351, "float32")


def test_every_dtype_has_a_tolerance():
    assert operator.TOLERANCE.keys() == gpu_comparison.DTYPES.keys()


def inputs(classes=7):
    case = operator.Case(6, 5, classes)
    return operator.Inputs(case, torch.float32, torch.device("cpu"), torch.Generator().manual_seed(0))


def test_results_are_loss_and_both_gradients_in_fresh_memory():
    given = inputs()
    first, second = given.run(operator.ours), given.run(operator.ours)
    for result, again, exact in zip(first, second, given.exact(operator.MARGIN), strict=True):
        torch.testing.assert_close(result.double(), exact, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(result, again)
        assert result.data_ptr() != again.data_ptr()
        assert not result.requires_grad
    assert given.features.grad is None and given.weight.grad is None


def test_peers_without_margin_get_normalized_inputs_times_the_scale():
    given = inputs()

    def linear_cross_entropy(features, weight, target):
        return torch.nn.functional.cross_entropy(features @ weight.T, target)

    results = given.run(operator.without_margin(linear_cross_entropy))
    for result, exact in zip(results, given.exact(0.0), strict=True):
        torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=1e-6)


def named(case, dtype, device):
    return {contender.name: contender for contender in operator.contenders(case, dtype, device)}


def test_both_kernels_are_forced_where_either_may_be_the_faster():
    few, many = operator.Case(256, 512, 1000), operator.Case(512, 512, 20_000)
    found = named(few, "float32", "cuda")
    variable = "FEWSHOT_EXT_MARGIN_SOFTMAX_KERNEL"
    assert found[operator.ONE_LAUNCH].environment == {variable: "one_launch"}
    assert found[operator.CHUNKED].environment == {variable: "chunked"}
    assert found[operator.OURS].kernel == found[operator.ONE_LAUNCH].kernel != found[operator.CHUNKED].kernel
    assert operator.ONE_LAUNCH not in named(few, "float32", "cpu")
    found = named(many, "float32", "cuda")
    assert operator.ONE_LAUNCH not in found
    assert operator.LIGER_16 in found  # only there are the logits larger than the features


def hide(monkeypatch, *modules):
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)


def test_peers_that_are_missing_say_why(monkeypatch):
    hide(monkeypatch, "cut_cross_entropy", "liger_kernel", "liger_kernel.ops.fused_linear_cross_entropy")
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    found = named(operator.Case(256, 512, 1000), "bfloat16", "cuda")
    assert "cut_cross_entropy" in found[operator.CCE].missing
    assert "liger_kernel" in found[operator.LIGER].missing == found[operator.LIGER_16].missing
    assert "2.13 is the first" in found[operator.TORCH_LINEAR].missing
    assert not found[operator.OURS].missing and not found[operator.EAGER].missing


def test_a_peer_that_breaks_at_import_is_missing_too(monkeypatch):
    class Breaks:
        def __getattr__(self, name):
            raise RuntimeError("0 active drivers")

    monkeypatch.setitem(sys.modules, "cut_cross_entropy", Breaks())
    assert operator.cut_cross_entropy("bfloat16").missing == "RuntimeError: 0 active drivers"
    assert "bfloat16 and float16 alone" in operator.cut_cross_entropy("tf32").missing


def liger_module(forward):
    """Liger's module, with a function of that signature."""
    function = type("Function", (torch.autograd.Function,), {"forward": staticmethod(forward)})
    return types.SimpleNamespace(LigerFusedLinearCrossEntropyFunction=function)


def test_settings_of_liger_find_their_place_among_its_arguments(monkeypatch):
    def forward(ctx, _input, weight, target, bias=None, reduction="mean", chunk_mem_const=1):
        assert bias is None and reduction == "mean"
        return _input.sum() * 0 + chunk_mem_const, None

    monkeypatch.setitem(sys.modules, "liger_kernel", types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, "liger_kernel.ops.fused_linear_cross_entropy", liger_module(forward))
    given = inputs()
    for settings, expected in (({}, 1.0), ({"chunk_mem_const": 16}, 16.0)):
        contender = operator.liger("liger", **settings)
        with torch.no_grad():
            assert float(contender.function(given.features, given.weight, given.target)) == expected
        assert contender.waits and contender.variant == 0.0
    assert operator.liger("liger", chunks=3).missing == "this version takes no chunks"


def test_products_are_those_of_the_case_in_either_layout():
    case = operator.Case(6, 5, 7)
    sets = [inputs(), inputs()]
    found = operator.products(case, sets, torch.Generator().manual_seed(0))
    shapes = {name: [call().shape for call in calls] for name, calls in found.items()}
    assert shapes == {
        "logits, rows": [(6, 7)] * 2,
        "logits, columns": [(7, 6)] * 2,
        "features, rows": [(6, 5)] * 2,
        "features, columns": [(6, 5)] * 2,
        "weight, rows": [(7, 5)] * 2,
        "weight, columns": [(7, 5)] * 2,
    }
    torch.testing.assert_close(found["logits, rows"][1](), sets[1].features @ sets[1].weight.T)
    torch.testing.assert_close(found["logits, columns"][1]().T, sets[1].features @ sets[1].weight.T)


def made_up(milliseconds):
    return Timing(0.9 * milliseconds, milliseconds, 1.2 * milliseconds, 9)


def test_the_floor_takes_each_product_in_its_better_layout():
    times = {"logits, rows": 3, "logits, columns": 2, "features, rows": 1, "features, columns": 4, "weight, rows": 5}
    assert operator.time_of_products({name: made_up(time) for name, time in times.items()}) == 2 + 1 + 5


def test_the_floor_is_the_larger_of_arithmetic_and_traffic():
    case = operator.Case(512, 512, 100_000)
    rates = {"copy_gb_per_s": 1000.0, "bfloat16_tflop_per_s": 100.0}
    floors = operator.floor_columns(case, "bfloat16", 0.1, rates)
    moved = 2 * (512 + 100_000) * 512 * 2 + 8 * 512
    assert floors["copy_ms"] == pytest.approx(moved / 1e9)
    assert floors["square_gemm_ms"] == pytest.approx(6 * 512 * 512 * 100_000 / 100e12 * 1e3)
    assert floors["floor_ms"] == floors["copy_ms"] > floors["gemm_ms"] == 0.1
    assert operator.floor_columns(case, "bfloat16", 0.1, {}) == {"gemm_ms": 0.1, "floor_ms": 0.1}


def rows_of(job, times, rates=True):
    """Rows as the worker makes them, from made-up milliseconds: contender -> kind -> time, or a note."""
    case, dtype = operator.parse(job)
    rates = {"copy_gb_per_s": 3000.0, f"{dtype}_tflop_per_s": 500.0} if rates else {}
    floors = operator.floor_columns(case, dtype, 0.25, rates)
    outcomes = []
    for name, known in times.items():
        outcome = Outcome(Contender(name, variant=-0.3))
        if isinstance(known, str):
            outcome.notes.append(known)
        else:
            outcome.error, outcome.memory = 1e-3, 3 << 20
            outcome.timings = {kind: made_up(time) for kind, time in known.items()}
        outcomes.append(outcome)
    common = {"case": operator.title(job), "input_sets": 2}
    return gpu_comparison.of_outcomes(outcomes, operator.OURS, common, floors)


def test_a_row_for_each_kind_of_timing_and_one_for_what_was_not_timed():
    times = {operator.OURS: {"graph": 0.5, "stream": 0.6}, operator.CCE: {"stream": 1.2}, operator.LIGER: "missing"}
    rows = rows_of(LARGE, times)
    assert [(row["contender"], row["timing"]) for row in rows] == [
        (operator.OURS, "graph"),
        (operator.OURS, "stream"),
        (operator.CCE, "stream"),
        (operator.LIGER, ""),
    ]
    assert rows[0] | {"p20_ms": "0.45000", "p50_ms": "0.50000", "p80_ms": "0.60000", "times_floor": "2.000"} == rows[0]
    assert rows[2]["times_fewshot_ext"] == "2.000"
    assert rows[2]["extra_memory_mib"] == "3.0"
    assert rows[3]["p50_ms"] == "" and rows[3]["note"] == "missing"
    assert len({tuple(row) for row in rows}) == 1  # every row has every column


def test_the_table_has_one_line_a_contender():
    times = {operator.OURS: {"graph": 0.5, "stream": 0.6}, operator.CCE: {"stream": 1.2}, operator.LIGER: "a|b"}
    text = operator.tables(rows_of(LARGE, times))
    assert "### 512, 512, 100000 in bfloat16" in text
    assert "| fewshot_ext | 500 | 450 - 600 | 2.000 | 600 | 540 - 720 | 3.0 | 1.0e-03 |  |" in text
    assert f"| {operator.CCE} |  |  |  | 1200 | 1080 - 1440 | 3.0 | 1.0e-03 |  |" in text
    assert f"| {operator.LIGER} |  |  |  |  |  |  |  | a\\|b |" in text
    assert "its three matrix products 250" in text
    assert "its least traffic not measured" in operator.tables(rows_of(LARGE, times, rates=False))


def verdicts(rows):
    return [goal.met for goal in operator.goals(rows)]


def test_goals_that_nobody_measured_are_not_measured():
    assert verdicts([]) == [None] * 6
    assert verdicts(rows_of("256,512,64,float32", {operator.OURS: "wrong"})) == [None] * 6


@pytest.mark.parametrize("time, met", ((0.0249, True), (0.025, True), (0.0251, False)))
def test_goal_of_25_microseconds(time, met):
    rows = rows_of("256,640,351,float32", {operator.OURS: {"graph": time, "stream": 0.1}})
    assert verdicts(rows) == [None, met, None, None, None, None]
    assert operator.goals(rows)[1].measured == f"{1e3 * time:.1f} us"


@pytest.mark.parametrize("time, met", ((0.5, True), (0.51, False)))
def test_goal_of_twice_the_floor(time, met):
    goal = operator.goals(rows_of(LARGE, {operator.OURS: {"graph": time}}))[2]
    assert goal.met is met
    assert goal.measured.startswith(f"{time / 0.25:.2f} times; ")
    assert "at the rate of a large square product" in goal.measured


def test_goals_against_peers_compare_plain_calls_with_the_best_variant():
    times = {
        operator.OURS: {"graph": 0.1, "stream": 0.6},
        operator.CCE: {"stream": 0.7},
        operator.LIGER: {"stream": 2.0},
        operator.LIGER_16: {"stream": 0.5},
        operator.TORCH_LINEAR: "torch 2.11 has none",
    }
    goals = operator.goals(rows_of(LARGE, times))
    assert [goal.met for goal in goals[3:]] == [True, False, None]
    assert goals[4].measured == "600 us against 500 us"


def test_a_whole_job_on_the_rehearsal_device(one_thread):
    class Bench:
        device, quick, seconds, rates = gpu_comparison.RehearsalOnCpu(), True, 0.0, {}

        def begin(self, *arguments, **settings):
            pass

        def left_out(self, *arguments):
            return None

        def remaining(self):
            return 0.0  # no time to compile

    rows = operator.measure("12,8,20,tf32", Bench())
    by_contender = {row["contender"]: row for row in rows}
    for name in (operator.OURS, operator.EAGER):
        assert float(by_contender[name]["p50_ms"]) > 0
        assert float(by_contender[name]["relative_error"]) < 1e-5
    assert by_contender[operator.COMPILED]["note"] == "not compiled: no time left"
    assert float(by_contender[operator.OURS]["gemm_ms"]) > 0
    assert by_contender[operator.OURS]["case"] == "12, 8, 20 in tf32"
