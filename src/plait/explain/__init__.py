"""Why a model answers as it does: how much each part of an input moved the answer, and whether that can be believed."""
