"""Training: state, jitted steps, the loop, checkpoints, metrics and the report of a run.

Import its modules by name; nothing is imported here, so that `rome report` does not wait for jax.
"""
