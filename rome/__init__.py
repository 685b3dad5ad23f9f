"""rome: agentic reinforcement learning in JAX, credit over chunks (arXiv:2512.24873)."""

__version__ = "0.1.0"
