"""Raw input <-> tensors <-> codes: one modality, one file. `registry` has them all, `media` the files they read."""
