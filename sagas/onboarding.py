"""Owns the onboarding: a person becomes a customer, or leaves no trace; what is finished stays finished."""

from __future__ import annotations

from datetime import timedelta

from pydantic import BaseModel

from orchestrator import StepFailed, saga
from tasks import customers, notifications
from tasks.customers import Signup
from tasks.notifications import Mail


class Onboarded(BaseModel):
    """Confirm an onboarding; what could not be done without harm is None or False."""

    customer_id: str
    accounts: list[str]
    bank_token: str | None
    welcomed: bool
    followed_up: bool


class IdentityRefused(Exception):
    """Say that the identity check came to a no; everything is undone."""


@saga.define(version=1, deadline=timedelta(days=7))
async def onboarding(signup: Signup) -> Onboarded:
    """Make the profile, check who it is, open accounts, link the bank, welcome; a day later ask how it goes."""
    await saga.step(customers.create_profile, signup)
    decision = await saga.step(customers.check_identity, signup)
    if not decision.approved:
        await _tell(signup, "refusal", "We cannot open an account for you")
        raise IdentityRefused(decision.reason)
    accounts = await saga.step(customers.open_accounts, signup)
    token = await _link(signup)
    await saga.step(customers.activate, signup)  # the pivot: from here only forward
    welcomed = await _tell(signup, "welcome", f"Welcome, {signup.name}")
    await saga.sleep(signup.follow_up_after)
    return Onboarded(
        customer_id=signup.id,
        accounts=accounts,
        bank_token=token,
        welcomed=welcomed,
        followed_up=await _tell(signup, "follow-up", "How is it going?"),
    )


async def _link(signup: Signup) -> str | None:
    """Link the other bank, if there is one; nobody is turned away because that fails."""
    if signup.iban is None:
        return None
    try:
        token: str = await saga.step(customers.link_bank, signup)
    except StepFailed:  # the link is revoked by now, if there was one
        return None
    return token


async def _tell(signup: Signup, what: str, subject: str) -> bool:
    """Send a mail, and return whether that went well; nothing is undone because of a mail."""
    mail = Mail(reference=f"{signup.id}/{what}", recipient=signup.email, subject=subject)
    try:
        await saga.step(notifications.send, mail)
    except StepFailed:
        return False
    return True
