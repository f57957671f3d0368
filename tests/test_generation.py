"""Generation against plain loops, and the verbs on a tiny random model made on the spot."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from plait.core.device import choose_device
from plait.core.errors import PlaitError
from plait.core.rng import uniform
from plait.inference import scoring
from plait.inference.decoder import Decoder
from plait.inference.engine import Engine
from plait.inference.grammar import spans
from plait.inference.model import PlaitModel, find_checkpoint, load
from plait.inference.requests import Request
from plait.inference.sampling import BatchSamplingParams, Sampling, draw, keep_top_a
from plait.kernels.linear import PackedLinear
from plait.modalities.text import Text
from plait.model import checkpoint as checkpoints
from plait.model.checkpoint import Checkpoint
from plait.model.multimodal import ModelConfig, Multimodal, Sequence, collate
from plait.model.transformer import Transformer, TransformerConfig, View


def make(tied: bool = False, position: str = "rotary", **columns: str) -> Checkpoint:
    torch.manual_seed(0)
    text = Text.train(["a red heart", "a blue star", "drei rote Herzen"], 280)
    backbone = TransformerConfig(
        width=32, layers=2, heads=4, kv_heads=2, head_width=8, hidden=64, max_length=128, position=position
    )
    columns = columns or {"image": "image", "label": "text", "audio": "audio", "caption": "text"}
    media = sorted(set(columns.values()) - {"text"}, reverse=True)
    image = {"size": 16, "stem": 8, "codec_width": 16, "levels": [4, 3]}
    audio = {"seconds": 0.4, "stem": 4, "codec_width": 16, "levels": [4, 3], "bands": 16}
    config = ModelConfig(
        backbone=backbone,
        vocabulary={
            "text": text.size,
            "columns": columns,
            "levels": {m: [4, 3] for m in media},
            "closers": [m for m in media if m == "audio"],
        },
        embed_dim=16,
        tied=tied,
        modalities={m: {"image": image, "audio": audio}[m] for m in media},
    )
    model = Multimodal(config).eval()
    with torch.no_grad():  # logits far enough apart that rounding decides nothing
        for parameter in model.output_embedding.parameters():
            parameter.mul_(10)
    return Checkpoint(model, text, labels={"label": ["heart", "star"]} if "label" in columns else {})


@pytest.fixture(scope="module")
def model() -> PlaitModel:
    return PlaitModel(make(), "cpu")


@pytest.fixture(scope="module")
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8))


@pytest.fixture(scope="module")
def audio() -> tuple[np.ndarray, int]:
    return np.random.default_rng(1).normal(size=2400).astype(np.float32), 8000


def plain_logits(model: PlaitModel, context: Sequence, ids: list[int]) -> torch.Tensor:
    """Logits (V,) after context and ids by one uncached pass."""
    whole = Sequence(context.ids + ids, context.targets + ids, context.media)
    net = model.checkpoint.model
    with torch.inference_mode():
        logits = net.logits(net(collate([whole], net.media, model.vocabulary.pad))[0, -1])
    return logits.clone()


def plain_write(model: PlaitModel, request: Request, sample: int = 0) -> list[int]:
    """The engine's promise without a cache, a batch or a tensor of settings."""
    span = spans(model.checkpoint.model)[request.token_type]
    bare = Sequence().read_ids(request.context.ids[-1:])
    ids: list[int] = []
    room = model.engine.max_length + 1 - len(request.context)
    most = min(b for b in (request.max_new_tokens, span.limit, room) if b is not None) // span.unit * span.unit
    while len(ids) < most:
        logits = plain_logits(model, request.context, ids)
        if request.guidance != 1 and len(request.context) > 1:
            without = plain_logits(model, bare, ids)
            logits = without + request.guidance * (logits - without)
        allowed = [span.allows(len(ids), token) for token in range(len(logits))]
        logits[~torch.tensor(allowed)] = float("-inf")
        if request.sampling.greedy:
            token = int(logits.argmax())
        else:
            chances = (logits.double() / request.sampling.temperature).softmax(-1)
            u = uniform(request.seed, request.first_sample + sample, len(ids))
            token = int((chances.cumsum(0) > float(u) * chances.sum()).nonzero()[0])
        if token == span.end:
            break
        ids.append(token)
    return ids


