"""What the margin softmax losses promise, for the contract tests."""

import math
from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

import fewshot_ext
from fewshot_ext import reference

from .contract import BadInput, Bounds, OperatorCase, Problem, entry, option, replaced
from .layouts import LAYOUTS, with_layout

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
NORM_FLOOR = 1e-12  # of torch.nn.functional.normalize
REFERENCE_UNIT = torch.finfo(torch.float64).eps / 2

# Around the widths of vectors (4 to 16) and register tiles (6, 14), and larger ones that no block divides.
SAMPLES = (1, 2, 7, 16, 33, 129)
CLASSES = (2, 3, 5, 14, 17, 64, 151)
DIMENSIONS = (1, 3, 8, 31, 64, 129, 372)
SPECIAL_ROWS = ("zero rows", "tiny rows", "large rows", "ties", "expanded")


def draw(
    samples: int,
    classes: int,
    dimensions: int,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    **options,
) -> Problem:
    """A standard normal problem."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "features": torch.randn(samples, dimensions, generator=generator, dtype=torch.float64).to(dtype),
        "weight": torch.randn(classes, dimensions, generator=generator, dtype=torch.float64).to(dtype),
        "target": torch.randint(classes, (samples,), generator=generator),
    }
    return Problem(tensors, options)


def with_special_rows(matrix: Tensor, kind: str, cosine: bool) -> Tensor:
    if kind == "zero rows":
        matrix[:: 1 + len(matrix) // 2] = 0
    elif kind == "tiny rows":  # just below the norm's floor, where the dtype reaches that far
        matrix[::2] *= 0.5 * NORM_FLOOR / matrix[::2].norm(dim=1, keepdim=True)
    elif kind == "large rows":
        # Within float16, and for inner products within logits that leave something to compare.
        matrix[::2] *= 1e3 if cosine else 10
    elif kind == "ties":
        matrix[1:] = matrix[:1]
    elif kind == "expanded":
        return matrix[:1].expand_as(matrix)
    return matrix


def _problems(cosine: bool):
    rows = st.sampled_from(("plain", *SPECIAL_ROWS))
    layout = st.sampled_from(LAYOUTS)

    @st.composite
    def problems(drawn, dtype: torch.dtype) -> Problem:
        classes = drawn(st.sampled_from(CLASSES))
        problem = draw(
            drawn(st.sampled_from(SAMPLES)),
            classes,
            drawn(st.sampled_from(DIMENSIONS)),
            seed=drawn(st.integers(0, 2**32)),
            margin=drawn(st.sampled_from((-1.0, -0.3, 0.0, 0.3, 1.0)) | st.floats(-2, 2)),
            scale=drawn(st.sampled_from((1.0, 5.0, 30.0, 64.0)) | st.floats(0.1, 64)),
            reduction=drawn(st.sampled_from(tuple(REDUCTIONS))),
            label_smoothing=drawn(st.sampled_from((0.0, 0.0, 0.1, 1.0))),
            # A label that occurs, one that does not, and torch's default.
            ignore_index=drawn(st.sampled_from((-100, -1, 0, classes - 1))),
            return_prediction=drawn(st.booleans()),
        )
        if drawn(st.booleans()) and problem.options["ignore_index"] < 0:
            problem.tensors["target"][::3] = problem.options["ignore_index"]
        tensors = {}
        for name, tensor in problem.tensors.items():
            if tensor.is_floating_point():
                tensor = with_special_rows(tensor, drawn(rows), cosine).to(dtype)
            # An expanded tensor keeps its row stride of 0.
            strides = drawn(layout) if 0 not in tensor.stride() else "contiguous"
            tensors[name] = tensor if strides == "contiguous" else with_layout(tensor, strides)
        return Problem(tensors, problem.options)

    return problems


def logit_error(problem: Problem, cosine: bool) -> Tensor:
    """Bound [N] on the rounding error of each row's logits and of the log-sum-exp over them.

    A sum of n rounded terms is off by about sqrt(n) u times the sum of their magnitudes: the probabilistic
    bound of Higham and Mary, "A New Approach to Probabilistic Rounding Error Analysis" (2019), with their
    lambda = 4. The constant 8 stands for the few single operations around each sum.
    """
    features, weight = (problem.tensors[name].double() for name in ("features", "weight"))
    unit = _unit_roundoff(problem)
    norm_x, norm_w = features.norm(dim=1), weight.norm(dim=1)
    if cosine:
        norm_x, norm_w = norm_x / norm_x.clamp_min(NORM_FLOOR), norm_w / norm_w.clamp_min(NORM_FLOOR)
    scale, margin = problem.options.get("scale", 30.0), problem.options.get("margin", -0.3)
    logits = scale * norm_x * norm_w.max()
    classes, dimensions = weight.shape
    return unit * (logits * (4 * math.sqrt(dimensions) + 8) + 2 * scale * abs(margin) + 4 * math.sqrt(classes) + 8)


def _unit_roundoff(problem: Problem) -> float:
    """The operator's plus the reference's: the difference of the two has the errors of both."""
    return torch.finfo(_accumulate_dtype(problem)).eps / 2 + REFERENCE_UNIT


def _accumulate_dtype(problem: Problem) -> torch.dtype:
    return torch.float64 if problem.tensors["features"].dtype == torch.float64 else torch.float32


def row_upstream(problem: Problem, upstream: Tensor) -> Tensor:
    """The upstream gradient of each row's loss, 0 for ignored rows."""
    counted = problem.tensors["target"] != problem.options.get("ignore_index", -100)
    if problem.options.get("reduction", "mean") == "mean":
        upstream = upstream / counted.sum().clamp_min(1)
    return upstream.double().expand(counted.shape) * counted


