"""The model from images to logits."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fewshot_ext.models import (
    FCN,
    DeepEMD,
    Grid,
    LocalFeaturesConfig,
    Sampling,
    StructuredClassifierConfig,
    build_local_features,
    conv4,
    emd_logits,
    fit_prototypes,
)

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSIFIER = StructuredClassifierConfig(passes=3)


def episodes(shot=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    support, query = (torch.rand(2, images, 1, 12, 12, generator=generator, dtype=dtype) for images in (3 * shot, 4))
    target = torch.arange(3).repeat(shot)
    return support, torch.stack([target, target.flip(0)]), query


def model(**options):
    torch.manual_seed(0)
    return DeepEMD(FCN(conv4(1, width=6, pooled_blocks=2)), **options).eval()


def test_one_shot_matches_the_support_images_themselves():
    support, target, query = episodes()
    deepemd = model(temperature=5.0)
    maps, queries = (deepemd.local_features(x.flatten(0, 1)).unflatten(0, x.shape[:2]) for x in (support, query))
    logits = deepemd(support, target, query, 3)
    assert logits.shape == (2, 4, 3)
    torch.testing.assert_close(logits[0], emd_logits(queries, maps, temperature=5.0)[0])
    torch.testing.assert_close(logits[1], emd_logits(queries, maps.flip(1), temperature=5.0)[1])


def test_more_shots_fit_prototypes():
    support, target, query = episodes(shot=3)
    deepemd = model(classifier=CLASSIFIER)
    maps, queries = (deepemd.local_features(x.flatten(0, 1)).unflatten(0, x.shape[:2]) for x in (support, query))
    prototypes = fit_prototypes(maps, target, 3, config=CLASSIFIER, generator=torch.Generator().manual_seed(7))
    actual = deepemd(support, target, query, 3, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(actual, emd_logits(queries, prototypes))


@pytest.mark.parametrize(("shot", "passes", "reaches"), [(1, 3, True), (2, 3, False), (2, 0, True)])
def test_gradients_reach_the_support_unless_prototypes_were_fitted(shot, passes, reaches):
    support, target, query = episodes(shot)
    support, query = support.requires_grad_(), query.requires_grad_()
    logits = model(classifier=StructuredClassifierConfig(passes=passes))(support, target, query, 3)
    gradients = torch.autograd.grad(logits.square().sum(), (support, query))
    assert (gradients[0] != 0).any().item() is reaches
    assert (gradients[1] != 0).any()


@pytest.mark.parametrize("shot", [1, 2])
def test_half_precision_features_are_matched_in_float32(shot):
    """Under autocast, as training has it: prototypes that were fitted are float32 and must meet their like."""
    support, target, query = episodes(shot)
    deepemd = model(classifier=CLASSIFIER)
    generator = torch.Generator()
    exact = deepemd(support, target, query, 3, generator=generator.manual_seed(7))
    with torch.autocast("cpu", torch.bfloat16):
        logits = deepemd(support, target, query, 3, generator=generator.manual_seed(7))
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, exact, rtol=0.1, atol=0.3)


def test_weights_are_detached_on_request():
    support, target, query = episodes()
    gradients = []
    for detach in (False, True):
        inputs = query.clone().requires_grad_()
        logits = model(detach_weights=detach)(support, target, inputs, 3)
        gradients.append(torch.autograd.grad(logits.square().sum(), inputs)[0])
    assert not torch.allclose(*gradients)


def test_episodes_of_a_training_step_share_their_batch_statistics():
    support, target, query = episodes()
    deepemd = model().train()
    together = deepemd(support, target, query, 3)
    images = torch.cat([support, query], 1)
    maps = deepemd.local_features(images.flatten(0, 1)).unflatten(0, (2, -1))
    torch.testing.assert_close(together[0], emd_logits(maps[:, 3:], maps[:, :3])[0])


def test_learns_an_episode():
    """A few steps of meta-training on one episode lower its loss."""
    support, target, query = episodes()
    deepemd = model()
    truth = torch.tensor([0, 1, 2, 0]).repeat(2)
    optimizer = torch.optim.Adam(deepemd.parameters(), lr=0.02)
    losses = []
    for _ in range(8):
        loss = F.cross_entropy(deepemd(support, target, query, 3).flatten(0, 1), truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05


def test_state_is_that_of_the_backbone():
    """Pre-trained weights load, and a checkpoint of the model goes on."""
    first, second = model(), model()
    nn.init.ones_(second.local_features.backbone.blocks[0][0].weight)
    second.load_state_dict(first.state_dict())
    support, target, query = episodes()
    assert torch.equal(first(support, target, query, 3), second(support, target, query, 3))
    assert all(key.startswith("local_features.backbone.") for key in first.state_dict())


@pytest.mark.parametrize(
    ("config", "kind", "regions"),
    [
        (LocalFeaturesConfig(), FCN, 9),
        (LocalFeaturesConfig(pyramid=(2,)), FCN, 13),
        (LocalFeaturesConfig("grid", grids=(1, 2)), Grid, 5),
        (LocalFeaturesConfig("sampling", regions=7), Sampling, 7),
    ],
)
def test_local_features_by_name(config, kind, regions):
    backbone = conv4(1, width=4, pooled_blocks=2)
    features = build_local_features(config, backbone, preprocessing=nn.Identity())
    assert type(features) is kind
    assert features(torch.rand(2, 1, 12, 12)).shape == (2, regions, 4)


def test_local_features_take_their_settings():
    grid = build_local_features(LocalFeaturesConfig("grid", ratio=1.5, horizontal_flip=False), conv4())
    assert (grid.grids, grid.ratio, grid.horizontal_flip) == ((2, 3), 1.5, False)
    sampling = build_local_features(LocalFeaturesConfig("sampling", seed=4, horizontal_flip=False), conv4())
    assert (sampling.regions, sampling.seed, sampling.horizontal_flip) == (9, 4, False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "dense"}, "name: expected one of fcn, grid, sampling, got 'dense'"),
        ({"pyramid": (0,)}, "pyramid: expected at least 1"),
        ({"grids": ()}, "grids: expected at least one side"),
        ({"grids": (2, 0)}, "grids: expected at least 1"),
        ({"ratio": 0.9}, "ratio: expected at least 1"),
        ({"regions": 0}, "regions: expected at least 1"),
        ({"seed": -1}, "seed: expected at least 0"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        LocalFeaturesConfig(**settings)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"support": [1]}, TypeError, "support: expected a tensor, got list"),
        ({"query": torch.rand(2, 4)}, ValueError, r"query: expected shape \[E, images, ...\], got \[2, 4\]"),
        (
            {"query": torch.rand(2, 4, 1, 12, 10)},
            ValueError,
            r"query: expected shape \[2, Q, 1, 12, 12\] .*\[2, 4, 1, 12, 10\]",
        ),
        ({"query": torch.rand(1, 4, 1, 12, 12)}, ValueError, r"query: expected shape \[2, Q, 1, 12, 12\]"),
        (
            {"query": torch.rand(2, 4, 1, 12, 12).double()},
            TypeError,
            "query: expected dtype torch.float32 as",
        ),
        (
            {"support_target": torch.zeros(2, 4, dtype=torch.int64)},
            ValueError,
            r"support_target: expected shape \[2, 3\]",
        ),
        ({"support_target": torch.zeros(2, 3, dtype=torch.int64)}, ValueError, "class 1 of episode 0 has no image"),
        ({"way": 4}, ValueError, "class 3 of episode 0 has no image"),
        ({"query": torch.full((2, 4, 1, 12, 12), float("nan"))}, ValueError, "query: expected finite entries, got NaN"),
        (
            {"support": torch.full((2, 3, 1, 12, 12), float("nan"))},
            ValueError,
            "support: expected finite entries, got NaN",
        ),
    ],
)
def test_bad_input_is_named(changes, error, message):
    support, target, query = episodes()
    arguments = {"support": support, "support_target": target, "query": query, "way": 3, **changes}
    with pytest.raises(error, match=message):
        model()(**arguments)


def test_no_episodes_have_no_logits():
    images, target = torch.rand(0, 3, 1, 12, 12), torch.zeros(0, 3, dtype=torch.int64)
    assert model().eval()(images, target, images, 3).shape == (0, 3, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "temperature: expected a number above 0"),
        ({"weighting": "norm"}, "weighting: expected one of cross_ref"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        DeepEMD(nn.Identity(), **options)
