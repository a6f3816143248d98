"""What `benchmarks/speed.py` is made of: the baseline, the cells, the measuring, the jobs and the report."""
