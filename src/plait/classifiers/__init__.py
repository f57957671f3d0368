"""Deciding which of a column's labels an input has: simple features, linear models, and how opinions are mixed."""
