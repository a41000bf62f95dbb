"""How the report reads pytest and compute-sanitizer."""

import stat
import sys
import textwrap
import time

import gpu_tests
import pytest
from gpu_tests import SuiteRun

FINISHED = """\
============================= test session starts ==============================
collecting ... collected 120 items / 116 deselected / 4 selected
python_tests/ops/test_contract.py::test_a[cuda-one two] PASSED           [ 25%]
python_tests/ops/test_contract.py::test_b[cuda] SKIPPED (no CUDA device) [ 50%]
python_tests/ops/test_contract.py::test_c[cuda] FAILED                   [ 75%]
python_tests/ops/test_contract.py::test_d[cuda] PASSED                   [100%]
=========================== short test summary info ============================
FAILED python_tests/ops/test_contract.py::test_c[cuda] - assert 1 == 2
ERROR python_tests/ops/test_broken.py - ImportError: no such module
"""


def read(text, **facts):
    found = SuiteRun(**facts)
    for line in text.splitlines():
        found.read(line)
    return found


def test_counts_and_failures_are_read_from_what_pytest_prints():
    found = read(FINISHED, returncode=1, seconds=12.0)
    assert found.counts == {"PASSED": 2, "SKIPPED": 1, "FAILED": 1}
    assert found.failures == [
        "python_tests/ops/test_contract.py::test_c[cuda] - assert 1 == 2",
        "python_tests/ops/test_broken.py - ImportError: no such module",
    ]
    assert found.verdict() == ("4 of 4 selected tests ran in 12 s: 1 failed, 2 passed, 1 skipped; pytest's exit code 1")
    assert "test_c[cuda] - assert 1 == 2 |" in gpu_tests.suite_section(found)


def test_a_run_without_a_result_shows_its_last_lines():
    section = gpu_tests.suite_section(read("No module named pytest", returncode=1))
    assert "0 of 0 selected tests ran" in section
    assert "```\nNo module named pytest\n```" in section


def test_many_failures_are_cut_and_counted():
    lines = "\n".join(f"FAILED a.py::test_{index} - no" for index in range(35))
    section = gpu_tests.suite_section(read(lines, returncode=1))
    assert section.count("a.py::test_") == 30
    assert "and 5 more" in section


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """Makes the report's suite out of the given tests."""

    def write(text):
        (tmp_path / "test_suite.py").write_text(textwrap.dedent(text))
        monkeypatch.setattr(gpu_tests, "TESTS", tmp_path)
        monkeypatch.setattr(gpu_tests, "ROOT", tmp_path)
        monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # starts in a third of a second
        return gpu_tests.pytest_command("cuda")

    return write


def test_the_selected_tests_run_in_a_process_of_their_own(suite, capsys):
    command = suite(
        """
        def test_cuda_one(): pass
        def test_cuda_two(): assert False, "wrong"
        def test_cpu(): assert False
        """
    )
    found = SuiteRun()
    gpu_tests.run(found, command, time.monotonic() + 60)
    assert found.counts == {"PASSED": 1, "FAILED": 1}
    assert found.selected == 2 and found.returncode == 1 and not found.passed
    assert found.failures == ["test_suite.py::test_cuda_two - AssertionError: wrong"]
    assert "FAILED test_suite.py::test_cuda_two" in capsys.readouterr().out


def test_a_broken_module_does_not_keep_the_others_from_running(suite):
    command = suite("def test_cuda(): pass")
    (gpu_tests.TESTS / "test_broken.py").write_text("import no_such_module")
    found = SuiteRun()
    gpu_tests.run(found, command, time.monotonic() + 60)
    assert found.counts["PASSED"] == 1
    assert not found.passed
    assert "test_broken.py" in found.failures[0]


def test_tests_past_their_share_are_stopped_with_a_count_and_the_name(suite, monkeypatch):
    monkeypatch.setattr(gpu_tests, "GRACE", 3.0)
    command = suite(
        """
        import time
        def test_cuda_one(): pass
        def test_cuda_slow(): time.sleep(60)
        """
    )
    found = SuiteRun()
    begin = time.monotonic()
    gpu_tests.run(found, command, begin + 8)
    assert time.monotonic() - begin < 15
    assert found.counts["PASSED"] == 1
    assert found.out_of_time and not found.passed
    assert found.verdict().startswith("1 of 2 selected tests ran")
    assert found.verdict().endswith("cut: out of time in test_suite.py::test_cuda_slow")
    assert any("KeyboardInterrupt" in line for line in found.log)  # it had the time to say so


