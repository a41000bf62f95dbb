"""Checkpoints as other code writes them: random weights under its names, and its forward pass, written by hand.

Nothing here knows the package. Names and shapes are those of the public repositories; each forward pass goes through
the weights by those names, so that it stands for the code that wrote them.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F


@dataclass
class Weights:
    """A state_dict that is being written, its names behind a prefix."""

    prefix: str = ""
    state: dict = field(default_factory=dict)
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def draw(self, *shape):
        return torch.randn(*shape, generator=self.generator)

    def conv(self, name, outputs, inputs, side, bias=False):
        self.state[f"{self.prefix}{name}.weight"] = self.draw(outputs, inputs, side, side) / (inputs * side**2) ** 0.5
        if bias:
            self.state[f"{self.prefix}{name}.bias"] = self.draw(outputs)

    def norm(self, name, channels):
        place = f"{self.prefix}{name}."
        self.state[place + "weight"] = 1 + self.draw(channels) / 4
        self.state[place + "bias"] = self.draw(channels) / 4
        self.state[place + "running_mean"] = self.draw(channels) / 4
        self.state[place + "running_var"] = 1 + self.draw(channels).abs() / 4
        self.state[place + "num_batches_tracked"] = torch.tensor(7)


@dataclass
class Case:
    """Weights and the forward pass of the code that wrote them, from pixels ``[N, 3, H, W]`` to features."""

    weights: Weights
    forward: object
    side: int

    @property
    def state(self):
        return self.weights.state

    def conv(self, x, name, stride=1, padding=None):
        place = f"{self.weights.prefix}{name}"
        weight = self.state[f"{place}.weight"]
        padding = weight.shape[-1] // 2 if padding is None else padding
        return F.conv2d(x, weight, self.state.get(f"{place}.bias"), stride, padding)

    def norm(self, x, name):
        place = f"{self.weights.prefix}{name}."
        parts = (self.state[place + leaf] for leaf in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *parts)

    def features(self, pixels):
        return self.forward(self, pixels)


def conv4(prefix, conv, norm, copies=None, width=4, first=0):
    """``conv`` and ``norm`` are names with a place for the block's number; ``copies`` those of a second set."""
    weights = Weights(prefix)
    for number in range(first, first + 4):
        inputs = 3 if number == first else width
        weights.conv(conv.format(number), width, inputs, 3, bias=True)
        weights.norm(norm.format(number), width)
        for name, copy in zip((conv, norm), copies or (), strict=False):
            own = {key: value for key, value in weights.state.items() if key.startswith(prefix + name.format(number))}
            for key, value in own.items():
                weights.state[key.replace(name.format(number), copy.format(number))] = value

    def forward(case, x):
        for number in range(first, first + 4):
            x = F.max_pool2d(F.relu(case.norm(case.conv(x, conv.format(number)), norm.format(number))), 2)
        return x.flatten(1)

    return Case(weights, forward, 32)


def resnet12(prefix, conv="conv", norm="bn", block=".0", widths=(4, 10, 20, 40)):
    weights, inputs = Weights(prefix), 3
    for stage, width in enumerate(widths, 1):
        place = f"layer{stage}{block}"
        for part in (1, 2, 3):
            weights.conv(f"{place}.{conv}{part}", width, inputs if part == 1 else width, 3)
            weights.norm(f"{place}.{norm}{part}", width)
        weights.conv(f"{place}.downsample.0", width, inputs, 1)
        weights.norm(f"{place}.downsample.1", width)
        inputs = width

    def forward(case, x):
        for stage in (1, 2, 3, 4):
            place = f"layer{stage}{block}"
            y = x
            for part in (1, 2, 3):
                y = case.norm(case.conv(y, f"{place}.{conv}{part}"), f"{place}.{norm}{part}")
                y = F.leaky_relu(y, 0.1) if part < 3 else y
            y = y + case.norm(case.conv(x, f"{place}.downsample.0"), f"{place}.downsample.1")
            x = F.max_pool2d(F.leaky_relu(y, 0.1), 2)
        return x.mean((2, 3))

    return Case(weights, forward, 32)


