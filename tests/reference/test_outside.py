"""The outside world keeps its contract, misbehaves when told to, and outlives its process."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import httpx
import pytest

from tasks.outside import client
from tasks.outside.client import Refused
from tasks.outside.process import Process
from tasks.outside.rules import DECLINED, SHELF
from tests.reference.conftest import Outside

CHARGE = {"card": "tok_visa", "money": {"currency": "EUR", "amount": "25.00"}}

pytestmark = pytest.mark.usefixtures("server")


# The contract


def test_it_is_done_once_for_each_key(outside: Outside) -> None:
    assert client.do("charges", "o1", CHARGE) == client.do("charges", "o1", CHARGE) == client.find("charges", "o1")
    assert outside.records("charges") == {"o1": "done"}


def test_a_key_is_one_request() -> None:
    client.do("charges", "o1", CHARGE)
    with pytest.raises(Refused, match="conflict"):
        client.do("charges", "o1", {**CHARGE, "card": "tok_other"})


def test_what_is_undone_is_not_found_and_not_done_again(outside: Outside) -> None:
    client.do("charges", "o1", CHARGE)
    client.undo("charges", "o1")
    client.undo("charges", "o1")
    assert client.find("charges", "o1") is None
    with pytest.raises(Refused, match="undone"):
        client.do("charges", "o1", CHARGE)
    assert outside.records("charges") == {"o1": "undone"}


def test_a_do_that_comes_after_its_undo_is_refused(outside: Outside) -> None:
    client.undo("charges", "o1")
    with pytest.raises(Refused, match="undone"):
        client.do("charges", "o1", CHARGE)
    assert outside.records("charges") == {"o1": "refused"}


def test_a_refusal_leaves_nothing_behind(outside: Outside) -> None:
    with pytest.raises(Refused, match="declined"):
        client.do("charges", "o1", {**CHARGE, "card": DECLINED})
    assert outside.records("charges") == {}


def test_a_shelf_gets_empty_and_is_filled_again_by_an_undo() -> None:
    client.do("picks", "o1", {"sku": "lamp", "quantity": SHELF})
    with pytest.raises(Refused, match="sold out"):
        client.do("picks", "o2", {"sku": "lamp", "quantity": 1})
    client.undo("picks", "o1")
    client.do("picks", "o2", {"sku": "lamp", "quantity": 1})


def test_a_key_may_be_any_text(outside: Outside) -> None:
    key = "o1/welcome ann+1@post.example?#%"
    client.do("mails", key, {"recipient": "ann@post.example", "subject": "Hello"})
    assert outside.records("mails") == {key: "done"}


def test_there_is_no_other_path() -> None:
    assert client.http().get("/elsewhere").status_code == 404


def test_pages_follow_one_another_to_the_end() -> None:
    seen, cursor = [], 0
    while cursor is not None:
        page = client.page("checking-25", cursor, 10)
        cursor = page["next"]
        seen += [each["id"] for each in page["transactions"]]
    assert seen == sorted(set(seen)) and len(seen) == page["total"] == 25
    assert client.page("checking-25", 20, 10) == page


# Faults


def test_an_error_means_that_nothing_happened(outside: Outside) -> None:
    outside.fault("error", "charges", verb="do", times=1)
    with pytest.raises(httpx.HTTPStatusError):
        client.do("charges", "o1", CHARGE)
    assert outside.records("charges") == {}
    client.do("charges", "o1", CHARGE)


@pytest.mark.usefixtures("impatient")
def test_an_answer_that_does_not_come_in_time_leaves_the_effect(outside: Outside) -> None:
    outside.fault("lost", "charges", verb="do")
    with pytest.raises(httpx.ReadTimeout):
        client.do("charges", "o1", CHARGE)
    assert outside.records("charges") == {"o1": "done"}


def test_a_connection_that_is_dropped_leaves_the_effect(outside: Outside) -> None:
    outside.fault("lost", "charges", seconds=0)
    with pytest.raises(httpx.RemoteProtocolError):
        client.do("charges", "o1", CHARGE)
    assert outside.records("charges") == {"o1": "done"}


@pytest.mark.usefixtures("impatient")
def test_a_slow_do_that_arrives_after_its_undo_is_refused(outside: Outside) -> None:
    outside.fault("slow", "charges", verb="do", seconds=1)
    with pytest.raises(httpx.ReadTimeout):
        client.do("charges", "o1", CHARGE)
    client.undo("charges", "o1")
    outside.recover()
    with pytest.raises(Refused, match="undone"):  # as the slow one is, which is still on its way
        client.do("charges", "o1", CHARGE)
    assert outside.records("charges") == {"o1": "refused"}


def test_who_forgets_keys_does_it_twice(outside: Outside) -> None:
    outside.fault("forgets", "charges", times=1)
    client.do("charges", "o1", CHARGE)
    client.do("charges", "o1", CHARGE)
    assert [each["state"] for each in outside.back_office("charges")] == ["done", "done"]


def test_a_fault_meets_only_whom_it_is_for(outside: Outside) -> None:
    outside.fault("error", "charges", holding="tok_bad")
    client.do("charges", "o1", CHARGE)
    with pytest.raises(httpx.HTTPStatusError):
        client.do("charges", "o2", {**CHARGE, "card": "tok_bad"})


def test_an_undo_meets_the_faults_of_what_it_undoes(outside: Outside) -> None:
    client.do("charges", "o1", {**CHARGE, "card": "tok_bad"})
    outside.fault("error", "charges", verb="undo", holding="tok_bad")
    with pytest.raises(httpx.HTTPStatusError):
        client.undo("charges", "o1")
    assert outside.records("charges") == {"o1": "done"}


# The process


def test_a_killed_server_knows_everything_when_it_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Process(tmp_path / "killed.jsonl") as first:
        monkeypatch.setenv("OUTSIDE_URL", first.url)
        client.do("charges", "o1", CHARGE)
        client.undo("charges", "o2")
        client.close()
        os.kill(first.pid, signal.SIGKILL)
    with Process(tmp_path / "killed.jsonl") as second:
        monkeypatch.setenv("OUTSIDE_URL", second.url)
        assert client.find("charges", "o1") is not None
        with pytest.raises(Refused):
            client.do("charges", "o2", CHARGE)
        client.close()


def test_a_server_ends_with_who_started_it(tmp_path: Path) -> None:
    server = Process(tmp_path / "orphan.jsonl")
    began = time.monotonic()
    server.stop()
    assert time.monotonic() - began < 10
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.url, trust_env=False)
