"""Meta-training through every head of the registry: loss, gradients, resuming, and what its checkpoint is good for."""

from dataclasses import replace

import pytest
import torch
from scipy.optimize import linprog

from fewshot_ext import FewShotClassifier
from fewshot_ext.data import AugmentationConfig, Split, load_digits
from fewshot_ext.evaluation import episode_accuracies, extract_features
from fewshot_ext.heads import HEADS, MAP_HEADS, Pooled, ProtoNet
from fewshot_ext.models import load_network
from fewshot_ext.models.network import read_checkpoint
from fewshot_ext.training import BackboneConfig, MetaTrainingConfig, MetaTrainingRun, ValidationConfig, meta_train
from fewshot_ext.training.episodic import EpisodeBatches

pytestmark = pytest.mark.usefixtures("one_thread")

WAY, QUERIES = 3, 4
SETTINGS = MetaTrainingConfig(
    way=WAY,
    queries=QUERIES,
    steps=3,
    epochs=4,
    learning_rate=0.01,
    backbone=BackboneConfig(width=6, pooled_blocks=2),
    validation=ValidationConfig(epochs=1, episodes=12, way=3, shot=1, queries=3),
)


@pytest.fixture(scope="module")
def digits():
    return load_digits().subset(Split.BASE)


# Each head once more, for one query and the support of each class: vectors [shot, D], or maps [shot, N, C].


def cosine(a, b):
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def nearest_means(similarity):
    return lambda query, classes, t: torch.stack([t * similarity(query, support.mean(0)) for support in classes])


def distance(a, b):
    return -(a - b).square().sum(-1)


def attention(query, classes, t):
    shares = torch.softmax(torch.cat([t * cosine(query, support) for support in classes]), 0)
    return torch.stack([part.sum() for part in shares.split([len(support) for support in classes])]).log()


def nearest_image(similarity):
    return lambda query, classes, t: torch.stack([t * similarity(query, support).max() for support in classes])


def local_neighbors(query, classes, t):
    pools = [support.flatten(0, 1) for support in classes]
    return torch.stack([t * sum(cosine(u, pool).sort().values[-3:].sum() for u in query) for pool in pools])


def fusion(query, classes, t):
    means = [support.mean((0, 1)) for support in classes]
    return sum(torch.softmax(torch.stack([t * cosine(u, mean) for mean in means]), 0) for u in query).log()


def matching(uniform):
    def score(query, classes, t):
        return torch.stack([t * (1 - transport(query, support.mean(0), uniform) / len(query)) for support in classes])

    return score


def transport(u, v, uniform):
    """The EMD by a general solver; by the envelope theorem its gradient is that of the Lagrangian at the optimum."""
    n = len(u)
    s, d = (u @ v.mean(0)).relu() + 1e-3, (v @ u.mean(0)).relu() + 1e-3
    s, d = (torch.ones(2, n, dtype=u.dtype)) if uniform else (s / s.sum() * n, d / d.sum() * n)
    cost = 1 - unit(u - u.mean(-1, keepdim=True)) @ unit(v - v.mean(-1, keepdim=True)).mT
    rows, columns = torch.eye(n).repeat_interleave(n, 1), torch.eye(n).repeat(1, n)
    problem = cost.detach().flatten(), torch.cat([rows, columns]), torch.cat([s, d]).detach()
    costs, sums, masses = (part.numpy() for part in problem)
    solved = linprog(costs, A_eq=sums, b_eq=masses)
    flow, duals = torch.from_numpy(solved.x), torch.from_numpy(solved.eqlin.marginals)
    by_weights = (torch.cat([s, d]) * duals).sum()
    return (flow.view(n, n) * cost).sum() + by_weights - by_weights.detach()


def pooled(score):
    return lambda query, classes, t: score(query.mean(0), [support.mean(1) for support in classes], t)


def normalized(score):
    return lambda query, classes, t: score(unit(query), [unit(support) for support in classes], t)


