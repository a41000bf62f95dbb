import pytest
import torch

from fewshot_ext.data import PKBatches


def uneven_labels():
    """Seven classes, of 1 to 7 images, with labels that do not count from 0."""
    return (10 * torch.arange(7) - 30).repeat_interleave(torch.arange(1, 8))[torch.randperm(28)]


@pytest.mark.parametrize(("classes", "samples"), [(1, 1), (3, 2), (7, 4), (2, 9)])
def test_every_batch_has_k_images_of_p_classes(classes, samples):
    labels = uneven_labels()
    sizes = dict(zip(*(part.tolist() for part in labels.unique(return_counts=True)), strict=True))
    for batch in PKBatches(labels, classes, samples, seed=0, batches=20):
        assert batch.shape == (classes * samples,)
        groups = batch.view(classes, samples)
        assert (labels[groups] == labels[groups[:, :1]]).all()
        assert len(labels[groups[:, 0]].unique()) == classes
        for group in groups:
            # No image comes again before all of its class have come.
            counts = group.unique(return_counts=True)[1]
            assert len(counts) == min(samples, sizes[labels[group[0]].item()])
            assert counts.max() - counts.min() <= 1


def test_classes_are_seen_equally_often():
    labels = torch.arange(9).repeat_interleave(20)
    batches = PKBatches(labels, classes=3, samples=2, seed=0, batches=30)
    drawn = labels[torch.cat(list(batches))].bincount()
    assert (drawn == 20).all()


def test_order_depends_on_seed_and_epoch_alone():
    labels = torch.arange(9).repeat_interleave(20)

    def order(seed, epoch):
        batches = PKBatches(labels, 3, 2, seed)
        batches.set_epoch(epoch)
        torch.manual_seed(epoch)  # which must not matter
        return torch.cat(list(batches)).tolist()

    assert order(0, 3) == order(0, 3)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_an_epoch_is_as_long_as_the_images():
    labels = torch.arange(5).repeat_interleave(10)
    assert len(PKBatches(labels, 3, 2, seed=0)) == len(list(PKBatches(labels, 3, 2, seed=0))) == 8
    assert len(PKBatches(labels[:4], 1, 9, seed=0)) == 1
    assert len(list(PKBatches(labels, 3, 2, seed=0, batches=11))) == 11


@pytest.mark.parametrize(
    "change, error, message",
    (
        ({"labels": [0, 1]}, TypeError, "labels: expected a tensor of torch.int64, got list"),
        ({"labels": torch.zeros(3)}, TypeError, "labels: expected a tensor of torch.int64, got torch.float32"),
        (
            {"labels": torch.zeros(3, 1).long()},
            ValueError,
            r"labels: expected shape \[N\] on the CPU, got \[3, 1\] on cpu",
        ),
        ({"labels": torch.zeros(3, device="meta").long()}, ValueError, "on meta"),
        ({"classes": 0}, ValueError, "classes: expected at least 1, got 0"),
        ({"samples": -1}, ValueError, "samples: expected at least 1, got -1"),
        ({"batches": 0}, ValueError, "batches: expected at least 1, got 0"),
        ({"classes": 4}, ValueError, "classes 4 asks for more than there are: 3"),
    ),
)
def test_bad_settings(change, error, message):
    with pytest.raises(error, match=message):
        PKBatches(**{"labels": torch.tensor([0, 1, 2]), "classes": 2, "samples": 2, "seed": 0, **change})
