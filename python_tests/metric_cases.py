"""The smallest metric training that tests share."""

from fewshot_ext.models import BackboneConfig
from fewshot_ext.training import AntiCollapseConfig, MeasurementConfig, MetricTrainingConfig

TINY_METRIC = MetricTrainingConfig(
    epochs=4,
    classes_per_batch=4,
    samples_per_class=3,
    milestones=(3,),
    anti_collapse=AntiCollapseConfig("batch_proxy"),
    backbone=BackboneConfig(width=8, pooled_blocks=2, embedding=6),
    measurement=MeasurementConfig(epochs=2, ks=(1, 2), seen_images=60),
)
