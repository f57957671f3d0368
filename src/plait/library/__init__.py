"""What `import plait` offers beside models and indexes: prepare, train and evaluate, and what they return.

The command line and notebooks call these functions. Each takes typed arguments and returns an object that shows itself
in a notebook.
"""
