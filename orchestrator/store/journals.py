"""The journals of many runs, read one after the other with few statements.

Reads only.  Must never hold a whole journal, nor the journals of many runs, in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from operator import itemgetter
from typing import Any

from psycopg.types.json import set_json_loads

from orchestrator.codec import read_stored
from orchestrator.store.connection import Connection

_FETCH = 500  # journal rows at once


def with_journals(
    connection: Connection, rows: Mapping[str, Any], where: str, values: Iterable[Any], columns: str
) -> Iterator[tuple[Any, Iterator[Any]]]:
    """Yield rows of runs, given by their ids and in that order, each with these columns of its journal.

    `where` with `values` is true for their journals, and may be so for others, which are passed by; the primary key of
    journal has the order.  A journal is to be read before the next row is.  The caller opens the transaction.
    """
    query = f"SELECT run_id, {columns} FROM orchestrator.journal WHERE {where} ORDER BY run_id, seq"
    with connection.cursor(name="journals") as cursor:
        cursor.itersize = _FETCH
        set_json_loads(read_stored, cursor)
        cursor.execute(query, tuple(values))
        groups = (found for found in groupby(cursor, key=itemgetter(0)) if found[0] in rows)
        owner, journal = next(groups, ("", iter(())))
        for run_id, row in rows.items():
            if owner != run_id:
                yield row, iter(())
                continue
            yield row, (each[1:] for each in journal)
            owner, journal = next(groups, ("", iter(())))
