"""Learning from episodes: advantages, losses, rows and batches, the update, the optimizer engine.

Sees models only through the Protocols of `tensors`, and never an env or a prompt format.
"""
