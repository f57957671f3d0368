"""Raw input <-> tensors <-> codes: one modality, one file."""