# By name: the head, its own temperature, and the one that is given beside it.
PLAIN = {
    "protonet": (nearest_means(distance), 1, 5),
    "protonet_cosine": (nearest_means(cosine), 10, 3),
    "matchingnet": (attention, 1, 8),
    "nearest_neighbor": (nearest_image(cosine), 10, 3),
    "nearest_neighbor_euclidean": (nearest_image(distance), 1, 0.3),
    "simpleshot_l2n": (normalized(nearest_means(distance)), 1, 4),
    "deepemd": (matching(uniform=False), 12.5, 5),
    "deepemd_uniform": (matching(uniform=True), 12.5, 5),
    "deepemd_mean": (matching(uniform=False), 12.5, 5),
    "knn": (local_neighbors, 1, 0.5),
    "prediction_fusion": (fusion, 10, 2),
    "protonet@fcn": (pooled(nearest_means(distance)), 1, 50),
    "protonet_cosine@fcn": (pooled(nearest_means(cosine)), 10, 3),
    "matchingnet@fcn": (pooled(attention), 1, 8),
}


def test_every_head_that_can_be_trained_is_tried():
    known = {name for name, head in (HEADS | MAP_HEADS).items() if not head.fits and not head.needs_base_mean}
    assert {name.partition("@")[0] for name in PLAIN} == known


def plain_loss(module, images, score, temperature, maps):
    shot = module.config.shot
    pixels = module.network.preprocessing(images.flatten(0, 1))
    features = module.backbone.feature_map(pixels).flatten(2).mT if maps else module.backbone(pixels)
    classes = features.unflatten(0, images.shape[:2])  # [way, images, ...]
    support = [own[:shot] for own in classes]
    losses = [
        -torch.log_softmax(score(query, support, temperature), 0)[label]
        for label, own in enumerate(classes)
        for query in own[shot:]
    ]
    return sum(losses) / len(losses)


@pytest.mark.parametrize(
    ("name", "shot"),
    # With more than one shot these two fit prototypes, which test_meta_training.py looks at.
    [(name, shot) for name in PLAIN for shot in (1, 2) if shot == 1 or name not in ("deepemd", "deepemd_uniform")],
)
def test_loss_and_gradients_are_those_of_the_head_written_out(digits, tmp_path, name, shot):
    """In float64 and evaluation mode, where nothing is random; a step along the gradient makes the loss smaller."""
    score, own, given = PLAIN[name]
    config = replace(SETTINGS, head=name, shot=shot, temperature=given if shot > 1 else None)
    module = MetaTrainingRun(config, digits, tmp_path, checkpoint=None).module.double().eval()
    batch = digits[next(iter(EpisodeBatches(digits.labels, 1, way=WAY, shot=shot, queries=QUERIES, seed=3)))]
    parameters = dict(module.backbone.named_parameters())

    maps = module.head.takes_maps
    expected = plain_loss(module, batch[0], score, given if shot > 1 else own, maps)
    gradients = torch.autograd.grad(expected, list(parameters.values()))

    loss = module.training_step(batch, 0)["loss"]
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=1e-9)
    loss.backward()
    assert any(gradient.abs().max() > 1e-4 for gradient in gradients)
    for (key, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-7, msg=lambda text, key=key: key + text)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.sub_(parameter.grad, alpha=1e-4 / max(1.0, loss.item()))
    assert module.training_step(batch, 0)["loss"] < loss


