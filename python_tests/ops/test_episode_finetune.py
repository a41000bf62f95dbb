"""What is particular to episode fine-tuning; test_contract.py has what every operator promises."""

import functools
import math

import pytest
import torch

import fewshot_ext
from fewshot_ext import reference

from .contract import BACKENDS, DEVICES, assert_equals_reference, assert_within, on_backends, threads
from .episode_finetune_case import BAD_INPUTS, NAMES, draw, loop
from .episode_finetune_case import finetune as case

FORM = "FEWSHOT_EXT_EPISODE_FINETUNE_FORM"
ON_ALL = on_backends([backend for backend in BACKENDS if case.missing_on(backend) == backend.missing])
ON_A_GPU = tuple(backend for backend in BACKENDS if backend.device == "cuda" or backend.name == "simt-one_launch")
FORMS = pytest.mark.parametrize("form", ("span", "direct"))
PROTOCOL = {"lr": 0.01, "momentum": 0.9, "dampening": 0.9, "weight_decay": 1e-3}


def protocol_like(way, support, dimensions, seed, margin, options):
    return draw(2, way, support, 5, dimensions, 4, seed=seed, dtype=torch.float32, margin=margin, **options)


@functools.cache
def solved(way, support, dimensions, seed, margin, options):
    """The loop's scores in float64, and the bound on what float32 may make of them."""
    problem = protocol_like(way, support, dimensions, seed, margin, dict(options))
    return loop(**problem.to(torch.float64).arguments()), case.bounds(problem, (), 0.0).results[0]


@ON_ALL
@FORMS
@pytest.mark.parametrize("similarity", ("cosine", "dot"))
@pytest.mark.parametrize(
    ("way", "support", "batch_size", "sgd"),
    [
        (5, 25, 4, PROTOCOL),
        (5, 5, 4, {**PROTOCOL, "lr": 0.5, "weight_decay": 0.1}),
        (5, 10, 10, {"lr": 0.1, "momentum": 0.5, "dampening": 0.0, "weight_decay": 0.0}),
        (3, 7, 1, {"lr": 0.1, "momentum": 0.0, "dampening": 0.9, "weight_decay": 1e-2}),
        (2, 1, 4, {"lr": 0.1, "momentum": 0.9, "dampening": -1.0, "weight_decay": 1e-2}),
        (9, 11, 6, {**PROTOCOL, "lr": 0.2}),
        (20, 20, 100, {**PROTOCOL, "lr": 0.2}),
    ],
    ids=str,
)
def test_each_form_is_the_loop_of_torch_sgd(backend, form, similarity, way, support, batch_size, sgd, monkeypatch):
    monkeypatch.setenv(FORM, form)
    options = {"similarity": similarity, "batch_size": batch_size, **sgd}
    for margin, dimensions, seed in ((0.0, 12, 0), (-0.3, 33, 1), (0.2, 1, 2)):
        problem = protocol_like(way, support, dimensions, seed, margin, options)
        expected, bound = solved(way, support, dimensions, seed, margin, tuple(options.items()))
        for dtype in (torch.float64, torch.float32):
            with backend.activate():
                scores = case.function(**problem.to(dtype, backend.device).arguments())
            rounding = torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
            assert_within(scores, expected, 2 * rounding * bound, "scores")


@FORMS
def test_each_instruction_set_has_both_forms(form, monkeypatch):
    """float64 scores agree far below what a wrong term would leave."""
    monkeypatch.setenv(FORM, form)
    problem = draw(3, 5, 25, 9, 70, 20)
    expected = loop(**problem.arguments())
    for capability in ("baseline", "avx2", "avx512"):
        monkeypatch.setenv("FEWSHOT_EXT_CPU_CAPABILITY", capability)
        torch.testing.assert_close(fewshot_ext.finetune_episodes(**problem.arguments()), expected, rtol=0, atol=1e-13)


@on_backends(DEVICES)
def test_the_whole_protocol_in_float32(backend):
    """700 steps of 5-way 5-shot: the rounding of float32 does not build up, no more than in torch's own loop."""
    assert_equals_reference(case, backend, draw(1, 5, 25, 16, 64, 100, dtype=torch.float32))


