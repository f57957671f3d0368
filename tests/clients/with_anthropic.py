"""anthropic: messages, streams, tools, their results, counting."""

import anthropic
from common import CITY, HI, URL

client = anthropic.Anthropic(base_url=URL, api_key="none", max_retries=0)
made = client.messages.create(model="caller", max_tokens=8, messages=HI, system="be brief")
assert made.content[0].text and made.stop_reason == "max_tokens"
with client.messages.stream(model="caller", max_tokens=8, messages=HI, system="be brief") as stream:
    assert "".join(stream.text_stream) == made.content[0].text
tools = [{"name": "weather", "description": "The weather", "input_schema": CITY}]
asked = {"model": "caller", "max_tokens": 500, "messages": HI, "tools": tools,
         "tool_choice": {"type": "tool", "name": "weather", "disable_parallel_tool_use": True}}  # fmt: skip
called = client.messages.create(**asked)
assert called.stop_reason == "tool_use" and called.content[0].input["city"] in ("Paris", "Rome")
with client.messages.stream(**asked) as stream:
    assert stream.get_final_message().content[0].input == called.content[0].input
said = [*HI, {"role": "assistant", "content": called.content}, {"role": "user", "content": [
    {"type": "tool_result", "tool_use_id": called.content[0].id, "content": "sunny"}]}]  # fmt: skip
assert client.messages.create(model="caller", max_tokens=8, messages=said, tools=tools).content
assert client.messages.count_tokens(model="caller", messages=HI).input_tokens > 0
