"""Other architectures through transformers: tiny models with random weights, made on the spot and run two ways."""

import itertools
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from plait.core.errors import PlaitError
from plait.hf.pretrained import TEMPLATE, load_pretrained
from plait.hf.speech import joined_words, tightened
from plait.inference.results import Segment
from plait.modalities.audio_files import resample

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
transformers = pytest.importorskip("transformers", reason="pip install plait-ml[huggingface]")

WORDS = ["the cat sat on the mat this is a photo of a dog user describe image . ? :"] * 3
WORDS += [f"word{i}" for i in range(120)]  # so that every id has one
SPECIALS = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
TEXT = {
    "vocab_size": 120, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 24, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.5,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8, "initializer_range": 0.5,
}  # fmt: skip


def write_tokenizer(folder: Path, length: int = 24, **more) -> None:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(WORDS, trainers.WordLevelTrainer(special_tokens=SPECIALS, vocab_size=120))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=length, **names, **more
    ).save_pretrained(folder)


def write_images(folder: Path, kind: str, size: dict) -> None:
    """As the hub's older folders have it: a processor without "Pil" in its name."""
    processor = getattr(transformers, f"{kind}ImageProcessorPil")(size=size, do_center_crop=False)
    values = {**json.loads(processor.to_json_string()), "image_processor_type": f"{kind}ImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))


def make(folder: Path, seed: int, kind: str, config) -> None:
    torch.manual_seed(seed)
    getattr(transformers, kind)(config).save_pretrained(folder)


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    t, root = transformers, tmp_path_factory.mktemp("pretrained")
    square = {"height": 32, "width": 32}

    make(root / "clip", 0, "CLIPModel", t.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16))
    write_images(root / "clip", "CLIP", square)
    write_tokenizer(root / "clip")

    make(root / "siglip", 1, "SiglipModel", t.SiglipConfig(text_config=TEXT, vision_config=VISION))
    write_images(root / "siglip", "Siglip", square)
    write_tokenizer(root / "siglip")

    make(root / "bert", 2, "BertForMaskedLM", t.BertConfig(**TEXT))
    write_tokenizer(root / "bert")

    whisper = t.WhisperConfig(
        vocab_size=120, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=20, max_target_positions=32,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, decoder_start_token_id=1, suppress_tokens=None,
        begin_suppress_tokens=None, init_std=0.5,
    )  # fmt: skip
    make(root / "whisper", 3, "WhisperForConditionalGeneration", whisper)
    t.WhisperFeatureExtractor(feature_size=20).save_pretrained(root / "whisper")
    write_tokenizer(root / "whisper")

    blip = t.BlipConfig(
        text_config={**TEXT, "encoder_hidden_size": 32, "sep_token_id": 2, "is_decoder": True}, vision_config=VISION
    )
    make(root / "blip", 4, "BlipForConditionalGeneration", blip)
    write_images(root / "blip", "Blip", square)
    write_tokenizer(root / "blip")

    llava = t.LlavaConfig(
        text_config=t.LlamaConfig(**{**TEXT, "max_position_embeddings": 128}),
        vision_config=t.CLIPVisionConfig(**VISION),
        image_token_id=4,
        vision_feature_layer=-1,
    )
    make(root / "llava", 5, "LlavaForConditionalGeneration", llava)
    write_tokenizer(root / "llava", 128, extra_special_tokens={"image_token": "<image>"})
    processor = t.LlavaProcessor(
        image_processor=t.CLIPImageProcessorPil(size=square, crop_size=square),
        tokenizer=t.AutoTokenizer.from_pretrained(root / "llava"),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template="{% for m in messages %}{{ m['role'] }} : {% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}",
    )
    processor.save_pretrained(root / "llava")

    pair = t.VisionEncoderDecoderConfig.from_encoder_decoder_configs(t.ViTConfig(**VISION), t.GPT2Config(
        vocab_size=120, n_embd=32, n_layer=1, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2,
        initializer_range=0.5,
    ))  # fmt: skip
    pair.decoder_start_token_id, pair.pad_token_id, pair.eos_token_id = 1, 0, 2
    make(root / "pair", 6, "VisionEncoderDecoderModel", pair)
    write_images(root / "pair", "ViT", square)
    write_tokenizer(root / "pair")

    mistral = t.MistralConfig(**{**TEXT, "max_position_embeddings": 128, "num_key_value_heads": 2, "sliding_window": 8})
    make(root / "mistral", 7, "MistralForCausalLM", mistral)
    write_tokenizer(root / "mistral", 128)
    return {folder.name: folder for folder in root.iterdir()}


@pytest.fixture(scope="session")
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8))


