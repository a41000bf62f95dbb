"""Scripts in two processes, as torchrun starts them."""

import os
import subprocess
import sys
from pathlib import Path

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

# Up to Python 3.13 a thread of gloo that drops a tensor while the interpreter ends aborts the process, however well the
# script has run (pytorch/pytorch#190489). On busy machines that is one run in five; so the script ends the process.
_ENDING = """
import os, sys
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)
"""


def run_script(path: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Writes ``script`` to ``path`` and runs it; fails with its errors if it fails."""
    path.write_text(script + _ENDING)
    done = subprocess.run(
        [*TORCHRUN, str(path), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done
