"""The network and its files; knows no training."""
