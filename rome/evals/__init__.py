"""Evaluation: metrics with intervals. Suites and reports over them come with the data they need."""

from rome.evals.metrics import wilson_interval

__all__ = ["wilson_interval"]