def pixels(image: Image.Image, folder: Path) -> torch.Tensor:
    """Resized and normalised by hand, as the folder's preprocessor says."""
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    small = image.convert("RGB").resize((32, 32), settings.get("resample", 3))
    values = np.asarray(small, np.float32) / 255
    values = (values - np.array(settings["image_mean"])) / np.array(settings["image_std"])
    return torch.tensor(values, dtype=torch.float32).permute(2, 0, 1)[None]


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_images_and_texts_are_classified_and_embedded(name, folders, image, tmp_path):
    start = time.monotonic()
    model = load_pretrained(folders[name], device="cpu")
    assert time.monotonic() - start < 5
    assert model.verbs == ["classify", "embed"]
    reference = transformers.AutoModel.from_pretrained(folders[name]).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders[name])
    labels = ["cat", "dog", "mat"]
    padding = {"padding": "max_length", "max_length": 24} if name == "siglip" else {"padding": True}
    texts = tokenizer([TEMPLATE.format(label) for label in labels], return_tensors="pt", **padding)
    with torch.no_grad():
        out = reference(**texts, pixel_values=pixels(image, folders[name]))
    logits = out.logits_per_image[0]
    wanted = logits.sigmoid() if name == "siglip" else logits.softmax(-1)
    got = model.classify(image, labels)
    assert [chance for _, chance in got] == sorted((chance for _, chance in got), reverse=True)
    for label, chance in got:
        assert chance == pytest.approx(float(wanted[labels.index(label)]), abs=1e-4)
    assert model.classify(image, labels, top=1) == got[:1]

    image.save(tmp_path / "image.png")
    vectors = model.embed([image, tmp_path / "image.png", *(TEMPLATE.format(label) for label in labels)])
    assert vectors.dtype == np.float32 and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert np.allclose(vectors[0], out.image_embeds[0], atol=1e-4) and np.array_equal(vectors[0], vectors[1])
    assert np.allclose(vectors[2:], out.text_embeds, atol=1e-4)
    with pytest.raises(PlaitError, match=r"\w+lip\) cannot transcribe; it can classify and embed"):
        model.transcribe((np.zeros(100), 8000))
    with pytest.raises(PlaitError, match="Name them"):
        model.classify(image)
    with pytest.raises(PlaitError, match=r"nothing\.png: cannot be read"):
        model.classify(tmp_path / "nothing.png", labels)


def test_sentences_are_embedded(folders, tmp_path):
    folder = shutil.copytree(folders["bert"], tmp_path / "bert")
    model = load_pretrained(folder, device="cpu")
    texts = ["the cat sat", "this is a photo of a dog", "the mat"]
    vectors = model.embed(texts)
    reference = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for text, vector in zip(texts, vectors, strict=True):
        with torch.no_grad():
            hidden = reference(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        wanted = hidden.mean(0) / hidden.mean(0).norm()
        assert np.allclose(vector, wanted, atol=1e-5)
    # Of a text longer than the model reads the beginning counts, as in sentence-transformers.
    assert np.allclose(*model.embed(["the cat " * 20 + "dog", "the cat " * 20 + "mat"]), atol=1e-6)
    many = model.embed([" ".join(["the", "cat", "mat"] * n) for n in range(1, 8)] * 20)  # in batches of like lengths
    assert np.allclose(many[:7], many[7:14], atol=1e-6)
    assert np.allclose(many[1], model.embed(["the cat mat the cat mat"])[0], atol=1e-5)

    # What the folder of sentence-transformers says: pooling, a dense layer, a prompt, how much is read.
    (folder / "1_Pooling").mkdir()
    (folder / "2_Dense").mkdir()
    modules = [{"path": "", "type": "sentence_transformers.models.Transformer"}]
    modules += [{"path": f"{k}_{kind}", "type": f"sentence_transformers.models.{kind}"}
                for k, kind in enumerate(["Pooling", "Dense"], 1)]  # fmt: skip
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 4}')
    (folder / "config_sentence_transformers.json").write_text('{"prompts": {"query": "dog "}}')
    weight = torch.randn(5, 32)
    save_file({"linear.weight": weight}, folder / "2_Dense" / "model.safetensors")
    dense = {"in_features": 32, "out_features": 5, "bias": False, "activation_function": "torch.nn.Tanh"}
    (folder / "2_Dense" / "config.json").write_text(json.dumps(dense))
    model = load_pretrained(folder)
    for prompt, text in ((None, "the cat sat"), ("query", "dog the cat sat")):
        with torch.no_grad():
            ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=4)
            wanted = (weight @ reference(**ids).last_hidden_state[0, 0]).tanh()
        assert np.allclose(model.embed(["the cat sat"], prompt)[0], wanted / wanted.norm(), atol=1e-5)
    with pytest.raises(PlaitError, match="no prompt 'passage'"):
        model.embed(["the cat"], "passage")

    # Zero-shot: how near the texts of the labels are.
    answers = model.classify("the cat", labels=["the_cat", "dog", "a mat"])
    assert answers[0][0] == "the_cat" and abs(sum(chance for _, chance in answers) - 1) < 1e-6
    nearness = np.exp(20 * (model.embed(["the cat", "dog", "a mat"]) @ model.embed(["the cat"])[0]))
    assert np.allclose(sorted(nearness / nearness.sum(), reverse=True), [chance for _, chance in answers], atol=1e-6)
    with pytest.raises(PlaitError, match="embeds texts, not Image"):
        model.embed([Image.new("L", (4, 4))])
    assert model.embed([]).shape[0] == 0


