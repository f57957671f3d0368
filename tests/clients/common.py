"""What the clients of the slow tests ask."""

import os

URL = os.environ["PLAIT_URL"]
HI = [{"role": "user", "content": "the cat"}]
CITY = {"type": "object", "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "The weather", "parameters": CITY}}]
