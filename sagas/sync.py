"""Owns the sync of an account at another bank: page after page to the end, and never a longer history than one link."""

from __future__ import annotations

import asyncio

from pydantic import BaseModel, ConfigDict

from orchestrator import saga
from tasks import banking

PAGES_PER_LINK = 20


class SyncRequest(BaseModel):
    """Ask for an account's transactions; `cursor`, `done` and `odd` say how far the links before this one came."""

    model_config = ConfigDict(frozen=True)

    account: str
    page_size: int = 1000
    categoriser: str = "categoriser"
    cursor: int = 0
    done: int = 0
    odd: int = 0


class Synced(BaseModel):
    """Say how many transactions there were, and how many of them looked odd."""

    account: str
    transactions: int
    odd: int


@saga.define(version=1)
async def sync(request: SyncRequest) -> Synced:
    """Fetch page by page; enrich, categorise and look for what is odd in parallel; book; go on as new now and then."""
    saga.tag(account=request.account)
    done, odd, cursor = request.done, request.odd, request.cursor
    for _ in range(PAGES_PER_LINK):
        page = await saga.step(banking.fetch, request.account, cursor, request.page_size)
        _, _, odd_here = await asyncio.gather(
            saga.step(banking.enrich, page),
            saga.step(banking.categorise, page, request.categoriser),
            saga.step(banking.detect_anomalies, page),
        )
        await saga.step(banking.book, page)
        done, odd = done + page.count, odd + odd_here
        saga.progress(done, page.total, f"up to {page.last}")
        if page.next is None:
            return Synced(account=request.account, transactions=done, odd=odd)
        cursor = page.next
    saga.continue_as_new(request.model_copy(update={"cursor": cursor, "done": done, "odd": odd}))