def test_audio_is_transcribed(folders, tmp_path):
    model = load_pretrained(folders["whisper"], device="cpu")
    wave = np.sin(np.arange(16_000) * 0.3).astype(np.float32) * np.linspace(0, 0.5, 16_000, dtype=np.float32)
    reference = transformers.WhisperForConditionalGeneration.from_pretrained(folders["whisper"]).eval()
    features = transformers.WhisperFeatureExtractor(feature_size=20)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["whisper"])

    def expected(wave: np.ndarray) -> str:
        inputs = features(wave, sampling_rate=16_000, return_tensors="pt")
        return tokenizer.decode(reference.generate(**inputs)[0], skip_special_tokens=True).strip()

    assert expected(wave) and model.transcribe((wave, 16_000)) == expected(wave)
    soundfile.write(tmp_path / "a.flac", wave[::2], 8000, subtype="PCM_24")
    slow, rate = soundfile.read(tmp_path / "a.flac", dtype="float32")
    assert model.transcribe(tmp_path / "a.flac") == expected(resample(slow, rate, 16_000))
    long = np.concatenate([wave] * 31)
    assert model.transcribe((long, 16_000)) == f"{expected(long[: 30 * 16_000])} {expected(wave)}"
    with pytest.raises(PlaitError, match="one language only"):
        model.transcribe((wave, 16_000), language="en")
    assert model.transcribe((np.zeros(16_000, np.float32), 16_000)) == ""
    with pytest.raises(PlaitError, match="does not tell times"):
        model.segments((wave, 16_000))
    with pytest.raises(PlaitError, match="no task 'sing'"):
        model.transcribe((wave, 16_000), task="sing")
    (tmp_path / "b.wav").write_bytes(b"RIFF")
    with pytest.raises(PlaitError, match=r"b\.wav: "):
        model.transcribe(tmp_path / "b.wav")


