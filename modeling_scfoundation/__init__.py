"""The model: encoder over expressed genes, decoder over all. Start with `modeling_scfoundation.py`."""
