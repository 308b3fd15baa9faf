"""What a limit may be, is known at import; and whom it counts for, when a call is asked for."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator import step
from orchestrator.errors import DefinitionError, UsageError
from orchestrator.machine.policy import seconds_between


def refund(account: str, result: str | None) -> None: ...


def charge(account: str, cents: int = 7) -> str:
    return account


def declared(**options: Any) -> Any:
    return step(name="limits.charge", **options)(charge)


@pytest.mark.parametrize(
    "rate", ["0/s", "0.0/m", "-1/s", "100", "100/d", "/s", "ten/s", "1e3/s", "100 /s", "", 100, 1.5, b"1/s"]
)
def test_a_rate_that_is_none_is_refused_at_import(rate: Any) -> None:
    with pytest.raises(DefinitionError, match=r"step limits\.charge: a rate is a positive number"):
        declared(rate_limit=rate)


@pytest.mark.parametrize("concurrency", [0, -1, True, 1.5, "5"])
def test_a_concurrency_that_is_none_is_refused_at_import(concurrency: Any) -> None:
    with pytest.raises(DefinitionError, match=r"step limits\.charge: concurrency is a whole number of 1 or more"):
        declared(concurrency=concurrency)


@pytest.mark.parametrize(("rate", "seconds"), [("100/s", 0.01), ("5/m", 12.0), ("1000/h", 3.6), ("0.5/s", 2.0)])
def test_a_rate_is_seconds_between_two_begins(rate: str, seconds: float) -> None:
    assert seconds_between(rate) == pytest.approx(seconds)


def test_a_key_without_a_limit_is_refused_and_says_how_a_call_is_named() -> None:
    with pytest.raises(DefinitionError, match=r"with_options\(key=...\)"):
        declared(key="charge-eu")


@pytest.mark.parametrize("key", ["customer", lambda customer: customer])
def test_a_key_of_a_parameter_that_is_not_there_is_refused(key: Any) -> None:
    with pytest.raises(DefinitionError, match="takes customer, which is no parameter of it"):
        declared(concurrency=1, key=key)


def test_without_a_key_the_limit_is_the_steps_own() -> None:
    assert declared(rate_limit="4/s").limit({"account": "ann"}) == {
        "gate": "limits.charge",
        "every": 0.25,
        "rate": "4/s",
    }
    assert declared().limit({"account": "ann"}) is None


def test_each_value_of_a_parameter_has_the_limit_for_itself() -> None:
    by_account, by_cents = declared(concurrency=2, key="account"), declared(concurrency=2, key="cents")
    assert by_account.limit({"account": "ann"}) == {"gate": "limits.charge:ann", "most": 2}
    assert by_cents.limit({"account": "ann"})["gate"] == "limits.charge:7"


def test_a_key_may_be_made_of_some_arguments() -> None:
    made = declared(concurrency=2, key=lambda cents, account: f"{account[0]}{cents > 5}")
    assert made.limit({"account": "ann"})["gate"] == "limits.charge:aTrue"


@pytest.mark.parametrize("account", ["", "two\nlines", "x" * 501])
def test_a_key_that_names_nothing_is_refused_when_it_is_asked_for(account: str) -> None:
    with pytest.raises(UsageError, match="the key of its limit"):
        declared(concurrency=2, key="account").limit({"account": account})


def test_the_key_of_a_call_is_another_one() -> None:
    limited = declared(concurrency=2, key="account")
    call = limited.with_options(key="charge-eu", concurrency=3)
    assert (call.options.key, limited.options.key) == ("charge-eu", "")
    assert call.limit({"account": "ann"}) == {"gate": "limits.charge:ann", "most": 3}


def test_an_undo_counts_for_its_own_key() -> None:
    undo = step(name="limits.refund", rate_limit="1/s", key="account")(refund)
    armed = declared(compensate=undo).arm({"account": "ann"})
    assert armed.limit == {"gate": "limits.refund:ann", "every": 1.0, "rate": "1/s"}
    assert declared(compensate=undo.s("bob", None)).arm({"account": "ann"}).limit["gate"] == "limits.refund:bob"


def test_an_undo_cannot_count_by_a_result_that_is_not_known_yet() -> None:
    undo = step(name="limits.refund", concurrency=1, key="result")(refund)
    with pytest.raises(DefinitionError, match="not known when the undo is armed"):
        declared(compensate=undo)


def test_the_rate_is_celerys_too_for_messages() -> None:
    assert declared(rate_limit="4/s").options.celery == {"rate_limit": "4/s"}