def test_words_have_times(tmp_path):
    """On a tiny Whisper that knows times: each token's end is what transformers says."""
    config = transformers.WhisperConfig(
        vocab_size=1700, d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2, num_mel_bins=20,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1, max_target_positions=32, init_std=0.5, median_filter_width=3,
    )  # fmt: skip
    torch.manual_seed(5)
    reference = transformers.WhisperForConditionalGeneration(config).eval()
    settings = transformers.GenerationConfig(
        no_timestamps_token_id=198, alignment_heads=[[1, 0], [1, 1]], is_multilingual=False, max_length=24,
        max_initial_timestamp_index=50, begin_suppress_tokens=[2], suppress_tokens=[0, 1, 3], return_timestamps=False,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    reference.generation_config = settings
    reference.save_pretrained(tmp_path)
    transformers.WhisperFeatureExtractor(feature_size=20).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    model = load_pretrained(tmp_path, device="cpu")
    wave = np.random.default_rng(0).normal(0, 0.1, 6 * 16_000).astype(np.float32)
    before = model.model.model.config._attn_implementation
    segments = model.segments((wave, 16_000), words=True)
    assert model.model.model.config._attn_implementation == before
    assert segments and [one.text for one in segments] == [one.text for one in model.segments((wave, 16_000))]
    for segment in segments:
        assert " ".join(word.text for word in segment.words).replace(" ", "") == segment.text.replace(" ", "")
        assert all(a.end <= b.start + 0.021 for a, b in itertools.pairwise(segment.words))
        assert all(0 <= word.start <= word.end <= 30 for word in segment.words)
    del settings.alignment_heads
    reference.save_pretrained(tmp_path)
    with pytest.raises(PlaitError, match="no alignment_heads"):
        load_pretrained(tmp_path).segments((wave, 16_000), words=True)


def test_pieces_become_words_without_the_silence_around_them():
    pieces = [(" It", 1.0), ("'s", 1.2), (" 5", 2.0), (".", 2.2), ("你", 3.0), ("好", 3.5), ("！", 4.0)]
    starts = [0.0, *(end for _, end in pieces)]
    words = joined_words(Segment(start, end, text) for start, (text, end) in zip(starts, pieces, strict=False))
    assert words == [
        Segment(0, 1.2, "It's"),
        Segment(1.2, 2.2, "5."),
        Segment(2.2, 3.0, "你"),
        Segment(3.0, 4.0, "好！"),
    ]
    wave = np.zeros(16_000, np.float32)
    wave[4000:8000] = np.sin(np.arange(4000))  # from .25 s to .5 s, and the next word's beginning at .94
    wave[15_040:] = np.sin(np.arange(960))
    assert tightened(Segment(0.1, 0.99, "x"), wave, 16_000) == Segment(0.24, 0.5, "x")
    assert tightened(Segment(0.0, 0.2, "x"), wave, 16_000) == Segment(0.0, 0.2, "x")


def test_images_are_described(folders, image):
    t = transformers
    # A captioner.
    model = load_pretrained(folders["pair"], device="cpu")
    tokenizer = t.AutoTokenizer.from_pretrained(folders["pair"])
    reference = t.VisionEncoderDecoderModel.from_pretrained(folders["pair"]).eval()
    ids = reference.generate(pixel_values=pixels(image, folders["pair"]), max_new_tokens=10, do_sample=False)[0]
    assert model.describe(image, max_new_tokens=10) == tokenizer.decode(ids, skip_special_tokens=True).strip()
    with pytest.raises(PlaitError, match="takes no prompt"):
        model.describe(image, prompt="what is this ?")

    # A captioner that a prompt may begin.
    model = load_pretrained(folders["blip"], device="cpu")
    tokenizer = t.AutoTokenizer.from_pretrained(folders["blip"])
    reference = t.BlipForConditionalGeneration.from_pretrained(folders["blip"]).eval()
    ids = reference.generate(pixel_values=pixels(image, folders["blip"]), max_new_tokens=10, do_sample=False)[0]
    assert model.describe(image, max_new_tokens=10) == tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert isinstance(model.describe(image, prompt="a photo of", max_new_tokens=5), str)

    # A chat model: the prompt is its template's, and is not part of the answer.
    model = load_pretrained(folders["llava"], device="cpu")
    tokenizer = t.AutoTokenizer.from_pretrained(folders["llava"])
    reference = t.LlavaForConditionalGeneration.from_pretrained(folders["llava"]).eval()
    text = "user : " + "<image> " * 16 + "this is a cat ?"
    inputs = tokenizer(text, return_tensors="pt")
    ids = reference.generate(
        input_ids=inputs.input_ids,
        attention_mask=inputs.attention_mask,
        pixel_values=model.processor.image_processor(image, return_tensors="pt").pixel_values,
        max_new_tokens=10,
        do_sample=False,
    )[0, inputs.input_ids.shape[1] :]
    wanted = tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert wanted and model.describe(image, prompt="this is a cat ?", max_new_tokens=10) == wanted


def test_other_language_models_generate(folders):
    model = load_pretrained(folders["mistral"], device="cpu")
    assert model.verbs == ["generate"]
    reference = transformers.MistralForCausalLM.from_pretrained(folders["mistral"]).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["mistral"])
    ids = tokenizer("the cat", return_tensors="pt").input_ids
    wanted = reference.generate(ids, max_length=30, do_sample=False)[0, ids.shape[1] :]
    found = model.generate("the cat", max_length=30)
    assert found == "the cat" + tokenizer.decode(wanted, skip_special_tokens=True)
    several = model.generate("the cat", max_new_tokens=20, num_return_sequences=3, seed=4)
    assert len(set(several)) == 3 and several == model.generate("the cat", max_new_tokens=20, n=3, seed=4)
    assert several != model.generate("the cat", max_new_tokens=20, n=3, seed=5)
    with pytest.raises(PlaitError, match="the prompt alone takes 4 tokens"):
        model.generate("the cat", max_length=4)
    with pytest.raises(PlaitError, match="cannot embed; it can generate"):
        model.embed(["the cat"])


def change(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def shorten(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


BAD = {
    "pickle": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "a format that can run code"),
    "cut": (shorten, "cannot be loaded"),
    "own code": (lambda f: change(f, model_type="mine", auto_map={"AutoModel": "mine.Mine"}), "Plait never runs"),
    "no type": (lambda f: change(f, model_type=None), "has no model_type"),
    "of no use": (lambda f: change(f, model_type="detr"), "no use is made here of a model of type 'detr'"),
    "lost layers": (lambda f: change(f, num_hidden_layers=3), "lacks weights of its model: encoder.layer.2"),
    "another width": (lambda f: change(f, intermediate_size=50), "cannot be loaded|lacks weights"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "cannot be loaded"),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_folders_are_refused(fault, folders, tmp_path):
    spoil, message = BAD[fault]
    folder = shutil.copytree(folders["bert"], tmp_path / "spoilt")
    spoil(folder)
    start = time.monotonic()
    with pytest.raises(PlaitError, match=message) as error:
        load_pretrained(folder)
    assert str(folder) in str(error.value) and time.monotonic() - start < 5
