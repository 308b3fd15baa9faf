"""A random mix of faults for as long as one likes: ``make soak MINUTES=n [SEED=s]``.

Owns the mix.  Rounds of a few dozen trips, each with its own database and broker, its own faults, and the checker at
its end, which fails a round that has not seen every kind of trouble: what chance has left out is made up for.  The seed
that is printed chooses all of it.  (What the machine makes of a seed is not in its hands.)
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import random
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import redis

from tests.acceptance.running import Worker
from tests.faults.load import Load
from tests.faults.rabbitmq import RabbitMQ
from tests.faults.scene import Scene
from tests.faults.servers import Servers
from tests.faults.tally import TALLY
from tests.faults.test_messages import purge
from tests.proof.checker import STRICT

RUNS = 55


@dataclass
class Round:
    """One round: its scene, its workers, its load, and the dice."""

    scene: Scene
    workers: list[Worker]
    servers: Servers
    rabbitmq: RabbitMQ
    dice: random.Random

    def worker(self) -> Worker:
        return self.dice.choice(self.workers)


def kill_child(it: Round) -> None:
    with contextlib.suppress(IndexError):
        it.scene.signal(it.dice.choice(it.scene.children(it.worker())), signal.SIGKILL)


def kill_companion(it: Round) -> None:
    it.scene.signal(it.scene.companion(it.worker()), signal.SIGKILL)


def kill_worker(it: Round) -> None:
    worker = it.worker()
    it.scene.signal(worker, signal.SIGKILL, whole=it.dice.random() < 0.5)
    worker.start()


def stop_worker(it: Round) -> None:
    worker = it.worker()
    it.scene.signal(worker, it.dice.choice([signal.SIGTERM, signal.SIGQUIT]))
    assert worker.process is not None
    worker.process.wait(60.0)
    worker.start()


def freeze_worker(it: Round) -> None:
    with it.scene.stopped(it.worker()):
        time.sleep(it.dice.uniform(0.5, 4.0))


def crash_postgres(it: Round) -> None:
    it.servers.restart_postgres()
    it.scene.fault("Postgres crashed")


def end_backends(it: Round) -> None:
    end_all = """SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
        WHERE datname = current_database() AND pid <> pg_backend_pid()"""
    it.scene.fault("backend terminated", it.scene.sql(end_all)[0][0])


def lose_answers(it: Round) -> None:
    it.scene.database.swallow(lambda data: it.dice.random() < 1 / 30, times=20)
    time.sleep(it.dice.uniform(0.5, 3.0))
    it.scene.fault("answer lost", it.scene.database.swallowed)
    it.scene.database.restore()


def hang(it: Round) -> None:
    proxy = it.dice.choice([it.scene.database, it.scene.broker])
    proxy.hang()
    it.scene.fault("half-open")
    time.sleep(it.dice.uniform(0.5, 5.0))
    proxy.restore()


def reset(it: Round) -> None:
    it.scene.fault("connections reset", it.dice.choice([it.scene.database, it.scene.broker]).reset())


def kill_broker(it: Round) -> None:
    if it.scene.broker_url.startswith("amqp"):
        it.rabbitmq.restart()
    else:
        it.servers.restart_valkey()
    it.scene.fault("broker killed")


def empty_queue(it: Round) -> None:
    purge(it.scene.broker_url)
    it.scene.fault("queue purged")


def ring_again(it: Round) -> None:
    """Doorbells that come once more than they were rung."""
    it.scene.ring_again()


FAULTS: list[Callable[[Round], None]] = [
    kill_child, kill_child, kill_companion, kill_worker, stop_worker, freeze_worker, crash_postgres, end_backends,
    lose_answers, hang, reset, kill_broker, empty_queue, ring_again,
]  # fmt: skip


def one_round(number: int, seed: int, servers: Servers, rabbitmq: RabbitMQ, broker_url: str, folder: Path) -> None:
    """Start a load and do a few random things to it; raises AssertionError if a promise was broken, or not tried."""
    dice = random.Random(f"{seed}-{number}")
    folder.mkdir()
    name = servers.new_database()
    scene = Scene(servers.url_of(name), broker_url, folder)
    try:
        workers = scene.start_workers(2, proxied=True)
        it = Round(scene, workers, servers, rabbitmq, dice)
        load: Load = scene.load(RUNS, seed=dice.randrange(1 << 30), ms=30, office=scene.proxied_office())
        chosen = [dice.choice(FAULTS) for _ in range(dice.randint(3, 8))]
        print(f"round {number}: {', '.join(fault.__name__ for fault in chosen)}", flush=True)
        for count, fault in enumerate(chosen):
            load.until_ended(count * RUNS // (len(chosen) + 2), within_s=180.0)
            fault(it)
        load.until_ended(RUNS, within_s=240.0)
        scene.ring_again()
        scene.overtake(*workers, "overtaken")
        scene.kill_in_a_step("killed")
        scene.judge(STRICT, load, within_s=240.0)
    finally:
        scene.close()
    servers.drop_database(name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1 << 31))
    given = parser.parse_args()
    until = time.monotonic() + given.minutes * 60
    print(f"SEED={given.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="orchestrator-soak-") as root:
        folder = Path(root)
        servers = Servers(folder / "servers")
        rabbitmq = RabbitMQ(folder / "rabbitmq")
        try:
            for number in itertools.count(1):
                if time.monotonic() > until:
                    break
                url = servers.broker_url(number % 250)
                if number % 2 == 0:
                    url = rabbitmq.url(number // 2)
                else:
                    with redis.Redis.from_url(url) as client:
                        client.flushdb()
                one_round(number, given.seed, servers, rabbitmq, url, folder / f"round-{number}")
        except AssertionError as broken:
            print(f"{broken}\n{TALLY}\nBROKEN with SEED={given.seed}")
            return 1
        finally:
            rabbitmq.stop()
            servers.stop()
    print(f"{TALLY}\nSEED={given.seed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
