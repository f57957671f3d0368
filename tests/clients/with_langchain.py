"""LangChain: chat, streams, structured output in every method, tools, 1,000 embeddings."""

from typing import Literal

from common import URL
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel


class Cat(BaseModel):
    """A cat."""

    colour: Literal["red", "blue"]
    old: bool


@tool
def weather(city: Literal["Paris", "Rome"]) -> str:
    """The weather of a city."""
    return f"sunny in {city}"


model = ChatOpenAI(model="caller", base_url=f"{URL}/v1", api_key="none", max_tokens=500, max_retries=0)
assert model.bind(max_tokens=8).invoke("the cat").content
assert "".join(chunk.content for chunk in model.bind(max_tokens=8).stream("the cat"))
for method in ("json_schema", "function_calling"):
    assert isinstance(model.with_structured_output(Cat, method=method).invoke("a cat"), Cat), method
schema = {**Cat.model_json_schema(), "additionalProperties": False}
assert isinstance(model.with_structured_output(schema, method="json_schema").invoke("a cat"), dict)
called = model.bind_tools([weather], tool_choice="any").invoke("the weather?")
assert called.tool_calls and weather.invoke(called.tool_calls[0]["args"]).startswith("sunny")
reply = model.bind(max_tokens=8).invoke([("user", "the weather?"), called, weather.invoke(called.tool_calls[0])])
assert reply.content
response = ChatOpenAI(model="caller", base_url=f"{URL}/v1", api_key="none", use_responses_api=True, max_retries=0)
assert response.bind_tools([weather], tool_choice="any").invoke("the weather?").tool_calls
embeddings = OpenAIEmbeddings(model="run", base_url=f"{URL}/v1", api_key="none", check_embedding_ctx_length=False)
vectors = embeddings.embed_documents([f"red bar {i}" for i in range(1000)])
assert len(vectors) == 1000 and len({len(vector) for vector in vectors}) == 1