@FORMS
def test_settings_are_those_of_torch(form, monkeypatch):
    """Defaults of the operator are those of the protocol, and each setting changes the result."""
    monkeypatch.setenv(FORM, form)
    problem = draw(2, 5, 10, 4, 16, 6, lr=0.1)
    found = fewshot_ext.finetune_episodes(**problem.arguments())
    written_out = {**problem.arguments(), **PROTOCOL, "lr": 0.1, "scale": 5.0, "margin": 0.0, "batch_size": 4}
    torch.testing.assert_close(found, loop(**written_out))
    for name, value in {
        "scale": 6.0,
        "margin": 0.1,
        "batch_size": 3,
        "lr": 0.2,
        "momentum": 0.8,
        "dampening": 0.8,
        "weight_decay": 0.1,
        "similarity": "dot",
    }.items():
        changed = problem.with_options(**{name: value}).arguments()
        scores = fewshot_ext.finetune_episodes(**changed)
        torch.testing.assert_close(scores, loop(**changed))
        assert (scores - found).abs().max() > 1e-5, name


def test_zero_classifiers_start_as_normalize_has_them():
    problem = draw(2, 3, 6, 4, 16, 2)
    problem.tensors["weight"][:, 1] = 0
    for similarity in ("cosine", "dot"):
        arguments = {**problem.arguments(), "similarity": similarity}
        torch.testing.assert_close(fewshot_ext.finetune_episodes(**arguments), loop(**arguments))


def test_the_old_name_of_the_inner_product_is_taken_with_a_warning():
    arguments = draw(2, 3, 6, 4, 16, 2).arguments()
    with pytest.warns(DeprecationWarning, match="similarity: expected cosine or dot, got 'softmax', which means dot"):
        found = fewshot_ext.finetune_episodes(**{**arguments, "similarity": "softmax"})
    assert torch.equal(found, fewshot_ext.finetune_episodes(**{**arguments, "similarity": "dot"}))


@FORMS
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
def test_long_steps_along_short_classifiers(form, dtype, monkeypatch):
    """Where the gradient lies along w nothing moves, but coefficients in the span grow: it has to be given up."""
    monkeypatch.setenv(FORM, form)
    problem = draw(2, 5, 10, 5, 1, 8, dtype=dtype, lr=0.1, dampening=0.0, weight_decay=0.0)
    problem.tensors["weight"] = 0.02 * problem.tensors["weight"]
    assert_equals_reference(case, DEVICES[0], problem)


@FORMS
def test_supports_that_nearly_coincide(form, monkeypatch):
    """Gram matrices square the condition of their vectors: in float32 this one would have lost the difference."""
    monkeypatch.setenv(FORM, form)
    problem = draw(2, 5, 25, 9, 64, 20, dtype=torch.float32, lr=0.1)
    support = problem.tensors["support"]
    problem.tensors["support"] = support[:, :1] + 1e-3 * support
    problem.tensors["weight"] = problem.tensors["weight"] * 1e-3
    assert_equals_reference(case, DEVICES[0], problem)


def test_episodes_do_not_depend_on_each_other():
    problem = draw(7, 5, 10, 4, 16, 5, dtype=torch.float32)
    together = fewshot_ext.finetune_episodes(**problem.arguments())
    for episode in range(7):
        alone = {name: tensor[episode : episode + 1] for name, tensor in problem.tensors.items()}
        found = fewshot_ext.finetune_episodes(**alone, **problem.options)
        torch.testing.assert_close(found[0], together[episode], rtol=0, atol=0)


@pytest.mark.parametrize("count", (1, 2, 3))
def test_threads_change_nothing(count):
    problem = draw(50, 5, 10, 4, 16, 5, dtype=torch.float32)
    arguments = {name: tensor for name, tensor in problem.arguments().items() if name not in ("weight", "order")}
    found = []
    for threads_now in (1, count):
        with threads(threads_now):
            generator = torch.Generator().manual_seed(0)
            found.append(fewshot_ext.finetune_episodes(**arguments, way=5, generator=generator))
    assert torch.equal(*found)


