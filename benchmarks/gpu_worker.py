"""The process in which the GPU report measures: does jobs and prints an event a line, in JSON.

    begin     what comes next (job, contender, phase) and for how many seconds it may be silent (patience)
    result    what a job has found
    error     why a job has found nothing; the next one goes on
    done      the job is finished
    fault     why this process cannot go on

gpu_process.supervise runs it, and says in the command line's JSON what to do and what to leave out. The jobs are an
operator's, or those of this module: what machine it is, what cannot be imported, and the rates that bound every kernel.
"""

import importlib
import json
import os
import subprocess
import sys
import time
from functools import partial

import gpu_comparison
import harness
import torch
from gpu_comparison import one_line
from harness import markdown_table

from fewshot_ext import env

SAME_DEATHS = 2  # after so many a contender is left out everywhere
# Module -> what goes without it.
PACKAGES = {
    "pytest": "the tests",
    "hypothesis": "the tests",
    "expecttest": "the tests",
    "triton": "torch.compile, cut-cross-entropy, liger-kernel",
    "cut_cross_entropy": "its comparison",
    "liger_kernel.ops.fused_linear_cross_entropy": "its comparison",
    "liger_kernel.ops.cutedsl.ops": "the comparison with its kernel for Hopper",
    "quack.linear_cross_entropy": "its comparison",
    "ot": "its comparison",
    "torch_linear_assignment": "its comparison",
}
VERSIONS = ("torch", "triton", "cut-cross-entropy", "liger-kernel", "quack-kernels", "POT", "torch-linear-assignment")
SMI = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu,compute_mode,mig.mode.current"


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

    def begin(self, phase: str, contender: str = "", patience: float = 60.0) -> None:
        self.emit("begin", phase=phase, contender=contender, patience=patience)

    def left_out(self, contender: str, phase: str) -> str | None:
        """Why this is not to be done, where earlier processes died of it: in this job, or in two others."""
        deaths = [death for death in self._left_out if (death["contender"], death["phase"]) == (contender, phase)]
        for death in deaths:
            here = death["job"] == self._job
            if here or len(deaths) >= SAME_DEATHS:
                return f"{death['reason']} ({phase})" + ("" if here else f" at {death['job']}")
        return None

    def remaining(self) -> float:
        return self._until - time.time()

    def survive(self, error: Exception) -> None:
        """Ends the process where the device has not survived the error."""
        if isinstance(error, gpu_comparison.CaptureError) or not self.device.is_healthy():
            self.emit("fault", reason=one_line(error))
            os._exit(3)  # without destructors, which would talk to a CUDA context that is beyond repair

    def do(self, measure, job: str) -> None:
        self._job = job
        self.begin("preparation")
        try:
            result = measure(job, self)
        except Exception as error:
            self.survive(error)
            self.emit("error", reason=one_line(error))
        else:
            self.emit("result", result=result)
        torch.cuda.empty_cache()
        self.emit("done")


def facts(bench: Bench) -> dict:
    """What machine it is; ``columns`` goes into every CSV row."""
    versions = harness.versions(*VERSIONS)
    columns = {"device": f"{harness.processor()} (rehearsal, no GPU)", "capability": "", "driver": "", "cuda": ""}
    details = {}
    if bench.device.name == "cuda":
        properties = bench.device.properties
        smi = nvidia_smi(properties)
        columns = {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "driver": smi.get("driver_version", "not readable"),
            "cuda": torch.version.cuda,
        }
        details = {
            "multiprocessors": properties.multi_processor_count,
            "memory": f"{properties.total_memory / 2**30:.1f} GiB",
            "L2 cache": f"{bench.device.cache_bytes / 2**20:.0f} MiB",
            **smi,
        }
    table = markdown_table(["", ""], {**columns, **versions, **details}.items())
    return {"columns": {**columns, **versions}, "text": f"{table}\n```\n{env.render(env.report()).rstrip()}\n```\n"}


def nvidia_smi(device) -> dict[str, str]:
    """What nvidia-smi reads, changing nothing; why not, where it does not."""
    # torch counts the devices that CUDA_VISIBLE_DEVICES leaves, nvidia-smi all of them; both know the PCI address.
    selected = f"{device.pci_domain_id:08x}:{device.pci_bus_id:02x}:{device.pci_device_id:02x}.0"
    query = ["nvidia-smi", f"--id={selected}", f"--query-gpu={SMI}", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
        return dict(zip(SMI.split(","), map(str.strip, done.stdout.split(",")), strict=True))
    except ValueError:
        return {"clocks": f"not readable: nvidia-smi said {(done.stdout + done.stderr).strip()[:200]!r}"}
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"clocks": f"not readable: {one_line(error)}"}


def packages(bench: Bench) -> dict:
    """Why some cannot be imported, and what goes without them."""
    missing = {}
    for module, without in PACKAGES.items():
        bench.begin("import", contender=module)
        reason = bench.left_out(module, "import")
        try:
            if reason is None:
                importlib.import_module(module)
        except Exception as error:  # any there is, where a package does not fit the torch or the Triton it meets
            reason = one_line(error)
        if reason is not None:
            missing[module] = f"{reason}; without it: {without}"
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        missing["torch.nn.functional.linear_cross_entropy"] = "torch has it from 2.13 on; without it: its comparison"
    table = markdown_table(["could not import", "reason"], missing.items())
    return {"text": table if missing else "Every package was imported.\n"}


def rates(bench: Bench) -> dict:
    """GB/s of a copy, bytes read plus bytes written, and TFLOP/s of a large square product in each precision."""
    on, small = bench.device.device, bench.device.name == "cpu"
    generator = gpu_comparison.generator(bench.device)

    def milliseconds(call) -> float:
        turns = 3 if bench.quick else 15
        return harness.interleaved({"": call}, seconds=0, turns=turns, measure=bench.device.elapsed)[""].p50

    bench.begin("copy")
    source = torch.randn((1 << 22) if small else (1 << 28), generator=generator, device=on)
    found = {"copy_gb_per_s": 2 * source.nbytes / milliseconds(partial(torch.empty_like(source).copy_, source)) / 1e6}
    del source
    for name, (dtype, precision) in gpu_comparison.DTYPES.items():
        bench.begin(f"square product in {name}")
        side = 256 if small else 4096 if name == "float32" else 8192
        a, b = (torch.randn(side, side, generator=generator, device=on).to(dtype) for _ in range(2))
        torch.set_float32_matmul_precision(precision)
        product = partial(torch.mm, a, b, out=torch.empty_like(a))
        found[f"{name}_tflop_per_s"] = 2 * side**3 / milliseconds(product) / 1e9
    text = "A large device-to-device copy, bytes read plus bytes written, and large square products.\n\n"
    table = markdown_table(["rate", "measured"], [[name, f"{rate:.4g}"] for name, rate in found.items()])
    return {"rates": found, "text": text + table}


def of_machine(job: str, bench: Bench) -> dict:
    return {"Machine": facts, "Packages": packages, "Rates": rates}[job](bench)


def main() -> None:
    # Libraries print to standard output as they like: events have a descriptor of their own, theirs goes to the log.
    events = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    orders = json.loads(sys.argv[1])
    try:
        bench = Bench(orders, events)
        measure = importlib.import_module(orders["module"]).measure if orders["module"] else of_machine
    except Exception as error:
        print(json.dumps({"event": "fault", "reason": one_line(error)}), file=events, flush=True)
        raise
    for job in orders["jobs"]:
        bench.do(measure, job)


if __name__ == "__main__":
    main()
