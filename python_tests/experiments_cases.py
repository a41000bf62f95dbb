"""The smallest training and the fewest episodes that the tests of experiments share."""

from fewshot_ext.evaluation import ProtocolConfig
from fewshot_ext.experiments.measurements import FewShotAccuracy
from fewshot_ext.heads import FineTuningConfig
from fewshot_ext.training import BackboneConfig, PreTrainingConfig

TINY = PreTrainingConfig(epochs=1, batch_size=128, backbone=BackboneConfig(width=8, pooled_blocks=3))
FEW = FewShotAccuracy(ProtocolConfig(episodes=6, shots=(1, 2), queries=3), finetuning=FineTuningConfig(steps=2))


def made_up(recalls, classes=("seen", "unseen"), epochs=(1, 2)):
    """Rows of a finished sweep; ``recalls`` by loss, weight and seed, the ranks ten times as large."""
    return [
        {
            "loss": loss,
            "variant": {"triplet": "pair"}.get(loss, "batch_proxy") if weight else "none",
            "weight": weight,
            "seed": seed,
            "epoch": epoch,
            "classes": name,
            "recall_at_1": recall * epoch / epochs[-1],
            "map_at_r": recall / 2,
            "coding_rate": 20 * recall,
            "effective_rank": 10 * recall,
            "spectrum": [0.9, recall, 0.0],
        }
        for (loss, weight, seed), recall in recalls.items()
        for epoch in epochs
        for name in classes
    ]


CLEAR = {
    **{("triplet", 0.0, seed): value for seed, value in enumerate((0.50, 0.52, 0.48))},
    **{("triplet", 0.1, seed): value for seed, value in enumerate((0.60, 0.63, 0.59))},
    **{("proxy_anchor", 0.0, seed): value for seed, value in enumerate((0.40, 0.45, 0.42))},
    **{("proxy_anchor", 1.0, seed): value for seed, value in enumerate((0.35, 0.41, 0.37))},
}
