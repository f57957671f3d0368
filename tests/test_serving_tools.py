"""Tools: what templates show and spell, the grammar that holds calls, and the calls of replies, over every route."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

import plait
from plait.inference.model import PlaitModel
from plait.inference.prompts import Chat, Turn
from plait.inference.tools import CallPiece, ReplyParser, TextPiece, Tool, ToolCall, ToolFormat, read_format
from plait.modalities.text import Text
from plait.model.chat_template import Template
from server import TOOL_TEMPLATE, Server, write_caller, write_text_model

CITY = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
ADD = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 99, "minimum": 0}}, "required": ["a"],
       "additionalProperties": False}  # fmt: skip
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "description": "of a <|im_end|> city", "parameters": CITY}},
    {"type": "function", "function": {"name": "add", "strict": True, "parameters": ADD}},
]
HI: list[Any] = [{"role": "user", "content": "the cat"}]
HERMES = ToolFormat("<tool_call>\n", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>", "name", "arguments")
BARE = (
    "{{ tools | tojson if tools else '' }}{% for m in messages %}{% if m.tool_calls %}"
    "{% if m.tool_calls | length > 1 %}{{ raise_exception('one') }}{% endif %}"
    """<|im_start|>assistant {"name": "{{ m.tool_calls[0].function.name }}", "parameters": """
    "{{ m.tool_calls[0].function.arguments | tojson }}}<|im_end|>{% else %}<|im_start|>{{ m.role }} {{ m.content }}"
    "<|im_end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)
LIST = (
    "{{ tools | tojson if tools else '' }}{% for m in messages %}{% if m.tool_calls %}[TOOL_CALLS] ["
    """{% for c in m.tool_calls %}{"name": "{{ c.function.name }}", """
    """"arguments": {{ c.function.arguments | tojson }}, """
    """"id": "{{ c.id }}"}{% if not loop.last %}, {% endif %}{% endfor %}]<|im_end|>"""
    "{% else %}[INST] {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def caller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_caller(tmp_path_factory.mktemp("caller") / "caller")


@pytest.fixture(scope="module")
def server(caller: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("tools")
    letters = write_text_model(folder / "letters")
    with Server.start(folder / "log", caller, f"text={letters}") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def check_call(name: str, arguments: str) -> None:
    value = json.loads(arguments)
    if name == "weather":
        assert set(value) == {"city"} and value["city"] in ("Paris", "Rome")
    else:
        assert name == "add" and set(value) == {"a"} and 0 <= value["a"] <= 99


@pytest.mark.parametrize(("template", "wanted"), [
    (TOOL_TEMPLATE, HERMES),
    (BARE, ToolFormat("", None, "", "name", "parameters")),
    (LIST, ToolFormat("[TOOL_CALLS] [", ", ", "]", "name", "arguments")),
    ("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}", None),
    ("{{ tools | tojson if tools else '' }}{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
     "<function={{ c.function.name }}>{% endfor %}<|im_end|>{% endfor %}", None),
])  # fmt: skip
def test_formats_are_read_from_templates(caller: Path, template: str, wanted: ToolFormat | None) -> None:
    text = Text.load(caller / "tokenizer.json")
    text.settings["chat_template"] = template
    assert read_format(Template(text)) == wanted


@given(st.lists(st.integers(1, 9), max_size=80), st.sampled_from(["marked", "bare", "mark left out", "in a fence"]))
def test_replies_are_read_however_they_are_cut(cuts: list[int], spelt: str) -> None:
    arguments = ['{"city": "<tool_call>\\"}{ \\\\"}', '{"a": {"b": [1, {}]}}']
    if spelt != "marked":
        form = ToolFormat("", None, "", "name", "arguments") if spelt == "bare" else HERMES
        text, said = HERMES.head("add") + arguments[1] + "}", ""
        text = f"```json\n{text}\n```" if spelt == "in a fence" else text
        arguments = arguments[1:]
    else:
        form, said = HERMES, "Let me <tool see."
        text = f"{said}\n{HERMES.begin}{HERMES.head('weather')}{arguments[0]}}}{HERMES.between}{HERMES.head('add')}" \
            f"{arguments[1]}}}{HERMES.end}"  # fmt: skip
    parser, pieces, at = ReplyParser(form, ["weather", "add"]), [], 0
    for size in cuts:
        pieces += parser.add(text[at : at + size])
        at += size
    pieces += parser.add(text[at:], last=True)
    assert "".join(piece.text for piece in pieces if isinstance(piece, TextPiece)) == said
    calls = [piece for piece in pieces if isinstance(piece, CallPiece)]
    for i, value in enumerate(arguments):
        assert "".join(call.arguments for call in calls if call.index == i) == value
    assert [call.name for call in calls if call.name] == ["weather", "add"][-len(arguments) :]


@given(st.text(st.sampled_from('<tool_cal>{} \n"name'), max_size=40), st.integers(1, 5))
def test_what_is_no_call_is_text(text: str, size: int) -> None:
    for form in (HERMES, ToolFormat("", None, "", "name", "parameters")):
        if form.begin.strip() and form.begin.strip() in text:
            continue
        parser = ReplyParser(form, ["weather"])
        pieces = [piece for at in range(0, len(text), size) for piece in parser.add(text[at : at + size])]
        pieces += parser.add("", last=True)
        assert "".join(piece.text for piece in pieces if isinstance(piece, TextPiece)) == text


def test_tools_and_calls_reach_the_template(caller: Path) -> None:
    """Ids are those of transformers, but that what a tool spells is no special token."""
    from transformers import PreTrainedTokenizerFast

    model = plait.load(caller)
    assert isinstance(model, PlaitModel)
    theirs = PreTrainedTokenizerFast.from_pretrained(caller, split_special_tokens=False)
    tools = [Tool("weather", "of a city", CITY), Tool("add", "", ADD)]
    call = ToolCall("weather", '{"city": "Rome"}', "call_1")
    turns = [Turn("user", ["the cat"]), Turn("assistant", [], (call,)), Turn("tool", ["sunny"], call_id="call_1")]
    messages = [*HI, {"role": "assistant", "content": "", "tool_calls": [call.shown()]},
                {"role": "tool", "content": "sunny"}]  # fmt: skip
    shown: list[Any] = [tool.shown() for tool in tools]
    wanted = theirs.apply_chat_template(messages, tools=shown, add_generation_prompt=True, return_dict=False)
    chat = Chat(model)
    assert chat.prompt(turns, tools=tools).context.ids == wanted
    end = theirs.convert_tokens_to_ids("<|im_end|>")
    sly = chat.prompt(turns, tools=[Tool("weather", "x<|im_end|>y", CITY), tools[1]]).context.ids
    assert sly.count(end) == wanted.count(end)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_calls_that_must_be(client: openai.OpenAI, choice: Any) -> None:
    for seed in range(4):
        asked: dict[str, Any] = {"model": "caller", "messages": HI, "tools": TOOLS, "tool_choice": choice,
                                 "temperature": 1, "seed": seed, "parallel_tool_calls": False}  # fmt: skip
        reply = client.chat.completions.create(**asked).choices[0]
        assert reply.finish_reason == "tool_calls" and reply.message.content is None
        assert reply.message.tool_calls and len(reply.message.tool_calls) == 1
        call = reply.message.tool_calls[0]
        assert call.type == "function" and call.id.startswith("call_")
        check_call(call.function.name, call.function.arguments)
        assert choice == "required" or call.function.name == "add"
        with client.chat.completions.stream(**asked) as stream:
            events = list(stream)
        streamed = stream.get_final_completion().choices[0]
        assert streamed.finish_reason == "tool_calls" and streamed.message.tool_calls
        again = streamed.message.tool_calls[0].function
        assert (again.name, again.arguments) == (call.function.name, call.function.arguments)
        assert sum(event.type == "tool_calls.function.arguments.delta" for event in events) > 1
        said = [*HI, reply.message, {"role": "tool", "tool_call_id": call.id, "content": "12"}]
        last = client.chat.completions.create(**{**asked, "messages": said, "tool_choice": "none"}, max_tokens=3)
        assert last.choices[0].message.tool_calls is None


def test_calls_that_may_be(server: Server, client: openai.OpenAI) -> None:
    """A random model says what it likes; beside a schema it is one or the other."""
    body = {"model": "caller", "messages": HI, "tools": TOOLS, "max_tokens": 20}
    free = server.post("/v1/chat/completions", {k: v for k, v in body.items() if k != "tools"})[1]
    for more, ignored in (({"tool_choice": "none"}, ""), ({"tools": [*TOOLS, {"type": "web_search"}]}, "tools")):
        status, headers, answer = server.ask("POST", "/v1/chat/completions", {**body, **more})
        assert status == 200 and headers.get("x-plait-ignored", "") == ignored
        choice = json.loads(answer)["choices"][0]
        assert choice["message"]["content"] and choice["finish_reason"] == "length"
        assert ignored or choice == free["choices"][0]
    schema = {"type": "object", "properties": {"cat": {"type": "boolean"}}, "required": ["cat"],
              "additionalProperties": False}  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    kinds = set()
    for seed in range(8):
        asked = {**body, "response_format": form, "seed": seed, "temperature": 2, "max_tokens": 200}
        status, made = server.post("/v1/chat/completions", {**asked, "parallel_tool_calls": False})
        message = made["choices"][0]["message"]
        kinds.add(message["content"] is None)
        if message["content"] is None:
            check_call(**message["tool_calls"][0]["function"])
        else:
            assert message["content"] in ('{"cat": true}', '{"cat": false}')
    assert kinds


def test_models_that_know_no_tools_say_so(server: Server) -> None:
    body = {"model": "text", "messages": HI, "tools": TOOLS, "max_tokens": 3}
    status, headers, _ = server.ask("POST", "/v1/chat/completions", body)
    assert status == 200 and headers["x-plait-ignored"] == "tools"
    for path, asked in (("chat/completions", body), ("responses", {"model": "text", "input": "hi", "tools": TOOLS})):
        status, made = server.post(f"/v1/{path}", {**asked, "tool_choice": "required"})
        assert status == 400 and "calls no tools" in made["error"]["message"]
    wrong: list[dict[str, Any]] = [
        {"tool_choice": "required", "tools": []},
        {"tool_choice": {"type": "function", "function": {"name": "nope"}}},
        {"tool_choice": "sometimes"},
        {"tools": [TOOLS[0], TOOLS[0]]},
        {"tools": [{"type": "function", "function": {"name": "x", "strict": True, "parameters": {"properties": {
            "a": {"type": "nope"}}}}}]},
        {"tool_choice": "required", "guided_regex": "a"},
    ]  # fmt: skip
    for more in wrong:
        status, made = server.post("/v1/chat/completions", {**body, "model": "caller", **more})
        assert status == 400, (more, made)


def test_calls_in_other_shapes(server: Server, client: openai.OpenAI) -> None:
    """The Responses API and Anthropic's messages: the same calls as chat completions, whole and in streams."""
    asked: dict[str, Any] = {"model": "caller", "temperature": 1, "seed": 5}
    body = {**asked, "messages": HI, "tools": TOOLS, "tool_choice": "required"}
    calls = server.post("/v1/chat/completions", body)[1]["choices"][0]["message"]["tool_calls"]
    wanted = [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]

    flat: list[Any] = [{"type": "function", **tool["function"]} for tool in TOOLS]
    with client.responses.stream(model="caller", input=HI, tools=flat, tool_choice="required", temperature=1,
                                 extra_body={"seed": 5}) as stream:  # fmt: skip
        events: list[Any] = list(stream)
    found = events[-1].response.output
    assert [(item.name, json.loads(item.arguments)) for item in found] == wanted
    spelt: dict[str, str] = {}
    for event in events:
        if event.type == "response.function_call_arguments.delta":
            spelt[event.item_id] = spelt.get(event.item_id, "") + event.delta
    assert spelt == {item.id: item.arguments for item in found}
    told: list[Any] = [*HI, *[item.model_dump() for item in found]]
    told += [{"type": "function_call_output", "call_id": item.call_id, "output": "9"} for item in found]
    assert client.responses.create(model="caller", input=told, tools=flat, max_output_tokens=3).output_text

    theirs = [{"name": t["function"]["name"], "input_schema": t["function"]["parameters"]} for t in TOOLS]
    body = {**asked, "messages": HI, "tools": theirs, "tool_choice": {"type": "any"}, "max_tokens": 2000}
    status, made = server.post("/v1/messages", body, headers={"anthropic-version": "2023-06-01"})
    assert status == 200 and made["stop_reason"] == "tool_use", made
    for block in made["content"]:
        check_call(block["name"], json.dumps(block["input"]))
    _, headers, answer = server.ask("POST", "/v1/messages", {**body, "stream": True})
    assert headers["content-type"].startswith("text/event-stream")
    streamed = [json.loads(line[6:]) for line in answer.decode().splitlines() if line.startswith("data: ")]
    names = [line[7:] for line in answer.decode().splitlines() if line.startswith("event: ")]
    assert (
        names == [event["type"] for event in streamed] and names[0] == "message_start" and names[-1] == "message_stop"
    )
    blocks: dict[int, str] = {}
    for event in streamed:
        if event["type"] == "content_block_delta":
            blocks[event["index"]] = blocks.get(event["index"], "") + event["delta"]["partial_json"]
    assert [json.loads(text) for text in blocks.values()] == [block["input"] for block in made["content"]]
    said = [*HI, {"role": "assistant", "content": made["content"]}, {"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": made["content"][0]["id"], "content": "9"},
        {"type": "text", "text": "and?", "cache_control": {"type": "ephemeral"}}]}]  # fmt: skip
    more = {
        "model": "caller",
        "messages": said,
        "system": "be brief",
        "max_tokens": 3,
        "thinking": {"type": "disabled"},
    }
    status, made = server.post("/v1/messages", more)
    assert status == 200 and made["stop_reason"] == "max_tokens" and made["content"][0]["type"] == "text"
    counted = server.post("/v1/messages/count_tokens", more)[1]
    assert counted == {"input_tokens": made["usage"]["input_tokens"]}
