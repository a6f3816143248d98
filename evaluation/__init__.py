"""How good predictions are: errors, baselines, comparisons, and what the computation costs."""
