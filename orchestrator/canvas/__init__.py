"""Durable canvas: Celery's chains, groups and chords, driven by the engine.

``nodes`` is what a canvas is in a journal, ``reading`` makes it of a Celery signature, ``walking`` is the saga code
that runs it, ``telling`` what an error handler hears, ``starting`` is `durable`.  Must never import Celery: a
signature is a dict.
"""

from orchestrator.canvas.starting import Durable, durable

__all__ = ["Durable", "durable"]