def mixed(model: PlaitModel, image, audio, count: int) -> list[Request]:
    contexts = [
        ("image", model.context(["a red heart"], "image")),
        ("text", model.context(["a red"])),
        ("text", model.context([image], "caption")),
        ("audio", model.context([image, "a star"], "audio")),
        ("text", model.context([audio], "label")),
        ("image", model.context([], "image")),
    ]
    requests = []
    for i in range(count):
        token_type, context = contexts[i % len(contexts)]
        guided = token_type != "text" and i % 4 != 1
        requests.append(
            Request(
                context,
                token_type,
                Sampling(greedy=i % 5 == 0, temperature=0.7 + 0.1 * (i % 4)),
                n=1 + (i % 7 == 0),
                max_new_tokens=None if token_type != "text" else 3 + i % 9,
                guidance=1.5 if guided else 1.0,
                seed=i,
                logprobs=i % 3 == 0,
            )
        )
    return requests


@pytest.mark.parametrize(("tied", "position"), [(False, "rotary"), (True, "learned")])
def test_engine_writes_what_a_plain_loop_writes(tied, position, image, audio):
    model = PlaitModel(make(tied, position), "cpu")
    requests = mixed(model, image, audio, 12)
    for rows in (3, 64):  # with 3 rows most requests wait for others to leave
        results = Engine(model.checkpoint, model.device, rows).run(requests)
        for request, result in zip(requests, results, strict=True):
            assert [s.ids for s in result.samples] == [plain_write(model, request, k) for k in range(request.n)]


def test_alone_and_in_company(model, image, audio):
    requests = mixed(model, image, audio, 32)
    together = Engine(model.checkpoint, model.device, 16).run(requests)
    for request, result in zip(requests, together, strict=True):
        alone = model.engine.run([request])[0]
        assert [dataclasses.replace(s, logprobs=None) for s in alone.samples] == [
            dataclasses.replace(s, logprobs=None) for s in result.samples
        ]
        for a, b in zip(alone.samples, result.samples, strict=True):
            assert a.logprobs is None or np.allclose(a.logprobs, b.logprobs, atol=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "int8", "int4"])
