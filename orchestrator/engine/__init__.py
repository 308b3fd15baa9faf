"""What drives runs: turns (`advance`), the loop of a worker's child (`drain`), recovery (`pump`), life (`lease`).

Owns the transactions.  Must never import Celery: how a step is invoked and how a doorbell is rung is handed in.
"""
