"""Cases, contenders, tables and goals of the operators in the GPU report. All times in tables here are made up."""

import sys
import types

import gpu_comparison
import gpu_emd
import gpu_episode_finetune
import gpu_margin_softmax
import pytest
import torch
from episode_finetune_peers import batched
from gpu_comparison import Contender, Outcome
from harness import Timing

from fewshot_ext import reference

OPERATORS = (gpu_margin_softmax, gpu_emd, gpu_episode_finetune)
LARGE = "512,512,100000,bfloat16"
CPU = torch.device("cpu")


class Bench:
    """Without time to compile."""

    device, quick, seconds, rates = gpu_comparison.RehearsalOnCpu(), True, 0.0, {}

    def begin(self, *arguments, **settings):
        pass

    def left_out(self, *arguments):
        return None

    def remaining(self):
        return 0.0


def rows_of(times, common, floors):
    """Rows as the worker makes them, from made-up milliseconds: contender -> kind -> time, or a note."""
    outcomes = []
    for name, known in times.items():
        outcome = Outcome(Contender(name, variant=-0.3))
        if isinstance(known, str):
            outcome.notes.append(known)
        else:
            outcome.error, outcome.memory = 1e-3, 3 << 20
            outcome.timings = {kind: Timing(0.9 * time, time, 1.2 * time, 9) for kind, time in known.items()}
        outcomes.append(outcome)
    return list(gpu_comparison.rows_of(outcomes, "fewshot_ext", {**common, "input_sets": 2}, floors))


def of_margin_softmax(job, times, rates=True):
    case, dtype = gpu_margin_softmax.parse(job)
    rates = {"copy_gb_per_s": 3000.0, f"{dtype}_tflop_per_s": 500.0} if rates else {}
    floors = gpu_margin_softmax.floor_columns(case, dtype, 0.25, rates)
    return rows_of(times, {"case": gpu_margin_softmax.title(job)}, floors)


def of_emd(job, times, rates=True):
    common = {"case": gpu_emd.title(job), "problems": gpu_emd.parse(job)[1], "pivots": "21.8"}
    floor = gpu_comparison.copy_ms(gpu_emd.bytes_moved(job), {"copy_gb_per_s": 3000.0} if rates else {})
    return rows_of(times, common, {"floor_ms": floor})


def of_finetuning(times, floor=0.25):
    names = gpu_episode_finetune.OURS, gpu_episode_finetune.PLAIN, gpu_episode_finetune.COMPILED
    known = [{"graph": time, "stream": time} if time else "broken" for time in times]
    case = gpu_episode_finetune.title(gpu_episode_finetune.GOAL_JOB)
    return rows_of(dict(zip(names, known, strict=True)), {"case": case}, {"floor_ms": floor})


@pytest.mark.parametrize(
    "operator, first",
    (
        (gpu_margin_softmax, ["256,512,64,float32", "256,640,351,float32", LARGE, gpu_margin_softmax.LARGEST]),
        (gpu_emd, ["deepemd,375,25", "deepemd,100000,25"]),
        (gpu_episode_finetune, ["5,512"]),
    ),
)
def test_jobs_with_goals_come_first(operator, first):
    jobs = operator.jobs(quick=False)
    assert jobs[: len(first)] == first
    assert len(jobs) == len(set(jobs)) == len({operator.title(job) for job in jobs})
    assert operator.jobs(quick=True)


def test_every_size_of_the_margin_softmax_is_measured_in_every_dtype():
    assert len(gpu_margin_softmax.jobs(quick=False)) == 5 * len(gpu_comparison.DTYPES) + 1
    assert gpu_margin_softmax.TOLERANCE.keys() == gpu_comparison.DTYPES.keys()


def margin_softmax_inputs():
    case = gpu_margin_softmax.Case(6, 5, 7)
    return gpu_margin_softmax.Inputs(case, torch.float32, CPU, torch.Generator().manual_seed(0))


EMD_JOB = "uniform,4,5"


