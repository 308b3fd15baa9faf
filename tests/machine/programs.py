"""Sagas as data: any tree of asyncio constructs over steps, interpreted by saga code.

Owns what each word of a program does.  Which steps there are, and further words, are the user's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

from orchestrator import saga
from orchestrator.errors import StepFailed
from orchestrator.step import Step

Program = list[Any]


class Language:
    """Performs programs; a program is the name of a word and what it takes, among it other programs."""

    def __init__(self, steps: Mapping[str, Step[Any, Any]], **more: Callable[..., Any]) -> None:
        self._steps = steps
        self._words: dict[str, Callable[..., Any]] = {
            "step": self._step,
            "sequence": self._sequence,
            "gather": self._gather,
            "group": self._group,
            "tolerant": self._tolerant,
            "sleep": self._sleep,
            "timeout": self._timeout,
            "wait_for": self._wait_for,
            "first": self._first,
            "background": self._background,
            "fickle": self._fickle,
            "fail": self._fail,
            "scope": self._scope,
            "locked": self._locked,
            "hear": self._hear,
            **more,
        }

    async def perform(self, program: Program) -> Any:
        """Do what `program` says, as saga code."""
        word, *parts = program
        return await self._words[word](*parts)

    async def _step(self, name: str, n: int) -> Any:
        return await saga.step(self._steps[name], n)

    async def _sequence(self, programs: list[Program]) -> Any:
        return [await self.perform(program) for program in programs]

    async def _gather(self, programs: list[Program]) -> Any:
        return await asyncio.gather(*map(self.perform, programs))

    async def _group(self, programs: list[Program]) -> Any:
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self.perform(program)) for program in programs]
        except BaseExceptionGroup as error:
            raise error.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _tolerant(self, program: Program) -> Any:
        try:
            return await self.perform(program)
        except StepFailed as error:
            return error.outcome
        except ValueError:
            return "the saga's own"

    async def _sleep(self, seconds: int) -> None:
        await saga.sleep(timedelta(seconds=seconds))

    async def _timeout(self, seconds: int, program: Program) -> Any:
        try:
            async with asyncio.timeout(seconds):
                return await self.perform(program)
        except TimeoutError:
            return "timeout"

    async def _wait_for(self, seconds: int, program: Program) -> Any:
        try:
            return await asyncio.wait_for(self.perform(program), seconds)
        except TimeoutError:
            return "timeout"

    async def _first(self, programs: list[Program]) -> Any:
        done, pending = await saga.wait([self.perform(p) for p in programs], return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        return [task.result() for task in done]

    async def _background(self, name: str, n: int, seconds: int) -> None:
        saga.step(self._steps[name], n)
        await asyncio.sleep(seconds)

    async def _fickle(self, name: str, n: int, seconds: int) -> None:
        request = saga.step(self._steps[name], n)
        await asyncio.sleep(seconds)
        request.cancel()

    async def _scope(self, program: Program) -> Any:
        async with saga.scope():
            return await self.perform(program)

    async def _locked(self, name: str, seconds: int, program: Program) -> Any:
        try:
            async with saga.lock(name, timeout=seconds):
                return await self.perform(program)
        except TimeoutError:
            return "not had"

    async def _hear(self, seconds: int) -> Any:
        try:
            return await saga.wait_signal("news", str, timeout=seconds)
        except TimeoutError:
            return "nothing heard"

    async def _fail(self) -> None:
        raise ValueError("the saga's own")
