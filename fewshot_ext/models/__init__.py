"""Networks from images to features: backbones, whole networks with their preprocessing, DeepEMD's matching."""

from fewshot_ext.models.backbone import Backbone
from fewshot_ext.models.bn_inception import BNInception
from fewshot_ext.models.config import BackboneConfig, build_backbone
from fewshot_ext.models.conv import ConvBackbone, ConvBlock, conv4
from fewshot_ext.models.deepemd import DeepEMD, LocalFeaturesConfig, build_local_features, class_prototypes
from fewshot_ext.models.drop_block import DropBlock
from fewshot_ext.models.efficientnet_lite import EfficientNetLite0
from fewshot_ext.models.embedding import EmbeddedBackbone
from fewshot_ext.models.foreign import CheckpointSettings
from fewshot_ext.models.local_features import FCN, Grid, LocalFeatures, Sampling
from fewshot_ext.models.matching import Match, cross_reference_weights, emd_logits, match_flows
from fewshot_ext.models.network import Network, NetworkConfig, as_network, build_network, load_network
from fewshot_ext.models.resnet import NarrowResNet12, ResNet12, ResNet18, ResNet50
from fewshot_ext.models.structured_classifier import StructuredClassifierConfig, fit_prototypes
from fewshot_ext.models.wide_resnet import WideResNet28

__all__ = [
    "FCN",
    "BNInception",
    "Backbone",
    "BackboneConfig",
    "CheckpointSettings",
    "ConvBackbone",
    "ConvBlock",
    "DeepEMD",
    "DropBlock",
    "EfficientNetLite0",
    "EmbeddedBackbone",
    "Grid",
    "LocalFeatures",
    "LocalFeaturesConfig",
    "Match",
    "NarrowResNet12",
    "Network",
    "NetworkConfig",
    "ResNet12",
    "ResNet18",
    "ResNet50",
    "Sampling",
    "StructuredClassifierConfig",
    "WideResNet28",
    "as_network",
    "build_backbone",
    "build_local_features",
    "build_network",
    "class_prototypes",
    "conv4",
    "cross_reference_weights",
    "emd_logits",
    "fit_prototypes",
    "load_network",
    "match_flows",
]
