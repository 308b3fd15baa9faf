"""The servers of these tests themselves: none outlives the tests, however those end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.acceptance.running import ROOT, until

_OWNER = """
import sys
from pathlib import Path
from tests.faults.rabbitmq import RabbitMQ
broker = RabbitMQ(Path(sys.argv[1]))
print(*broker.pids, flush=True)
sys.stdin.read()
"""


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.debian
def test_a_rabbitmq_ends_with_whoever_started_it_even_by_sigkill(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _OWNER, str(tmp_path / "rabbitmq")]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        pids = [int(word) for word in owner.stdout.readline().split()]
        assert len(pids) == 2 and all(map(_runs, pids))
        owner.kill()
    until(lambda: not any(map(_runs, pids)), "broker and port mapper end", 30.0)