def _bounds(cosine: bool):
    def bounds(problem: Problem, upstream: Sequence[Tensor], operand_error: float = 0.0) -> Bounds:
        """First-order error analysis of the loss and its gradients, started by the errors of the logits."""
        features, weight = (problem.tensors[name].double() for name in ("features", "weight"))
        target = problem.tensors["target"]
        scale, margin = problem.options["scale"], problem.options["margin"]
        smoothing = problem.options.get("label_smoothing", 0.0)
        unit = _unit_roundoff(problem)
        # Exponentials may vanish a little above the smallest normal number.
        tiny = 2 * torch.finfo(_accumulate_dtype(problem)).tiny
        classes = weight.shape[0]

        inverse_x, inverse_w = (
            1 / rows.norm(dim=1).clamp_min(NORM_FLOOR) if cosine else rows.new_ones(len(rows))
            for rows in (features, weight)
        )
        similarity = inverse_x[:, None] * (features @ weight.t()) * inverse_w
        is_target = target[:, None] == torch.arange(classes)
        logits = scale * (similarity - margin * is_target)
        # Twice: once for the logit, once for the log-sum-exp or the target that it is compared with.
        error = 2 * logit_error(problem, cosine)
        # The reference forms log p_y and p_y - 1 by subtraction: its error does not vanish with a tiny loss.
        cancellation = error * REFERENCE_UNIT / unit

        # L = softplus(gap) errs by that of the gap times the slope 1 - p_y: tiny losses keep their digits.
        others = logits.masked_fill(is_target, -math.inf).logsumexp(dim=1)
        gap = others - logits.masked_fill(~is_target, -math.inf).amax(dim=1)
        off_target = torch.sigmoid(gap)
        slope = (off_target * error.exp()).clamp_max(1)
        softplus = torch.nn.functional.softplus(gap)
        rows = slope * error + 2 * unit * softplus + 4 * smoothing * error + cancellation + tiny
        weights = row_upstream(problem, torch.ones((), dtype=torch.float64))
        rows = rows.masked_fill(weights == 0, 0)
        loss = rows if problem.options.get("reduction", "mean") == "none" else (weights * rows).sum()

        # G = dL/ds, first its magnitude, then its error: p changes by the factor e^error, within [0, 1].
        share = torch.where(is_target, off_target[:, None], logits.softmax(dim=1))
        magnitude = share + smoothing * torch.where(is_target, 1.0, 1 / classes)
        spread = (share * error[:, None].expm1()).clamp_max(1) + is_target * cancellation[:, None] + tiny
        spread = spread + operand_error * magnitude
        factor = (scale * row_upstream(problem, upstream[0]).abs())[:, None]
        magnitude, spread = factor * magnitude, factor * spread

        def gradient_bound(rows, inverse_rows, others, inverse_others, magnitude, spread):
            # sum_j G_ij w_j / |w_j| / |x_i|, and for cosines the projection -(sum_j G_ij s_ij) x_i / |x_i|^2.
            terms = spread + unit * (4 * math.sqrt(len(others)) + 8) * magnitude
            bound = inverse_rows[:, None] * (terms @ (others.abs() * inverse_others[:, None]))
            if cosine:
                plain = inverse_rows[:, None] * (rows @ others.t()) * inverse_others
                similarity_error = unit * (4 * math.sqrt(rows.shape[1]) + 8)
                dot = (terms * plain.abs() + magnitude * similarity_error).sum(dim=1)
                bound = bound + (dot * inverse_rows**2)[:, None] * rows.abs()
            return bound

        gradients = {
            "features": gradient_bound(features, inverse_x, weight, inverse_w, magnitude, spread),
            "weight": gradient_bound(weight, inverse_w, features, inverse_x, magnitude.t(), spread.t()),
        }
        return Bounds((loss,), gradients)

    return bounds