def resnet(prefix, blocks, stem, conv="conv", norm="bn", shortcut=("downsample.0", "downsample.1"), bottleneck=False):
    """ResNet-18 and, with bottlenecks, ResNet-50, of 4 channels in the first stage; strides as torchvision has them."""
    weights, inputs, width, grown = Weights(prefix), 4, 4, 4 if bottleneck else 1
    weights.conv(stem[0], width, 3, 7)
    weights.norm(stem[1], width)
    for stage, count in enumerate(blocks):
        inner = width * 2**stage
        for block in range(count):
            place = f"layer{stage + 1}.{block}"
            shapes = [(inner, inputs, 1), (inner, inner, 3), (inner * 4, inner, 1)]
            shapes = shapes if bottleneck else [(inner, inputs, 3), (inner, inner, 3)]
            for part, shape in enumerate(shapes, 1):
                weights.conv(f"{place}.{conv}{part}", *shape)
                weights.norm(f"{place}.{norm}{part}", shape[0])
            if inputs != inner * grown:
                weights.conv(f"{place}.{shortcut[0]}", inner * grown, inputs, 1)
                weights.norm(f"{place}.{shortcut[1]}", inner * grown)
            inputs = inner * grown

    def forward(case, x):
        x = F.max_pool2d(F.relu(case.norm(case.conv(x, stem[0], 2), stem[1])), 3, 2, 1)
        for stage, count in enumerate(blocks):
            for block in range(count):
                place, stride = f"layer{stage + 1}.{block}", 2 if stage and not block else 1
                y, parts = x, 3 if bottleneck else 2
                for part in range(1, parts + 1):
                    # The convolution of 3 x 3 has the stride: the first of two, the second of three.
                    own = stride if part == parts - 1 else 1
                    y = case.norm(case.conv(y, f"{place}.{conv}{part}", own), f"{place}.{norm}{part}")
                    y = F.relu(y) if part < parts else y
                if f"{prefix}{place}.{shortcut[0]}.weight" in case.state:
                    x = case.norm(case.conv(x, f"{place}.{shortcut[0]}", stride), f"{place}.{shortcut[1]}")
                x = F.relu(x + y)
        return x.mean((2, 3))

    return Case(weights, forward, 64)


def wrn(prefix, widths=(2, 4, 8)):
    weights, inputs = Weights(prefix), 16
    weights.conv("conv1", 16, 3, 3)
    for stage, width in enumerate(widths, 1):
        for block in range(4):
            place = f"layer{stage}.{block}"
            weights.norm(f"{place}.BN1", inputs)
            weights.conv(f"{place}.C1", width, inputs, 3)
            weights.norm(f"{place}.BN2", width)
            weights.conv(f"{place}.C2", width, width, 3)
            if inputs != width:
                weights.conv(f"{place}.convShortcut", width, inputs, 1)
            inputs = width
    weights.norm("bn1", inputs)

    def forward(case, x):
        x = case.conv(x, "conv1")
        for stage in (1, 2, 3):
            for block in range(4):
                place, stride = f"layer{stage}.{block}", 2 if stage > 1 and not block else 1
                y = F.relu(case.norm(x, f"{place}.BN1"))
                z = F.relu(case.norm(case.conv(y, f"{place}.C1", stride), f"{place}.BN2"))
                first = f"{prefix}{place}.convShortcut.weight" in case.state
                x = case.conv(z, f"{place}.C2") + (case.conv(y, f"{place}.convShortcut", stride) if first else x)
        return F.relu(case.norm(x, "bn1")).mean((2, 3))

    return Case(weights, forward, 16)


def negative_margin(backbone, bias=False):
    """The case and the content of a ``.tar`` of the official negative-margin code."""
    import numpy as np

    case = {
        "conv4": lambda: conv4(
            "feature.", "trunk.{}.C", "trunk.{}.BN", copies=("trunk.{}.trunk.0", "trunk.{}.trunk.1")
        ),
        "resnet12": lambda: resnet12("feature.", "C", "BN"),
        "resnet18": lambda: resnet(
            "feature.", (2, 2, 2, 2), ("trunk.0", "trunk.1"), "C", "BN", ("shortcut", "BNshortcut")
        ),
        "wrn28_10": lambda: wrn("module.feature."),
    }[backbone]()
    parallel = "module." if backbone == "wrn28_10" else ""
    features = case.features(torch.zeros(1, 3, 84 if backbone == "conv4" else case.side, case.side)).shape[1]
    case.state[f"{parallel}classifier.weight"] = case.weights.draw(6, features)
    if bias:
        case.state[f"{parallel}classifier.bias"] = case.weights.draw(6)
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([parameter])
    parameter.sum().backward()
    optimizer.step()
    accuracies = {"acc": np.float64(0.5), "best_acc": np.mean(np.ones(3, np.float32))}
    return case, {"epoch": 399, "state": case.state, **accuracies, "optimizer": optimizer.state_dict()}


