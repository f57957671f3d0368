"""Foreseeing: what a network weighs, what it costs to train, where it fits, and what failures add."""