@pytest.mark.parametrize(
    "make, variant, function",
    (
        (margin_softmax_inputs, gpu_margin_softmax.MARGIN, gpu_margin_softmax.ours),
        *(
            (lambda: gpu_emd.Inputs(EMD_JOB, CPU, 0), None, solver)
            for solver in (gpu_emd.ours, gpu_emd.forward, gpu_emd.on_host, gpu_emd.pot)
        ),
    ),
)
def test_results_are_right_and_in_fresh_memory(make, variant, function):
    if function is gpu_emd.pot:
        pytest.importorskip("ot")
    given = make()
    first, second = given.run(function), given.run(function)
    for result, again, exact in zip(first, second, given.exact(variant), strict=True):
        torch.testing.assert_close(result.double(), exact, rtol=1e-4, atol=1e-5)
        assert result.data_ptr() != again.data_ptr() and not result.requires_grad


def test_sets_of_inputs_differ():
    first, second = (gpu_emd.Inputs(EMD_JOB, CPU, seed).problem[0] for seed in (0, 1))
    assert not torch.equal(first, second)


def test_peers_without_margin_get_normalized_inputs_times_the_scale():
    given = margin_softmax_inputs()

    def of(module):
        return lambda x, weight, target: module.nn.functional.cross_entropy(x @ weight.T, target)

    peer = gpu_margin_softmax.without_margin("peer", "torch", of)
    for result, exact in zip(given.run(peer.function), given.exact(peer.variant), strict=True):
        torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=1e-6)


def test_what_the_peers_of_fine_tuning_compute_is_the_loop_of_torch_sgd():
    inputs = gpu_episode_finetune.Inputs("1,16", True, CPU, torch.Generator().manual_seed(0))
    double = [x.double() if x.is_floating_point() else x for x in inputs.tensors]
    expected = reference.finetune_episodes(*double[:3], weight=double[3], order=double[4])
    torch.testing.assert_close(inputs.exact(None)[0], expected, rtol=1e-10, atol=1e-12)
    for function in (gpu_episode_finetune.ours, batched):
        torch.testing.assert_close(inputs.run(function)[0].double(), expected, rtol=1e-4, atol=1e-6)


def named(contenders):
    return {contender.name: contender for contender in contenders}


def of_sizes(samples, dimensions, classes, dtype="bfloat16", device="cuda"):
    case = gpu_margin_softmax.Case(samples, dimensions, classes)
    return named(gpu_margin_softmax.contenders(case, dtype, device))


def test_both_kernels_are_forced_where_either_may_be_the_faster():
    few, many = of_sizes(256, 512, 1000), of_sizes(512, 512, 20_000)
    one_pass = gpu_margin_softmax.ONE_PASS, "one_pass"
    for name, value in ((gpu_margin_softmax.ONE_LAUNCH, "one_launch"), one_pass):
        assert few[name].environment == {"FEWSHOT_EXT_MARGIN_SOFTMAX_KERNEL": value}
    for name, value in (one_pass, (gpu_margin_softmax.CHUNKED, "chunked")):
        assert many[name].environment == {"FEWSHOT_EXT_MARGIN_SOFTMAX_KERNEL": value}
    assert gpu_margin_softmax.ONE_LAUNCH not in many
    assert gpu_margin_softmax.LIGER_16 in many  # only there are the logits larger than the features
    found = named(gpu_episode_finetune.contenders("cuda"))
    for name, form in ((gpu_episode_finetune.SPAN, "span"), (gpu_episode_finetune.DIRECT, "direct")):
        assert found[name].environment == {"FEWSHOT_EXT_EPISODE_FINETUNE_FORM": form}


def test_a_rehearsal_times_nothing_twice():
    assert gpu_margin_softmax.ONE_LAUNCH not in of_sizes(256, 512, 1000, device="cpu")
    assert gpu_emd.HOST not in named(gpu_emd.contenders(EMD_JOB, "cpu"))
    assert gpu_episode_finetune.SPAN not in named(gpu_episode_finetune.contenders("cpu"))


