"""Tasks, metrics with error bars, and the report."""
