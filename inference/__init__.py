"""AnnData in, AnnData out: the functions that biologists call."""
