"""Chat, recognition, generation and search: thin, on top of generate() and embed()."""
