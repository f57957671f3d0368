"""HTML reports: templates, charts, words."""
