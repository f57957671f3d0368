"""Recommendation: histories of items, from reading them to routes and commands."""
