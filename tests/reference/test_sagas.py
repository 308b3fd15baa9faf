"""The sagas with their own steps on a real ledger, in-process: every way to end, and what stays."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, select, update

from orchestrator import testing
from orchestrator.step import registry
from orchestrator.testing import TestRun
from sagas.onboarding import Onboarded, onboarding
from sagas.order import Order, OrderReceipt, order
from sagas.payment import Payment, PaymentReceipt, payment
from sagas.training import training
from sagas.transfer import Transfer, transfer
from tasks import customers, ledger, model, models, payments, transfers
from tasks.customers import Signup
from tasks.ledger import House
from tasks.model import Dataset, Weights
from tasks.models import Discarded, NotWhatWasTrained, Trained, TrainingJob
from tasks.money import Money, eur
from tasks.outside.client import Refused
from tasks.outside.rules import DECLINED, FORGED, SOLD_OUT
from tests.reference.conftest import Outside
from tests.reference.regretted import regretted

TRANSFER = Transfer(id="t1", source="ann", target="bob", money=eur(40))


def an_order(*, sku: str = "lamp", card: str = "tok_visa", email: str = "ann@post.example") -> Order:
    """Return an order of three pieces for 25 EUR."""
    return Order(id="o1", sku=sku, quantity=3, total=eur(25), card=card, email=email)


def a_payment(*, card: str = "tok_visa", merchant: str = "bakery", money: Money | None = None) -> Payment:
    """Return a payment by ann, of 30 EUR if nothing else is said."""
    return Payment(
        id="p1",
        customer="ann",
        merchant=merchant,
        card=card,
        money=money or eur(30),
        customer_email="ann@post.example",
        merchant_email="bakery@post.example",
    )


def undone(run: TestRun) -> list[str]:
    """Return the compensations that a run performed, in order."""
    return [call.name for call in run.calls if call.role == "undo" and call.error is None]


def balances(conn: Connection) -> tuple[Money, Money]:
    """Return what ann and bob hold."""
    return ledger.available(conn, "ann"), ledger.available(conn, "bob")


# Transfer


def test_a_transfer_moves_the_money(conn: Connection) -> None:
    run = testing.run(transfer, TRANSFER, connection=conn)

    assert run.result().moved == eur(40)
    assert balances(conn) == (eur(60), eur(40))


def test_a_rejected_debit_is_not_reversed(conn: Connection) -> None:
    too_much = TRANSFER.model_copy(update={"money": eur(101)})

    run = testing.run(transfer, too_much, connection=conn)

    assert (run.state, undone(run)) == ("failed", [])
    assert balances(conn) == (eur(100), eur(0))


def test_a_debit_that_timed_out_leaves_the_money_where_it_was(
    conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    def post_then_time_out(*args: Any) -> None:
        post(*args)
        raise TimeoutError

    post = ledger.post
    monkeypatch.setattr(ledger, "post", post_then_time_out)

    run = testing.run(transfer, TRANSFER, connection=conn)

    assert run.state in ("failed", "compensated")
    assert balances(conn) == (eur(100), eur(0))


@pytest.mark.parametrize("status", ["closed", "frozen"])
def test_a_credit_that_cannot_be_made_gives_the_money_back(conn: Connection, status: str) -> None:
    conn.execute(update(ledger.accounts).values(status=status).where(ledger.accounts.c.id == "bob"))

    run = testing.run(transfer, TRANSFER, connection=conn)

    assert run.state == "compensated"
    assert balances(conn) == (eur(100), eur(0))


FROM_BANK = Transfer(id="t1", source="iban:DE02", target="bob", money=eur(40))


def test_money_comes_from_another_bank(conn: Connection, outside: Outside) -> None:
    run = testing.run(transfer, FROM_BANK, connection=conn)

    assert run.result().debit_posting is None
    assert (outside.records("debits"), balances(conn)[1]) == ({"t1": "done"}, eur(40))


def test_another_banks_refusal_is_not_reversed_into_a_gift(conn: Connection, outside: Outside) -> None:
    empty = FROM_BANK.model_copy(update={"source": "iban:XX00"})

    run = testing.run(transfer, empty, connection=conn)

    assert (run.state, undone(run)) == ("failed", [])
    assert outside.records("debits") == {}, "nothing was asked to be given back"


def test_a_pull_that_timed_out_is_reversed(conn: Connection, outside: Outside, impatient: None) -> None:
    outside.fault("lost", "debits", verb="do")

    run = testing.run(transfer, FROM_BANK, connection=conn)

    assert (run.state, undone(run)) == ("compensated", ["tasks.transfers.return_to_bank"])
    assert (outside.records("debits"), balances(conn)[1]) == ({"t1": "undone"}, eur(0))


def test_a_pull_that_never_came_through_is_refused_if_it_comes_later(conn: Connection, outside: Outside) -> None:
    outside.fault("error", "debits", verb="do")

    assert testing.run(transfer, FROM_BANK, connection=conn).state == "compensated"
    outside.recover()

    with pytest.raises(Refused, match="undone"):
        transfers.pull(FROM_BANK)


def test_a_credit_that_cannot_be_made_returns_the_pull(conn: Connection, outside: Outside) -> None:
    conn.execute(update(ledger.accounts).values(status="closed").where(ledger.accounts.c.id == "bob"))

    assert testing.run(transfer, FROM_BANK, connection=conn).state == "compensated"
    assert outside.records("debits") == {"t1": "undone"}


def test_a_transfer_that_was_made_is_taken_back_with_what_it_is_a_part_of(conn: Connection) -> None:
    run = testing.run(regretted, TRANSFER, connection=conn)

    assert (run.state, undone(run)) == ("compensated", ["tasks.transfers.undo_credit", "tasks.transfers.undo_debit"])
    assert balances(conn) == (eur(100), eur(0))


def test_what_the_target_has_spent_already_waits_for_a_person(conn: Connection) -> None:
    def give_then_lose_it(request: Transfer) -> ledger.Posting:
        posting = transfers.credit.function(conn, request)
        ledger.post(conn, "spent", "elsewhere", "bob", House.EQUITY.account("EUR"), eur(10))
        return posting

    run = testing.run(regretted, TRANSFER, connection=conn, stubs={transfers.credit: give_then_lose_it})

    assert (run.state, undone(run)) == ("compensating", [])
    assert balances(conn) == (eur(60), eur(30)), "nothing is created or lost while a person decides"


# Order


def test_an_order_is_charged_and_picked(outside: Outside) -> None:
    run = testing.run(order, an_order())

    assert run.result() == OrderReceipt(order_id="o1", charge_id="o1", paid=eur(25), confirmed=True)
    assert outside.records("charges") == outside.records("picks") == {"o1": "done"}


def test_a_declined_card_ends_an_order_before_it_began(outside: Outside) -> None:
    run = testing.run(order, an_order(card=DECLINED))

    assert (run.state, undone(run)) == ("failed", [])
    assert outside.records("charges") == outside.records("picks") == {}


def test_a_charge_without_an_answer_is_found_and_kept(outside: Outside, impatient: None) -> None:
    outside.fault("lost", "charges", verb="do")

    run = testing.run(order, an_order())

    assert run.state == "completed"
    assert [call.role for call in run.calls if call.role == "probe"] == ["probe"]
    assert outside.records("charges") == {"o1": "done"}


def test_an_order_that_cannot_be_charged_at_all_ends_before_it_began(outside: Outside) -> None:
    outside.fault("error", "charges", verb="do")

    run = testing.run(order, an_order())

    assert (run.state, undone(run)) == ("failed", []), "the probe is certain that there was no charge"
    assert outside.records("charges") == {"o1": "refused"}, "nor will there be one, if it comes late"


@pytest.mark.parametrize("answer", ["given", "lost"])
def test_an_order_that_cannot_be_filled_is_refunded(outside: Outside, answer: str) -> None:
    if answer == "lost":
        outside.fault("lost", "charges", verb="do", seconds=0)

    run = testing.run(order, an_order(sku=SOLD_OUT))

    assert (run.state, undone(run)) == ("compensated", ["tasks.payments.refund"])
    assert outside.records("charges") == {"o1": "undone"}


def test_goods_picked_without_an_answer_go_back_before_the_money(outside: Outside) -> None:
    outside.fault("lost", "picks", verb="do", seconds=0)

    run = testing.run(order, an_order())

    assert undone(run) == ["tasks.inventory.restock", "tasks.payments.refund"]
    assert outside.records("charges") == outside.records("picks") == {"o1": "undone"}


def test_a_refund_that_fails_at_first_is_tried_again(outside: Outside) -> None:
    outside.fault("error", "charges", verb="undo", times=2)

    assert testing.run(order, an_order(sku=SOLD_OUT)).state == "compensated"
    assert outside.records("charges") == {"o1": "undone"}


def test_a_refund_that_keeps_failing_parks_the_order_until_a_person_acts(outside: Outside) -> None:
    outside.fault("error", "charges", verb="undo")

    run = testing.run(order, an_order(sku=SOLD_OUT))

    assert (run.state, outside.records("charges")) == ("parked", {"o1": "done"})
    outside.recover()
    run.retry("tasks.payments.charge#0", by="ann", reason="the provider is back")
    assert (run.state, outside.records("charges")) == ("compensated", {"o1": "undone"})


@pytest.mark.parametrize("failure", ["bounced", "down"])
def test_a_mail_that_fails_undoes_nothing(outside: Outside, failure: str) -> None:
    if failure == "down":
        outside.fault("error", "mails")

    run = testing.run(order, an_order(email="ann@bounce.example"))

    assert (run.result().confirmed, undone(run)) == (False, [])
    assert outside.records("charges") == outside.records("picks") == {"o1": "done"}


def test_a_provider_that_forgets_its_keys_is_beyond_help(outside: Outside) -> None:
    outside.fault("forgets", "charges", verb="do", times=1)
    outside.fault("lost", "charges", verb="do", times=1, seconds=0)

    assert testing.run(order, an_order()).state == "completed"
    assert [each["state"] for each in outside.back_office("charges")] == ["done", "done"], "the contract was theirs"


# Payment


def test_a_payment_reaches_the_merchant(conn: Connection, outside: Outside) -> None:
    run = testing.run(payment, a_payment(), connection=conn)

    assert run.result() == PaymentReceipt(payment_id="p1", charge_id="p1", settled=eur(30), notified=2)
    assert balances(conn)[0] == eur(70)
    assert outside.records("charges") == {"p1": "done"}


@pytest.mark.parametrize("amount", [101, 5001])
def test_a_payment_that_is_refused_at_the_door_leaves_no_trace(conn: Connection, amount: int) -> None:
    run = testing.run(payment, a_payment(money=eur(amount)), connection=conn)

    assert (run.state, undone(run)) == ("failed", [])
    assert balances(conn)[0] == eur(100)


def test_a_wallet_emptied_after_the_look_is_not_overdrawn(conn: Connection) -> None:
    def look_then_lose_the_race(request: Payment) -> Money:
        transfers.debit.function(conn, TRANSFER.model_copy(update={"money": eur(90)}))
        return eur(100)

    stubs = {payments.check_balance: look_then_lose_the_race}
    run = testing.run(payment, a_payment(), connection=conn, stubs=stubs)

    assert run.state == "failed"
    assert balances(conn)[0] == eur(10)


def test_a_declined_payment_releases_the_hold(conn: Connection) -> None:
    run = testing.run(payment, a_payment(card=DECLINED), connection=conn)

    assert (run.state, undone(run)) == ("compensated", ["tasks.payments.release"])
    assert balances(conn)[0] == eur(100)


def test_a_payment_whose_charge_got_no_answer_is_found_and_settled(
    conn: Connection, outside: Outside, impatient: None
) -> None:
    outside.fault("lost", "charges", verb="do")

    run = testing.run(payment, a_payment(), connection=conn)

    assert run.result().settled == eur(30)
    assert [call.name for call in run.calls if call.role == "probe"] == ["tasks.payments.find_charge"]


def test_a_payment_that_cannot_be_settled_is_undone(conn: Connection, outside: Outside) -> None:
    run = testing.run(payment, a_payment(merchant="nobody"), connection=conn)

    assert undone(run) == ["tasks.payments.refund", "tasks.payments.release"]
    assert balances(conn)[0] == eur(100)
    assert outside.records("charges") == {"p1": "undone"}


@pytest.mark.parametrize("failing", ["@", "ann@", "bakery@"])
def test_a_settled_payment_is_never_reversed(conn: Connection, outside: Outside, failing: str) -> None:
    outside.fault("error", "mails", holding=failing)

    run = testing.run(payment, a_payment(), connection=conn)

    assert run.result().notified == (0 if failing == "@" else 1)
    assert undone(run) == []
    assert (balances(conn)[0], outside.records("charges")) == (eur(70), {"p1": "done"})


# Onboarding

SIGNUP = Signup(id="s1", name="Sue", email="sue@post.example", document="pass-1", iban="DE02")


def trace(conn: Connection, outside: Outside) -> tuple[str | None, int, dict[str, str]]:
    """Return what an onboarding left: the profile's status, the number of accounts, the bank's links."""
    mine = select(ledger.accounts.c.id).where(ledger.accounts.c.id.like("customer:s1:%"))
    return customers.status_of(conn, "s1"), len(conn.execute(mine).all()), outside.records("links")


def test_a_day_after_the_welcome_comes_the_question(conn: Connection, outside: Outside) -> None:
    run = testing.run(onboarding, SIGNUP, connection=conn)

    assert run.result() == Onboarded(
        customer_id="s1", accounts=["customer:s1:EUR"], bank_token="link-1", welcomed=True, followed_up=True
    )
    assert timedelta(hours=24) <= run.duration < timedelta(hours=25)
    assert trace(conn, outside) == ("active", 1, {"s1": "done"})
    assert set(outside.records("mails")) == {"s1/welcome sue@post.example", "s1/follow-up sue@post.example"}


def test_who_is_not_who_he_says_is_told_and_leaves_no_trace(conn: Connection, outside: Outside) -> None:
    run = testing.run(onboarding, SIGNUP.model_copy(update={"document": FORGED}), connection=conn)

    assert (run.state, run.error["type"]) == ("compensated", "IdentityRefused")
    assert trace(conn, outside) == (None, 0, {})
    assert set(outside.records("mails")) == {"s1/refusal sue@post.example"}


def test_a_refusal_that_cannot_be_mailed_is_one_all_the_same(conn: Connection, outside: Outside) -> None:
    outside.fault("error", "mails")

    run = testing.run(onboarding, SIGNUP.model_copy(update={"document": FORGED}), connection=conn)

    assert (run.state, run.error["type"]) == ("compensated", "IdentityRefused")
    assert trace(conn, outside) == (None, 0, {})


def test_an_identity_check_that_does_not_answer_undoes_the_profile(conn: Connection, outside: Outside) -> None:
    outside.fault("error", "checks")

    assert testing.run(onboarding, SIGNUP, connection=conn).state == "compensated"
    assert trace(conn, outside) == (None, 0, {})


def test_an_address_that_is_taken_ends_it_before_it_began(conn: Connection) -> None:
    customers.create_profile(conn, SIGNUP.model_copy(update={"id": "s0"}))

    assert testing.run(onboarding, SIGNUP, connection=conn).state == "failed"
    assert customers.status_of(conn, "s0") == "new"


@pytest.mark.parametrize("fails", [customers.open_accounts, customers.activate])
def test_what_fails_before_it_is_finished_leaves_no_trace(conn: Connection, outside: Outside, fails: Any) -> None:
    run = testing.run(onboarding, SIGNUP, connection=conn, stubs={fails: ConnectionError("not now")})

    assert run.state == "compensated"
    assert trace(conn, outside)[:2] == (None, 0)
    assert outside.records("links") in ({}, {"s1": "undone"})


@pytest.mark.parametrize(("what", "left"), [("lost", "undone"), ("error", "refused")])
def test_nobody_is_turned_away_because_a_bank_cannot_be_linked(
    conn: Connection, outside: Outside, what: str, left: str
) -> None:
    outside.fault(what, "links", verb="do", seconds=0)

    run = testing.run(onboarding, SIGNUP, connection=conn)

    assert run.result().bank_token is None
    assert trace(conn, outside) == ("active", 1, {"s1": left})


def test_without_another_bank_there_is_no_link(conn: Connection, outside: Outside) -> None:
    assert testing.run(onboarding, SIGNUP.model_copy(update={"iban": None}), connection=conn).state == "completed"
    assert outside.records("links") == {}


def test_a_failed_mail_does_not_undo_a_finished_onboarding(conn: Connection, outside: Outside) -> None:
    outside.fault("error", "mails")

    run = testing.run(onboarding, SIGNUP, connection=conn)

    assert (run.result().welcomed, run.result().followed_up) == (False, False)
    assert trace(conn, outside) == ("active", 1, {"s1": "done"})


def test_a_cancellation_during_the_day_undoes_nothing_either(conn: Connection, outside: Outside) -> None:
    run = testing.run(onboarding, SIGNUP, connection=conn, cancel_at=timedelta(hours=5))

    assert run.state == "completed"
    assert trace(conn, outside) == ("active", 1, {"s1": "done"})


# Training

JOB = TrainingJob(id="j1", account="labelled-1000", epochs=4)


def serving(conn: Connection) -> str | None:
    """Return the file of the model under the alias."""
    return conn.scalar(select(models.aliases.c.model))


def epochs_trained() -> list[int]:
    """Return the epochs in the order they were trained, over all attempts."""
    log = models.folder(JOB) / "training.log"
    return [json.loads(line)["epoch"] for line in log.read_text().splitlines()]


def test_a_good_model_is_deployed(conn: Connection) -> None:
    run = testing.run(training, JOB, connection=conn)

    report = run.result()
    assert report.accuracy >= JOB.gate and report.previous is None
    assert serving(conn) == report.model and Path(report.model).exists()


def test_data_that_cannot_be_had_at_first_is_asked_for_again(conn: Connection, outside: Outside) -> None:
    outside.fault("error", "feeds", times=2)

    assert testing.run(training, JOB, connection=conn).state == "completed"


def test_data_that_cannot_be_had_at_all_leaves_no_file(conn: Connection, outside: Outside) -> None:
    outside.fault("error", "feeds")

    assert testing.run(training, JOB, connection=conn).state == "compensated"
    with pytest.raises(Discarded):
        models.folder(JOB)


def test_an_interrupted_training_goes_on_at_its_checkpoint_and_comes_to_the_same(
    conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_epoch, broken = model.train_epoch, []

    def break_once(weights: Weights, data: Dataset, seed: int) -> tuple[Weights, float]:
        if weights.epoch == 2 and not broken:
            broken.append(weights.epoch)
            raise MemoryError
        return train_epoch(weights, data, seed)

    monkeypatch.setattr(model, "train_epoch", break_once)
    interrupted = testing.run(training, JOB, connection=conn).result()
    assert (broken, epochs_trained()) == ([2], [1, 2, 3, 4])

    other = JOB.model_copy(update={"id": "j2"})
    straight = testing.run(training, other, connection=conn).result()
    assert straight.loss == interrupted.loss
    weights = [model.load_weights(Path(each.model)).values for each in (interrupted, straight)]
    assert (weights[0] == weights[1]).all()


def test_a_model_that_is_not_good_enough_is_thrown_away(conn: Connection) -> None:
    before = testing.run(training, JOB.model_copy(update={"id": "j0"}), connection=conn).result()

    run = testing.run(training, JOB.model_copy(update={"account": "noisy-1000"}), connection=conn)

    assert (run.state, run.error["type"]) == ("compensated", "NotGoodEnough")
    assert serving(conn) == before.model and Path(before.model).exists()
    with pytest.raises(Discarded):
        models.folder(JOB)


@pytest.mark.parametrize("is_first", [True, False])
def test_a_model_that_fails_where_it_serves_gives_way_to_the_one_before(conn: Connection, is_first: bool) -> None:
    before = None
    if not is_first:
        before = testing.run(training, JOB.model_copy(update={"id": "j0"}), connection=conn).result().model

    run = testing.run(training, JOB, connection=conn, stubs={models.verify: NotWhatWasTrained("wrong")})

    assert undone(run) == ["tasks.models.withdraw", "tasks.models.discard"]
    assert serving(conn) == before


def test_a_withdrawn_model_never_comes_back_by_another_withdrawal(conn: Connection) -> None:
    lower, upper = (JOB.model_copy(update={"id": name}) for name in ("lower", "upper"))
    models.deploy(conn, lower, Trained(path="lower.npz", epochs=1, loss=0.0))
    models.deploy(conn, upper, Trained(path="upper.npz", epochs=1, loss=0.0))

    models.withdraw(conn, lower)
    assert serving(conn) == "upper.npz"
    models.withdraw(conn, upper)
    models.withdraw(conn, upper)
    assert serving(conn) is None


# All of them


def test_every_undo_is_declared_next_to_its_do() -> None:
    own = ("tasks.customers", "tasks.inventory", "tasks.models", "tasks.payments", "tasks.transfers")
    undoable = [do for do in registry.steps.values() if do.__module__ in own and do.options.compensate]
    assert len(undoable) >= 9
    for do in undoable:
        assert do.options.compensate.__module__ == do.__module__


def test_what_is_on_the_way_belongs_to_the_house(conn: Connection) -> None:
    testing.run(transfer, TRANSFER, connection=conn, stubs={transfers.credit: ConnectionError("not now")})

    transit = House.TRANSIT.account("EUR")
    rest = select(ledger.entries.c.amount).where(ledger.entries.c.account_id == transit)
    assert sum(conn.scalars(rest)) == 0
