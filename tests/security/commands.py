"""Run many commands of the command line in one process: lists of arguments as JSON in, codes and outputs out."""

from __future__ import annotations

import json
import sys

from celery import Celery
from celery.bin.base import CLIContext
from click.testing import CliRunner

from orchestrator import Orchestrator
from orchestrator.cli import saga


def main() -> None:
    app = Celery("security", broker="memory://")
    Orchestrator(app)
    context = CLIContext(app, no_color=True, workdir=None)
    answers = []
    for arguments in json.load(sys.stdin):
        result = CliRunner().invoke(saga, arguments, obj=context)
        answers.append((result.exit_code, result.output + (repr(result.exception) if result.exit_code == 1 else "")))
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