class TestDraws:
    """Classifiers and orders that are not given."""

    @staticmethod
    def draws(episodes=50, way=5, dimensions=100, steps=20, support=25, seed=0, dtype=torch.float32, device="cpu"):
        features = torch.empty(episodes, support, dimensions, dtype=dtype, device=device)
        return torch.ops.fewshot_ext.draw_episodes(features, torch.tensor([seed]), way, steps)

    def test_classifiers_are_those_of_kaiming_uniform(self):
        weight, _ = self.draws()
        bound, count = 1 / math.sqrt(100), weight.numel()
        assert weight.shape == (50, 5, 100)
        assert 0.999 * bound < weight.max() < bound
        assert -bound < weight.min() < -0.999 * bound
        # Five standard deviations of the mean and of the mean square.
        assert abs(weight.double().mean()) < 5 * bound / math.sqrt(3 * count)
        assert abs((weight.double() ** 2).mean() / bound**2 - 1 / 3) < 5 * math.sqrt(4 / 45 / count)
        flat = weight.double().flatten() / bound
        for shift in (1, 2, 100, 500):  # the next number, the next class, the next episode
            assert abs((flat * flat.roll(shift)).mean()) < 5 / 3 / math.sqrt(count)
        assert len(weight.unique()) > 0.99 * count

    def test_orders_are_permutations_and_all_as_likely(self):
        _, order = self.draws(episodes=300, steps=40, support=4, dimensions=1)
        assert torch.equal(order.sort(-1).values, torch.arange(4).expand_as(order))
        codes = (order * torch.tensor([64, 16, 4, 1])).sum(-1)
        counts = codes.flatten().unique(return_counts=True)[1]
        assert len(counts) == 24
        expected = 300 * 40 / 24
        # Chi-squared with 23 degrees of freedom exceeds 60 once in 30,000 times.
        assert ((counts - expected) ** 2 / expected).sum() < 60
        # Neither passes nor episodes repeat each other.
        assert len({tuple(row.tolist()) for row in codes}) == 300
        assert len({tuple(row.tolist()) for row in codes.T}) == 40

    def test_a_long_order_is_a_permutation(self):
        _, order = self.draws(episodes=2, steps=3, support=3001, dimensions=1)
        assert torch.equal(order.sort(-1).values, torch.arange(3001).expand_as(order))

    def test_seeds_differ_and_dtypes_agree(self):
        weight, order = self.draws()
        for seed in (1, 2**40, 2**63 - 1):
            other_weight, other_order = self.draws(seed=seed)
            assert not torch.equal(other_weight, weight) and not torch.equal(other_order, order)
            assert abs((weight * other_weight).double().mean()) < 5 / 100 / 3 / math.sqrt(weight.numel())
        for dtype in (torch.bfloat16, torch.float16):
            assert torch.equal(self.draws(dtype=dtype)[0], weight)
        double, double_order = self.draws(dtype=torch.float64)
        torch.testing.assert_close(double.float(), weight, rtol=1e-6, atol=0)
        assert torch.equal(double_order, order)

    def test_generator_decides_and_gives_one_number_a_call(self):
        problem = draw(4, 5, 10, 3, 16, 3)
        arguments = {name: problem.tensors[name] for name in NAMES[:3]} | {"steps": 3, "way": 5}

        def call(seed, **others):
            return fewshot_ext.finetune_episodes(**arguments, generator=torch.Generator().manual_seed(seed), **others)

        first = call(0)
        assert first.shape == (4, 3, 5)
        assert torch.equal(first, call(0)) and not torch.equal(first, call(1))
        seed = torch.randint(2**63 - 1, (1,), generator=torch.Generator().manual_seed(0))
        weight, order = torch.ops.fewshot_ext.draw_episodes(arguments["support"], seed, 5, 3)
        assert torch.equal(first, fewshot_ext.finetune_episodes(**arguments, weight=weight, order=order))
        assert torch.equal(first, call(0, weight=weight)) and torch.equal(first, call(0, order=order))
        generator = torch.Generator().manual_seed(0)
        calls = [fewshot_ext.finetune_episodes(**arguments, generator=generator) for _ in range(2)]
        assert torch.equal(calls[0], first) and not torch.equal(calls[1], first)
        generator = torch.Generator().manual_seed(0)
        fewshot_ext.finetune_episodes(**arguments, weight=weight, order=order, generator=generator)
        assert torch.equal(generator.get_state(), torch.Generator().manual_seed(0).get_state())

    def test_torchs_own_generator_where_none_is_given(self):
        problem = draw(2, 3, 4, 3, 16, 3)
        arguments = {name: problem.tensors[name] for name in NAMES[:3]} | {"steps": 3, "way": 3}
        found = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            found.append(fewshot_ext.finetune_episodes(**arguments))
        assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])

    @pytest.mark.parametrize("change", ({"way": -1}, {"steps": -1}, {"seed": torch.zeros(2, dtype=torch.int64)}))
    def test_operator_refuses_what_it_cannot_draw(self, change):
        arguments = {"support": torch.zeros(2, 3, 4), "seed": torch.tensor([0]), "way": 2, "steps": 2} | change
        with pytest.raises(RuntimeError):
            torch.ops.fewshot_ext.draw_episodes(**arguments)

    def test_compiled_calls_draw_too(self):
        problem = draw(4, 3, 4, 3, 16, 3, dtype=torch.float32)
        arguments = {name: problem.tensors[name] for name in NAMES[:3]} | {"steps": 3, "way": 3}
        compiled = torch.compile(fewshot_ext.finetune_episodes, fullgraph=True, backend="aot_eager")
        found = compiled(**arguments)
        assert found.shape == (4, 3, 3) and found.isfinite().all()
        assert not torch.equal(found, compiled(**arguments))


