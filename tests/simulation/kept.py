"""Seeds that once failed, with what they found; they are played by every run of the tests.

A seed is worth as much as the program that draws from it: when the simulation itself changes, what a seed plays
changes too.  The test that pins a mended fault down is beside the code that was mended.
"""

from __future__ import annotations

KEPT = {
    14: "a connection that broke inside a transactional step ended the drain, and all that was begun with it",
    41: "an arrival that another turn took while the run was being read was taken a second time",
    48: "a cancelled run that had not begun was put off for 30 s by a worker without its code",
    125: "an undo whose commit was lost was taken for the step that it undoes, and done again",
}