def test_tests_that_failed_before_time_ran_out_have_failed(suite, monkeypatch):
    monkeypatch.setattr(gpu_tests, "GRACE", 3.0)
    command = suite(
        """
        import time
        def test_cuda_one(): assert False
        def test_cuda_slow(): time.sleep(60)
        """
    )
    found = SuiteRun()
    gpu_tests.run(found, command, time.monotonic() + 8)
    assert found.cut and not found.out_of_time


def test_a_test_that_hangs_is_no_matter_of_time(suite, monkeypatch):
    monkeypatch.setattr(gpu_tests, "PATIENCE", 5.0)
    monkeypatch.setattr(gpu_tests, "GRACE", 2.0)
    command = suite(
        """
        import signal, time
        def test_cuda_hangs():
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            time.sleep(60)
        """
    )
    found = SuiteRun()
    gpu_tests.run(found, command, time.monotonic() + 60)
    assert found.cut == "no sign of life for 5 s in test_suite.py::test_cuda_hangs"
    assert not found.out_of_time


def test_a_relative_search_path_keeps_its_meaning(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "checkout:/absolute")
    assert gpu_tests.environment(MORE="1")["PYTHONPATH"] == f"{tmp_path}/checkout:/absolute"
    assert gpu_tests.environment(MORE="1")["MORE"] == "1"


@pytest.mark.parametrize(
    "lines, clean",
    (
        (("========= ERROR SUMMARY: 0 errors",), True),
        (("========= ERROR SUMMARY: 3 errors",), False),
        (("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)",), True),
        (("========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)",), False),
        (("========= ERROR SUMMARY: 0 errors", "========= ERROR SUMMARY: 10 errors"), False),
        ((), False),
    ),
)
def test_verdict_of_the_sanitizer(lines, clean):
    passed = "a.py::test[cuda] PASSED [100%]"
    found = read("\n".join((passed, *lines)), returncode=0)
    assert gpu_tests.sanitizer_verdict(found)[0] is clean


@pytest.mark.parametrize("outcome, returncode", (("FAILED", 1), ("SKIPPED (no CUDA device)", 0)))
def test_a_sanitizer_that_saw_no_test_pass_proves_nothing(outcome, returncode):
    found = read(f"a.py::test[cuda] {outcome} [100%]\n========= ERROR SUMMARY: 0 errors", returncode=returncode)
    assert not gpu_tests.sanitizer_verdict(found)[0]


@pytest.fixture
def sanitizer(tmp_path):
    """A stand-in that runs the command behind its own options and finds nothing."""
    path = tmp_path / "bin" / "compute-sanitizer"
    path.parent.mkdir()
    path.write_text(
        f"#!{sys.executable}\n"
        "import subprocess, sys\n"
        f"code = subprocess.call(sys.argv[sys.argv.index({sys.executable!r}):])\n"
        "print('========= ERROR SUMMARY: 0 errors')\n"
        "sys.exit(code)\n"
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_the_sanitizer_is_found_on_the_path_and_in_cuda_home(sanitizer, monkeypatch):
    for variable, value in (("PATH", sanitizer.parent), ("CUDA_HOME", sanitizer.parents[1])):
        monkeypatch.setenv("PATH", "/nowhere")
        monkeypatch.delenv("CUDA_HOME", raising=False)
        monkeypatch.setenv(variable, str(value))
        assert gpu_tests.find_sanitizer() == str(sanitizer)


@pytest.mark.parametrize("tool", gpu_tests.TOOLS)
def test_small_tests_run_under_each_tool(tool, suite, sanitizer):
    suite(
        """
        import os
        def test_cuda_empty_input(): assert os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
        def test_cuda_large(): assert False
        """
    )
    command = gpu_tests.sanitizer_command(str(sanitizer), tool)
    assert command[:3] == [str(sanitizer), "--tool", tool]
    assert ("kernel_substring=fewshot_ext" in command) is (tool != "initcheck")
    found = SuiteRun()
    gpu_tests.run(found, command, time.monotonic() + 60, **gpu_tests.SANITIZER_ENVIRONMENT)
    assert gpu_tests.sanitizer_verdict(found) == (True, "0 errors")
