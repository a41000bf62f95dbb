"""The smallest training and the fewest episodes that the tests of experiments share."""

from fewshot_ext.evaluation import FineTuningConfig, ProtocolConfig
from fewshot_ext.experiments.measurements import FewShotAccuracy
from fewshot_ext.training import BackboneConfig, PreTrainingConfig

TINY = PreTrainingConfig(epochs=1, batch_size=128, backbone=BackboneConfig(width=8, pooled_blocks=3))
FEW = FewShotAccuracy(ProtocolConfig(episodes=6, shots=(1, 2), queries=3), finetuning=FineTuningConfig(steps=2))
