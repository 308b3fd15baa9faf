"""The sagas of the reference application, one per file; they import tasks, never the reverse."""
