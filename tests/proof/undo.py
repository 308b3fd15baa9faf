"""Rules about going back: exactly what took effect, or may have, is undone, in the reverse order of the requests.

Owns those rules.  Works on entries as they are stored, not on the engine's fold.
"""

from __future__ import annotations

from collections.abc import Iterator

from tests.proof.rules import rule
from tests.proof.world import Run, World

Found = Iterator[tuple[str, str]]


def took_effect(run: Run) -> set[str]:
    """Return the keys that took effect, or may have, and declare an undo."""
    there = {entry["key"] for entry in run.of("settled") if entry["outcome"] in ("succeeded", "unknown")}
    return {key for key in there if run.asked[key].get("undo") and run.asked[key].get("effect") != "none"}


def late(run: Run) -> set[str]:
    """Return the keys whose effect showed up after it had been decided without it: they are undone whenever it does."""
    return {entry["key"] for entry in run.of("late")}


def rolled_back(run: Run) -> list[str]:
    """Return the keys whose undo the rollback began, in that order; on the spot and late ones have their own time."""
    begun = run.rolled_back_at
    if begun is None:
        return []
    keys = [entry["key"] for entry in run.entries[begun:] if entry["e"] == "undoing"]
    return [key for key in keys if key not in late(run)]


@rule("an effect was neither kept nor undone")
def effects_are_undone(world: World) -> Found:
    """Of a run that went back everything; of one that completed, what was given up, or is unknown to all."""
    for run in world.readable:
        if not run.ended or run.state == "terminated":
            continue
        abandoned = {entry["key"] for entry in run.of("abandoned")}
        # A person who goes on without an answer leaves the effect, and its run says so.
        unknown = {e["key"] for e in run.of("settled") if e["outcome"] == "unknown" and not e.get("by")}
        owed = took_effect(run) if run.rolled_back_at is not None else took_effect(run) & (abandoned | unknown)
        begun = {entry["key"] for entry in run.of("undoing")}
        for key in owed - begun:
            yield run.id, f"{key}: took effect, or may have; the run is {run.state}, and it was not undone"


@rule("a late effect was not undone")
def late_effects_are_undone(world: World) -> Found:
    """One that shows up after it was decided without it: by the run itself, or after its end by a correcting run."""
    for run in world.readable:
        for key, attempt, ended in owed_late(run):
            again = [e for e in run.of("undoing") if e["key"] == key and e.get("late") == attempt]
            correcting = f"{run.id}/late/{key}/{attempt}"
            if ended and correcting not in world.runs:
                yield run.id, f"{key}: attempt {attempt} took effect after the end, and there is no run {correcting}"
            elif not ended and run.ended and run.state != "terminated" and not again:
                yield run.id, f"{key}: attempt {attempt} took effect after its outcome was decided, and that was all"


def owed_late(run: Run) -> Iterator[tuple[str, int, bool]]:
    """Yield late effects that have to be undone, as (key, attempt, whether the run had ended)."""
    decided: set[str] = set()
    ended = False
    for entry in run.entries:
        if entry["e"] == "undoing" or (entry["e"] == "settled" and entry["outcome"] in ("unknown", "rejected")):
            decided.add(entry["key"])
        elif entry["e"] == "ended":
            ended = True
        elif entry["e"] == "late" and entry["key"] in decided and run.asked[entry["key"]].get("undo"):
            yield entry["key"], entry["attempt"], ended


@rule("an undo was asked for and has no end")
def undos_have_ended(world: World) -> Found:
    for run in world.readable:
        if not run.ended or run.state == "terminated":
            continue
        for key in run.asked:
            kinds = [entry["e"] for entry in run.of("undoing", "undone") if entry["key"] == key]
            if kinds != ["undoing", "undone"] * (len(kinds) // 2):
                yield run.id, f"{key}: {kinds}"


@rule("something was undone that had no effect")
def only_effects_are_undone(world: World) -> Found:
    for run in world.readable:
        in_doubt = {e["key"] for e in run.of("attempted") if e.get("doubt", True) and e.get("role", "do") == "do"}
        settled = {entry["key"] for entry in run.of("settled")}
        for entry in run.of("undoing"):
            key = entry["key"]
            on_the_spot = key not in settled and key in in_doubt  # it settles as unknown when the undo is done
            if not (key in took_effect(run) or key in late(run) or on_the_spot):
                yield run.id, f"{key}: it was undone, and it neither succeeded nor is unknown"


@rule("undos were not begun in reverse order")
def undos_are_in_reverse_order(world: World) -> Found:
    for run in world.readable:
        order = list(run.asked)
        keys = rolled_back(run)
        if keys != sorted(keys, key=order.index, reverse=True):
            yield run.id, f"asked for in the order {order}, undone in the order {keys}"


@rule("two undos of a rollback ran at once")
def undos_come_one_at_a_time(world: World) -> Found:
    for run in world.readable:
        begun, open_key = run.rolled_back_at, ""
        exempt = late(run)
        for entry in run.entries[begun:] if begun is not None else ():
            if entry["e"] == "undoing" and entry["key"] not in exempt:
                if open_key:
                    yield run.id, f"{entry['key']}: its undo began while {open_key} was being undone"
                open_key = entry["key"]
            elif entry["e"] == "undone" and entry["key"] == open_key:
                open_key = ""


@rule("undos did not take effect in reverse order")
def undo_effects_are_in_reverse_order(world: World) -> Found:
    """By the effect log alone: the first effect of each undo."""
    first: dict[str, dict[str, None]] = {}
    for effect in world.effects:
        if effect.direction == "undo":
            first.setdefault(effect.run, {}).setdefault(effect.key)
    for run in world.readable:
        order, keys = list(run.asked), set(rolled_back(run))
        effects = [key for key in first.get(run.id, ()) if key in keys]
        if effects != sorted(effects, key=order.index, reverse=True):
            yield run.id, f"asked for in the order {order}, undone in the order {effects}"
