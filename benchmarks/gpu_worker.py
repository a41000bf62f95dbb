"""The process in which the GPU report measures: does jobs and prints an event a line, in JSON.

    begin     what comes next (job, contender, phase, kernel) and for how many seconds it may be silent (patience)
    result    what a job has found
    error     why a job has found nothing; the next one goes on
    done      the job is finished
    fault     why this process cannot go on

gpu_process.supervise runs it, and says in the command line's JSON what to do and what to leave out.
"""

import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from functools import partial
from typing import NoReturn

import gpu_comparison
import harness
import torch
from gpu_comparison import one_line

from fewshot_ext import env


class Bench:
    """What a job gets: the device, the time, and a way to say what it is at."""

    def __init__(self, orders: dict, events) -> None:
        self.device = gpu_comparison.DEVICES[orders["device"]]()
        self.quick: bool = orders["quick"]
        self.seconds: float = orders["seconds"]  # to spend on the turns of one job, about
        self.rates: dict[str, float] = orders["rates"]
        self._until: float = orders["until"]
        self._left_out: list[dict] = orders["left_out"]
        self._events = events
        self._job = ""

    def emit(self, event: str, **facts) -> None:
        print(json.dumps({"event": event, "job": self._job, **facts}), file=self._events, flush=True)

    def begin(self, phase: str, contender: str = "", kernel: str = "", patience: float = 60.0) -> None:
        """``kernel`` names what fails where this fails, so that it need not fail for every job and contender."""
        self.emit("begin", phase=phase, contender=contender, kernel=kernel, patience=patience)

    def left_out(self, contender: str, phase: str, kernel: str = "") -> str | None:
        """Why this is not to be done, where an earlier process died of it."""
        for failure in self._left_out:
            here = (failure["job"], failure["contender"], failure["phase"]) == (self._job, contender, phase)
            if here or (failure["everywhere"] and (failure["kernel"], failure["phase"]) == (kernel, phase)):
                return f"{failure['reason']} ({failure['phase']})" + ("" if here else f" at {failure['job']}")
        return None

    def remaining(self) -> float:
        return self._until - time.time()

    def fault(self, reason: str) -> NoReturn:
        """Ends the process without destructors, which would talk to a CUDA context that is beyond repair."""
        self.emit("fault", reason=reason)
        os._exit(3)

    def survive(self, error: Exception) -> None:
        """Ends the process where the device has not survived the error."""
        if isinstance(error, gpu_comparison.CaptureError) or not self.device.is_healthy():
            self.fault(one_line(error))

    def do(self, module, job: str) -> None:
        self._job = job
        self.begin("preparation")
        try:
            result = module.measure(job, self)
        except Exception as error:
            self.survive(error)
            self.emit("error", reason=one_line(error))
        else:
            self.emit("result", result=result)
        self.device.release_memory()
        self.emit("done")


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
    generator = gpu_comparison.generator(device)
    count = (1 << 22) if small else (1 << 28)
    source = torch.randn(count, generator=generator, device=device.device)
    target = torch.empty_like(source)
    bench.begin("copy")
    call = {"copy": partial(target.copy_, source)}
    timing = harness.interleaved(call, seconds=0, turns=turns, measure=device.elapsed)
    found = {"copy_gb_per_s": 2 * source.nbytes / timing["copy"].p50 / 1e6}
    del call, source, target
    for name, (dtype, _) in gpu_comparison.DTYPES.items():
        bench.begin(f"square product in {name}")
        side = 256 if small else 4096 if name == "float32" else 8192
        a, b = (torch.randn(side, side, generator=generator, device=device.device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        with gpu_comparison.precision(name):
            call = {"mm": partial(torch.mm, a, b, out=out)}
            timing = harness.interleaved(call, seconds=0, turns=turns, measure=device.elapsed)
        found[f"{name}_tflop_per_s"] = 2 * side**3 / timing["mm"].p50 / 1e9
    return found


def main() -> None:
    # Libraries print to standard output as they like: events have a descriptor of their own, theirs goes to the log.
    events = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    orders = json.loads(sys.argv[1])
    try:
        bench = Bench(orders, events)
        module = importlib.import_module(orders["module"])
    except Exception as error:
        print(json.dumps({"event": "fault", "reason": one_line(error)}), file=events, flush=True)
        raise
    for job in orders["jobs"]:
        bench.do(module, job)


if __name__ == "__main__":
    main()
