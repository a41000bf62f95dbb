"""The reader of ptxas' reports finds every kernel and every one that leaves its registers."""

import importlib.util
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("kernel_resources", Path(__file__).with_name("kernel_resources.py"))
kernel_resources = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernel_resources)

# By nvcc 13.0 --resource-usage, as ninja and then pip --verbose pass it on.
LOG = """\
  building 'fewshot_ext._C_cuda' extension
  [1/1] nvcc -c cuda.cu -o cuda.o --resource-usage
  ptxas info    : 28 bytes gmem, 224 bytes cmem[4]
  ptxas info    : Compiling entry function '_ZN11fewshot_ext5spillIdEEvPT_PKS1_i' for 'sm_80'
  ptxas info    : Function properties for _ZN11fewshot_ext5spillIdEEvPT_PKS1_i
      7296 bytes stack frame, 7288 bytes spill stores, 13200 bytes spill loads
  ptxas info    : Used 32 registers, used 1 barriers, 7296 bytes cumulative stack size, 512 bytes smem, 372 bytes cmem[0]
  ptxas info    : Compile time = 161.144 ms
  ptxas info    : Compiling entry function '_ZN11fewshot_ext5spillIfEEvPT_PKS1_i' for 'sm_80'
  ptxas info    : Function properties for _ZN11fewshot_ext5spillIfEEvPT_PKS1_i
      160 bytes stack frame, 168 bytes spill stores, 176 bytes spill loads
  ptxas info    : Used 64 registers, used 1 barriers, 160 bytes cumulative stack size, 256 bytes smem, 372 bytes cmem[0]
  ptxas info    : Compile time = 43.157 ms
  ptxas info    : Compiling entry function '_ZN11fewshot_ext22margin_softmax_projectINS_7Float16EEEvNS_15ProjectGradientIT_EE' for 'sm_80'
  ptxas info    : Function properties for _ZN11fewshot_ext22margin_softmax_projectINS_7Float16EEEvNS_15ProjectGradientIT_EE
      0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
  ptxas info    : Used 31 registers, used 0 barriers, 432 bytes cmem[0]
  ptxas info    : Compile time = 1.077 ms
  ptxas info    : 28 bytes gmem
  ptxas info    : Compiling entry function '_Z2k1Pfi' for 'sm_90a'
  ptxas info    : Function properties for _Z2k1Pfi
      256 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
  ptxas info    : Used 34 registers, used 0 barriers, 256 bytes cumulative stack size
  ptxas info    : Compile time = 11.318 ms
  ptxas info    : Function properties for _Z3fooPKfi
      8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
  running install_lib
"""  # noqa: E501
Kernel = kernel_resources.Kernel


@pytest.fixture(autouse=True)
def nothing_allowed(monkeypatch):
    """The log has none of the package's kernels."""
    monkeypatch.setattr(kernel_resources, "ALLOWED", {})


def main(log, tmp_path):
    path = tmp_path / "build.log"
    path.write_text(log)
    with pytest.raises(SystemExit) as finished:
        kernel_resources.main([str(path)])
    return finished.value.code


def test_every_figure_is_read():
    assert kernel_resources.parse(LOG) == [
        Kernel("foo", "sm_90a", stack=8),
        Kernel("k1", "sm_90a", registers=34, stack=256),
        Kernel("margin_softmax_project<Float16>", "sm_80", registers=31),
        Kernel("spill<double>", "sm_80", 32, 512, 7296, 7288, 13200),
        Kernel("spill<float>", "sm_80", 64, 256, 160, 168, 176),
    ]


def test_all_but_float64_kernels_have_to_stay_in_their_registers(tmp_path, capsys):
    assert main(LOG, tmp_path)
    told = capsys.readouterr().out
    assert [line for line in told.splitlines() if line.startswith("FAULT")] == [
        "FAULT: foo for sm_90a: 8 bytes of stack frame, 0 of spill stores, 0 of spill loads",
        "FAULT: k1 for sm_90a: 256 bytes of stack frame, 0 of spill stores, 0 of spill loads",
        "FAULT: spill<float> for sm_80: 160 bytes of stack frame, 168 of spill stores, 176 of spill loads",
    ]
    assert "| margin_softmax_project<Float16> |        sm_80 |        31 |      0 |     0 |" in told
    assert len({len(line) for line in told.splitlines() if line.startswith("|")}) == 1


def test_log_without_faults_passes(tmp_path, capsys):
    clean = LOG[: LOG.index("  ptxas info    : Compiling entry function '_ZN11fewshot_ext5spillIfE")]
    assert not main(clean, tmp_path)
    assert "spill<double>" in capsys.readouterr().out


@pytest.mark.parametrize("log", ["", "  building 'fewshot_ext._C' extension\n  [1/1] c++ -c cpu.cpp\n"])
def test_log_without_a_report_is_a_fault(tmp_path, capsys, log):
    assert main(log, tmp_path)
    assert "no report of ptxas in the log" in capsys.readouterr().out


def test_allowed_kernels_pass_as_long_as_they_need_it():
    kernels = kernel_resources.parse(LOG)
    allowed = {"spill": "test", "foo": "test", "k1": "test"}
    assert kernel_resources.faults(kernels, allowed) == []
    allowed["margin_softmax_project"] = "test"
    assert kernel_resources.faults(kernels, allowed) == [
        "margin_softmax_project stays in its registers and needs no line in ALLOWED"
    ]


def test_kernel_may_be_allowed_on_one_architecture_alone():
    kernels = kernel_resources.parse(LOG)
    allowed = {"spill": "test", "foo for sm_90a": "test", "k1 for sm_90a": "test"}
    assert kernel_resources.faults(kernels, allowed) == []
    elsewhere = {"spill": "test", "foo": "test", "k1 for sm_80": "test", "k1 for sm_120": "not built"}
    assert kernel_resources.faults(kernels, elsewhere) == [
        "k1 for sm_90a: 256 bytes of stack frame, 0 of spill stores, 0 of spill loads",
        "k1 for sm_80 stays in its registers and needs no line in ALLOWED",
    ]


@pytest.mark.parametrize(
    ("name", "float64"),
    [
        ("f<double>", True),
        ("f<4, double, double, true>", True),
        ("f<Rows<double> >", True),
        ("f<float, double>", False),
        ("f<double, Float16>", False),
        ("f<double, BFloat16>", False),
        ("f<float>", False),
        ("f<4>", False),
        ("double_buffered", False),
        ("double_buffered<float>", False),
    ],
)
def test_float64_is_told_by_the_template_arguments(name, float64):
    assert Kernel(name, "sm_80").is_float64() is float64
