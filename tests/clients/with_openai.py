"""openai-python: sync, async, streams, parse, tools, responses, decisions."""

import asyncio
import json
from typing import Literal

import openai
from common import CITY, HI, TOOLS, URL
from pydantic import BaseModel


class Cat(BaseModel):
    colour: Literal["red", "blue"]
    age: int


client = openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)
asked = {"model": "caller", "messages": HI, "max_tokens": 20}
whole = client.chat.completions.create(**asked).choices[0].message.content
assert whole
pieces = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**asked, stream=True)]
assert "".join(pieces) == whole


async def again() -> str:
    there = openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)
    replies = await asyncio.gather(*(there.chat.completions.create(**asked) for _ in range(4)))
    assert len({reply.choices[0].message.content for reply in replies}) == 1
    return replies[0].choices[0].message.content


assert asyncio.run(again()) == whole
parsed = client.chat.completions.parse(model="caller", messages=HI, response_format=Cat).choices[0].message.parsed
assert isinstance(parsed, Cat)
tool = openai.pydantic_function_tool(Cat)
called = client.chat.completions.parse(model="caller", messages=HI, tools=[tool], tool_choice="required")
assert isinstance(called.choices[0].message.tool_calls[0].function.parsed_arguments, Cat)
held = client.responses.parse(model="caller", input="a cat", text_format=Cat)
assert isinstance(held.output_parsed, Cat)
flat = [{"type": "function", **TOOLS[0]["function"]}]
call = client.responses.create(model="caller", input="hi", tools=flat, tool_choice="required").output[0]
assert call.type == "function_call" and json.loads(call.arguments)["city"] in CITY["properties"]["city"]["enum"]
if hasattr(client, "decisions"):
    choices = [{"value": "red bar"}, {"value": "blue bar"}]
    asked = [{"type": "choice", "instructions": "Which?", "choices": choices}]
    decided = client.decisions.create(model="run", input="red bar", questions=asked)
    assert decided.answers[0].type in ("choice", "refusal")
