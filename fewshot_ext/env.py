"""What is installed, what was built with which compiler, which kernels run on which device, and why not.

``python -m fewshot_ext.env`` prints it, for bug reports and for questions such as why a GPU lies idle. It
works without the compiled library too, and then says why that is missing.
"""

import argparse
import importlib.metadata
import json
import platform
import re
import sys
from typing import Any

import torch

from fewshot_ext import _library
from fewshot_ext._version import __version__

DEVICES = ("cpu", "cuda")


def installed_version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def declared_extras(requirements: list[str]) -> dict[str, list[str]]:
    """Distribution names per extra, from the requirements in a package's metadata that this Python meets.

    >>> declared_extras(["numpy", 'jsonargparse[signatures]>=4; extra == "train"'])
    {'train': ['jsonargparse']}
    """
    extras: dict[str, list[str]] = {}
    for requirement in requirements:
        extra = re.search(r"""extra\s*==\s*["']([\w-]+)["']""", requirement)
        least = re.search(r"""python_version\s*>=\s*["'](\d+)\.(\d+)["']""", requirement)
        if extra and (least is None or sys.version_info[:2] >= tuple(map(int, least.groups()))):
            name = re.match(r"[\w.-]+", requirement)
            extras.setdefault(extra.group(1), []).append(name.group() if name else requirement)
    return extras


def extras_report() -> dict[str, dict[str, Any]]:
    try:
        requirements = importlib.metadata.requires("fewshot_ext") or []
    except importlib.metadata.PackageNotFoundError:
        requirements = []
    report = {}
    for extra, names in declared_extras(requirements).items():
        versions = {name: installed_version(name) for name in names}
        complete = all(version is not None for version in versions.values())
        report[extra] = {
            "versions": versions,
            "install": None if complete else f"pip install 'fewshot_ext[{extra}]'",
        }
    return report


def gpu_report() -> list[dict[str, Any]]:
    """Per GPU what it is, and why the CUDA kernels do not run on it, if they do not."""
    return [
        {
            "name": torch.cuda.get_device_name(gpu),
            "capability": ".".join(map(str, torch.cuda.get_device_capability(gpu))),
            "error": _library.gpu_error(gpu) if _library.cuda_error is None else "the CUDA library is not loaded",
        }
        for gpu in range(torch.cuda.device_count())
    ]


def library_report(build: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    """Per device its library, whether it is loaded, and why not."""
    why_not_built = (build or {}).get("cuda_missing_because")
    cuda_error = _library.cuda_error
    if _library.cpu_error is not None:
        cuda_error = "not tried without _C"
    elif cuda_error is not None and why_not_built:
        cuda_error = f"not built: {why_not_built}"
    return {
        "cpu": {"library": "_C", "error": _library.cpu_error},
        "cuda": {"library": "_C_cuda", "error": cuda_error},
    }


def operator_report() -> dict[str, dict[str, str]]:
    """Per operator and device what the dispatcher finds: a kernel, torch's operators that it is made of, or none."""

    def implementation(name: str, device: str) -> str:
        if torch._C._dispatch_has_kernel_for_dispatch_key(name, device.upper()):
            return "kernel"
        composite = torch._C._dispatch_has_computed_kernel_for_dispatch_key(name, device.upper())
        return "by torch's operators" if composite else "none"

    names = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fewshot_ext::"))
    return {name.partition("::")[2]: {device: implementation(name, device) for device in DEVICES} for name in names}


def report() -> dict[str, Any]:
    """Everything ``python -m fewshot_ext.env`` prints, as JSON types."""
    build = _library.build_record()
    driver = _library.driver_version()
    return {
        "versions": {
            "fewshot_ext": __version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "numpy": installed_version("numpy"),
            "platform": platform.platform(),
        },
        "build": build,
        "library_dir": str(_library.library_dir()),
        "libraries": library_report(build),
        "devices": {
            "cpu": {
                "capability": torch.backends.cpu.get_cpu_capability(),
                "threads": torch.get_num_threads(),
            },
            "cuda": {
                "toolkit_of_torch": torch.version.cuda,
                "driver": ".".join(map(str, driver)) if driver else None,
                "driver_error": _library.driver_error(),
                "gpus": gpu_report(),
            },
        },
        "operators": operator_report(),
        "extras": extras_report(),
    }


def render(facts: dict[str, Any]) -> str:
    """The report as text."""
    lines: list[str] = []

    def section(title: str, rows: dict[str, Any]) -> None:
        width = max(map(len, rows), default=0)
        lines.extend(["", title, *(f"  {name:<{width}}  {value}" for name, value in rows.items())])

    section("Versions", facts["versions"])

    build = facts["build"]
    if build is None:
        section("Build", {"record": f"none for the libraries in {facts['library_dir']}"})
    else:
        rows = {
            "compiler": build["compiler"],
            "torch": f"{build['torch']}, runs on {build['torch_target']} and later",
        }
        if build["cuda_toolkit"]:
            rows["cuda"] = f"toolkit {build['cuda_toolkit']}, architectures {build['cuda_architectures']}"
        section("Build", rows)

    libraries = facts["libraries"].values()
    section("Libraries", {entry["library"]: entry["error"] or "loaded" for entry in libraries})

    cpu, cuda = facts["devices"]["cpu"], facts["devices"]["cuda"]
    rows = {"cpu": f"{cpu['capability']}, {cpu['threads']} threads"}
    for index, gpu in enumerate(cuda["gpus"]):
        runs = "kernels run" if gpu["error"] is None else gpu["error"]
        rows[f"cuda:{index}"] = f"{gpu['name']}, compute capability {gpu['capability']}: {runs}"
    if cuda["toolkit_of_torch"] is None:
        rows["cuda"] = "this torch is built without CUDA"
    elif not cuda["gpus"]:
        rows["cuda"] = f"torch is built with CUDA {cuda['toolkit_of_torch']}, but sees no GPU"
    if cuda["driver"] is not None:
        rows["driver"] = cuda["driver_error"] or f"for CUDA {cuda['driver']} at most"
    section("Devices", rows)

    def on_devices(operator: dict[str, str]) -> str:
        return ", ".join(f"{device}: {what}" for device, what in operator.items())

    operators = {name: on_devices(operator) for name, operator in facts["operators"].items()}
    section("Operators", operators or {"none": "no operator is registered, because _C is not loaded"})

    def extra(entry: dict[str, Any]) -> str:
        there = ", ".join(f"{name} {version}" for name, version in entry["versions"].items() if version)
        missing = [name for name, version in entry["versions"].items() if not version]
        if not there or not missing:
            return there or f"not installed: {entry['install']}"
        return f"{there}\n      without {', '.join(missing)}: {entry['install']}"

    section("Extras", {name: extra(entry) for name, entry in facts["extras"].items()})
    return "\n".join(lines[1:])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fewshot_ext.env", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    arguments = parser.parse_args(argv)
    facts = report()
    print(json.dumps(facts, indent=2) if arguments.json else render(facts))


if __name__ == "__main__":
    main()
