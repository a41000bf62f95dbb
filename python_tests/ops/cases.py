"""The operators that the contract tests hold to the contract: a new one joins by an entry here."""

import pytest

from .coding_rate_case import coding_rate
from .contract import skip_if_missing
from .emd_case import emd
from .episode_finetune_case import finetune
from .margin_softmax_case import margin_cosine, margin_softmax

OPERATORS = (margin_cosine, margin_softmax, emd, finetune, coding_rate)


def each_operator(backends, operators=OPERATORS):
    """Runs a test for every operator on every backend; the report says why one is missing."""
    return pytest.mark.parametrize(
        "case, backend",
        [
            pytest.param(
                case, backend, id=f"{backend.name}-{case.name}", marks=skip_if_missing(case.missing_on(backend))
            )
            for case in operators
            for backend in case.backends(backends)
        ],
    )


def each_differentiable(backends):
    return each_operator(backends, tuple(case for case in OPERATORS if case.differentiable))
