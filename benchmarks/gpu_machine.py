"""What the GPU report says of the machine: versions, missing packages, and the two rates that bound every kernel."""

import importlib
import shutil
import subprocess
from functools import partial

import gpu_timing
import harness
import torch
from gpu_worker import one_line

from fewshot_ext import env

JOBS = ("facts", "packages", "rates")
# Module -> what goes without it.
PACKAGES = {
    "pytest": "the tests",
    "hypothesis": "the tests",
    "expecttest": "the tests",
    "triton": "torch.compile, cut-cross-entropy, liger-kernel",
    "cut_cross_entropy": "its comparison",
    "liger_kernel.ops.fused_linear_cross_entropy": "its comparison",
}
SMI_FIELDS = (
    "driver_version",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "power.limit",
    "temperature.gpu",
    "compute_mode",
    "mig.mode.current",
)


def measure(job: str, bench) -> dict:
    return {"facts": facts, "packages": packages, "rates": rates}[job](bench)


def facts(bench) -> dict:
    """``columns`` goes into every CSV row, ``details`` into the report."""
    versions = harness.versions("torch", "triton", "cut-cross-entropy", "liger-kernel")
    report = env.render(env.report())
    if bench.device.name == "cpu":
        name = f"{harness.processor()} (rehearsal, no GPU)"
        columns = {"device": name, "capability": "", "driver": "", "cuda": "", **versions}
        return {"columns": columns, "details": {"device": name}, "environment": report}
    properties = bench.device.properties
    smi = nvidia_smi(bench.device.device.index)
    columns = {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "driver": smi.get("driver_version", "not readable"),
        "cuda": torch.version.cuda,
        **versions,
    }
    details = {
        "multiprocessors": properties.multi_processor_count,
        "memory": f"{properties.total_memory / 2**30:.1f} GiB",
        "L2 cache": f"{bench.device.cache_bytes() / 2**20:.0f} MiB",
        **smi,
    }
    return {"columns": columns, "details": {**columns, **details}, "environment": report}


def nvidia_smi(index: int) -> dict[str, str]:
    """What nvidia-smi reads, changing nothing; why not, where it does not."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return {"clocks": "not readable: no nvidia-smi on the PATH"}
    # torch counts the devices that CUDA_VISIBLE_DEVICES leaves, nvidia-smi all of them; both know the PCI address.
    bus = torch.cuda.get_device_properties(index)
    selected = f"{bus.pci_domain_id:08x}:{bus.pci_bus_id:02x}:{bus.pci_device_id:02x}.0"
    query = [command, f"--id={selected}", f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"clocks": f"not readable: {one_line(error)}"}
    values = [value.strip() for value in done.stdout.strip().split(",")]
    if done.returncode != 0 or len(values) != len(SMI_FIELDS):
        return {"clocks": f"not readable: nvidia-smi said {(done.stdout + done.stderr).strip()[:200]!r}"}
    return dict(zip(SMI_FIELDS, values, strict=True))


def packages(bench) -> dict[str, str]:
    """Package -> why it cannot be imported and what goes without it."""
    missing = {}
    for module, without in PACKAGES.items():
        bench.begin("import", contender=module, kernel=module)
        reason = bench.left_out(module, "import", module) or failure_to_import(module)
        if reason is not None:
            missing[module] = f"{reason}; without it: {without}"
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        missing["torch.nn.functional.linear_cross_entropy"] = "torch has it from 2.13 on; without it: its comparison"
    return missing


def failure_to_import(module: str) -> str | None:
    # A package that does not fit the torch or the Triton it meets fails with any exception there is.
    try:
        importlib.import_module(module)
    except Exception as error:
        return one_line(error)
    return None


def rates(bench) -> dict[str, float]:
    """GB/s of a copy, bytes read plus bytes written, and TFLOP/s of a large square product in each precision."""
    device, small = bench.device, bench.device.name == "cpu"
    turns = 3 if bench.quick else 15
    generator = gpu_timing.generator(device)
    count = (1 << 22) if small else (1 << 28)
    source = torch.randn(count, generator=generator, device=device.device)
    target = torch.empty_like(source)
    bench.begin("copy")
    call = {"copy": partial(target.copy_, source)}
    timing = harness.interleaved(call, seconds=0, turns=turns, measure=device.elapsed)
    found = {"copy_gb_per_s": 2 * source.nbytes / timing["copy"].p50 / 1e6}
    del call, source, target
    for name, (dtype, _) in gpu_timing.DTYPES.items():
        bench.begin(f"square product in {name}")
        side = 256 if small else 4096 if name == "float32" else 8192
        a, b = (torch.randn(side, side, generator=generator, device=device.device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        with gpu_timing.precision(name):
            call = {"mm": partial(torch.mm, a, b, out=out)}
            timing = harness.interleaved(call, seconds=0, turns=turns, measure=device.elapsed)
        found[f"{name}_tflop_per_s"] = 2 * side**3 / timing["mm"].p50 / 1e9
    return found