def test_peers_that_are_missing_say_why(monkeypatch):
    for module in ("cut_cross_entropy", "liger_kernel", "liger_kernel.ops.fused_linear_cross_entropy", "ot"):
        monkeypatch.setitem(sys.modules, module, None)
    for module in ("liger_kernel.ops.cutedsl.ops", "quack", "quack.linear_cross_entropy", "torch_linear_assignment"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    found = of_sizes(256, 512, 1000)
    assert "cut_cross_entropy" in found[gpu_margin_softmax.CCE].missing
    assert "liger_kernel" in found[gpu_margin_softmax.LIGER].missing == found[gpu_margin_softmax.LIGER_16].missing
    assert "2.13 is the first" in found[gpu_margin_softmax.TORCH_LINEAR].missing
    assert "quack" in found[gpu_margin_softmax.QUACK].missing
    assert "liger_kernel" in found[gpu_margin_softmax.LIGER_CUTEDSL].missing
    assert not found[gpu_margin_softmax.OURS].missing and not found[gpu_margin_softmax.EAGER].missing
    found = named(gpu_emd.contenders("assignment,4,5", "cuda"))
    assert "ot" in found[gpu_emd.POT].missing == found[gpu_emd.POT_BATCH].missing
    assert "torch_linear_assignment" in found[gpu_emd.ASSIGNMENT].missing


def test_peers_that_a_problem_does_not_suit_say_why():
    found = of_sizes(256, 512, 1000, "tf32")
    assert found[gpu_margin_softmax.CCE].missing == "its backward pass takes bfloat16 and float16 alone"
    assert found[gpu_margin_softmax.QUACK].missing == "its products take bfloat16 and float16 alone"
    assert found[gpu_margin_softmax.LIGER_CUTEDSL].missing == "it takes bfloat16 alone"
    found = named(gpu_emd.contenders(gpu_emd.BATCH_OF_25, "cuda"))
    assert found[gpu_emd.POT].missing == "one call takes seconds beyond 1000 problems"
    assert found[gpu_emd.POT_BATCH].missing == found[gpu_emd.POT].missing
    on_cpu = named(gpu_emd.contenders(gpu_emd.EPISODE_OF_25, "cpu"))[gpu_emd.POT_BATCH]
    assert on_cpu.missing == "one call takes seconds beyond 10000 costs on a CPU"
    assert found[gpu_emd.ASSIGNMENT].missing == "it takes equal masses alone"


def installed(monkeypatch, name, **functions):
    """A package with stand-ins for these functions."""
    for part in range(name.count(".") + 1):
        monkeypatch.setitem(sys.modules, ".".join(name.split(".")[: part + 1]), types.SimpleNamespace(**functions))


def test_peers_by_cute_dsl_are_called_as_they_ask(monkeypatch):
    def losses(features, weight, target):
        return torch.nn.functional.cross_entropy(features @ weight.T, target, reduction="none")

    function = types.SimpleNamespace(apply=losses)  # a loss a sample
    installed(monkeypatch, "liger_kernel.ops.cutedsl.ops", LigerFusedScaledCrossEntropySM90Function=function)
    mean = {"chunked_linear_cross_entropy": lambda x, weight, target: losses(x, weight, target).mean()}
    installed(monkeypatch, "quack.linear_cross_entropy", **mean)
    given = margin_softmax_inputs()
    found = of_sizes(6, 5, 7, "bfloat16")
    for name in (gpu_margin_softmax.LIGER_CUTEDSL, gpu_margin_softmax.QUACK):
        for result, exact in zip(given.run(found[name].function), given.exact(found[name].variant), strict=True):
            torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=1e-6)
        assert found[name].compiles


def test_an_assignment_is_the_flow_of_equal_masses(monkeypatch):
    def batch_linear_assignment(cost):
        optimize = pytest.importorskip("scipy.optimize")
        return torch.stack([torch.as_tensor(optimize.linear_sum_assignment(one)[1]) for one in cost.numpy()])

    installed(monkeypatch, "torch_linear_assignment", batch_linear_assignment=batch_linear_assignment)
    given = gpu_emd.Inputs("assignment,4,5", CPU, 0)
    solver = named(gpu_emd.contenders("assignment,4,5", "cuda"))[gpu_emd.ASSIGNMENT].function
    for result, exact in zip(given.run(solver), given.exact(None), strict=True):
        torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=1e-6)


def test_the_batch_solver_of_pot_is_timed_with_its_error_beside():
    pytest.importorskip("ot")
    rows = [row for row in gpu_emd.measure(EMD_JOB, Bench()) if row["contender"] == gpu_emd.POT_BATCH]
    assert [row["timing"] for row in rows] == ["stream", "host"]
    assert float(rows[0]["p50_ms"]) > 0 and gpu_emd.TOLERANCE < float(rows[0]["relative_error"]) < 1


