"""litellm: completion, streams, JSON schema, tools, embeddings, transcription, rerank."""

import io
import wave
from typing import Literal

import litellm
from common import HI, TOOLS, URL
from pydantic import BaseModel


class Cat(BaseModel):
    colour: Literal["red", "blue"]
    old: bool


litellm.num_retries = 0
options = {"api_base": f"{URL}/v1", "api_key": "none"}
asked = {"model": "openai/caller", "messages": HI, **options}
assert litellm.completion(**asked, max_tokens=8).choices[0].message.content
assert "".join(part.choices[0].delta.content or "" for part in litellm.completion(**asked, max_tokens=8, stream=True))
Cat.model_validate_json(litellm.completion(**asked, response_format=Cat).choices[0].message.content)
called = litellm.completion(**asked, tools=TOOLS, tool_choice="required").choices[0]
assert called.message.tool_calls[0].function.name == "weather" and called.finish_reason == "tool_calls"
assert len(litellm.embedding(model="openai/run", input=["red bar", "blue bar"], **options).data) == 2
file = io.BytesIO()
with wave.open(file, "wb") as out:
    out.setparams((1, 2, 8000, 0, "NONE", ""))
    out.writeframes(bytes(range(256)) * 40)
file.name = "a.wav"
file.seek(0)
assert litellm.transcription(model="openai/run", file=file, **options).text
