"""Shows that the installed package's CUDA library loads and has a kernel for every operator. Needs no GPU.

Run with ``python -I``, so that neither the working directory nor this folder is on the path.
"""

import torch

import fewshot_ext
from fewshot_ext import _library


def faults():
    if _library.cuda_error is not None:
        return [f"the CUDA library is not loaded: {_library.cuda_error}"]
    operators = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fewshot_ext::"))
    if not operators:
        return ["no operator is registered"]
    missing = []
    for name in operators:
        # Registered for CUDA itself: a fallback for all devices would not be a CUDA kernel.
        there = torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")
        print(f"  {name:<40}  {'CUDA kernel' if there else 'MISSING'}")
        if not there:
            missing.append(f"{name} has no CUDA kernel")
    return missing


def main():
    print(f"{fewshot_ext.__file__}: torch {torch.__version__}, {torch.cuda.device_count()} GPUs")
    found = faults()
    for fault in found:
        print(f"FAULT: {fault}")
    raise SystemExit(bool(found))


if __name__ == "__main__":
    main()