def torchvision(depth):
    """The case of a ResNet-18 or ResNet-50 of torchvision, with its classifier; timm has the same names."""
    blocks = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}[depth]
    case = resnet("", blocks, ("conv1", "bn1"), bottleneck=depth == 50)
    case.state["fc.weight"] = case.weights.draw(5, 128 if depth == 50 else 32)
    case.state["fc.bias"] = case.weights.draw(5)
    return case


def bn_inception():
    """The case of a BN-Inception of pretrainedmodels, a 32nd as wide, with its classifier."""
    weights, inputs = Weights(), 6
    joined = {
        "3a": "2 2 2 2 3 1", "3b": "2 2 3 2 3 2", "3c": "- 4 5 2 3 -", "4a": "7 2 3 3 4 4", "4b": "6 3 4 3 4 4",
        "4c": "5 4 5 4 5 4", "4d": "3 4 6 5 6 4", "4e": "- 4 6 6 8 -", "5a": "11 6 10 5 7 4", "5b": "11 6 10 6 7 4",
    }  # fmt: skip
    layers = [("conv1_7x7_s2", 2, 3, 7), ("conv2_3x3_reduce", 2, 2, 1), ("conv2_3x3", 6, 2, 3)]
    for block, numbers in joined.items():
        one, reduced, three, twice, double, projected = (int(n) if n != "-" else 0 for n in numbers.split())
        place = f"inception_{block}_"
        layers += [(f"{place}1x1", one, inputs, 1), (f"{place}pool_proj", projected, inputs, 1)] if one else []
        layers += [(f"{place}3x3_reduce", reduced, inputs, 1), (f"{place}3x3", three, reduced, 3)]
        layers += [(f"{place}double_3x3_reduce", twice, inputs, 1), (f"{place}double_3x3_1", double, twice, 3)]
        layers += [(f"{place}double_3x3_2", double, double, 3)]
        inputs = one + three + double + (projected or inputs)
    for name, *shape in layers:
        weights.conv(name, *shape, bias=True)
        weights.norm(f"{name}_bn", shape[0])
    weights.state["last_linear.weight"], weights.state["last_linear.bias"] = weights.draw(5, 32), weights.draw(5)

    def forward(case, x):
        def layer(x, name, stride=1):
            return F.relu(case.norm(case.conv(x, name, stride), f"{name}_bn"))

        x = F.max_pool2d(layer(x[:, [2, 1, 0]], "conv1_7x7_s2", 2), 3, 2, ceil_mode=True)
        x = F.max_pool2d(layer(layer(x, "conv2_3x3_reduce"), "conv2_3x3"), 3, 2, ceil_mode=True)
        for block in joined:
            place, stride = f"inception_{block}_", 2 if block in ("3c", "4e") else 1
            three = layer(layer(x, f"{place}3x3_reduce"), f"{place}3x3", stride)
            double = layer(layer(x, f"{place}double_3x3_reduce"), f"{place}double_3x3_1")
            double = layer(double, f"{place}double_3x3_2", stride)
            if stride == 2:
                x = torch.cat([three, double, F.max_pool2d(x, 3, 2, ceil_mode=True)], 1)
                continue
            pooled = F.max_pool2d(x, 3, 1, 1) if block == "5b" else F.avg_pool2d(x, 3, 1, 1)
            x = torch.cat([layer(x, f"{place}1x1"), three, double, layer(pooled, f"{place}pool_proj")], 1)
        return x.mean((2, 3))

    return Case(weights, forward, 64)


def libfewshot(backbone, prefix="emb_func."):
    if backbone == "conv4":
        return conv4(prefix, "layer{}.0", "layer{}.1", first=1)
    return resnet12(prefix)


def meta_baseline(backbone):
    """The case and the content of a ``.pth`` of few-shot-meta-baseline, after its first stage."""
    if backbone == "resnet18":
        case = resnet("encoder.", (2, 2, 2, 2), ("conv1", "bn1"))
    else:
        widths = (4, 8, 16, 32) if backbone == "resnet12" else (4, 10, 20, 40)
        case = resnet12("encoder.", block="", widths=widths)
    case.state["classifier.linear.weight"] = case.weights.draw(5, 32)
    case.state["classifier.linear.bias"] = case.weights.draw(5)
    training = {"epoch": 100, "optimizer": "sgd", "optimizer_args": {"lr": 0.1}, "optimizer_sd": {"state": {}}}
    arguments = {"encoder": backbone, "encoder_args": {}, "classifier": "linear-classifier"}
    content = {"file": "train.py", "config": {}, "model": "classifier", "model_args": arguments}
    return case, {**content, "model_sd": case.state, "training": training}
