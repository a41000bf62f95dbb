"""The structured fully connected layer against torch's own SGD and autograd, one episode after another."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from fewshot_ext._episodes import class_means
from fewshot_ext.models import StructuredClassifierConfig, emd_logits, fit_prototypes

pytestmark = pytest.mark.usefixtures("one_thread")

EPISODES, WAY, NODES, CHANNELS = 3, 3, 4, 6
TARGET = torch.tensor([[0, 1, 2, 0, 1, 2, 2], [2, 2, 2, 2, 1, 1, 0], [0, 0, 1, 2, 1, 2, 0]])


def support_maps(dtype=torch.float64, nodes=NODES, channels=CHANNELS):
    generator = torch.Generator().manual_seed(0)
    classes = torch.randn(EPISODES, WAY, nodes, channels, generator=generator, dtype=torch.float64)
    maps = classes[torch.arange(EPISODES).unsqueeze(1), TARGET]
    noise = torch.randn(maps.shape, generator=generator, dtype=torch.float64)
    return (maps + 0.7 * noise).clamp_min(-0.3).to(dtype)


def draw_order(passes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(EPISODES, passes, TARGET.shape[1], generator=generator).argsort(-1)


def one_by_one(support, order, config, **options):
    """The official loop: torch.optim.SGD on one episode's prototypes after another's."""
    fitted = []
    for maps, target, passes in zip(support, TARGET, order, strict=True):
        means = torch.stack([maps[target == label].mean(0) for label in range(WAY)])
        prototypes = means.clone().requires_grad_()
        optimizer = torch.optim.SGD([prototypes], lr=config.lr, momentum=config.momentum, dampening=config.dampening)
        for one_pass in passes:
            for batch in one_pass.split(config.batch_size):
                optimizer.zero_grad()
                logits = emd_logits(maps[batch].unsqueeze(0), prototypes.unsqueeze(0), **options)[0]
                F.cross_entropy(logits, target[batch]).backward()
                optimizer.step()
        fitted.append(prototypes.detach())
    return torch.stack(fitted)


@pytest.mark.parametrize("detach_weights", [True, False])
@pytest.mark.parametrize("weighting", ["cross_reference", "uniform"])
@pytest.mark.parametrize(
    "config",
    [
        StructuredClassifierConfig(passes=6),
        StructuredClassifierConfig(passes=4, batch_size=3, lr=0.03, momentum=0.5, dampening=0.2),
        StructuredClassifierConfig(passes=2, batch_size=100, momentum=0.0, dampening=0.0),
    ],
)
def test_equals_sgd_with_autograd(config, weighting, detach_weights):
    support, order = support_maps(), draw_order(config.passes)
    config = replace(config, detach_weights=detach_weights)
    options = {"weighting": weighting, "temperature": 8.0}
    expected = one_by_one(support, order, config, **options, detach_weights=detach_weights)
    actual = fit_prototypes(support, TARGET, WAY, config=config, order=order, **options)
    moved = (expected - class_means(support, TARGET, WAY)).abs().max()
    assert moved > 0.01
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9 * moved.item())


def test_gradient_through_the_weights_matters():
    support, order = support_maps(), draw_order(5)
    stopped, through = (
        fit_prototypes(
            support, TARGET, WAY, config=StructuredClassifierConfig(passes=5, detach_weights=detach), order=order
        )
        for detach in (True, False)
    )
    assert (stopped - through).abs().max() > 1e-3


def test_levels_stay_where_the_gradient_leaves_them():
    """Similarities ignore a feature's mean over the channels, so with detached weights it never moves."""
    support = support_maps()
    fitted = fit_prototypes(support, TARGET, WAY, config=StructuredClassifierConfig(passes=5))
    torch.testing.assert_close(fitted.mean(-1), class_means(support, TARGET, WAY).mean(-1))


def test_learns_the_support():
    support = support_maps(torch.float32)
    truth = F.one_hot(TARGET, WAY).bool()

    def margin(prototypes):
        logits = emd_logits(support, prototypes)
        return (logits[truth] - logits.masked_fill(truth, -100).amax(-1).flatten()).mean()

    means = class_means(support, TARGET, WAY)
    fitted = fit_prototypes(support, TARGET, WAY, generator=torch.Generator().manual_seed(0))
    assert margin(fitted) > margin(means) + 0.5


def test_no_passes_leave_the_means():
    support = support_maps()
    fitted = fit_prototypes(support, TARGET, WAY, config=StructuredClassifierConfig(passes=0))
    expected = [torch.stack([m[t == k].mean(0) for k in range(WAY)]) for m, t in zip(support, TARGET, strict=True)]
    torch.testing.assert_close(fitted, torch.stack(expected))


def test_episodes_in_parts_change_nothing():
    support, order = support_maps(), draw_order(4)
    config = StructuredClassifierConfig(passes=4)
    whole, parts = (
        fit_prototypes(support, TARGET, WAY, config=config, order=order, bytes_at_once=bytes_at_once)
        for bytes_at_once in (2**30, 1)
    )
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)


