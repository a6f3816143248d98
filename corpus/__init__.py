"""Any number of cell files -> a corpus of shards -> raw cells in an order that resumes exactly."""
