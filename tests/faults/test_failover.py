"""The primary dies for good, and a synchronous standby takes its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.proxy import Proxy
from tests.faults.scene import LOADED, Scene
from tests.faults.servers import Servers


@pytest.mark.long
def test_a_primary_that_is_killed_under_load_and_its_standby_lose_no_run(tmp_path: Path) -> None:
    """Workers and clients know one address; what was acknowledged by the one is known to the other."""
    servers = Servers(tmp_path / "primary")
    database = servers.new_database()
    standby = servers.new_standby(tmp_path / "standby")
    way = Proxy(servers.url_of(database))
    (tmp_path / "scene").mkdir()
    scene = Scene(way.url, servers.broker_url(1), tmp_path / "scene")
    try:
        scene.start_workers(2)
        load = scene.load(runs=110, ms=30)
        load.until_ended(20, within_s=180.0)
        servers.kill_postgres()
        scene.fault("primary killed")
        way.cut()
        standby.promote()
        way.lead_to(standby.url)
        way.restore()
        scene.judge(LOADED, load, within_s=180.0)
        assert scene.sql("SELECT left(pg_walfile_name(pg_current_wal_lsn()), 8)") == [("00000002",)], "the same server"
    finally:
        scene.close()
        way.close()
        standby.stop()
        servers.stop()
