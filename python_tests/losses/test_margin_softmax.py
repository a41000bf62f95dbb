"""Modules that own the weight of a margin softmax loss."""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fewshot_ext import (
    MarginCosineLoss,
    MarginSoftmaxLoss,
    margin_cosine_loss,
    margin_softmax_loss,
)

HEADS = pytest.mark.parametrize(
    "head_class, loss",
    ((MarginCosineLoss, margin_cosine_loss), (MarginSoftmaxLoss, margin_softmax_loss)),
    ids=("cosine", "softmax"),
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def samples(count=8, dimensions=6, classes=5, dtype=None):
    return torch.randn(count, dimensions, dtype=dtype), torch.randint(classes, (count,))


@HEADS
def test_loss_is_that_of_the_function(head_class, loss):
    options = {"margin": 0.2, "scale": 7.0, "reduction": "sum", "ignore_index": 1, "label_smoothing": 0.1}
    head = head_class(6, 5, **options)
    features, target = samples()
    assert torch.equal(head(features, target), loss(features, head.weight, target, **options))
    found, prediction = head(features, target, return_prediction=True)
    assert torch.equal(found, head(features, target))
    assert torch.equal(prediction, head.scores(features).argmax(dim=1))


@HEADS
def test_defaults_are_those_of_the_function(head_class, loss):
    head = head_class(6, 5)
    features, target = samples()
    assert torch.equal(head(features, target), loss(features, head.weight, target))


def test_scores_have_neither_margin_nor_scale():
    features, _ = samples()
    cosine, product = MarginCosineLoss(6, 5), MarginSoftmaxLoss(6, 5)
    expected = F.cosine_similarity(features[:, None], cosine.weight[None], dim=2)
    torch.testing.assert_close(cosine.scores(features), expected)
    torch.testing.assert_close(product.scores(features), features @ product.weight.t())
    # Support and query features come in batches of episodes.
    batched = features.view(2, 4, 6)
    torch.testing.assert_close(cosine.scores(batched).flatten(0, 1), cosine.scores(features))


@HEADS
def test_weight_is_the_only_parameter(head_class, loss):
    head = head_class(6, 5)
    assert [(name, tuple(weight.shape)) for name, weight in head.named_parameters()] == [("weight", (5, 6))]
    assert list(head.state_dict()) == ["weight"]


@HEADS
def test_weight_starts_as_in_a_linear_layer(head_class, loss):
    torch.manual_seed(3)
    linear = torch.nn.Linear(6, 5, bias=False)
    torch.manual_seed(3)
    head = head_class(6, 5)
    assert torch.equal(head.weight, linear.weight)
    head.reset_parameters()
    assert not torch.equal(head.weight, linear.weight)
    torch.manual_seed(3)
    head.reset_parameters()
    assert torch.equal(head.weight, linear.weight)


@HEADS
def test_repr_shows_every_setting(head_class, loss):
    head = head_class(6, 5, margin=-0.25, scale=12.0, reduction="sum", ignore_index=7, label_smoothing=0.1)
    assert repr(head) == (
        f"{head_class.__name__}(in_features=6, num_classes=5, margin=-0.25, scale=12.0, reduction='sum', "
        "ignore_index=7, label_smoothing=0.1, check=False)"
    )


@HEADS
@pytest.mark.parametrize(
    "duplicate", (copy.deepcopy, lambda head: pickle.loads(pickle.dumps(head))), ids=("deepcopy", "pickle")
)
def test_duplicates_are_equal_and_independent(head_class, loss, duplicate):
    head = head_class(6, 5, margin=-0.25)
    features, target = samples()
    head(features, target).backward()
    twin = duplicate(head)
    assert repr(twin) == repr(head)
    assert torch.equal(twin(features, target), head(features, target))
    with torch.no_grad():
        twin.weight.zero_()
    assert head.weight.abs().min() > 0


@HEADS
def test_state_dict_round_trip(head_class, loss):
    head, other = head_class(6, 5), head_class(6, 5)
    other.load_state_dict(head.state_dict())
    features, target = samples()
    assert torch.equal(other(features, target), head(features, target))
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        head_class(6, 4).load_state_dict(head.state_dict())


@HEADS
@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16, torch.float16), ids=str)
def test_dtypes(head_class, loss, dtype):
    features, target = samples(dtype=dtype)
    for head in (head_class(6, 5, dtype=dtype), head_class(6, 5).to(dtype)):
        value = head(features, target)
        value.backward()
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert head.weight.dtype == head.weight.grad.dtype == dtype
        assert head.scores(features).dtype == dtype


