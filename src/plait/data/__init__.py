"""Files -> records -> a dataset on disk. Knows files, not tokens."""
