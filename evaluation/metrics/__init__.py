"""Metrics for `evaluate.load(<folder>)`: each folder stands alone, so that it can be pushed to the Hub as it is."""
