"""Search over records by words and by embeddings."""
