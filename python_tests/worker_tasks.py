"""Tasks for processes that are started afresh: they import them by this module's name, which a test's own has not."""

import os
import signal
import time

import torch

from fewshot_ext.experiments.sweep_task import TrainAndMeasure


class Square:
    """A task that any process can do."""

    work = 2

    def __init__(self, number):
        self.number, self.name = number, f"square of {number}"

    def __call__(self, report):
        report(1, "half")
        if self.number < 0:
            raise ValueError("no negative\nnumbers")
        return self.number**2, torch.get_num_threads(), os.getpid()


class Die(Square):
    def __call__(self, report):
        os.kill(os.getpid(), signal.SIGKILL)


class Patient:
    """Goes on for as long as somebody waits for it, and then makes a file."""

    work, name = 1, "patient"

    def __init__(self, file):
        self.file = file

    def __call__(self, report):
        try:
            while True:
                report(0, str(time.monotonic()))
                time.sleep(0.05)
        finally:
            self.file.touch()


class KilledOnce(TrainAndMeasure):
    """A run of a sweep whose process is killed after an epoch, the first time; tells its epochs in a file."""

    def __init__(self, told, run, sweep, epoch):
        super().__init__(run, sweep.checkpoints, sweep.checksum, sweep.measurement)
        self.told, self.epoch = told, epoch

    def __call__(self, report):
        def tell(epochs, remark):
            report(epochs, remark)
            is_first = not self.told.exists() or "killed" not in self.told.read_text()
            with self.told.open("a") as file:
                file.write(f" {epochs}{' killed' if epochs == self.epoch and is_first else ''}")
            if epochs == self.epoch and is_first:
                os.kill(os.getpid(), signal.SIGKILL)

        return super().__call__(tell)
