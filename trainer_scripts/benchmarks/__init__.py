"""Jobs that compare models with each other and with simple baselines."""