def test_one_call_of_the_operator_a_step(monkeypatch):
    from fewshot_ext.models import structured_classifier

    calls, solve = [], structured_classifier.emd
    monkeypatch.setattr(structured_classifier, "emd", lambda *inputs: calls.append(inputs[0].shape) or solve(*inputs))
    fit_prototypes(support_maps(), TARGET, WAY, config=StructuredClassifierConfig(passes=2))
    assert calls == [(3, 4, 3, 4, 4), (3, 3, 3, 4, 4)] * 2


def test_a_seed_decides_the_order():
    support = support_maps()
    config = StructuredClassifierConfig(passes=2)
    first, again, other = (
        fit_prototypes(support, TARGET, WAY, config=config, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_computed_in_float32(dtype):
    support, order = support_maps(dtype), draw_order(3)
    config = StructuredClassifierConfig(passes=3)
    fitted = fit_prototypes(support, TARGET, WAY, config=config, order=order)
    assert fitted.dtype == torch.float32
    wide = fit_prototypes(support.double(), TARGET, WAY, config=config, order=order)
    torch.testing.assert_close(fitted.double(), wide, rtol=1e-3, atol=1e-3)


def test_autocast_leaves_the_precision_alone():
    support, order = support_maps(torch.float32), draw_order(2)
    config = StructuredClassifierConfig(passes=2)
    expected = fit_prototypes(support, TARGET, WAY, config=config, order=order)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fit_prototypes(support, TARGET, WAY, config=config, order=order), expected)


def test_regions_without_features_stay_finite():
    support = support_maps()
    support[:, :, 0] = 0
    assert fit_prototypes(support, TARGET, WAY, config=StructuredClassifierConfig(passes=2)).isfinite().all()


def test_no_episodes():
    assert fit_prototypes(support_maps()[:0], TARGET[:0], WAY).shape == (0, WAY, NODES, CHANNELS)


def test_carries_no_gradient():
    config = StructuredClassifierConfig(passes=1)
    assert not fit_prototypes(support_maps().requires_grad_(), TARGET, WAY, config=config).requires_grad


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"support": None}, TypeError, "support: expected a floating-point tensor, got NoneType"),
        (
            {"support": torch.zeros(3, 7, 4)},
            ValueError,
            r"support: expected shape \[E, images, N, C\], got \[3, 7, 4\]",
        ),
        ({"support": torch.zeros(3, 7, 0, 6)}, ValueError, "support: expected at least one region"),
        ({"support": torch.full((3, 7, 4, 6), float("nan"))}, ValueError, "support: expected finite entries"),
        (
            {"support_target": TARGET.float()},
            TypeError,
            "support_target: expected dtype torch.int64, got",
        ),
        ({"support_target": TARGET[:, :6]}, ValueError, r"support_target: expected shape \[3, 7\], got \[3, 6\]"),
        (
            {"support_target": TARGET.to("meta")},
            ValueError,
            "support_target: expected device cpu as support is on, got",
        ),
        ({"support_target": TARGET + 1}, ValueError, r"support_target: expected numbers in \[0, 3\), got 1 to 3"),
        ({"support_target": TARGET.clamp(max=1)}, ValueError, "class 2 of episode 0 has no image"),
        ({"way": 8}, ValueError, "class 3 of episode 0 has no image"),  # more classes than images
        ({"way": 1}, ValueError, "way: expected at least 2"),
        ({"order": torch.zeros(3, 99, 7, dtype=torch.int64)}, ValueError, r"order: expected shape \[3, 100, 7\]"),
        ({"order": torch.zeros(3, 100, 7, dtype=torch.int64)}, ValueError, "order: expected permutations of the 7"),
        ({"way": 3.0}, TypeError, "way: expected an integer, got float"),
        ({"order": [0]}, TypeError, "order: expected a tensor .*, got list"),
        ({"order": torch.zeros(3, 100, 7)}, TypeError, "order: expected dtype torch.int64, got torch.float32"),
        ({"temperature": -1.0}, ValueError, "temperature: expected a number above 0"),
        ({"bytes_at_once": 0}, ValueError, "bytes_at_once: expected at least 1"),
        ({"weighting": "norm"}, ValueError, "weighting: expected one of cross_reference, uniform"),
    ],
)
def test_bad_input_is_named(changes, error, message):
    arguments = {"support": support_maps(), "support_target": TARGET, "way": WAY}
    with pytest.raises(error, match=message):
        fit_prototypes(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("name", "value"), [("passes", -1), ("batch_size", 0), ("lr", 0.0), ("momentum", 1.0), ("dampening", -0.1)]
)
def test_bad_settings_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected"):
        StructuredClassifierConfig(**{name: value})


@pytest.mark.parametrize(("name", "value"), [("passes", 1.5), ("batch_size", True), ("lr", "0.1")])
def test_settings_of_another_type_are_named(name, value):
    with pytest.raises(TypeError, match=f"{name}: expected a"):
        StructuredClassifierConfig(**{name: value})
