"""Everything that measures: evaluation, benchmarks, studies; only the command line imports it."""
