"""The configuration of the model: the one thing every module is built from."""
