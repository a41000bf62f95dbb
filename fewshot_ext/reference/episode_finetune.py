"""Episode fine-tuning as every framework runs it: one classifier after another, ``torch.optim.SGD`` and autograd.

Same arguments and results as :func:`fewshot_ext.finetune_episodes`, except that ``weight`` and ``order`` are not drawn
and that half types are neither promoted nor accumulated in float32: call it in float64 for an oracle.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def finetune_episodes(
    support: Tensor,
    support_target: Tensor,
    query: Tensor,
    *,
    similarity: str = "cosine",
    scale: float = 5.0,
    margin: float = 0.0,
    steps: int = 100,
    batch_size: int = 4,
    lr: float = 0.01,
    momentum: float = 0.9,
    dampening: float = 0.9,
    weight_decay: float = 1e-3,
    weight: Tensor,
    order: Tensor,
) -> Tensor:
    scores = query.new_empty(*query.shape[:2], weight.shape[1])
    for episode in range(len(support)):
        classifier = torch.nn.Parameter(weight[episode].clone())
        sgd = torch.optim.SGD(
            [classifier], lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, foreach=False
        )
        for permutation in order[episode]:
            for batch in permutation.split(batch_size):
                target = support_target[episode, batch]
                one_hot = F.one_hot(target, len(classifier)).to(classifier.dtype)
                sgd.zero_grad()
                with torch.enable_grad():
                    logits = scale * (_scores(support[episode, batch], classifier, similarity) - margin * one_hot)
                    F.cross_entropy(logits, target).backward()
                sgd.step()
        scores[episode] = _scores(query[episode], classifier.detach(), similarity)
    return scores


def _scores(features: Tensor, classifier: Tensor, similarity: str) -> Tensor:
    if similarity == "cosine":
        features, classifier = F.normalize(features, dim=-1), F.normalize(classifier, dim=-1)
    return F.linear(features, classifier)