def test_way_is_read_from_labels_or_classifiers():
    problem = draw(2, 4, 6, 3, 8, 2)
    problem.tensors["support_target"][0, 0] = 2
    given = {name: problem.tensors[name] for name in NAMES[:3]} | {"steps": 2}
    given["support_target"] = given["support_target"].clamp_max(2)
    assert fewshot_ext.finetune_episodes(**given).shape == (2, 3, 3)
    assert fewshot_ext.finetune_episodes(**given, way=7).shape == (2, 3, 7)
    assert fewshot_ext.finetune_episodes(**given, weight=problem.tensors["weight"]).shape == (2, 3, 4)
    with pytest.raises(ValueError, match="way: expected the number of classes, got None"):
        fewshot_ext.finetune_episodes(**{name: value[:0] for name, value in given.items() if name != "steps"}, steps=2)
    with pytest.raises(ValueError, match="way: expected the number of classes, got None"):
        fewshot_ext.finetune_episodes(
            **{name: value.to("meta") for name, value in given.items() if name != "steps"}, steps=2
        )
    one_class = {**given, "support_target": torch.zeros_like(given["support_target"])}
    with pytest.raises(ValueError, match="way: expected at least 2 classes, got 1"):
        fewshot_ext.finetune_episodes(**one_class)


def test_half_features_take_classifiers_in_float32():
    problem = draw(2, 3, 5, 4, 16, 3, dtype=torch.bfloat16)
    weight = problem.tensors["weight"].float() + 1e-4
    scores = fewshot_ext.finetune_episodes(**{**problem.arguments(), "weight": weight})
    exact = loop(**{**problem.to(torch.float64).arguments(), "weight": weight.double()})
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), exact, rtol=1e-5, atol=1e-5)


def test_scores_carry_no_gradient_and_say_so():
    problem = draw(2, 3, 5, 4, 16, 3)
    arguments = problem.arguments()
    support = arguments["support"].clone().requires_grad_()
    with torch.no_grad():
        scores = fewshot_ext.finetune_episodes(**{**arguments, "support": support})
    assert not scores.requires_grad
    assert torch.equal(scores, fewshot_ext.finetune_episodes(**{**arguments, "support": support.detach()}))

    def scores_of_support(x):
        return fewshot_ext.finetune_episodes(**{**arguments, "support": x}).sum()

    with pytest.raises(RuntimeError, match=r"support: .* offers no gradient"):
        torch.func.grad(scores_of_support)(support.detach())
    mapped = torch.func.vmap(scores_of_support)
    copies = torch.stack([support.detach()] * 2)
    for transformed in (
        torch.func.grad(lambda x: mapped(x).sum()),
        torch.func.jacrev(mapped),
        torch.func.vmap(torch.func.grad(scores_of_support)),
        lambda x: torch.func.vjp(mapped, x)[1](torch.ones(2)),
        lambda x: torch.func.jvp(mapped, (x,), (x,)),
    ):
        with pytest.raises(RuntimeError, match="offers no gradient"):
            transformed(copies)
    # The operator itself records the question and refuses to answer it.
    tensors = [arguments[name] for name in NAMES]
    scores = torch.ops.fewshot_ext.finetune_episodes(support, *tensors[1:], True, 5.0, 0.0, 2, 0.1, 0.9, 0.9, 0.0)
    with pytest.raises(RuntimeError, match="offers no gradient"):
        scores.sum().backward()
    assert support.grad is None


