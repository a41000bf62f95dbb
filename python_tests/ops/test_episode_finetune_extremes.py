"""Episode fine-tuning by cosines of rows of any length."""

import math

import pytest
import torch
import torch.nn.functional as F

import fewshot_ext

from .contract import assert_within, on_backends
from .episode_finetune_case import draw, loop
from .episode_finetune_case import finetune as case
from .test_episode_finetune import FORM, FORMS, ON_A_GPU


@FORMS
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("share", (0.6, 0.97), ids=str)  # of the exponents that there are
@pytest.mark.parametrize("capability", ("baseline", "avx2", "avx512"))
def test_cosines_of_rows_of_any_length(form, dtype, share, capability, monkeypatch):
    """A power of two in support or query changes nothing; classifiers so long are moved by their decay alone."""
    monkeypatch.setenv(FORM, form)
    monkeypatch.setenv("FEWSHOT_EXT_CPU_CAPABILITY", capability)
    problem = draw(2, 3, 7, 6, 33, 3, dtype=dtype, lr=0.5, weight_decay=0.1)
    long = int(share * math.log2(torch.finfo(dtype).max))
    expected = loop(**problem.to(torch.float64).arguments())
    lengthened = {name: problem.tensors[name].clone() for name in ("support", "query")}
    for rows in lengthened.values():
        rows[:, ::2] = torch.ldexp(rows[:, ::2], torch.tensor(long))
    scores = fewshot_ext.finetune_episodes(**{**problem.arguments(), **lengthened})
    single = case.bounds(problem.to(torch.float32), (), 0.0).results[0]
    rounding = torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
    assert_within(scores, expected, 2 * rounding * single, "scores")

    problem.tensors["weight"] = torch.ldexp(problem.tensors["weight"], torch.tensor(long))
    query, weight = (
        F.normalize(torch.ldexp(problem.tensors[name].double(), torch.tensor(power)), dim=-1)
        for name, power in (("query", 0), ("weight", -long))
    )
    scores = fewshot_ext.finetune_episodes(**problem.arguments())
    torch.testing.assert_close(scores.double(), query @ weight.mT, rtol=0, atol=8 * torch.finfo(dtype).eps)


@FORMS
def test_classifiers_of_a_million_move_as_torch_has_them(form, monkeypatch):
    """Long enough to be shortened, short enough for large steps to move them."""
    monkeypatch.setenv(FORM, form)
    problem = draw(2, 3, 7, 6, 33, 3, lr=3e12, weight_decay=0.0)
    for dtype, size in ((torch.float32, 20), (torch.float64, 20), (torch.float64, 260)):
        given = problem.to(dtype)
        given.tensors["weight"] = torch.ldexp(given.tensors["weight"], torch.tensor(size + 1))
        given.options["lr"] = 3.0 * 4.0 ** (size + 1)
        expected = loop(**given.to(torch.float64).arguments())
        start = loop(**given.with_options(lr=0.0).to(torch.float64).arguments())
        assert (expected - start).abs().max() > 0.1
        found = fewshot_ext.finetune_episodes(**given.arguments())
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=200 * torch.finfo(dtype).eps)


@on_backends(ON_A_GPU)
@FORMS
def test_a_gpu_gives_no_number_for_queries_it_cannot_measure(backend, form, monkeypatch):
    monkeypatch.setenv(FORM, form)
    problem = draw(2, 3, 7, 6, 33, 1, dtype=torch.float32)
    problem.tensors["query"][1, 4] *= 1e25
    with backend.activate():
        scores = case.function(**problem.to(device=backend.device).arguments())
    assert scores.isnan().any(-1).nonzero().tolist() == [[1, 4]]
