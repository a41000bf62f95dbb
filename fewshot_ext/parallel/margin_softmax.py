"""Signed-margin softmax with the classes divided among ranks."""

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from fewshot_ext._random import derive_generator, derive_seed
from fewshot_ext._validation import (
    FLOATING_DTYPES,
    check_between,
    check_choice,
    check_count,
    check_flag,
    check_floating,
    check_labels,
    check_positive,
    check_similarity,
)
from fewshot_ext.ops.margin_softmax import DEFAULTS, check_settings, check_tensors
from fewshot_ext.parallel._autograd import IGNORED, ClassParallelMarginSoftmax, Problem
from fewshot_ext.parallel._collectives import Batches, StepAgreement, agree_once

INITIAL_BLOCK = 1024  # classes drawn from one seed, so that the weight does not depend on the number of ranks

_FLAG = (False, True)
_STEP_FACTS = {
    "features: dtype": FLOATING_DTYPES,
    "features: requires_grad": _FLAG,
    "weight: requires_grad": _FLAG,
    "training": _FLAG,
    "return_prediction": _FLAG,
}


class ClassParallelMarginLoss(nn.Module):
    r"""Margin softmax over classes divided among the ranks of a process group, for more of them than one device holds.

    Every rank holds its own batch and the weight of its own classes. Loss and gradients are those of
    :func:`fewshot_ext.margin_cosine_loss` or :func:`fewshot_ext.margin_softmax_loss` on the batches of all ranks
    together and the whole weight. The logits are not stored, neither those of all classes nor those of the shard.

    The weight is a :class:`torch.distributed.tensor.DTensor` ``[num_classes, in_features]`` in shards of
    ceil(num_classes / ranks) classes, of which the last may be smaller or empty. Optimizers and
    ``torch.distributed.checkpoint`` know what to do with it, at another number of ranks too.

    Do not wrap this module in ``DistributedDataParallel``; only the backbone goes there. DDP takes the mean of the
    backbone's gradients over ranks, where the gradient of one loss over all batches is their sum. With
    ``backbone_gradients="mean"`` the features' gradient is the number of ranks times as large, and the mean then is
    the gradient of the loss. The weight's gradient is the loss's own in either case.

    Args:
        in_features: D, the length of a feature vector.
        num_classes: C >= 2, over all ranks.
        margin, scale: as in the one-process losses; None takes the defaults of the similarity, -0.3 and 30 for cosine,
            -1 and 5 for softmax.
        similarity: "cosine" or "dot" (the inner product).
        reduction: "mean" and "sum" are over the rows of all ranks, and every rank gets the same number. "none" gives
            each rank its own rows, and the gradients are those of the sum over ranks of what each makes of its rows.
        ignore_index, label_smoothing: as in the one-process losses.
        sample_rate: in (0, 1]; below 1, the softmax of a training step is over the classes that occur in the batches
            of all ranks and a random choice of the others, so that each rank takes part with
            ceil(sample_rate * its classes), or with more where more of them occur (Partial FC). Rows not chosen get
            a zero gradient. In evaluation mode all classes take part.
        backbone_gradients: "mean" where the gradients of the backbone's replicas are averaged over ranks, as DDP and
            FSDP do, "sum" where they are added.
        seed: of the initial weight and of the choice of classes. The initial weight is the same for every number of
            ranks; the choice depends on seed, step and rank, and the step is part of the state.
        check: exchange one small tensor before each step, so that batches may differ in size, and a mistake of one
            rank raises on all. Without it every rank must bring as many rows as the others, labels out of range are
            an error on the CPU and NaN on a GPU, and no step makes the host wait for a GPU.
        group: the ranks; None for the default group.
        device: of the shard; None for the accelerator where the group's backend is for it, else the CPU.
        dtype: of the weight.

    Shape:
        features ``[N_r, D]``, target ``[N_r]`` int64 with labels in [0, C) -> ``[]``, or ``[N_r]`` for "none"; with
        ``return_prediction`` a pair of it and the predictions, ``[N_r]`` int64, among the classes that took part.

    Gradients reach features and weight; second and forward-mode derivatives raise a RuntimeError.

    Raises:
        RuntimeError: ``torch.distributed`` is not initialized. A rank that dies, or does not come to a collective
            within the group's timeout, raises on the others.
        TypeError or ValueError: as in the one-process losses, on every rank, naming the rank at fault; ranks that
            differ in a setting, or in dtype, gradients or mode at a step.

    Reference:
        An et al., "Partial FC: Training 10 Million Identities on a Single Machine", ICCV Workshops 2021; "Killing Two
        Birds with One Stone: Efficient and Robust Training of Face Recognition CNNs by Partial FC", CVPR 2022.

    Example:
        >>> import torch, torch.distributed as dist  # one process here; torchrun starts as many as there are GPUs
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> from fewshot_ext.parallel import ClassParallelMarginLoss
        >>> loss = ClassParallelMarginLoss(in_features=64, num_classes=1000, margin=-0.3)
        >>> features, target = torch.randn(8, 64, requires_grad=True), torch.randint(1000, (8,))
        >>> loss(features, target).backward()
        >>> loss.weight.grad.shape
        torch.Size([1000, 64])
        >>> dist.destroy_process_group()
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        margin: float | None = None,
        scale: float | None = None,
        *,
        similarity: str = "cosine",
        reduction: str = "mean",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        sample_rate: float = 1.0,
        backbone_gradients: str = "mean",
        seed: int = 0,
        check: bool = True,
        group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not dist.is_initialized():
            raise RuntimeError(
                "fewshot_ext.parallel: torch.distributed is not initialized; call "
                "torch.distributed.init_process_group first, under torchrun"
            )
        group = dist.group.WORLD if group is None else group
        if dist.get_rank(group) < 0:
            raise ValueError("group: this process is not in it")

        def settings() -> dict[str, object]:
            chosen = check_similarity(similarity)
            defaults = DEFAULTS[chosen]
            numbers = check_settings(
                defaults[0] if margin is None else margin,
                defaults[1] if scale is None else scale,
                label_smoothing,
                ignore_index,
                reduction,
            )
            check_choice("backbone_gradients", backbone_gradients, "mean", "sum")
            check_flag("check", check)
            check_floating("dtype", torch.empty(0, dtype=dtype))
            rate = check_positive("sample_rate", check_between("sample_rate", sample_rate, 0, 1))
            return {
                "in_features": check_count("in_features", in_features, 1),
                "num_classes": check_count("num_classes", num_classes, 2),
                **dict(zip(("margin", "scale", "label_smoothing", "ignore_index"), numbers, strict=True)),
                "similarity": chosen,
                "reduction": reduction,
                "sample_rate": rate,
                "backbone_gradients": backbone_gradients,
                "seed": check_count("seed", seed, 0),
                "check": check,
                "dtype": dtype or torch.get_default_dtype(),
            }

        agreed = agree_once(settings, group)
        dtype = agreed.pop("dtype")
        for name, value in agreed.items():
            setattr(self, name, value)
        self._setting_names = tuple(agreed)

        device = torch.device(_device_of(group) if device is None else device)
        # The mesh and not the group is kept, because a group cannot be pickled.
        self._mesh = DeviceMesh.from_group(group, device.type)
        self.classes = self._classes_of(dist.get_rank(group))
        shard = torch.empty(len(self.classes), self.in_features, device=device, dtype=dtype)
        self.weight = nn.Parameter(
            DTensor.from_local(
                shard,
                self._mesh,
                [Shard(0)],
                run_check=False,
                shape=torch.Size([self.num_classes, self.in_features]),
                stride=(self.in_features, 1),
            )
        )
        if self.sample_rate < 1:
            self.register_buffer("sampling_step", torch.zeros((), dtype=torch.int64, device=device))
        self.reset_parameters()

    @property
    def group(self) -> dist.ProcessGroup:
        """The ranks that the classes are divided among."""
        return self._mesh.get_group()

    def _classes_of(self, rank: int) -> range:
        """The shards of a DTensor: equal ones as long as the classes last."""
        each = -(-self.num_classes // self._mesh.size())
        return range(min(rank * each, self.num_classes), min((rank + 1) * each, self.num_classes))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """kaiming_uniform with a = sqrt(5), as in the one-process losses; each rank draws its own classes."""
        bound = 1 / math.sqrt(self.in_features)
        shard, first, stop = self.weight.to_local(), self.classes.start, self.classes.stop
        for block in range(first // INITIAL_BLOCK, -(-stop // INITIAL_BLOCK)):
            drawn = range(block * INITIAL_BLOCK, (block + 1) * INITIAL_BLOCK)
            begin, end = max(drawn.start, first), min(drawn.stop, stop)
            values = torch.empty(INITIAL_BLOCK, self.in_features)
            values.uniform_(-bound, bound, generator=derive_generator(self.seed, 0, block))
            shard[begin - first : end - first] = values[begin - drawn.start : end - drawn.start]

    @torch.compiler.disable
    def forward(
        self, features: Tensor, target: Tensor, *, return_prediction: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Loss of the batches of all ranks, of which ``features [N_r, D]`` and ``target [N_r]`` are this rank's. All
        ranks have to call it, with the same ``return_prediction``."""
        features, weight, sizes = self._check_step(features, target, return_prediction)
        batches = Batches(sizes, self.group)
        if self.reduction == "mean" and batches.total == 0:
            raise ValueError("features: got no samples on any rank, which have no mean; use reduction='sum' or 'none'")
        target = batches.gather(target)
        local = self._label_in_shard(target)
        rows, total_classes = None, self.num_classes
        if self.training and self.sample_rate < 1:
            rows, total_classes = self._sample(target, local)
            weight = weight.index_select(0, rows)
            local = _label_among(rows, local, len(self.classes))
        problem = Problem(
            batches,
            self.margin,
            self.scale,
            self.label_smoothing,
            self.reduction,
            self.similarity == "cosine",
            total_classes,
            self._mesh.size() if self.backbone_gradients == "mean" else 1,
            self._class_numbers(rows, target.device) if return_prediction else None,
        )
        try:
            loss, prediction = ClassParallelMarginSoftmax.apply(features, weight, local, problem)
        except RuntimeError:
            # On the CPU the kernel looks at every label, but knows it by its number within the shard.
            if not self.check and target.device.type == "cpu":
                check_labels("target", target, self.num_classes, self.ignore_index)
            raise
        return (loss, prediction) if return_prediction else loss

    def _check_step(
        self, features: Tensor, target: Tensor, return_prediction: bool
    ) -> tuple[Tensor, Tensor, list[int]]:
        """Features and the shard in one dtype, and the size of every rank's batch."""
        weight, error, facts = self.weight.to_local(), None, {}
        try:
            check_flag("return_prediction", return_prediction)
            features, weight = check_tensors(features, weight, target)
            grad = torch.is_grad_enabled()
            flags = (grad and features.requires_grad, grad and weight.requires_grad, self.training, return_prediction)
            facts = dict(zip(_STEP_FACTS, (features.dtype, *flags), strict=True))
            if self.check:
                check_labels("target", target, self.num_classes, self.ignore_index)
        except (TypeError, ValueError) as raised:
            if not self.check:
                raise
            error = raised
        if not self.check:
            return features, weight, [len(features)] * self._mesh.size()
        agreement = StepAgreement(_STEP_FACTS, self.group, weight.device)
        return features, weight, agreement.reach(0 if error else len(features), facts, error)

    def _label_in_shard(self, target: Tensor) -> Tensor:
        """Labels as :class:`ClassParallelMarginSoftmax` takes them, and num_classes for one out of range."""
        shard = len(self.classes)
        local = target - self.classes.start
        local = torch.where((local >= 0) & (local < shard), local, shard)
        local.masked_fill_((target < 0) | (target >= self.num_classes), self.num_classes)
        return local.masked_fill_(target == self.ignore_index, IGNORED)

    def _sample(self, target: Tensor, local: Tensor) -> tuple[Tensor, int]:
        """Rows of the shard for this step, in ascending order, and their number over all shards."""
        shard = len(self.classes)
        seed = derive_seed(self.seed, 1, int(self.sampling_step), self.group.rank())
        self.sampling_step += 1
        generator = torch.Generator(local.device).manual_seed(seed)
        score = torch.rand(shard, device=local.device, generator=generator)
        score[local[(local >= 0) & (local < shard)]] = 2
        # Every rank sees all labels, so that it knows how many rows the others take without asking.
        present = target[(target >= 0) & (target < self.num_classes) & (target != self.ignore_index)].unique()
        each = len(self._classes_of(0))
        positives = torch.bincount(present // each, minlength=self._mesh.size()).tolist()
        counts = [
            min(size, max(2, found, math.ceil(self.sample_rate * size)))
            for found, size in zip(positives, (len(self._classes_of(r)) for r in range(self._mesh.size())), strict=True)
        ]
        return score.topk(counts[self.group.rank()]).indices.sort().values, sum(counts)

    def _class_numbers(self, rows: Tensor | None, device: torch.device) -> Tensor:
        if rows is not None:
            return self.classes.start + rows
        return torch.arange(self.classes.start, self.classes.stop, device=device)

    def extra_repr(self) -> str:
        settings = ", ".join(f"{name}={getattr(self, name)!r}" for name in self._setting_names)
        return f"{settings}, classes={self.classes.start}..{self.classes.stop} of rank {self.group.rank()}"


def _label_among(rows: Tensor, local: Tensor, shard: int) -> Tensor:
    """Labels within the shard -> within a choice of its rows that has all of those that occur."""
    owned = (local >= 0) & (local < shard)
    # A label of another shard only has to lie beyond the rows, and one out of range to stay where it is.
    return torch.where(owned, torch.searchsorted(rows, local), torch.where(local == shard, len(rows), local))


def _device_of(group: dist.ProcessGroup) -> str:
    accelerator = torch.accelerator.current_accelerator()
    return "cpu" if accelerator is None or dist.get_backend(group) == "gloo" else accelerator.type