def test_first_bad_value_is_named():
    problem = draw(3, 3, 4, 2, 8, 2)
    target, order = problem.tensors["support_target"].clone(), problem.tensors["order"].clone()
    target[1, 2], target[2, 0], order[2, 1] = 5, -3, torch.tensor([0, 1, 1, 3])
    with pytest.raises(ValueError, match=r"support_target: expected labels in \[0, 3\), got 5 at \[1, 2\]"):
        fewshot_ext.finetune_episodes(**{**problem.arguments(), "support_target": target, "order": order})
    with pytest.raises(ValueError, match=r"order: .* 0 .. 3, got \[0, 1, 1, 3\] at \[2, 1\]"):
        fewshot_ext.finetune_episodes(**{**problem.arguments(), "order": order})


@pytest.mark.parametrize("bad", [bad for bad in BAD_INPUTS if bad.reads_values], ids=lambda bad: bad.name)
def test_kernel_refuses_values_that_compiled_code_did_not_check(bad):
    problem = case.examples[0]
    compiled = torch.compile(fewshot_ext.finetune_episodes, fullgraph=True, backend="eager")
    with pytest.raises(RuntimeError):
        compiled(**{**problem.arguments(), **bad.change(problem.tensors)})


@pytest.mark.parametrize(
    "change",
    (
        lambda t: {"support": t["support"][0]},
        lambda t: {"support": t["support"][:1]},
        lambda t: {"support_target": t["support_target"][:, 1:]},
        lambda t: {"support_target": t["support_target"].int()},
        lambda t: {"query": t["query"][..., 1:]},
        lambda t: {"query": t["query"].float()},
        lambda t: {"weight": t["weight"].float()},
        lambda t: {"weight": t["weight"][:, :1]},
        lambda t: {"order": t["order"][..., 1:]},
        lambda t: {"order": t["order"].int()},
        lambda t: {"support": t["support"].long(), "query": t["query"].long(), "weight": t["weight"].float()},
    ),
)
def test_kernel_refuses_what_would_read_foreign_memory(change):
    tensors = draw(3, 3, 4, 2, 8, 2).tensors
    with pytest.raises(RuntimeError):
        torch.ops.fewshot_ext.finetune_episodes(*{**tensors, **change(tensors)}.values(), True, 5, 0, 2, 0.1, 0, 0, 0)


def test_kernel_refuses_an_empty_batch():
    tensors = draw(3, 3, 4, 2, 8, 2).tensors
    with pytest.raises(RuntimeError, match="batch_size: expected at least 1"):
        torch.ops.fewshot_ext.finetune_episodes(*tensors.values(), True, 5.0, 0.0, 0, 0.1, 0.0, 0.0, 0.0)


@ON_ALL
@FORMS
def test_item_22_a_batch_size_near_the_largest_integer_is_the_whole_support_set(backend, form, monkeypatch):
    """The number of minibatches, rounded up, must not overflow: the scores were those of no training at all."""
    monkeypatch.setenv(FORM, form)
    problem = draw(2, 3, 7, 4, 8, 3, dtype=torch.float64).to(device=backend.device)
    with backend.activate():
        whole, huge = (
            case.function(**{**problem.arguments(), "batch_size": size}) for size in (7, torch.iinfo(torch.int64).max)
        )
    assert torch.equal(whole, huge)


