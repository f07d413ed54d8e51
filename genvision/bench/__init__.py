"""Speed beside the packages that people use otherwise: `genvision benchmark` and what the scripts in benchmarks/ share.

`genvision.bench.timing` must be imported before torch: it sets the number of threads. Stands above all stages, like `jobs`.
"""
