import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from worker_tasks import Die, Square

from fewshot_ext.experiments.workers import run_tasks, sweep_progress


@pytest.mark.parametrize("jobs", [1, 2])
def test_every_task_is_done_and_a_failure_is_an_outcome(jobs):
    reports = []
    tasks = [Square(number) for number in (2, -1, 3)]
    outcomes = list(run_tasks(tasks, jobs=jobs, on_report=lambda *report: reports.append(report)))
    found = {outcome.task.number: outcome for outcome in outcomes}
    assert {number: outcome.value and outcome.value[0] for number, outcome in found.items()} == {2: 4, -1: None, 3: 9}
    assert found[-1].error == "ValueError: no negative numbers"
    assert 'raise ValueError("no negative' in found[-1].traceback
    assert sorted((task.number, units, remark) for task, units, remark in reports) == [
        (-1, 1, "half"),
        (2, 1, "half"),
        (3, 1, "half"),
    ]
    processes = {outcome.value[2] for outcome in outcomes if outcome.value}
    assert (os.getpid() in processes) == (jobs == 1)


def test_processes_have_the_threads_that_are_asked_for():
    (outcome,) = run_tasks([Square(2)], jobs=2, threads=1)
    assert outcome.value[1] == 1


def test_threads_of_this_process_are_set_back():
    before = torch.get_num_threads()
    assert [outcome.value[1] for outcome in run_tasks([Square(2)], threads=before + 1)] == [before + 1]
    assert torch.get_num_threads() == before


def test_a_killed_process_is_named_and_the_others_go_on():
    outcomes = {outcome.task.number: outcome for outcome in run_tasks([Die(1), Square(2), Square(3)], jobs=2)}
    assert outcomes[1].error == "its process ended with SIGKILL(-9)"
    assert [outcomes[number].value[0] for number in (2, 3)] == [4, 9]


def test_leaving_early_ends_the_processes():
    outcomes = run_tasks([Square(2), Square(3)], jobs=2)
    (_, _, process) = next(outcomes).value
    outcomes.close()
    for _ in range(50):
        if not _is_alive(process):
            return
        time.sleep(0.1)
    pytest.fail("the process is still there")


def _is_alive(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_ctrl_c_ends_all_processes(tmp_path):
    script = tmp_path / "sleepers.py"
    script.write_text("""
import time
from fewshot_ext.experiments.workers import run_tasks
class Sleep:
    work = 1
    def __init__(self, name): self.name = name
    def __call__(self, report):
        report(0, "asleep")
        time.sleep(60)
if __name__ == "__main__":
    try:
        list(run_tasks([Sleep("a"), Sleep("b")], jobs=2, on_report=lambda *_: print("asleep", flush=True)))
    except KeyboardInterrupt:
        print("interrupted", flush=True)
""")
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "asleep\n"
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert "interrupted" in process.communicate(timeout=30)[0]
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("name", ["jobs", "threads"])
def test_bad_counts_are_named(name):
    with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
        run_tasks([], **{name: 0})


def test_progress_lines_where_there_is_no_terminal(capsys):
    tasks = [Square(2), Square(3)]
    with sweep_progress("runs", tasks) as progress:
        progress.report(tasks[0], 1, "half")
        progress.end(tasks[0], "square of 2: 4")
        progress.say("a remark")
        progress.end(tasks[1], "square of 3: 9")
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["1/2 square of 2: 4 (0 s left)", "a remark", "2/2 square of 3: 9"]