@on_backends(ON_A_GPU)
@FORMS
@pytest.mark.parametrize("wrong", ("label 5", "label -1", "order beyond", "order below", "order twice"))
def test_bad_values_poison_their_episode(backend, form, wrong, monkeypatch):
    """No host looks at the values on a GPU unless asked to; the scores of their episode are not numbers."""
    monkeypatch.setenv(FORM, form)
    problem = draw(3, 5, 7, 4, 9, 3, dtype=torch.float32)
    name, _, value = wrong.partition(" ")
    if name == "label":
        problem.tensors["support_target"][1, 6] = int(value)
    else:
        problem.tensors["order"][1, 2, 3] = {"beyond": 2**40, "below": -1}.get(value, problem.tensors["order"][1, 2, 4])
    with backend.activate():
        scores = fewshot_ext.finetune_episodes(**problem.to(device=backend.device).arguments(), way=5)
    assert scores[1].isnan().all()
    assert scores[[0, 2]].isfinite().all()


@on_backends(ON_A_GPU)
def test_draws_are_those_of_the_cpu(backend):
    for dtype in (torch.float32, torch.float64):
        features = torch.empty(7, 13, 30, dtype=dtype)
        expected = torch.ops.fewshot_ext.draw_episodes(features, torch.tensor([2**62 + 5]), 3, 11)
        with backend.activate():
            found = torch.ops.fewshot_ext.draw_episodes(features.to(backend.device), torch.tensor([2**62 + 5]), 3, 11)
        for part, same in zip(found, expected, strict=True):
            assert torch.equal(part.cpu(), same)


@on_backends(ON_A_GPU)
@pytest.mark.parametrize("sizes", ((2, 64), (2, 65), (5, 62), (20, 20), (40, 33)), ids=str)
def test_supports_around_what_shared_memory_holds(backend, sizes):
    way, support = sizes
    assert_equals_reference(case, backend, draw(2, way, support, 3, 20, 2, dtype=torch.float32, batch_size=5))


@on_backends(ON_A_GPU)
def test_long_steps_are_given_up_on_a_gpu_too(backend):
    problem = draw(2, 5, 10, 5, 1, 8, lr=0.1, dampening=0.0, weight_decay=0.0)
    problem.tensors["weight"] = 0.02 * problem.tensors["weight"]
    assert_equals_reference(case, backend, problem)


class TestOnAGpu:
    """What only a GPU can show."""

    pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

    @staticmethod
    def arguments(**options):
        return draw(40, 5, 25, 16, 64, 5, dtype=torch.float32, **options).to(device="cuda").arguments()

    @pytest.mark.parametrize("drawn", (False, True))
    def test_the_host_does_not_wait(self, drawn):
        arguments = self.arguments()
        if drawn:
            arguments |= {"weight": None, "order": None, "way": 5}
        fewshot_ext.finetune_episodes(**arguments)
        torch.cuda.set_sync_debug_mode("error")
        try:
            fewshot_ext.finetune_episodes(**arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_graph_capture(self):
        arguments = self.arguments()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            fewshot_ext.finetune_episodes(**arguments)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = fewshot_ext.finetune_episodes(**arguments)
        for seed in (1, 2):
            for name, value in self.arguments(seed=seed).items():
                if isinstance(value, torch.Tensor):
                    arguments[name].copy_(value)
            graph.replay()
            assert torch.equal(captured, fewshot_ext.finetune_episodes(**arguments))

    def test_whole_calls_agree_with_the_cpu(self):
        arguments = self.arguments() | {"weight": None, "order": None, "way": 5}
        on_cpu = {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
        scores = [
            fewshot_ext.finetune_episodes(**given, generator=torch.Generator().manual_seed(0)).cpu()
            for given in (arguments, on_cpu)
        ]
        torch.testing.assert_close(*scores, rtol=1e-5, atol=1e-6)

    def test_generators_of_a_gpu_are_refused(self):
        with pytest.raises(ValueError, match="generator: expected one on the CPU, got one on cuda"):
            fewshot_ext.finetune_episodes(**self.arguments(), generator=torch.Generator("cuda"))


def test_unknown_form_is_refused(monkeypatch):
    monkeypatch.setenv(FORM, "dual")
    with pytest.raises(RuntimeError, match=f"{FORM}: expected span or direct, got dual"):
        fewshot_ext.finetune_episodes(**draw(2, 3, 4, 2, 8, 2).arguments())


def test_public_names():
    assert "finetune_episodes" in fewshot_ext.__all__
    assert "finetune_episodes" in reference.__all__