@pytest.mark.parametrize("tied", [True, False])
def test_weights_in_fewer_bits(tied, precision, image):
    """Held once, in the precision asked for; what is written stays near to what fp32 writes."""
    exact, small = PlaitModel(make(tied, "rotary"), "cpu"), PlaitModel(make(tied, "rotary"), "cpu", precision)
    network = small.checkpoint.model
    kept = [module for module in network.modules() if isinstance(module, PackedLinear)]
    if small.device.weights is not None:
        bits = {"bf16": 16, "fp16": 16, "int8": 8.5, "int4": 5}[precision]
        products = 4 * network.config.backbone.layers + (1 if tied else 2)
        assert len(kept) == products and not network.token_embedding.free.numel()
        padded = sum(-(-layer.out_features // 32) * 32 * -(-layer.in_features // 32) * 32 for layer in kept)
        if kept[0].library is not None:
            assert sum(layer.nbytes for layer in kept) == padded * bits / 8
    context = exact.context([image], "caption")
    request = Request(context, logprobs=True, max_new_tokens=1, n=1)
    first, second = (model.engine.run([request])[0].samples[0].logprobs[0] for model in (exact, small))
    assert first == pytest.approx(second, abs=0.3 if precision == "int4" else 0.05)
    ids = exact.checkpoint.text.encode("a red heart")
    first, second = (scoring.score(model.engine, [context], [ids])[0, 0] / len(ids) for model in (exact, small))
    assert first == pytest.approx(second, abs=0.3 if precision == "int4" else 0.05)


def test_log_probabilities_are_the_models_own(model, image):
    request = Request(model.context([image], "caption"), logprobs=True, max_new_tokens=6)
    written = model.engine.run([request])[0].samples[0]
    span = spans(model.checkpoint.model)["text"]
    for place, found in enumerate(written.logprobs):
        token = [*written.ids, span.end][place]
        logits = plain_logits(model, request.context, written.ids[:place])[: span.stop]
        assert found == pytest.approx(float(logits.log_softmax(-1)[token]), abs=1e-4)


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_grammar_is_never_broken(model, data):
    token_type = data.draw(st.sampled_from(["text", "image", "audio"]))
    column = {"text": "caption", "image": "image", "audio": "audio"}[token_type]
    sampling = Sampling(
        temperature=data.draw(st.floats(0.3, 50)),
        top_k=data.draw(st.integers(0, 5)),
        top_p=data.draw(st.floats(0.05, 1)),
        min_p=data.draw(st.floats(0, 1)),
        repetition_penalty=data.draw(st.floats(0.3, 3)),
    )
    request = Request(
        model.context([data.draw(st.text(max_size=5))], column),
        token_type,
        sampling,
        n=3,
        guidance=data.draw(st.floats(-1, 5)),
        seed=data.draw(st.integers(0, 2**40)),
        max_new_tokens=20 if token_type == "text" else None,
    )
    span = spans(model.checkpoint.model)[token_type]
    for written in model.engine.run([request])[0].samples:
        assert all(span.allows(place, token) for place, token in enumerate(written.ids))
        assert len(written.ids) >= span.least and len(written.ids) % span.unit == 0
        if token_type == "image":
            assert len(written.ids) == 16
        if token_type == "audio":
            assert 2 <= len(written.ids) <= 20
    samples = model.decode(column, model.engine.run([request])[0].samples) if token_type != "text" else []
    assert all(np.isfinite(sample).all() for sample in samples)


def test_settings_match_transformers():
    from transformers import (
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    torch.manual_seed(0)
    logits = torch.randn(6, 50) * 3
    ids = torch.randint(0, 50, (6, 8))
    rows = [
        Sampling(),
        Sampling(temperature=0.5, top_k=7),
        Sampling(top_p=0.6),
        Sampling(min_p=0.2, repetition_penalty=1.7),
        Sampling(temperature=2.0, top_k=20, top_p=0.8, min_p=0.05, repetition_penalty=0.6),
        Sampling(greedy=True, repetition_penalty=3.0),
    ]
    seen = torch.zeros(6, 50, dtype=torch.bool).scatter_(1, ids, True)
    kept = []

    def spy(found, uniforms):
        kept.append(found)
        return draw(found, uniforms)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("plait.inference.sampling.draw", spy)
        chosen = BatchSamplingParams(rows, torch.device("cpu")).choose(logits, torch.rand(6), seen)
    for row, s in enumerate(rows):
        wanted = RepetitionPenaltyLogitsProcessor(s.repetition_penalty)(ids[row : row + 1], logits[row : row + 1])
        if s.greedy:
            assert int(chosen[row]) == int(wanted.argmax())
            continue
        chain = [TemperatureLogitsWarper(s.temperature)]
        chain += [TopKLogitsWarper(s.top_k)] if s.top_k else []
        chain += [TopPLogitsWarper(s.top_p)] if s.top_p < 1 else []
        chain += [MinPLogitsWarper(s.min_p)] if s.min_p else []
        for processor in chain:
            wanted = processor(ids[row : row + 1], wanted)
        torch.testing.assert_close(kept[0][row], wanted[0])


def test_top_a_keeps_what_is_likely_beside_the_likeliest():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.94, 0.03, 0.02, 0.01]]).log()
    kept = keep_top_a(logits, torch.tensor([0.4, 0.4])) > -torch.inf  # at least .1, and at least .353
    assert kept.tolist() == [[True, True, True, False], [True, False, False, False]]
    rows = [Sampling(top_a=0.4), Sampling()]
    found = BatchSamplingParams(rows, torch.device("cpu")).choose(logits[[1, 1]], torch.tensor([0.99, 0.995]))
    assert found.tolist() == [0, 3]


def test_draws_follow_the_probabilities():
    logits = torch.tensor([0.5, 0.0, 0.25, 0.25]).log().expand(40_000, -1)
    found = torch.bincount(draw(logits, torch.from_numpy(uniform(3, np.arange(40_000)))), minlength=4) / 40_000
    assert found[1] == 0
    assert found.tolist() == pytest.approx([0.5, 0, 0.25, 0.25], abs=0.012)
    assert draw(logits[:2], torch.tensor([0.0, 1.0])).tolist() == [0, 3]


def test_scores_on_a_tree_equal_plain_ones(model, image, audio):
    texts = ["heart", "a red heart", "", "star", "drei rote Herzen"]
    contexts = [model.context([image]), model.context(["a"]), model.context([audio, "blue"]), model.context([])]
    found = model.score(contexts, "label", texts)
    alone = np.concatenate([model.score([context], "label", texts) for context in contexts])
    assert np.allclose(found, alone, atol=1e-4)
    span = spans(model.checkpoint.model)["text"]
    for row, context in enumerate(contexts):
        opened = model._opened(context, "label")
        for column, text in enumerate(texts):
            ids, total = model.checkpoint.text.encode(text), 0.0
            for place, token in enumerate([*ids, span.end]):
                logits = plain_logits(model, opened, ids[:place])[: span.stop]
                total += float(logits.log_softmax(-1)[token])
            assert found[row, column] == pytest.approx(total, abs=1e-3)
    many = [f"star {i}" for i in range(300)]  # more than one chunk of branches
    assert np.allclose(
        model.score(contexts[:1], "label", many)[0, ::50], model.score(contexts[:1], "label", many[::50])
    )


