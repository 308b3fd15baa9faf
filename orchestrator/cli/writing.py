"""What cannot be written, said in one sentence; must import nothing heavy, as every ``celery`` command loads it."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

import click

_UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


@contextlib.contextmanager
def writing() -> Iterator[None]:
    """Say that a disk is full, or its like.  Raises: ClickException, which exits with code 1."""
    try:
        yield
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        raise click.ClickException(f"nothing can be written: {error.strerror}") from None