@HEADS
def test_device(head_class, loss):
    head = head_class(6, 5, device="meta")
    assert head.weight.is_meta
    features, target = samples()
    assert head(features.to("meta"), target.to("meta")).is_meta
    head = head.to_empty(device="cpu")
    head.reset_parameters()
    assert head(features, target).isfinite()


@HEADS
def test_autocast(head_class, loss):
    """Backbones hand over half-precision features; the head's weight stays in float32."""
    head = head_class(6, 5)
    features, target = samples(dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = head(features, target)
    value.backward()
    torch.testing.assert_close(value, head(features.float(), target))
    assert head.weight.grad.dtype == torch.float32


@HEADS
@pytest.mark.parametrize("margin", (-0.3, 0.3))
def test_training_separates_the_classes(head_class, loss, margin):
    centers = 3 * torch.randn(5, 6)
    target = torch.arange(100) % 5
    features = centers[target] + 0.1 * torch.randn(100, 6)
    head = head_class(6, 5, margin=margin, scale=5.0)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(50):
        value = head(features, target)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < 0.5 * losses[0]
    assert (head.scores(features).argmax(dim=1) == target).all()


@HEADS
@pytest.mark.parametrize(
    "arguments, error, message",
    (
        ((0, 5), ValueError, "in_features: expected at least 1, got 0"),
        ((6, 1), ValueError, "num_classes: expected at least 2, got 1"),
        ((-1, 5), ValueError, "in_features: expected at least 1, got -1"),
        ((6.0, 5), TypeError, "in_features: expected an integer, got float"),
        ((6, "5"), TypeError, "num_classes: expected an integer, got str"),
        ((6, True), TypeError, "num_classes: expected an integer, got bool"),
    ),
)
def test_bad_sizes(head_class, loss, arguments, error, message):
    with pytest.raises(error) as raised:
        head_class(*arguments)
    assert str(raised.value) == message


# 21
@HEADS
@pytest.mark.parametrize(
    "setting, error, message",
    (
        ({"margin": "0.3"}, TypeError, "margin: expected a number, got str"),
        ({"scale": -1}, ValueError, "scale: expected a number above 0, got -1"),
        ({"scale": float("nan")}, ValueError, "scale: expected a finite number, got nan"),
        ({"reduction": "avg"}, ValueError, "reduction: expected one of none, mean, sum, got 'avg'"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing: expected a number in [0, 1], got 1.5"),
        ({"ignore_index": 0.5}, TypeError, "ignore_index: expected an integer, got float"),
        ({"check": 1}, TypeError, "check: expected True or False, got int"),
        ({"dtype": torch.complex64}, TypeError, "dtype: expected dtype float32, float64, bfloat16 or float16, got"),
    ),
)
def test_the_constructor_checks_what_the_function_checks(head_class, loss, setting, error, message):
    with pytest.raises(error) as raised:
        head_class(6, 5, **setting)
    assert str(raised.value).startswith(message)


# 21
@HEADS
def test_integers_of_numpy_are_integers(head_class, loss):
    head = head_class(np.int64(6), np.int32(5), ignore_index=np.int64(-1), scale=np.float32(2))
    assert all(type(size) is int for size in (head.in_features, head.num_classes, head.ignore_index))
    assert head.weight.shape == (5, 6)
    features, target = samples(dimensions=6)
    head(features, target).backward()


@HEADS
def test_features_of_another_width(head_class, loss):
    features, target = samples(dimensions=7)
    with pytest.raises(ValueError, match=r"weight: expected shape \[C, 7\] to fit features, got \[5, 6\]"):
        head_class(6, 5)(features, target)
