"""Models in the formats of Hugging Face: import, export, encoders, and models that transformers runs."""
