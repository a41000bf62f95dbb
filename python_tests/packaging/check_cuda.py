"""Shows that the installed package's CUDA library loads and has a kernel for every native operator. Needs no GPU.

Run with ``python -I``, so that neither the working directory nor this folder is on the path.
"""

import torch

import fewshot_ext
from fewshot_ext import _library


def has_kernel(operator, key):
    return torch._C._dispatch_has_kernel_for_dispatch_key(operator, key)


def served_by(operator):
    """What serves CUDA tensors, or None."""
    # Registered for CUDA itself: a fallback for all devices would not be a CUDA kernel.
    if has_kernel(operator, "CUDA"):
        return "CUDA kernel"
    # One written in Python calls torch's operators on every device and has no kernel for the CPU either.
    if has_kernel(operator, "CompositeExplicitAutograd") and not has_kernel(operator, "CPU"):
        return "torch's operators"
    return None


def faults():
    if _library.cuda_error is not None:
        return [f"the CUDA library is not loaded: {_library.cuda_error}"]
    operators = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fewshot_ext::"))
    if not operators:
        return ["no operator is registered"]
    served = {name: served_by(name) for name in operators}
    for name, by in served.items():
        print(f"  {name:<40}  {by or 'MISSING'}")
    return [f"{name} has no CUDA kernel" for name, by in served.items() if by is None]


def main():
    print(f"{fewshot_ext.__file__}: torch {torch.__version__}, {torch.cuda.device_count()} GPUs")
    found = faults()
    for fault in found:
        print(f"FAULT: {fault}")
    raise SystemExit(bool(found))


if __name__ == "__main__":
    main()
