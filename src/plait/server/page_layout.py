"""How the page is laid out: the tabs that the models that are served have a use for."""

from __future__ import annotations

import importlib.util
from html import escape
from typing import Any

import gradio

from plait.server.page_html import example_button, examples_of, word_button
from plait.server.page_tabs import Tabs

IMAGES = 4  # drawn at once: what a request may ask for
KINDS = [("images", "image"), ("audio", "audio"), ("texts", "text")]
HOW_TO_FIND = (
    "<p>To find things, make an index and serve it:</p><pre>plait index add my.index FILES --model RUN\n"
    "plait serve RUN --ui --index my.index</pre>"
)
METHODS = [("leave out (occlusion)", "occlusion"), ("integrated gradients", "integrated-gradients")]


def blocks(page: Tabs, reports: list[str]) -> Any:
    """Gradio's page over the handlers; `reports` names the models that have one."""
    served = list(page.service.models.values())
    verbs = {verb for one in served for verb in one.verbs}
    ours = [one.model for one in served if one.model.plait_model is not None]
    columns = {name: kind for model in ours for name, kind in model.columns.items()}
    texts = [name for name, kind in columns.items() if kind == "text"]
    voices = [name for name, kind in columns.items() if kind == "audio"]
    kinds = {kind for kind in columns.values() if kind in ("image", "audio")}
    made = {verb: kind for verb, kind in (("draw", "image"), ("speak", "audio")) if verb in verbs}
    words = [text for model in ours for column in texts for text in model.labels.get(column, [])[2:6]]
    media, ink = examples_of(served)
    chats = [one.chat for one in served if one.chat is not None]
    remembers = any(chat.template or chat.model.vocabulary.turns or not chat.model.columns for chat in chats)

    def medium(where: str, draws: bool = True) -> Any:
        """A place to drop, draw or record a medium, the hidden text that holds it, and examples."""
        wanted = [kind for kind in ("image", "audio") if kind in kinds] or ["image", "audio"]
        tools = [*wanted, *(["draw"] if draws and "image" in wanted else [])]
        few = "".join(example_button(where, kind, *one) for kind in wanted for one in enumerate(media.get(kind, []), 1))
        text = gradio.Textbox(elem_id=where, elem_classes="plait-hidden", label="medium")
        _html(f'<div class="plait-media" data-to="{where}" data-tools="{" ".join(tools)}" data-ink="{ink}"></div>')
        if few:
            _html(f'<div class="plait-examples">{few}</div>')
        return text

    def examples(box: Any) -> None:
        few = "".join(word_button(box.elem_id, text) for text in dict.fromkeys(words))
        if few:
            _html(f'<div class="plait-examples">{few}</div>')

    def choice(label: str, values: list[str], first: str, shown: bool = True) -> Any:
        return gradio.Dropdown(
            [(first, ""), *((v, v) for v in values)], value="", label=label, visible=shown and bool(values)
        )

    def recommending() -> None:
        history, liked = (
            gradio.Textbox(elem_id=where, elem_classes="plait-hidden", label=where)
            for where in ("recommend-history", "recommend-liked")
        )
        names = [one.name for one in has_items]
        name = gradio.Dropdown(names, value=names[0], label="Items of", visible=len(names) > 1)
        with gradio.Row():
            text = gradio.Textbox(label="Find by title", placeholder="a part of it", elem_id="recommend-text", scale=4)
            look = gradio.Button("Look up", elem_id="recommend-look", scale=1)
        found = _html("", "recommend-found")
        chosen = _html("", "recommend-chosen")
        with gradio.Row():
            where = gradio.Textbox(label="Only where", placeholder="year >= 1990", elem_id="recommend-where")
            diversity = gradio.Slider(0, 1, value=0, step=0.1, label="Diversity")
            k = gradio.Slider(1, 50, value=10, step=1, label="Results")
            why = gradio.Checkbox(True, label="Say why")
        go, out = gradio.Button("Recommend", variant="primary", elem_id="recommend-go"), _html("", "recommend-out")
        inputs = [name, history, where, diversity, k, why]
        gradio.on([go.click, history.change], page.recommend, inputs, [chosen, out], **private)
        liked.change(page.similar, [name, liked, where, k], out, **private)
        gradio.on([look.click, text.submit, whole.load, name.change], page.look_up, [name, text], found, **private)

    def finding() -> None:
        indexes = page.service.resources.get("search", {})
        if not indexes:
            _html(HOW_TO_FIND)
            return
        text = gradio.Textbox(label="Words, or an image or audio below", elem_id="find-text")
        examples(text)
        seen = medium("find-medium")
        with gradio.Row():
            wanted = gradio.CheckboxGroup(KINDS, label="Only", elem_id="find-kinds")
            k = gradio.Slider(1, 50, value=12, step=1, label="Results")
            index = choice(
                "Index",
                list(indexes),
                "the first",
                len(indexes) > 1,
            )
        go, out = gradio.Button("Find", variant="primary", elem_id="find-go"), _html("", "find-out")
        gradio.on([go.click, text.submit], page.find, [name, text, seen, wanted, k, index], out, **private)

    def explaining() -> None:
        seen = medium("explain-medium")
        text = gradio.Textbox(label="Words, instead of a medium or beside it", elem_id="explain-text")
        with gradio.Row():
            answer = gradio.Textbox(label="Why this answer", placeholder="the model's own", elem_id="explain-answer")
            known = METHODS if importlib.util.find_spec("captum") else METHODS[:1]
            method = gradio.Dropdown(known, value="occlusion", label="Method", visible=len(known) > 1)
            column = choice("Answer column", texts, "the first", len(texts) > 1)
        go, out = gradio.Button("Explain", variant="primary", elem_id="explain-go"), _html("", "explain-out")
        go.click(page.explain, [name, seen, text, answer, column, method], out, **private)

    private: dict[str, Any] = {"api_visibility": "private", "show_progress": "minimal"}
    has_items = [one for one in served if "recommend" in one.verbs]
    with gradio.Blocks(title="Plait", analytics_enabled=False) as whole:
        _html(f"<h1 style='margin:.2rem 0'>{escape(' · '.join(one.name for one in served))}</h1>")
        names = [one.name for one in served if one not in has_items]
        name = gradio.Dropdown(names, value=names[0] if names else None, label="Model", visible=len(names) > 1)
        with gradio.Tabs():
            if names:
                with gradio.Tab("Chat"):
                    talk, told = _html("", "chat-talk"), gradio.Textbox(elem_classes="plait-hidden", label="told")
                    text = gradio.Textbox(
                        label="Say", placeholder="Write, or add an image or an audio clip", elem_id="chat-text"
                    )
                    with gradio.Accordion("An image or an audio clip", open=False, visible=bool(kinds)):
                        seen = medium("chat-medium")
                    with gradio.Row():
                        # A model of records answers media with words, and words with media.
                        forms = [("auto", ""), ("text", "text")]
                        forms += [(f"a {'image' if kind == 'image' else 'audio'}", kind) for kind in made.values()]
                        first = "" if made and not remembers else "text"
                        kind = gradio.Radio(forms, value=first, label="Reply in", visible=len(forms) > 2)
                        column = choice("Reply column", texts, "the first", len(texts) > 1)
                        keep = gradio.Checkbox(remembers, label="Remember what was said", visible=True)
                    with gradio.Row():
                        go = gradio.Button("Send", variant="primary", elem_id="chat-go")
                        new = gradio.Button("New conversation", elem_id="chat-new")
                    examples(text)
                    inputs, outputs = [name, text, seen, kind, column, keep, told], [talk, told, text, seen]
                    gradio.on([go.click, text.submit], page.chat, inputs, outputs, **private)
                    new.click(lambda: ("", "", "", ""), None, outputs, **private)
            if {"classify", "describe", "transcribe"} & verbs:
                with gradio.Tab("Recognise"):
                    seen = medium("recognise-medium")
                    with gradio.Row():
                        labels = gradio.Textbox(
                            label="Labels", placeholder="the model's own, or: cat, dog", elem_id="recognise-labels"
                        )
                        column = choice("Answer column", texts, "the first", len(texts) > 1)
                    go, out = (
                        gradio.Button("Recognise", variant="primary", elem_id="recognise-go"),
                        _html("", "recognise-out"),
                    )
                    go.click(page.recognise, [name, seen, labels, column], out, **private)
            if "draw" in verbs:
                with gradio.Tab("Draw"):
                    text = gradio.Textbox(label="What to draw", elem_id="draw-text")
                    examples(text)
                    with gradio.Row():
                        n = gradio.Slider(1, IMAGES, value=IMAGES, step=1, label="Images")
                        guidance = gradio.Slider(1, 5, value=2, step=0.5, label="Guidance")
                        seed = gradio.Textbox(label="Seed", placeholder="any")
                    go, out = gradio.Button("Draw", variant="primary", elem_id="draw-go"), _html("", "draw-out")
                    gradio.on([go.click, text.submit], page.draw, [name, text, n, guidance, seed], out, **private)
            if "speak" in verbs:
                with gradio.Tab("Speak"):
                    text = gradio.Textbox(label="What to say", elem_id="speak-text")
                    examples(text)
                    with gradio.Row():
                        voice = choice("Voice", voices, "the first", len(voices) > 1)
                        seed = gradio.Textbox(label="Seed", placeholder="any")
                    go, out = gradio.Button("Speak", variant="primary", elem_id="speak-go"), _html("", "speak-out")
                    gradio.on([go.click, text.submit], page.speak, [name, text, voice, seed], out, **private)
            if has_items:
                with gradio.Tab("Recommend"):
                    recommending()
            if names:
                with gradio.Tab("Find"):
                    finding()
                with gradio.Tab("Explain"):
                    explaining()
            if reports:
                with gradio.Tab("Report"):
                    for one in reports:
                        title = f"<h3>{escape(one)}</h3>" if len(reports) > 1 else ""
                        _html(f'{title}<iframe class="plait-report" sandbox="" src="/report/{escape(one, quote=True)}" '
                              f'title="report of {escape(one, quote=True)}"></iframe>')  # fmt: skip
    limits = page.service.limits
    return whole.queue(default_concurrency_limit=limits.queue, max_size=limits.queue)


def _html(html: str, where: str | None = None) -> Any:
    """HTML of our own making. Gradio's component of that name compiles templates, which the page's policy forbids."""
    return gradio.Markdown(html, elem_id=where, sanitize_html=False, latex_delimiters=[])
