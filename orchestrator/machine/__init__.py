"""The pure heart: transition tables, journal entries, the deterministic loop and the turn.

Owns every decision about a run.  Must never do IO, read a clock, draw a random number or log:
everything it needs comes in as arguments, everything it wants goes out as values.
"""