@pytest.mark.parametrize(("head", "temperature"), [("protonet", None), ("matchingnet@fcn", 12.5)])
def test_training_and_its_checkpoint(digits, validation_archive, tmp_path, head, temperature):
    config = replace(SETTINGS, head=head, temperature=temperature, steps=12)
    losses = []
    options = {"validation": validation_archive, "on_epoch": lambda epoch, loss: losses.append(loss)}
    run = MetaTrainingRun(config, digits, tmp_path, checkpoint=None, **options)
    features = extract_features(run.module.features, validation_archive.images)
    expected = episode_accuracies(features, run.validation.episodes, head=run.module.head).mean().item()
    module = run.train()
    found = run.results()
    assert found["start_validation_accuracy"] == pytest.approx(expected)
    assert losses[-1] < 0.8 * losses[0]
    assert found["accuracy"] > 0.7
    best = tmp_path / "best.ckpt"
    assert read_checkpoint(best)["hyper_parameters"]["config"]["head"] == head
    assert torch.equal(load_network(best)(digits.images[:3]), module(digits.images[:3]))
    # Features of the classifier are those that were trained, so that it predicts as the head does.
    novel, few = load_digits().subset(Split.NOVEL), torch.arange(40)
    classifier = FewShotClassifier(best, head=module.head).fit(novel.images[few], novel.labels[few].tolist())
    taken = extract_features(module.features, novel.images[:60]).unsqueeze(0)
    labels = novel.labels[few].unique(return_inverse=True)[1].unsqueeze(0)
    scores = module.head(taken[:, few], labels, taken[:, 40:], len(labels.unique()))
    torch.testing.assert_close(classifier.decision_function(novel.images[40:60]), scores[0], rtol=1e-4, atol=1e-4)


def test_feature_vectors_train_the_projection_of_an_embedding(digits, tmp_path):
    config = replace(SETTINGS, epochs=1, backbone=replace(SETTINGS.backbone, embedding=4))
    for head, trained in (("protonet", True), ("protonet@fcn", False)):
        run = MetaTrainingRun(replace(config, head=head), digits, tmp_path / head, checkpoint=None)
        before = run.module.backbone.projection.weight.clone()
        assert torch.equal(run.train().backbone.projection.weight, before) != trained


def test_a_broken_run_of_another_head_goes_on(digits, tmp_path, weights):
    config = replace(SETTINGS, head="protonet", augmentation=AugmentationConfig(rotation=10, translation=0.1))

    def interrupt(epoch, loss):
        if epoch == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        meta_train(config, digits, tmp_path / "broken", checkpoint=None, on_epoch=interrupt)
    resumed = meta_train(config, digits, tmp_path / "broken", checkpoint=None, resume=True)
    unbroken = meta_train(config, digits, tmp_path / "unbroken", checkpoint=None)
    assert torch.equal(weights(resumed), weights(unbroken))


def test_regions_follow_the_name_and_settings_of_the_regions_follow_them(digits, tmp_path):
    config = replace(SETTINGS, head="protonet@grid", local_features=replace(SETTINGS.local_features, grids=(2,)))
    module = MetaTrainingRun(config, digits, tmp_path, checkpoint=None).module
    assert module.features_an_image == (4, 6)
    assert module.head == Pooled(ProtoNet())
    assert MetaTrainingRun(SETTINGS, digits, tmp_path, checkpoint=None).module.features_an_image == (4, 6)
    plain = MetaTrainingRun(replace(SETTINGS, head="protonet"), digits, tmp_path, checkpoint=None).module
    assert plain.features_an_image == (24,)


def test_another_head_may_validate(digits, validation_archive, tmp_path):
    config = replace(SETTINGS, head="protonet", validation=replace(SETTINGS.validation, head="deepemd", shot=2))
    run = MetaTrainingRun(config, digits, tmp_path, checkpoint=None, validation=validation_archive)
    extractor = run.module.network.local_features(SETTINGS.local_features)
    maps = extract_features(extractor, validation_archive.images)
    expected = episode_accuracies(maps, run.validation.episodes, head=MAP_HEADS["deepemd"])
    run.module.train()
    assert torch.equal(run.validation._accuracies(run.module), expected)
    assert run.module.training and run.module.backbone.training


def test_too_few_regions_are_found_before_the_run(digits, validation_archive, tmp_path):
    one = replace(SETTINGS, backbone=BackboneConfig(width=4, pooled_blocks=3))
    with pytest.raises(ValueError, match="head knn: neighbors: expected at most 1"):
        MetaTrainingRun(replace(one, head="knn"), digits, tmp_path / "out", checkpoint=None)
    config = replace(one, validation=replace(one.validation, head="knn"))
    with pytest.raises(ValueError, match=r"validation\.head knn: neighbors: expected at most 1"):
        MetaTrainingRun(config, digits, tmp_path / "out", checkpoint=None, validation=validation_archive)
    assert not (tmp_path / "out").exists()
