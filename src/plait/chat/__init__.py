"""Conversations and auto-reply."""