def _check_prediction(cosine: bool):
    def check(problem: Problem, results: tuple[Tensor, ...]) -> None:
        """Every predicted class scores as high as the best, up to rounding."""
        if not problem.options.get("return_prediction"):
            return
        features, weight = (problem.tensors[name].double() for name in ("features", "weight"))
        if cosine:
            features, weight = (torch.nn.functional.normalize(rows, dim=1) for rows in (features, weight))
        scores = problem.options["scale"] * torch.nn.functional.linear(features, weight)
        predicted = scores.gather(1, results[1].cpu()[:, None])[:, 0]
        assert (predicted >= scores.amax(dim=1) - 2 * logit_error(problem, cosine)).all()

    return check


def _examples() -> tuple[Problem, ...]:
    plain = {"margin": -0.3, "scale": 5.0}
    ignored = draw(7, 4, 3, seed=1, reduction="mean", ignore_index=1, label_smoothing=0.1, **plain)
    return (
        draw(6, 5, 4, **plain),
        draw(6, 5, 4, reduction="none", return_prediction=True, **plain),
        draw(5, 3, 4, reduction="sum", return_prediction=True, margin=0.4, scale=3.0),
        ignored,
    )


def _overloads(cosine: bool):
    operators = torch.ops.fewshot_ext

    def overloads(problem: Problem):
        features, weight, target = (problem.tensors[name] for name in ("features", "weight", "target"))
        settings = (-0.3, 5.0, 0.1, 2, cosine, 0)
        calls = []
        for reduction, hints, prediction in (
            ("mean", (True, True), True),
            ("mean", (True, False), False),
            ("sum", (False, True), False),
            ("none", (False, False), True),
        ):
            arguments = (features, weight, target, *settings, REDUCTIONS[reduction], *hints, prediction)
            calls.append((operators.margin_softmax.default, arguments))
        constants = [tensor.detach() for tensor in (features, weight, target)]
        *_, statistics, _, _ = operators.margin_softmax(*constants, *settings, REDUCTIONS["none"], False, False, False)
        upstream = torch.linspace(-1, 1, len(features), dtype=statistics.dtype, device=statistics.device)
        for hints in ((True, True), (True, False), (False, True)):
            # Constants, because the backward operator refuses to be differentiated.
            arguments = (upstream, *constants, statistics, *settings, *hints)
            calls.append((operators.margin_softmax_backward.default, arguments))
        return calls

    return overloads