def test_the_largest_case_is_left_out_with_a_word_where_its_reference_does_not_fit(monkeypatch):
    monkeypatch.setattr(Bench.device, "memory", 40 << 30)
    (row,) = gpu_margin_softmax.measure(gpu_margin_softmax.LARGEST, Bench())
    assert row["note"] == "the float64 reference takes 60 GiB" and row["timing"] == ""
    assert "every contender" in table(gpu_margin_softmax, [row])


def test_a_peer_that_breaks_at_import_is_missing_too(monkeypatch):
    class Breaks:
        def __getattr__(self, name):
            raise RuntimeError("0 active drivers")

    monkeypatch.setitem(sys.modules, "cut_cross_entropy", Breaks())
    assert of_sizes(256, 512, 1000)[gpu_margin_softmax.CCE].missing == "RuntimeError: 0 active drivers"


def test_settings_of_liger_find_their_place_among_its_arguments(monkeypatch):
    def forward(ctx, _input, weight, target, bias=None, reduction="mean", chunk_mem_const=1):
        assert bias is None and reduction == "mean"
        return _input.sum() * 0 + chunk_mem_const, None

    function = type("Function", (torch.autograd.Function,), {"forward": staticmethod(forward)})
    module = types.SimpleNamespace(LigerFusedLinearCrossEntropyFunction=function)
    monkeypatch.setitem(sys.modules, "liger_kernel", types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, "liger_kernel.ops.fused_linear_cross_entropy", module)
    given = margin_softmax_inputs()
    found = of_sizes(6, 5, 7)
    for name, expected in ((gpu_margin_softmax.LIGER, 1.0), (gpu_margin_softmax.LIGER_16, 16.0)):
        with torch.no_grad():
            assert float(found[name].function(given.features, given.weight, given.target)) == expected
        assert found[name].waits and found[name].variant == 0.0
    with pytest.raises(TypeError, match="this version takes no chunks"):
        gpu_margin_softmax.liger(module, chunks=3)


def test_products_are_those_of_the_case_in_either_layout():
    case = gpu_margin_softmax.Case(6, 5, 7)
    sets = [margin_softmax_inputs(), margin_softmax_inputs()]
    found = gpu_margin_softmax.products(case, sets, torch.Generator().manual_seed(0))
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


def test_the_floor_takes_each_product_in_its_better_layout():
    times = {"logits, rows": 3, "logits, columns": 2, "features, rows": 1, "features, columns": 4, "weight, rows": 5}
    timings = {name: Timing(0.9 * time, time, 1.2 * time, 9) for name, time in times.items()}
    assert gpu_margin_softmax.time_of_products(timings) == 2 + 1 + 5


def test_the_floor_is_the_larger_of_arithmetic_and_traffic():
    case = gpu_margin_softmax.Case(512, 512, 100_000)
    rates = {"copy_gb_per_s": 1000.0, "bfloat16_tflop_per_s": 100.0}
    floors = gpu_margin_softmax.floor_columns(case, "bfloat16", 0.1, rates)
    moved = 2 * (512 + 100_000) * 512 * 2 + 8 * 512
    assert floors["copy_ms"] == pytest.approx(moved / 1e9)
    assert floors["square_gemm_ms"] == pytest.approx(6 * 512 * 512 * 100_000 / 100e12 * 1e3)
    assert floors["floor_ms"] == floors["copy_ms"] > floors["gemm_ms"] == 0.1
    assert gpu_margin_softmax.floor_columns(case, "bfloat16", 0.1, {}) == {"gemm_ms": 0.1, "floor_ms": 0.1}


def test_floors_of_traffic_count_every_tensor_once():
    assert gpu_emd.bytes_moved("uniform,10,3") == 4 * 10 * (9 + 6 + 1 + 9 + 6 + 5 + 1)
    assert gpu_comparison.copy_ms(1480, {"copy_gb_per_s": 1.0}) == pytest.approx(1480e-6)
    inputs = gpu_episode_finetune.Inputs("1,16", True, CPU, torch.Generator().manual_seed(0))
    support, target, query, weight, order = inputs.tensors
    floats = support.numel() + query.numel() + weight.numel() + query.shape[0] * query.shape[1] * 5
    assert inputs.nbytes() == 4 * floats + 8 * (target.numel() + order.numel())


