"""The demonstration: real servers, a few hundred sagas, a SIGKILL in the middle, the promises checked.

Run it with ``python -m sagas.demo``. It is no part of the product and uses what any application would.
"""