# For a float64 problem of 6 samples, 5 classes and 4 dimensions.
BAD_INPUTS = (
    BadInput(
        "label too high", entry("target", 2, 5), ValueError, "target: expected labels in [0, 5)", reads_values=True
    ),
    BadInput("label negative", entry("target", 2, -1), ValueError, "got -1 at index 2", reads_values=True),
    BadInput(
        "label too high, looked for",
        lambda t: {**entry("target", 2, 5)(t), "check": True},
        ValueError,
        "target: expected labels in [0, 5)",
    ),
    BadInput("check a number", option("check", 1), TypeError, "check: expected True or False"),
    BadInput(
        "features a list",
        lambda t: {"features": t["features"].tolist()},
        TypeError,
        "features: expected a tensor",
    ),
    BadInput(
        "features of rank 1",
        replaced("features", lambda x: x[0]),
        ValueError,
        "features: expected shape [N, D]",
    ),
    BadInput("features of rank 3", replaced("features", lambda x: x[None]), ValueError, "got [1, 6, 4]"),
    BadInput("weight of rank 1", replaced("weight", lambda w: w[0]), ValueError, "weight: expected shape [C, D]"),
    BadInput(
        "soft targets",
        replaced("target", lambda y: torch.nn.functional.one_hot(y.clamp(min=0), 5).float()),
        TypeError,
        "target: expected [N] int64 labels, got torch.float32 of shape [6, 5]: soft targets are not offered",
    ),
    BadInput("target of rank 2", replaced("target", lambda y: y[None]), ValueError, "target: expected shape [N]"),
    BadInput("widths differ", replaced("weight", lambda w: w[:, :3]), ValueError, "weight: expected shape [C, 4]"),
    BadInput("lengths differ", replaced("target", lambda y: y[:5]), ValueError, "target: expected shape [6]"),
    BadInput(
        "width 0",
        lambda t: {"features": t["features"][:, :0], "weight": t["weight"][:, :0]},
        ValueError,
        "features: expected at least one dimension",
    ),
    BadInput("one class", replaced("weight", lambda w: w[:1]), ValueError, "weight: expected at least 2 classes"),
    BadInput("integer features", replaced("features", lambda x: x.long()), TypeError, "features: expected dtype"),
    BadInput("complex weight", replaced("weight", lambda w: w.cfloat()), TypeError, "weight: expected dtype"),
    BadInput(
        "dtypes differ",
        replaced("weight", lambda w: w.float()),
        TypeError,
        "weight: expected dtype torch.float64",
    ),
    BadInput(
        "int32 target",
        replaced("target", lambda y: y.int()),
        TypeError,
        "target: expected dtype torch.int64",
    ),
    BadInput("devices differ", replaced("weight", lambda w: w.to("meta")), ValueError, "weight: expected device"),
    BadInput("NaN scale", option("scale", math.nan), ValueError, "scale: expected a finite number"),
    BadInput("zero scale", option("scale", 0.0), ValueError, "scale: expected a number above 0"),
    BadInput("infinite margin", option("margin", -math.inf), ValueError, "margin: expected a finite number"),
    BadInput("margin a string", option("margin", "0.3"), TypeError, "margin: expected a number, got str"),
    BadInput(
        "smoothing above 1",
        option("label_smoothing", 1.5),
        ValueError,
        "label_smoothing: expected a number in",
    ),
    BadInput(
        "fractional ignore_index",
        option("ignore_index", 1.5),
        TypeError,
        "ignore_index: expected an integer",
    ),
    BadInput("unknown reduction", option("reduction", "max"), ValueError, "none, mean, sum, got 'max'"),
    BadInput("reduction None", option("reduction", None), TypeError, "reduction: expected one of"),
    BadInput(
        "prediction flag",
        option("return_prediction", 1),
        TypeError,
        "return_prediction: expected True or False",
    ),
    BadInput(
        "no samples, mean",
        lambda t: {"features": t["features"][:0], "target": t["target"][:0]},
        ValueError,
        "features: got no samples (N = 0)",
    ),
)


def _case(name: str, cosine: bool) -> OperatorCase:
    return OperatorCase(
        name=name,
        function=getattr(fewshot_ext, name),
        reference=getattr(reference, name),
        differentiable=("features", "weight"),
        problems=_problems(cosine),
        bounds=_bounds(cosine),
        check_discrete=_check_prediction(cosine),
        examples=_examples(),
        large=draw(64, 200, 130, dtype=torch.float32, margin=-0.3, scale=10.0, return_prediction=True),
        empty=tuple(
            draw(0, 5, 4, margin=-0.3, scale=5.0, reduction=reduction, return_prediction=True)
            for reduction in ("sum", "none")
        ),
        overloads=_overloads(cosine),
        dynamic={"features": {0: "N"}, "weight": {0: "C"}, "target": {0: "N"}},
        bad_inputs=BAD_INPUTS,
        no_second_derivative="fewshot_ext.margin_softmax offers first derivatives only",
        batched=("features", "weight", "target"),
    )


margin_cosine = _case("margin_cosine_loss", cosine=True)
margin_softmax = _case("margin_softmax_loss", cosine=False)