def test_continues_as_transformers_does(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    text = Text.train(["a red heart", "a blue star"], 280)
    config = GPT2Config(
        vocab_size=text.size, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )
    theirs = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(3)
    theirs.save_pretrained(tmp_path)
    text.save(tmp_path / "tokenizer.json")
    prompt = "a red heart and"
    ids = torch.tensor([text.encode(prompt)])
    wanted = theirs.generate(ids, max_length=40, do_sample=False, pad_token_id=0)[0].tolist()
    wanted = wanted[:-1] if wanted[-1] == 0 else wanted
    assert load(tmp_path, "cpu").generate(prompt, max_length=40) == text.decode(wanted)


def test_stop_stream_and_cancel(model):
    request = Request(model.context(["a red"]), sampling=Sampling(temperature=2.0), max_new_tokens=40, seed=5)
    whole = model.engine.run([request])[0].samples[0]
    assert whole.text and whole.finish in ("length", "end")
    updates = list(model.engine.stream(request))
    assert "".join(u.text for u in updates) == whole.text
    assert [i for u in updates for i in u.ids] == whole.ids and updates[-1].finish == whole.finish
    stop = whole.text[4:6]
    stopped = dataclasses.replace(request, stop=(stop, "never"))
    written = model.engine.run([stopped])[0].samples[0]
    assert written.finish == "stop" and written.text == whole.text[: whole.text.find(stop)]
    assert "".join(u.text for u in model.engine.stream(stopped)) == written.text
    jobs = [model.engine.submit(dataclasses.replace(request, n=3)) for _ in range(2)]
    for _ in range(3):
        model.engine.step()
    jobs[0].cancel()
    while model.engine.step():
        pass
    assert [s.finish for s in jobs[0].result.samples] == ["cancelled"] * 3
    assert all(len(s.ids) == 3 for s in jobs[0].result.samples)
    assert jobs[1].result.samples[0] == whole and model.engine.used == 0
    for update in model.engine.stream(request):
        assert update.ids
        break
    assert model.engine.used == 0 and not model.engine.step()


def test_generate(model, image, audio):
    assert model.generate("a red", max_new_tokens=5, seed=1).startswith("a red")
    five = model.generate("a red", max_length=20, num_return_sequences=5)
    assert len(five) == 5 and len(set(five)) > 1
    assert model.generate("a", n=2, seed=3) == model.generate("a", n=2, seed=3)
    assert isinstance(model.generate("", max_new_tokens=3), str)
    drawn = model.generate(["a drawing of", image], to="image", n=2)
    assert [one.size for one in drawn] == [(16, 16)] * 2
    assert model.generate("a star", to="image").size == (16, 16)
    wave, rate = model.generate([audio, "a star"], to="audio")
    assert rate == 8000 and np.isfinite(wave).all()
    assert isinstance(model.generate(image, to="caption", max_new_tokens=4), str)
    for wrong in (
        lambda: model.generate("a red heart", max_length=2),
        lambda: model.generate("a", to="video"),
        lambda: model.generate("x" * 500),
        lambda: model.generate("a", n=2, do_sample=False),
        lambda: model.generate("a", top_p=0.0, do_sample=True),
        lambda: model.generate("a", guidance=2.0),
        lambda: model.generate((np.zeros(80_000, np.float32), 8000), to="image"),
    ):
        with pytest.raises(PlaitError):
            wrong()


def test_verbs(model, image, audio, tmp_path):
    file = tmp_path / "a.png"
    image.save(file)
    found = model.classify(file)
    assert found == model.classify(image) and {label for label, _ in found} == {"heart", "star"}
    assert sum(p for _, p in found) == pytest.approx(1) and found[0][1] >= found[1][1]
    long = np.tile(audio[0], 4), 8000
    assert len(model.classify(long, labels=["a", "b", "c"], column="caption", top=2)) == 2
    assert isinstance(model.describe(image, max_new_tokens=8), str)
    assert isinstance(model.transcribe(long, max_new_tokens=8), str)
    assert len(model.draw("star", n=2, best_of=4)) == 2 and len(model.speak("star")) == 1
    vectors = model.embed(["a red heart", image, file, long, "x" * 300, ("audio", audio)])
    assert vectors.shape == (6, 16) and vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5) and np.allclose(vectors[1], vectors[2])
    assert np.allclose(vectors[0], model.embed(["a red heart"])[0], atol=1e-5)
    with pytest.raises(PlaitError, match="empty"):
        model.embed([""])
    with pytest.raises(PlaitError, match="no image"):
        model.classify(b"nothing")


