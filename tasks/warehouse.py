"""Stands in for a warehouse's own system: the stock, and what was picked from it.

As the payment provider does, it picks once per reference and remembers a return even if nothing was picked,
so that a pick arriving after its return is refused. The goods in ``SLOW_SKU`` are picked, but the answer
never arrives.
"""

from __future__ import annotations

from sqlalchemy import CheckConstraint, Column, Integer, Table, Text, func, select, update
from sqlalchemy.dialects.postgresql import insert

from orchestrator import Rejected
from tasks import effects
from tasks.database import metadata, outside_engine

SLOW_SKU = "SKU-SLOW"

stock = Table(
    "stock",
    metadata,
    Column("sku", Text, primary_key=True),
    Column("on_hand", Integer, nullable=False),
    CheckConstraint("on_hand >= 0", name="stock_never_negative"),
    schema="warehouse",
)

picks = Table(
    "picks",
    metadata,
    Column("reference", Text, primary_key=True),
    Column("state", Text, nullable=False),
    Column("sku", Text),
    Column("quantity", Integer, nullable=False, server_default="0"),
    CheckConstraint("state in ('picked', 'returned', 'never')", name="picks_state"),
    schema="warehouse",
)


class OutOfStock(Rejected):
    """Say that nothing was picked: there is not enough on hand."""


class PickRefused(Rejected):
    """Say that nothing was picked: the return for this reference came first."""


def pick(reference: str, sku: str, quantity: int) -> None:
    """Take goods from the shelf, once per reference.

    Raises: OutOfStock, PickRefused; TimeoutError if the warehouse does not answer, picked or not.
    """
    with outside_engine().begin() as conn:
        row = {"reference": reference, "state": "picked", "sku": sku, "quantity": quantity}
        new = conn.scalar(insert(picks).values(row).on_conflict_do_nothing().returning(picks.c.reference))
        if new is not None:
            fewer = update(stock).values(on_hand=stock.c.on_hand - quantity)
            if not conn.execute(fewer.where(stock.c.sku == sku, stock.c.on_hand >= quantity)).rowcount:
                raise OutOfStock(f"There are no {quantity} pieces of {sku} on hand.")  # rolls the pick back
        state = conn.scalar(select(picks.c.state).where(picks.c.reference == reference))
    if new is not None:
        effects.record("pick", reference)
    if state != "picked":
        raise PickRefused(f"The pick {reference} was returned before.")
    if sku == SLOW_SKU:
        raise TimeoutError("The warehouse did not answer in time.")


def put_back(reference: str) -> None:
    """Return what was picked under ``reference`` to the shelf, once; remember it if nothing was picked."""
    with outside_engine().begin() as conn:
        conn.execute(insert(picks).values(reference=reference, state="never").on_conflict_do_nothing())
        returned = update(picks).values(state="returned")
        row = conn.execute(
            returned.where(picks.c.reference == reference, picks.c.state == "picked").returning(picks)
        ).one_or_none()
        if row is not None:
            more = update(stock).values(on_hand=stock.c.on_hand + row.quantity)
            conn.execute(more.where(stock.c.sku == row.sku))
    if row is not None:
        effects.record("put back", reference)


def receive(sku: str, quantity: int) -> None:
    """Put new goods on the shelf."""
    with outside_engine().begin() as conn:
        row = insert(stock).values(sku=sku, on_hand=quantity)
        conn.execute(row.on_conflict_do_update(index_elements=["sku"], set_={"on_hand": stock.c.on_hand + quantity}))


def on_hand() -> int:
    """Count all pieces on the shelves."""
    with outside_engine().begin() as conn:
        return int(conn.scalar(select(func.coalesce(func.sum(stock.c.on_hand), 0))) or 0)
