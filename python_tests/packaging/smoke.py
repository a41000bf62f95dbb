"""One forward and backward of an operator, by the installed package and its core dependencies alone.

Run with ``python -I``, so that neither the working directory nor this folder is on the path.
"""

import torch
from torch.nn.functional import cross_entropy, normalize, one_hot

import fewshot_ext

generator = torch.Generator().manual_seed(0)
features = torch.randn(8, 16, generator=generator, requires_grad=True)
weight = torch.randn(5, 16, generator=generator, requires_grad=True)
target = torch.randint(5, (8,), generator=generator)
margin, scale = -0.3, 30.0

cosine = normalize(features) @ normalize(weight).T
expected = cross_entropy(scale * (cosine - margin * one_hot(target, 5)), target)
loss = fewshot_ext.margin_cosine_loss(features, weight, target, margin=margin, scale=scale)

torch.testing.assert_close(loss, expected)
torch.testing.assert_close(
    torch.autograd.grad(loss, (features, weight)), torch.autograd.grad(expected, (features, weight))
)
print(f"{fewshot_ext.__file__}: version {fewshot_ext.__version__}, forward and backward agree with the formula")
