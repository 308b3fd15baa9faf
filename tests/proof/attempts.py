"""Rules about attempts and effects: counted before they run, written down, refused when they are stale.

Owns the comparison of the journal with the effect log.  Works on entries as they are stored, not on the engine's fold.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator

from tests.proof.rules import rule
from tests.proof.world import Row, Run, World

Found = Iterator[tuple[str, str]]
_SEED = "/late/"
"""Correcting runs begin with a copy of what another run recorded."""


def reported(run: Run) -> Iterator[tuple[str, str, int, Row]]:
    """Yield what attempts wrote, as (key, role, attempt, entry), in the order of the journal.

    An entry that the engine or a person wrote about an attempt that had ended before is not among them.
    """
    for entry in run.entries:
        kind, attempt = entry["e"], entry.get("attempt", 0)
        if kind == "attempted":
            yield entry["key"], entry.get("role", "do"), attempt, entry
        elif kind == "settled" and entry.get("worker") and not entry.get("by"):
            yield entry["key"], "do", attempt, entry
        elif kind == "undone" and entry.get("how", "done") == "done":
            yield entry["key"], "undo", attempt, entry


@rule("an attempt wrote after the one that followed it")
def attempts_only_grow(world: World) -> Found:
    for run in world.readable:
        last: Counter[tuple[str, str]] = Counter()
        for key, role, attempt, entry in reported(run):
            if run.asked[key].get("kind") == "child":
                continue  # it is asked again by the same order, and counts nothing
            if attempt <= last[key, role]:
                yield run.id, f"{key}: attempt {attempt} to {role} wrote {entry['e']!r} after attempt {last[key, role]}"
            last[key, role] = max(last[key, role], attempt)


@rule("an attempt was counted and is not on record")
def attempts_are_contiguous(world: World) -> Found:
    for run in world.readable:
        numbers: dict[tuple[str, str], set[int]] = defaultdict(set)
        for key, role, attempt, _ in reported(run):
            numbers[key, role].add(attempt)
        for (key, role), found in numbers.items():
            if missing := set(range(1, max(found) + 1)) - found:
                yield run.id, f"{key}: of the attempts to {role} {sorted(missing)} are missing"


@rule("a row of work is behind its journal")
def work_is_ahead_of_the_journal(world: World) -> Found:
    """Whoever is outstanding is a later attempt than those that have ended."""
    for run in world.readable:
        ended: Counter[tuple[str, str]] = Counter()
        for key, role, attempt, _ in reported(run):
            ended[key, role] = max(ended[key, role], attempt)
        for row in run.work:
            role = "do" if row["role"] == "once" else row["role"]
            least = ended[row["key"], role] + (row["fence"] is not None)
            if row["role"] != "turn" and row["attempt"] < least:
                yield run.id, f"{row['key']}: work for attempt {row['attempt']} to {role}, {least - 1} have ended"


@rule("two rows of work have one key")
def work_is_outstanding_once(world: World) -> Found:
    """The table itself tells lanes apart, not what is done in them."""
    for run in world.readable:
        for key, rows in Counter(row["key"] for row in run.work).items():
            if rows > 1:
                yield run.id, f"{key}: {rows} rows of work"


@rule("a step was begun after its undo")
def nothing_is_done_after_its_undo(world: World) -> Found:
    for run in world.readable:
        undoing: set[str] = set()
        for entry in run.entries:
            if entry["e"] == "undoing":
                undoing.add(entry["key"])
            wrote = entry["e"] == "attempted" and entry.get("role", "do") == "do"
            wrote = wrote or (entry["e"] == "settled" and entry["outcome"] != "unknown")
            if wrote and entry["key"] in undoing:
                yield run.id, f"{entry['key']}: {entry['e']!r} of attempt {entry.get('attempt', 0)}"
        for row in run.work:
            if row["role"] in ("do", "once") and row["key"] in undoing:
                yield run.id, f"{row['key']}: forward work is there, and its undo has begun"


# -- against the effect log --------------------------------------------------------------------------------------------
def logged_successes(world: World, run: Run) -> Iterator[tuple[str, str, int, str]]:
    """Yield what a run records as having taken effect, as (key, direction, attempt, by)."""
    for entry in run.of("settled", "undone", "late"):
        asked = run.asked[entry["key"]]
        if asked.get("kind", "step") != "step":
            continue
        if entry["e"] == "undone":
            if entry.get("how", "done") == "done" and asked["undo"]["task"] not in world.unlogged:
                yield entry["key"], "undo", entry.get("attempt", 0), ""
        elif asked["task"] not in world.unlogged and (entry["e"] == "late" or entry["outcome"] == "succeeded"):
            told = entry["e"] == "late" or entry.get("worker") or _SEED in run.id
            yield entry["key"], "do", entry.get("attempt", 0), entry.get("by", "") or ("" if told else "a person")


@rule("a recorded success has no effect")
def successes_took_effect(world: World) -> Found:
    """Every success of the journal is in the effect log; what a person vouched for need not be."""
    if not world.has_log:
        return
    there = [effect for effect in world.effects if effect.event == "effect"] + (world.transactional or [])
    by_attempt = {(effect.run, effect.key, effect.direction, effect.attempt) for effect in there}
    by_key = {effect[:3] for effect in by_attempt}
    for run in world.readable:
        for key, direction, attempt, by in logged_successes(world, run):
            run_id = run.id.partition(_SEED)[0] if direction == "do" else run.id
            told = (run_id, key, direction, attempt) in by_attempt
            if by:
                told = by != "probe" or (run_id, key, direction) in by_key
            if not told:
                yield run.id, f"{key}: attempt {attempt} to {direction} is recorded as done, and nothing tells of it"


@rule("a step settled as without effect has one")
def what_had_no_effect_has_none(world: World) -> Found:
    """The rows of a transactional step have rules of their own; what a person or a probe vouched for is theirs."""
    there = {(e.run, e.key) for e in world.effects if e.direction == "do" and e.event == "effect"}
    for run in world.readable:
        late = {entry["key"] for entry in run.of("late")}
        for entry in run.of("settled"):
            asked = run.asked[entry["key"]]
            exempt = asked.get("transactional") or asked.get("effect") == "none" or entry.get("by")
            without = entry["outcome"] in ("rejected", "failed", "withdrawn") and entry["key"] not in late
            if without and not exempt and (run.id, entry["key"]) in there:
                yield run.id, f"{entry['key']}: it is {entry['outcome']}, and took effect"


@rule("an effect was not intended")
def effects_were_intended(world: World) -> Found:
    for effect in world.effects:
        run = world.runs.get(effect.run)
        if effect.run and (run is None or effect.key not in run.asked) and not (run and run.has_gap):
            yield effect.run, f"{effect.key}: attempt {effect.attempt} took effect, and was never asked for"


@rule("an effect is of an attempt that was never begun")
def effects_were_begun(world: World) -> Found:
    """Of a run that ended by itself every attempt that was ever begun is on record, unless a restore forgot some."""
    known: dict[str, set[tuple[str, str, int]]] = {}
    for run in world.readable:
        if run.ended and run.state != "terminated" and not list(run.of("restored")):
            known[run.id] = {(key, role, attempt) for key, role, attempt, _ in reported(run)}
            known[run.id] |= {(entry["key"], "do", entry["attempt"]) for entry in run.of("late")}
    for effect in world.effects:
        if effect.run not in known or effect.key not in world.runs[effect.run].asked:
            continue
        if (effect.key, effect.direction, effect.attempt) not in known[effect.run]:
            yield effect.run, f"{effect.key}: an effect of attempt {effect.attempt} to {effect.direction}"


@rule("a late success was dropped")
def refused_successes_are_entries(world: World) -> Found:
    """Whose outcome was refused, though its function had returned, is noted as late; a transaction was rolled back."""
    returned = {(e.run, e.key, e.attempt) for e in world.effects if e.event == "returned" and e.direction == "do"}
    for run_id, key, attempt in world.refused:
        run = world.runs.get(run_id)
        if (run_id, key, attempt) not in returned or run is None or run.has_gap:
            continue
        if run.asked[key].get("transactional"):
            continue
        if not any(entry["key"] == key and entry.get("attempt") == attempt for entry in run.of("late")):
            yield run_id, f"{key}: attempt {attempt} succeeded and was refused, and no entry says so"


# -- transactional steps -----------------------------------------------------------------------------------------------
@rule("a transactional effect happened twice")
def transactional_effects_happen_once(world: World) -> Found:
    counted = Counter((e.run, e.key, e.direction) for e in world.transactional or ())
    for (run_id, key, direction), count in counted.items():
        if count > 1:
            yield run_id, f"{key}: {count} times {direction}"


@rule("a transactional effect and its record disagree")
def transactional_effects_are_recorded(world: World) -> Found:
    """Business row and outcome share one commit: there are both, or neither."""
    if world.transactional is None:
        return
    there = {(e.run, e.key) for e in world.transactional if e.direction == "do"}
    for run in world.readable:
        done = {e["key"] for e in run.of("settled") if e["outcome"] == "succeeded" and not e.get("by")}
        for key, asked in run.asked.items():
            known = asked.get("transactional") and asked["task"] not in world.unlogged and _SEED not in run.id
            if known and ((run.id, key) in there) != (key in done):
                yield run.id, f"{key}: its row is {'there' if key not in done else 'missing'}"
