"""Benchmarks, importable as ``wtacrs_fx.benchmarks``; what they measure with is :mod:`wtacrs_fx.measure`."""
