"""A checkpoint and a prompt -> tokens -> raw; knows no training."""
