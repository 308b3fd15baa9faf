"""The steps of the reference application: one module per business domain, each do next to its undo.

Sagas import tasks, never the reverse.
"""
