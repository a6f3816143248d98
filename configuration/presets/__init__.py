"""Named model sizes as JSON, read by `ScFoundationConfig.from_preset`."""
