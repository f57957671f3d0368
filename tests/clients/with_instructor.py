"""instructor in all its modes for this kind of server."""

from typing import Literal

import instructor
import openai
from common import HI, URL
from pydantic import BaseModel


class Cat(BaseModel):
    """A cat."""

    colour: Literal["red", "blue"]
    old: bool


client = openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)
modes = ("TOOLS", "TOOLS_STRICT", "JSON_SCHEMA", "RESPONSES_TOOLS")
for name in modes:
    mode = getattr(instructor.Mode, name)
    asked = {"model": "caller", "response_model": Cat, "max_retries": 0}
    patched = instructor.from_openai(client, mode=mode)
    made = patched.chat.completions.create(messages=HI, **asked)
    assert isinstance(made, Cat), name
# JSON mode promises JSON, not the schema: a random model's object need not be a cat, nor come to an end.
for name in ("JSON", "MD_JSON"):
    patched = instructor.from_openai(client, mode=getattr(instructor.Mode, name))
    try:
        patched.chat.completions.create(model="caller", messages=HI, response_model=Cat, max_retries=0, max_tokens=200)
    except Exception as error:
        assert any(word in str(error).lower() for word in ("validation", "json", "incomplete")), error
