"""Benchmarks, importable as ``wtacrs_fx.benchmarks`` so that the demo measures with the same code."""
