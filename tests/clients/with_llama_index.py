"""LlamaIndex: completion, chat, streams, structured prediction, tools, embeddings."""

from typing import Literal

from common import URL
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel


class Cat(BaseModel):
    """A cat."""

    colour: Literal["red", "blue"]
    old: bool


def weather(city: Literal["Paris", "Rome"]) -> str:
    """The weather of a city."""
    return f"sunny in {city}"


options = {"model": "caller", "api_base": f"{URL}/v1", "api_key": "none", "max_retries": 0, "context_window": 2000}
model = OpenAILike(**options, is_chat_model=True, is_function_calling_model=True, max_tokens=400)
assert OpenAILike(**options, is_chat_model=False, max_tokens=8).complete("the cat").text
assert OpenAILike(**options, is_chat_model=True, max_tokens=8).chat([ChatMessage("the cat")]).message.content
assert "".join(part.delta or "" for part in model.stream_chat([ChatMessage("the cat")], max_tokens=8))
made = model.structured_predict(Cat, PromptTemplate("a cat"), llm_kwargs={"tool_choice": "required"})
assert isinstance(made, Cat)
called = model.chat_with_tools([FunctionTool.from_defaults(weather)], "the weather?", tool_required=True)
assert model.get_tool_calls_from_response(called)[0].tool_name == "weather"
embeddings = OpenAILikeEmbedding(model_name="run", api_base=f"{URL}/v1", api_key="none")
assert len(embeddings.get_text_embedding_batch([f"red bar {i}" for i in range(30)])) == 30
