"""Models over HTTP, in the shapes that OpenAI's clients know."""

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # the page's library, wherever it loads, asks nothing of others
