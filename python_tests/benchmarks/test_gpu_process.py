"""Children that hang, crash and lie, as a GPU's do."""

import os
import signal
import sys
import time

import pytest
from gpu_process import Budget, Child, Overdue, Silent, supervise


def python(code, *arguments):
    return [sys.executable, "-c", code, *arguments]


def soon(seconds=20.0):
    return time.monotonic() + seconds


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] != "Z"


def test_budget_gives_shares_of_what_is_left():
    budget = Budget(100)
    assert 99 < budget.remaining() <= 100
    assert budget.deadline(10) == pytest.approx(time.monotonic() + 10, abs=0.5)
    assert budget.deadline(1000) == budget.deadline() == pytest.approx(time.monotonic() + 100, abs=0.5)


def test_lines_come_whole_and_the_rest_is_kept():
    with Child(python("import sys; sys.stdout.write('one\\ntwo\\nthr'); sys.exit(3)")) as child:
        assert list(child.lines(soon())) == ["one", "two"]
        assert child.unfinished_line == b"thr"
        assert child.process.returncode == 3


def test_a_child_past_its_deadline_is_killed_with_all_that_it_started():
    code = (
        "import subprocess, sys, time; "
        "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid, flush=True); time.sleep(60)"
    )
    with pytest.raises(Overdue), Child(python(code)) as child:
        for line in child.lines(soon(2)):
            grandchild = int(line)
    deadline = soon(5)
    while is_alive(grandchild) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(grandchild)
    assert child.process.returncode == -signal.SIGKILL


def test_a_child_without_a_sign_of_life_is_noticed_before_its_deadline():
    with Child(python("import time; print('hello', flush=True); time.sleep(60)")) as child:
        child.patience = 0.3
        lines = child.lines(soon())
        begin = time.monotonic()
        with pytest.raises(Silent):
            for _ in range(2):
                next(lines)
    assert time.monotonic() - begin < 10


def test_a_dead_child_is_noticed_although_its_own_child_holds_the_pipe():
    code = (
        "import subprocess, sys; print('hello', flush=True); "
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    )
    with Child(python(code)) as child:
        assert list(child.lines(soon())) == ["hello"]


# A stand-in for gpu_worker.py: does jobs unless told to leave them out, and fails as the job's name says.
WORKER = """
import json, os, sys, time
orders = json.loads(sys.argv[1])
def emit(**event): print(json.dumps(event), flush=True)
def left_out(job, contender):
    return any(contender == f["contender"] and (f["job"] == job or f["everywhere"]) for f in orders["left_out"])
if orders.get("broken"): sys.exit("no torch here")
for job in orders["jobs"]:
    emit(event="begin", job=job, contender="", phase="preparation", kernel="", patience=20)
    if job == "crash": os.abort()
    for contender in ("ours", "peer"):
        if left_out(job, contender): continue
        kernel = "kernel" if contender == "ours" else ""
        emit(event="begin", job=job, contender=contender, phase="check", kernel=kernel, patience=0.5)
        if job.startswith("hang") and contender == "ours": time.sleep(60)
        if job == "fault" and contender == "peer":
            emit(event="fault", job=job, reason="illegal memory access")
            os._exit(3)
    emit(event="result", job=job, result=[c for c in ("ours", "peer") if not left_out(job, c)])
    emit(event="done", job=job)
    if job == "afterwards" and len(orders["jobs"]) > 1: os._exit(4)
"""


def run(*jobs, **settings):
    return list(supervise(python(WORKER), settings, list(jobs), soon()))


def results(events):
    return {event["job"]: event["result"] for event in events if event["event"] == "result"}


def failures(events):
    names = ("job", "contender", "phase", "reason")
    return [tuple(event[name] for name in names) for event in events if event["event"] == "failure"]


def test_jobs_without_failures_are_done_by_one_worker():
    events = run("a", "b")
    assert results(events) == {"a": ["ours", "peer"], "b": ["ours", "peer"]}
    assert not failures(events)


def test_a_contender_that_hangs_is_named_and_left_out():
    events = run("hang", "b")
    assert failures(events) == [("hang", "ours", "check", "no sign of life for 0.5 s")]
    assert results(events) == {"hang": ["peer"], "b": ["ours", "peer"]}


def test_a_kernel_that_hangs_twice_is_left_out_everywhere():
    events = run("hang 1", "hang 2", "hang 3", "b")
    assert [failure[0] for failure in failures(events)] == ["hang 1", "hang 2"]
    assert set(map(tuple, results(events).values())) == {("peer",)}


def test_a_fault_that_the_worker_reports_comes_with_its_reason():
    events = run("fault", "b")
    assert failures(events) == [("fault", "peer", "check", "illegal memory access")]
    assert results(events) == {"fault": ["ours"], "b": ["ours", "peer"]}


def test_a_job_that_crashes_outside_of_any_contender_is_given_up():
    events = run("a", "crash", "b")
    assert failures(events) == [("crash", "", "preparation", "the process died of SIGABRT")]
    assert list(results(events)) == ["a", "b"]


def test_a_worker_that_dies_between_jobs_is_followed_by_another():
    events = run("afterwards", "b")
    assert failures(events) == [("", "", "the end of afterwards", "the process ended with exit code 4")]
    assert list(results(events)) == ["afterwards", "b"]


def test_a_worker_that_cannot_start_ends_it_with_what_it_said():
    events = run("a", "b", broken=True)
    assert failures(events) == [("", "", "start", "the process ended with exit code 1")]
    assert "no torch here" in events[-1]["output"]


def test_the_deadline_holds_for_all_workers_together():
    begin = time.monotonic()
    with pytest.raises(Overdue):
        list(supervise(python("import time; time.sleep(60)"), {}, ["a"], soon(0.5)))
    assert time.monotonic() - begin < 10


def test_children_have_a_process_group_of_their_own():
    with Child(python("import os; print(os.getpgrp())")) as child:
        (group,) = child.lines(soon())
    assert int(group) == child.process.pid != os.getpgrp()
