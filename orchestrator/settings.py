"""What can be set, with its one default, read from the environment or passed by hand.

Every setting has the environment variable ``ORCHESTRATOR_<NAME>``; what is passed by hand wins. The database
URL is a secret: this module must never show it in a repr, a log line or an error message.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from datetime import timedelta
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationError

from orchestrator.errors import ConfigurationError

__all__ = ["PREFIX", "Settings"]

PREFIX: Final = "ORCHESTRATOR_"
_QUOTED: Final = "%(?!00)[0-9A-Fa-f]{2}"
_HOST: Final = rf"(?:\[(?:[^\]@/?%]|{_QUOTED})*\]|(?:[^%@/?:,\[\]]|{_QUOTED})*)(?::\d*)?"
_ADDRESS: Final = re.compile(  # as libpq reads it
    rf"(?P<who>(?:[^%@/]|{_QUOTED})*@)?(?P<hosts>{_HOST}(?:,{_HOST})*)"
    rf"(?P<path>/(?:[^%@?]|{_QUOTED})*)?(?:\?(?P<query>(?:[^%]|{_QUOTED})*))?"
)
_SCHEMES: Final = frozenset({"postgresql", "postgres", "postgresql+psycopg"})


def _seconds(value: object) -> object:
    """Read a bare number as seconds; the environment has nothing but text."""
    if isinstance(value, str):
        try:
            return timedelta(seconds=float(value.strip().removesuffix("s")))
        except (ValueError, OverflowError):
            return value
    return value


Duration = Annotated[timedelta, BeforeValidator(_seconds), Field(gt=timedelta(0))]


class Settings(BaseModel):
    """Hold the settings of one process; frozen, and safe to print and to send to a child process."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    database_url: SecretStr = Field(repr=False)
    lease: Duration = timedelta(seconds=2)
    pump_interval: Duration = timedelta(seconds=1)
    reservation: Duration = timedelta(milliseconds=100)
    saga_code_timeout: Duration = timedelta(seconds=30)
    watchdog: Duration = timedelta(seconds=60)
    doorbell_expires: Duration = timedelta(seconds=10)
    drain_seconds: float = Field(default=1.0, gt=0)
    drain_steps: int = Field(default=500, ge=1)
    max_connections: int = Field(default=20, ge=1)
    prepared_statements: bool = True
    cache_runs: int = Field(default=1000, ge=0)
    payload_limit: int = Field(default=262_144, ge=1, description="bytes of one encoded value")
    accept_messages: Literal["all", "doorbells"] = "all"
    show_payloads: bool = False
    nightly: bool = Field(default=True, description="beat reconciles every night, and prunes if retention is set")
    retention: str = Field(
        default="", pattern=r"^(\d{1,9}[smhd]|\d{1,8}w)?$", description="what beat prunes: 90d; empty: nothing"
    )

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None, /, **overrides: Any) -> Self:
        """Read the settings from the environment; overrides that are not None win.

        A duration is a number of seconds ("0.5") or ISO 8601 ("PT0.5S").

        Raises:
            ConfigurationError: the database URL is missing or a setting cannot be read.
        """
        source = os.environ if environment is None else environment
        given = {name: source[PREFIX + name.upper()] for name in cls.model_fields if source.get(PREFIX + name.upper())}
        given |= {name: value for name, value in overrides.items() if value is not None}
        if not given.get("database_url"):
            raise ConfigurationError(
                f"No database is configured: set {PREFIX}DATABASE_URL to "
                "postgresql://user:password@host/database, or pass database_url= to Orchestrator."
            )
        try:
            settings = cls.model_validate(given)
        except ValidationError as error:
            raise ConfigurationError(_sentence(error)) from None
        settings._address()
        return settings

    @property
    def dsn(self) -> str:
        """Return the database's URL as libpq and psycopg take it; a secret."""
        return f"postgresql://{self._address()}"

    @property
    def sqlalchemy_url(self) -> str:
        """Return the database's URL as SQLAlchemy takes it, with psycopg as the driver; a secret."""
        address = self._address()
        found = _ADDRESS.fullmatch(address)
        if found is None or "," not in found["hosts"]:
            return f"postgresql+psycopg://{address}"
        # Of several hosts SQLAlchemy reads only those of the query.
        query = "&".join([*(f"host={host}" for host in found["hosts"].split(",")), *filter(None, [found["query"]])])
        return f"postgresql+psycopg://{found['who'] or ''}{found['path'] or '/'}?{query}"

    def _address(self) -> str:
        scheme, separator, address = self.database_url.get_secret_value().strip().partition("://")
        if not separator or scheme.lower() not in _SCHEMES:
            raise ConfigurationError(
                f"The database URL (database_url=, or {PREFIX}DATABASE_URL) must begin with "
                "postgresql://, postgres:// or postgresql+psycopg://; correct it."
            )
        if not _ADDRESS.fullmatch(address):
            # The driver would refuse it, too, and repeat what it takes for a host or a port: a part of the password.
            raise ConfigurationError(
                f"The database URL (database_url=, or {PREFIX}DATABASE_URL) is not of the form "
                "postgresql://user:password@host:port/database; in its parts write %40 for @, %2F for / and %25 for %."
            )
        return address


def _sentence(error: ValidationError) -> str:
    flaws = [
        f"{name} (in the environment {PREFIX}{name.upper()}): {flaw['msg']}"
        for flaw in error.errors(include_url=False, include_input=False, include_context=False)
        for name in [str(flaw["loc"][0]) if flaw["loc"] else "settings"]
    ]
    return f"These settings cannot be read; correct them: {'; '.join(flaws)}."
