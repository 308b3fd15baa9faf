"""Messages that are lost, doubled, late, or of yesterday; with Valkey and with RabbitMQ."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import pytest
import redis
from celery import Celery
from kombu import Connection

from orchestrator.celery.doorbell import Bell
from tests.acceptance.running import until
from tests.faults.conftest import new_valkey_url
from tests.faults.load import QUEUE, Office
from tests.faults.postman import Habits, Postman
from tests.faults.rabbitmq import RabbitMQ
from tests.faults.scene import BARE, LOADED, Scene
from tests.faults.servers import Servers
from tests.faults.steps import Stop
from tests.proof.checker import STRICT


@pytest.fixture(params=["valkey", pytest.param("rabbitmq", marks=pytest.mark.debian)])
def new_broker_url(request: pytest.FixtureRequest, own_servers: Servers) -> Callable[[], str]:
    """Make URLs of brokers without messages: all of Valkey, or all of RabbitMQ."""
    if request.param == "valkey":
        return lambda: new_valkey_url(own_servers)
    rabbitmq: RabbitMQ = request.getfixturevalue("rabbitmq")
    return rabbitmq.new_url


@contextmanager
def posted(scene: Scene, source: str, habits: Habits) -> Iterator[Postman]:
    """Two workers and a client whose doorbells a postman carries."""
    scene.office = Office(scene.database_url, source, scene.folder / "acknowledged")
    with Postman(source, scene.broker_url, habits) as postman:
        scene.start_workers(2, FAULTS_WRITE_TO=source)
        scene.messages = postman.kept
        yield postman
    scene.office.close()


def purge(url: str) -> int:
    with Connection(url) as connection:
        return int(connection.default_channel.queue_purge(QUEUE) or 0)


def test_queues_that_are_emptied_under_load_cost_nothing(
    new_scene: Callable[..., Scene], new_broker_url: Callable[[], str]
) -> None:
    """Valkey forgets everything each time, its bindings too; and messages are among what goes, as nobody reads them."""
    scene = new_scene(new_broker_url())
    workers = scene.start_workers(2)
    load = scene.load(runs=66)
    for count in range(5, 60, 5):
        load.until_ended(count)
        _empty(scene)
    with ExitStack() as still:
        for worker in workers:
            still.enter_context(scene.stopped(worker))
        for number in range(10):
            scene.start(f"unheard {number}", Stop(name="a"))
        until(lambda: scene.office.ring(20) and scene.waiting(), "more doorbells wait than a worker has in hand")
        assert _empty(scene) > 0
    for number in range(10):
        scene.until_state(f"unheard {number}", "completed")
    scene.judge(LOADED, load)


def _empty(scene: Scene) -> int:
    """Take all messages away from a broker; returns how many there were in the queue."""
    lost = purge(scene.broker_url) if scene.broker_url.startswith("amqp") else scene.waiting()
    if scene.broker_url.startswith("redis"):
        with redis.Redis.from_url(scene.broker_url) as broker:
            broker.flushall()
    scene.fault("queue purged" if scene.broker_url.startswith("amqp") else "FLUSHALL")
    return lost


def test_messages_that_come_three_times_do_nothing_twice(
    new_scene: Callable[..., Scene], new_broker_url: Callable[[], str]
) -> None:
    """Tripled, late by up to half a second each, so in another order too; then all of them once more."""
    scene = new_scene(new_broker_url())
    with posted(scene, new_broker_url(), Habits(copies=3, longest_delay_s=0.5)) as postman:
        load = scene.load(runs=44)
        load.until_ended(44)
        replayed = postman.replay()
        again = scene.load(runs=22, seed=2)
        again.until_ended(22)
        scene.fault("messages tripled and late", postman.carried)
        scene.fault("messages replayed", replayed)
        scene.redeliveries = postman.repeated
        scene.judge(replace(LOADED, redeliveries=1), load, again)


def test_doorbells_that_all_come_too_late_are_heard_all_the_same(
    new_scene: Callable[..., Scene], own_servers: Servers
) -> None:
    """So they do where more are rung than a busy worker can look at, and pumps ring on for what is not begun.

    Valkey keeps them all; RabbitMQ drops them by itself.
    """
    scene = new_scene()
    scene.office = Office(scene.database_url, new_valkey_url(own_servers), scene.folder / "acknowledged")
    scene.start_workers(1, ORCHESTRATOR_DOORBELL_EXPIRES="0.001")
    for run in ("one", "another"):
        scene.start(run, Stop(name="a"))  # rings where nobody listens, so that a pump has to
        scene.until_state(run, "completed", within_s=20.0)
    scene.office.close()
    scene.judge(replace(BARE, faults=0))


def test_a_load_that_meets_with_everything_is_judged_by_the_strict_demand(
    new_scene: Callable[..., Scene], new_broker_url: Callable[[], str]
) -> None:
    """Messages that come again, a worker that is overtaken, a child that is killed, and every kind of end."""
    scene = new_scene(new_broker_url())
    with posted(scene, new_broker_url(), Habits(copies=3)) as postman:
        load = scene.load(runs=44)
        load.until_ended(11)
        scene.overtake(*scene.workers, "overtaken")
        scene.kill_in_a_step("killed")
        load.until_ended(44)
        scene.fault("messages tripled", postman.carried)
        scene.redeliveries = postman.repeated
        scene.judge(STRICT, load)


def test_messages_that_are_eaten_cost_seconds_and_no_work(
    new_scene: Callable[..., Scene], new_broker_url: Callable[[], str]
) -> None:
    """Three in ten, on their way."""
    scene = new_scene(new_broker_url())
    with posted(scene, new_broker_url(), Habits(eaten=0.3)) as postman:
        load = scene.load(runs=66)
        load.until_ended(66)
        until(lambda: postman.eaten, "a message was eaten")
        scene.fault("messages eaten", postman.eaten)
        scene.judge(LOADED, load)


def test_a_broker_that_is_killed_and_restarted_costs_seconds(scene_of_each_broker: Scene, request: Any) -> None:
    _kill_the_broker(scene_of_each_broker, request, times=2, runs=44)


def test_a_worker_that_has_messages_in_hand_outlives_its_broker(scene: Scene, own_servers: Servers) -> None:
    """It gives back what it has not acknowledged, over a connection that is gone.

    A task that it does not know is held for a while, in case a newer release comes.
    """
    worker = scene.worker().start()
    with Celery("people", broker=scene.broker_url, set_as_current=False) as app:
        app.send_task("faults.unheard_of", queue=QUEUE)
    until(lambda: "faults.unheard_of" in worker.said, "the message is held", 30.0)
    own_servers.restart_valkey()
    scene.fault("broker killed")
    until(lambda: worker.said.count("Connected to redis") > 1 or not worker.is_alive, "it is connected again", 60.0)
    assert worker.is_alive, worker.said
    scene.start("after", Stop(name="a"))
    scene.until_state("after", "completed")
    scene.judge(BARE)


@pytest.mark.long
def test_a_broker_that_is_killed_twenty_times(scene_of_each_broker: Scene, request: Any) -> None:
    _kill_the_broker(scene_of_each_broker, request, times=20, runs=220)


def _kill_the_broker(scene: Scene, request: pytest.FixtureRequest, *, times: int, runs: int) -> None:
    rabbit = scene.broker_url.startswith("amqp")
    restart = request.getfixturevalue("rabbitmq" if rabbit else "own_servers")
    workers = scene.start_workers(2)
    load = scene.load(runs=runs, ms=30)
    for number in range(times):
        load.until_ended((number + 1) * runs // (times + 2), within_s=180.0)
        restart.restart() if rabbit else restart.restart_valkey()
        scene.fault("broker killed")
    scene.judge(LOADED, load, within_s=180.0)
    assert all(worker.is_alive for worker in workers), "workers outlive their broker"


def test_a_doorbell_that_finds_its_broker_gone_leaves_no_socket_behind(scene_of_each_broker: Scene) -> None:
    """One that stays open is a warning of Python's when it is collected, and warnings are errors here."""
    options = {"hostname": scene_of_each_broker.broker.url, "ssl": False, "transport_options": {}, "heartbeat": 0}
    bell = Bell(options)
    for _ in range(3):
        until(lambda: bell.ring(QUEUE), "the bell rings", 30.0)
        scene_of_each_broker.broker.cut()
        until(lambda: not bell.ring(QUEUE), "it is seen that the broker is gone", 30.0)
        scene_of_each_broker.broker.restore()
        gc.collect()
    bell.close()


def _half_open(scene: Scene, seconds: float, runs: int) -> None:
    workers = scene.start_workers(2, proxied=True)
    load = scene.load(runs=runs, office=scene.proxied_office())
    load.until_ended(runs // 4)
    scene.broker.hang()
    scene.fault("broker half-open")
    began = scene.sql("SELECT clock_timestamp()")[0][0]
    load.until_ended(runs // 2, within_s=180.0)  # it goes on: what drains goes on draining
    until(
        lambda: (scene.sql("SELECT clock_timestamp()")[0][0] - began).total_seconds() > seconds,
        "it was half-open for long enough", seconds + 30.0,
    )  # fmt: skip
    scene.broker.restore()
    scene.judge(LOADED, load, within_s=180.0)
    assert all(worker.is_alive for worker in workers)


@pytest.mark.long
def test_a_broker_that_is_half_open_for_ninety_seconds(scene_of_each_broker: Scene) -> None:
    _half_open(scene_of_each_broker, 90.0, 66)


def test_a_broker_that_is_half_open_is_outlived(scene: Scene) -> None:
    _half_open(scene, 5.0, 33)
