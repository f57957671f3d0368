"""Commands that answer people: chat, reply."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from plait.console import DeviceOption, ModelArgument, PrecisionOption, SeedOption, app, err, out, plain, write

if TYPE_CHECKING:
    from plait.chat.session import Session
    from plait.inference.sampling import Options

HELP = (
    "/image FILE and /audio FILE go along with the next message; /draw TEXT draws; /save FILE keeps the conversation; "
    "/new begins another one; /quit, or Ctrl-D, ends."
)


@app.command()
def chat(
    model: ModelArgument,
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 takes the likeliest words.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample among the likeliest tokens that together have this probability.")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Of each reply.")] = None,
    images: Annotated[Path, typer.Option(help="Where /draw puts its files.")] = Path(),
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
) -> None:
    """Talk with a model. A line is a message; /help shows the commands. Messages may come through a pipe.

    Example: plait chat runs/chat
    """
    from plait.chat.session import Session
    from plait.core.errors import PlaitError
    from plait.hf import hub
    from plait.inference.base import Verb
    from plait.inference.model import find_checkpoint, load
    from plait.inference.prompts import Chat

    loaded = load(model, device, precision).plait_model
    if loaded is None or Verb.GENERATE not in loaded.verbs:
        raise PlaitError(f"{model} cannot chat: it runs in transformers, or writes nothing.")
    session = Session(Chat(loaded, find_checkpoint(model) or hub.find(model)), system)
    options: Options = {"temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens, "seed": seed}
    asking = sys.stdin.isatty()
    if asking:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (lines can be edited, and earlier ones called back)
        err.print(plain(HELP))
    while True:
        try:
            line = input("> " if asking else "").strip()
        except EOFError:
            return
        if line in ("/quit", "/exit"):
            return
        if not line and not session.attached:
            continue
        try:
            session = _answer(session, line, options, images)
        except KeyboardInterrupt:  # gives up the reply, not the conversation
            if not asking:
                raise
            err.print("\n[dim]Stopped; this message and its reply are forgotten.[/dim]")
        except PlaitError as error:
            if not asking:
                raise
            err.print(f"[red]plait:[/red] {plain(str(error))}")


def _answer(session: Session, line: str, options: Options, images: Path) -> Session:
    """Obey a line; returns the conversation that goes on."""
    from plait.core.errors import PlaitError

    command, _, rest = line.partition(" ")
    rest = rest.strip()
    if not line.startswith("/"):
        for piece in session.say(line, **options):
            out.print(piece, end="", markup=False)
        out.print()
        if session.left_out:
            err.print(f"[dim]{session.left_out} older turns no longer fit and were left out.[/dim]")
    elif command == "/help":
        err.print(plain(HELP))
    elif command == "/new":
        return type(session)(session.chat, session.turns[0].parts[0] if _has_system(session) else None)
    elif command not in ("/image", "/audio", "/draw", "/save"):
        raise PlaitError(f"There is no command {command}. {HELP}")
    elif not rest:
        raise PlaitError(f"{command} needs {'what to draw' if command == '/draw' else 'a file'}.")
    elif command == "/save":
        write(Path(rest), (json.dumps({"messages": session.messages()}, ensure_ascii=False) + "\n").encode())
        err.print(plain(f"Saved: {rest}"))
    elif command == "/draw":
        image = session.draw(rest, seed=options.get("seed", 0))
        path = next(p for n in range(1, 10**6) if not (p := images / f"drawing-{n}.png").exists())
        image.save(path)
        out.print(plain(str(path)))
    else:
        session.attach(Path(rest).expanduser(), command[1:])
        err.print(plain(f"{rest} goes along with the next message."))
    return session


def _has_system(session: Session) -> bool:
    return bool(session.turns) and session.turns[0].role == "system"


@app.command()
def reply(
    run: Annotated[Path, typer.Argument(help="A run that was trained on past questions and their replies.")],
    messages: Annotated[list[str] | None, typer.Argument(help="Messages; without any, one a line from stdin.")] = None,
    data: Annotated[Path | None, typer.Option(help="The dataset of past pairs; by default the run's.")] = None,
    question: Annotated[str | None, typer.Option(help="The column of questions.")] = None,
    answer: Annotated[str | None, typer.Option(help="The column of replies.")] = None,
    sources: Annotated[int, typer.Option(min=0, help="Past pairs to show beside each answer.")] = 3,
    least: Annotated[
        float | None, typer.Option(min=0, max=1, help="Confidence below which there is silence; else found on val.")
    ] = None,
    encoder: Annotated[
        str | None, typer.Option(help="A text encoder that helps to find what is near: a Hugging Face name or folder.")
    ] = None,
    compose: Annotated[
        bool, typer.Option("--compose", help="Let the run's model write; else replies are quoted.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="A line of JSON for each message.")] = False,
    device: DeviceOption = "auto",
) -> None:
    """Answer messages from past questions and replies, with sources, or stay silent where not sure.

    Example: plait reply runs/replies "hello, when are you open?"
    """
    from dataclasses import asdict

    from plait.chat.replies import open_replies
    from plait.core.errors import PlaitError
    from plait.inference.model import load

    loaded = load(str(run), device).plait_model if compose else None
    if compose and loaded is None:
        raise PlaitError(f"{run} writes no replies: it runs in transformers.")
    embedder = load(encoder, device).embed_inputs if encoder is not None else None
    replies = open_replies(run, data, question, answer, embedder, loaded, least)
    lines = messages or [line.strip() for line in sys.stdin if line.strip()]
    for message, quoted in zip(lines, replies.answer(lines, sources, compose), strict=True):
        if as_json:
            out.print(json.dumps({"message": message, **asdict(quoted)}, ensure_ascii=False), markup=False)
            continue
        shown = "(silence)" if quoted.reply is None else quoted.reply
        if len(lines) > 1:
            out.print(plain(message))
        out.print(plain(f"{shown}  [confidence {quoted.confidence:.2f}, least {quoted.threshold:.2f}]"))
        for pair in quoted.sources:
            out.print(plain(f"  {pair.nearness:.2f}  {pair.question}  ->  {pair.reply}"))