def test_bulk_writing_gives_each_context_its_own_draws(model):
    contexts = [model.context(["star"])] * 4
    samples = [row[0] for row in model.write(contexts, "image", seed=1)]
    assert samples[0].shape == (16, 16, 3) and samples[0].dtype == np.uint8
    assert len({sample.tobytes() for sample in samples}) == 4
    again = model.write(contexts[:1], "image", n=4, seed=1)[0]
    assert all((a == b).all() for a, b in zip(samples, again, strict=True))
    assert len(set(model.write(contexts, "caption", max_new_tokens=4)[0])) == 1  # greedy


def test_a_text_model_says_what_it_cannot(image):
    model = PlaitModel(make(story="text"), "cpu")
    assert model.generate("a", max_new_tokens=2).startswith("a")
    with pytest.raises(PlaitError, match="cannot draw"):
        model.draw("a star")
    with pytest.raises(PlaitError, match="no image"):
        model.embed([image])
    with pytest.raises(PlaitError, match="no known labels"):
        model.classify("a")


def test_load(tmp_path, model):
    run = tmp_path / "runs" / "one"
    (run / "checkpoints").mkdir(parents=True)
    with pytest.raises(PlaitError, match="no checkpoint yet"):
        load(run)
    checkpoints.save(model.checkpoint, run / "checkpoints" / "last")
    assert find_checkpoint(run) == run / "checkpoints" / "last"
    checkpoints.save(model.checkpoint, run / "checkpoints" / "best")
    assert find_checkpoint(run) == run / "checkpoints" / "best"
    for path in (run, run / "checkpoints" / "last"):
        again = load(path, "cpu")
        assert again.columns == model.columns and again.labels == model.labels
        assert again.generate("a red", max_new_tokens=9) == model.generate("a red", max_new_tokens=9)
    (tmp_path / "empty").mkdir()
    for wrong, message in ((tmp_path / "empty", "is empty"), (tmp_path / "none", "does not exist")):
        with pytest.raises(PlaitError, match=message):
            load(wrong)
    assert find_checkpoint("gpt2") is None and choose_device("cpu").name == "cpu"


@pytest.mark.parametrize("settings", [{}, {"position": "learned", "norm": "layer", "activation": "gelu", "bias": True}])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_of_the_decoder_is_a_pass_of_the_backbone(settings, precision):
    """Rows of unlike lengths, heads in groups; bf16 within its rounding."""
    torch.manual_seed(0)
    plain = {"qk_norm": False, "qkv_bias": True} if settings else {}
    config = TransformerConfig(
        width=32, layers=2, heads=4, kv_heads=2, head_width=8, hidden=64, max_length=32, **settings, **plain
    )
    backbone = Transformer(config).eval()
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, 0.0 if parameter.ndim > 1 else 1.0, 0.3)
    decoder = Decoder(backbone, choose_device("cpu", precision))
    x = torch.randn(3, 20, 32)
    start = torch.tensor([9, 1, 14])
    cache = decoder.cache(5, 32)
    with torch.inference_mode():
        wanted = backbone(x)
        decoder(x[:, :14], view=View(cache, torch.arange(3), start, 14, held=0))
        for step in range(5):
            at = start + step
            got = decoder.step(x[torch.arange(3), at], cache, at.numpy())
            error = (got.float() - wanted[torch.arange(3), at]).abs().max()
            assert error < (1e-5 if precision == "fp32" else 0.1) * wanted.abs().max()
    assert cache.lengths.tolist() == [14, 6, 19, 0, 0]


@pytest.mark.parametrize("extreme", [5e-324, 1e-45, 1e300])
def test_extreme_settings_draw_what_is_possible(extreme: float) -> None:
    logits = torch.tensor([[30.0, -30.0, 29.0, float("-inf")]])
    seen = torch.tensor([[True, True, False, False]])
    for one in (
        Sampling(temperature=extreme),
        Sampling(repetition_penalty=extreme),
        Sampling(temperature=2, top_p=1e-45),
    ):
        assert BatchSamplingParams([one], logits.device).choose(logits, torch.tensor([0.99]), seen).item() in (0, 1, 2)