def test_a_row_for_each_kind_of_timing_and_one_for_what_was_not_timed():
    cce, liger = gpu_margin_softmax.CCE, gpu_margin_softmax.LIGER
    times = {"fewshot_ext": {"graph": 0.5, "stream": 0.6}, cce: {"stream": 1.2}, liger: "missing"}
    rows = of_margin_softmax(LARGE, times)
    assert [(row["contender"], row["timing"]) for row in rows] == [
        ("fewshot_ext", "graph"),
        ("fewshot_ext", "stream"),
        (cce, "stream"),
        (liger, ""),
    ]
    assert rows[0] | {"p20_ms": "0.45000", "p50_ms": "0.50000", "p80_ms": "0.60000", "times_floor": "2.000"} == rows[0]
    assert rows[2]["times_fewshot_ext"] == "2.000" and rows[2]["extra_memory_mib"] == "3.0"
    assert rows[3]["p50_ms"] == "" and rows[3]["note"] == "missing"
    assert len({tuple(row) for row in rows}) == 1  # every row has every column


def table(operator, rows):
    return gpu_comparison.tables(rows, operator.caption)


def test_tables_have_a_line_for_each_contender_and_tell_of_the_floors():
    cce, liger = gpu_margin_softmax.CCE, gpu_margin_softmax.LIGER
    times = {"fewshot_ext": {"graph": 0.5, "stream": 0.6, "host": 0.1}, cce: {"stream": 1.2}, liger: "a|b"}
    text = table(gpu_margin_softmax, of_margin_softmax(LARGE, times))
    assert "### 512, 512, 100000 in bfloat16" in text
    assert "| fewshot_ext | 500 | 450 - 600 | 2.000 | 600 | 540 - 720 | 100 | 3.0 | 1.0e-03 |  |" in text
    assert f"| {cce} |  |  |  | 1200 | 1080 - 1440 |  | 3.0 | 1.0e-03 |  |" in text
    assert f"| {liger} |  |  |  |  |  |  |  |  | a\\|b |" in text
    assert "its three matrix products 250" in text
    without = table(gpu_margin_softmax, of_margin_softmax(LARGE, times, rates=False))
    assert "its least traffic not measured" in without

    times = {"fewshot_ext": {"graph": 0.08}, gpu_emd.FORWARD: {"graph": 0.05}}
    text = table(gpu_emd, of_emd(gpu_emd.EPISODE_OF_25, times))
    assert "### 375 problems of 25 x 25, deepemd data" in text
    assert "21.8 pivots a problem; floor 0.700 us. 7.50 million problems a second, forward alone." in text
    assert "floor not measured" in table(gpu_emd, of_emd(gpu_emd.EPISODE_OF_25, times, rates=False))

    text = table(gpu_episode_finetune, of_finetuning((0.5, 2.0, None)))
    assert "### 5-way 5-shot, D = 512\n\nFloor 250 us." in text and "| broken |" in text
    assert "Floor not measured." in table(gpu_episode_finetune, of_finetuning((0.5, 2.0, None), floor=0.0))


def verdicts(operator, rows):
    """Of the goals that were measured."""
    return {goal.goal: goal.met for goal in operator.goals(rows) if goal.met is not None}


@pytest.mark.parametrize("operator, goals", list(zip(OPERATORS, (18, 3, 3), strict=True)))
def test_goals_that_nobody_measured_are_not_measured(operator, goals):
    assert [(goal.measured, goal.met) for goal in operator.goals([])] == [("", None)] * goals


@pytest.mark.parametrize(
    "time, met", ((0.0099, (True, True)), (0.0101, (True, False)), (0.025, (True, False)), (0.0251, (False, False)))
)
def test_goals_of_few_shot_sizes(time, met):
    rows = of_margin_softmax("256,512,64,float32", {"fewshot_ext": {"graph": time, "stream": 0.1, "host": 0.061}})
    case = "256, 512, 64 in float32"
    assert verdicts(gpu_margin_softmax, rows) == {
        f"{case}: at most 25 us in a CUDA graph": met[0],
        f"{case}: at most 10 us in a CUDA graph": met[1],
        f"{case}: at most 60 us of the host's time": False,
    }
    assert gpu_margin_softmax.goals(rows)[0].measured == f"{1e3 * time:.1f} us"


