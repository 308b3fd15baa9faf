"""How fast the engine is, next to a raw Celery chain and to bare commits, on the machine at hand.

Owns the servers, workers and clients that it measures. Nothing here is imported by the package.
"""