@pytest.mark.parametrize("time, met", ((0.4, (True, True)), (0.5, (True, False)), (0.51, (False, False))))
def test_goals_of_many_classes(time, met):
    rows = of_margin_softmax(LARGE, {"fewshot_ext": {"graph": time}})
    found = {goal.goal: goal for goal in gpu_margin_softmax.goals(rows) if goal.met is not None}
    floor, absolute = found.values()
    assert (floor.met, absolute.met) == met
    assert floor.measured.startswith(f"{time / 0.25:.2f} times; ")
    assert "at the rate of a large square product" in floor.measured
    assert absolute.goal == "512, 512, 100000 in bfloat16: at most 0.4 ms in a CUDA graph"


def test_goals_against_peers_compare_plain_calls_with_the_best_variant():
    times = {
        "fewshot_ext": {"stream": 0.6},
        gpu_margin_softmax.CCE: {"stream": 0.7},
        gpu_margin_softmax.LIGER: {"stream": 2.0},
        gpu_margin_softmax.LIGER_16: {"stream": 0.5},
        gpu_margin_softmax.LIGER_CUTEDSL: {"stream": 0.4},
        gpu_margin_softmax.QUACK: {"stream": 0.8},
        gpu_margin_softmax.TORCH_LINEAR: "torch 2.11 has none",
    }
    rows = of_margin_softmax(LARGE, times)
    found = verdicts(gpu_margin_softmax, rows)
    assert {goal.partition("ahead of ")[2].partition(" (no")[0]: met for goal, met in found.items()} == {
        "cut-cross-entropy": True,
        "liger-kernel": False,
        "liger-kernel, cutedsl": False,
        "QuACK": True,
    }
    assert "600.0 us against 500.0 us" in {goal.measured for goal in gpu_margin_softmax.goals(rows)}


@pytest.mark.parametrize("time, met", ((0.035, [True, True]), (0.06, [True, False]), (0.061, [False, False])))
def test_goals_of_an_episode(time, met):
    rows = of_emd(gpu_emd.EPISODE_OF_25, {"fewshot_ext": {}, gpu_emd.FORWARD: {"graph": time}})
    assert list(verdicts(gpu_emd, rows).values()) == met
    assert gpu_emd.goals(rows)[0].measured == f"{1e3 * time:.1f} us"


@pytest.mark.parametrize("time, met", ((19.9, True), (20.1, False)))
def test_goal_of_a_long_batch(time, met):
    rows = of_emd(gpu_emd.BATCH_OF_25, {"fewshot_ext": {}, gpu_emd.FORWARD: {"graph": time}})
    assert list(verdicts(gpu_emd, rows).values()) == [met]


@pytest.mark.parametrize(
    "times, met",
    (
        ((0.5, 2.0, 3.0), [True, True, True]),
        ((1.6, 2.0, None), [True, False, True]),
        ((6.0, 2.0, None), [False, False, False]),
        ((None, 2.0, 3.0), []),
    ),
)
def test_goals_of_fine_tuning(times, met):
    assert list(verdicts(gpu_episode_finetune, of_finetuning(times)).values()) == met


@pytest.mark.parametrize(
    "operator, job, contenders",
    (
        (gpu_margin_softmax, "12,8,20,tf32", (gpu_margin_softmax.OURS, gpu_margin_softmax.EAGER)),
        (gpu_emd, EMD_JOB, (gpu_emd.OURS, gpu_emd.FORWARD)),
        (gpu_episode_finetune, "1,16", (gpu_episode_finetune.OURS, gpu_episode_finetune.PLAIN)),
    ),
)
def test_a_whole_job_on_the_rehearsal_device(operator, job, contenders, one_thread):
    precision = torch.get_float32_matmul_precision()
    rows = operator.measure(job, Bench())
    assert {row["timing"] for row in rows} == {"stream", "host", ""}
    rows = {row["contender"]: row for row in rows if row["timing"] != "host"}
    torch.set_float32_matmul_precision(precision)
    for name in contenders:
        assert rows[name]["note"] == "" and float(rows[name]["p50_ms"]) > 0
        assert float(rows[name]["relative_error"]) < 1e-5
        assert rows[name]["case"] == operator.title(job)
        assert bool(rows[name]["times_floor"]) is (operator is gpu_margin_softmax)  # whose products were measured
    if operator is gpu_margin_softmax:
        assert rows[gpu_margin_softmax.COMPILED]["note"] == "not compiled: no time left"
        assert float(rows[gpu_margin_softmax.OURS]["gemm_ms"]) > 0
