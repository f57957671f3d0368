"""Pretrained encoders against transformers itself, on tiny encoders with random weights made on the spot."""

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from safetensors.torch import load_file

import plait as library
from conftest import make_image, write_world
from plait.core.config import SIZES
from plait.core.errors import PlaitError
from plait.hf import encoders as hf_encoders
from plait.modalities.audio import Audio, AudioSettings
from plait.modalities.audio_files import encode_wav, resample
from plait.modalities.image import Image, ImageSettings

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
transformers = pytest.importorskip("transformers", reason="pip install plait-ml[huggingface]")

VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
          "image_size": 32, "patch_size": 8, "initializer_range": 0.3}  # fmt: skip
TEXT = {"vocab_size": 120, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 4, "max_position_embeddings": 24}  # fmt: skip
WAVE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
        "conv_dim": (16, 16, 16), "conv_stride": (5, 8, 8), "conv_kernel": (10, 8, 8),
        "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "initializer_range": 0.3,
        "mask_time_prob": 0.5, "layerdrop": 0.5}  # fmt: skip
SQUARE = {"height": 32, "width": 32}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    t, root = transformers, tmp_path_factory.mktemp("encoders")
    whisper = t.WhisperConfig(
        vocab_size=120, d_model=32, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=20, max_target_positions=32,
        max_source_positions=100, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        init_std=0.3,
    )  # fmt: skip
    square = {"do_resize": True, "size": SQUARE}
    clip = t.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=SQUARE)
    wave = {"feature_size": 1, "sampling_rate": 16_000, "padding_value": 0.0}
    made = {
        "clip": (t.CLIPModel(t.CLIPConfig(text_config=TEXT, vision_config=VISION)), clip),
        "siglip": (t.SiglipModel(t.SiglipConfig(text_config=TEXT, vision_config=VISION)),
                   t.SiglipImageProcessorPil(size=SQUARE)),
        "vit": (t.ViTForImageClassification(t.ViTConfig(**VISION)), t.ViTImageProcessorPil(**square)),
        "registers": (t.Dinov2WithRegistersModel(t.Dinov2WithRegistersConfig(**{**VISION, "image_size": 64})),
                      t.BitImageProcessorPil(size={"shortest_edge": 40}, crop_size=SQUARE)),
        "convnext": (t.ConvNextModel(t.ConvNextConfig(hidden_sizes=[8, 8, 16, 32], depths=[1, 1, 1, 1], image_size=64)),
                     t.ViTImageProcessorPil(do_resize=True, size={"height": 64, "width": 64})),
        "efficientnet": (  # whose configuration names no width of its last states
            t.EfficientNetModel(t.EfficientNetConfig(
                image_size=32, hidden_dim=320, width_coefficient=0.25, depth_coefficient=0.1)),
            t.ViTImageProcessorPil(**square)),
        "whisper": (t.WhisperForConditionalGeneration(whisper), t.WhisperFeatureExtractor(feature_size=20)),
        "wav2vec2": (t.Wav2Vec2Model(t.Wav2Vec2Config(**WAVE)),
                     t.Wav2Vec2FeatureExtractor(**wave, do_normalize=True, return_attention_mask=False)),
        "hubert": (t.HubertModel(t.HubertConfig(**WAVE, feat_extract_norm="layer", do_stable_layer_norm=True)),
                   t.Wav2Vec2FeatureExtractor(**wave, do_normalize=True, return_attention_mask=True)),
        "bert": (t.BertModel(t.BertConfig(**TEXT)), None),
    }  # fmt: skip
    for name, (model, processor) in made.items():
        torch.manual_seed(0)
        model.save_pretrained(root / name)
        if processor is not None:
            processor.save_pretrained(root / name)
    return {name: root / name for name in made}


def modality(kind: str, folder: Path, **settings):
    """As training makes it, and its settings as a checkpoint keeps them."""
    overrides = {**settings, "encoder": f"hf:{folder}"}
    overrides["hf_encoder"] = hf_encoders.describe(overrides["encoder"], kind).model_dump()
    if kind == "image":
        made = Image(ImageSettings.sized(32, overrides), 24)
    else:
        made = Audio(AudioSettings.sized(8000, {"seconds": 1.0, **overrides}), 24)
    assert type(made.settings).model_validate(json.loads(made.settings.model_dump_json())) == made.settings
    hf_encoders._fill(made, folder)
    return made.eval()


def test_what_a_frozen_tower_has_seen_is_kept(folders):
    """The same numbers for the same image, whatever stands beside it, and no more bytes than allowed."""
    encoder = modality("image", folders["vit"]).encoder.hf_encoder
    images = torch.from_numpy(np.random.default_rng(0).random((4, 3, 224, 224), np.float32))
    images = images[..., : encoder.network.config.image_size, : encoder.network.config.image_size].contiguous()
    plain = encoder(pixel_values=images)
    encoder.keep_states(2 * plain[0].nbytes)
    first = encoder(pixel_values=images[:3])
    assert torch.allclose(first, plain[:3], atol=1e-5) and len(encoder.kept.known) == 2
    calls = []
    encoder.network.register_forward_hook(lambda *given: calls.append(1))
    again = encoder(pixel_values=images[[2, 1, 0, 3]])
    assert torch.equal(again[:3], first[[2, 1, 0]]) and len(calls) == 2  # of the third and the fourth
    assert encoder.kept.held <= encoder.kept.limit


@pytest.mark.parametrize("name", ["clip", "siglip", "vit", "registers", "convnext", "efficientnet"])
def test_a_vision_tower_sees_what_it_does_in_transformers(name, folders):
    known = {"size": 64} if name == "convnext" else {}
    mine = modality("image", folders[name], **known)
    rng = np.random.default_rng(0)
    images = [PILImage.fromarray(rng.integers(0, 256, (mine.settings.size,) * 2 + (3,), np.uint8)) for _ in range(3)]
    theirs = transformers.AutoImageProcessor.from_pretrained(folders[name], backend="pil")
    resized = {"do_resize": False} if name == "registers" else {}
    wanted = theirs(images, return_tensors="pt", **resized).pixel_values
    values, lengths = mine.batch([mine.sample(p) for p in images])
    got = mine.encoder.pixels(values)
    assert torch.allclose(got, wanted, atol=1e-5)
    whole = transformers.AutoModel.from_pretrained(folders[name]).eval()
    whole = getattr(whole, "vision_model", whole)
    with torch.no_grad():
        states = whole(pixel_values=wanted).last_hidden_state
        assert torch.allclose(mine.encoder.hf_encoder(pixel_values=got), states, atol=1e-5)
        tokens = mine.encoder(values, lengths)
        assert tokens.shape == (3, mine.token_count(1), 24)
        # A place of the grid sees its own patches, and the summary.
        if name == "registers":
            patches = states[:, 5:].view(3, 4, 4, 32).flatten(1, 2)
            both = torch.cat((patches, states[:, :1].expand_as(patches)), -1)
            use_manual_backward = mine.encoder.out(mine.encoder.norm(both)) + mine.encoder.places
            assert torch.allclose(tokens, use_manual_backward, atol=1e-5)


@pytest.mark.parametrize("name", ["whisper", "wav2vec2", "hubert"])
def test_an_audio_tower_hears_what_it_does_in_transformers(name, folders):
    seconds = 2.0 if name == "whisper" else 1.0  # Whisper's own window
    mine = modality("audio", folders[name], seconds=seconds)
    rng = np.random.default_rng(0)
    waves = [(np.sin(np.arange(n) * 0.2) * 0.4 + rng.normal(0, 0.02, n)).astype(np.float32) for n in (7040, 3500)]
    samples = [mine.sample((wave, 8000)) for wave in waves]
    values, lengths = mine.batch(samples)
    assert lengths.tolist() == [89, 44] and mine.code_count(89) == 46
    theirs = transformers.AutoFeatureExtractor.from_pretrained(folders[name])
    if name == "whisper":
        theirs = transformers.WhisperFeatureExtractor(feature_size=20, chunk_length=2)
    raw = [resample(wave, 8000, 16_000) for wave in waves]
    # One at a time: in a batch wav2vec2's takes the mean over the padding too.
    each = [theirs(wave, sampling_rate=16_000, return_tensors="pt") for wave in raw]
    got = mine.encoder.heard(values, lengths)
    assert set(got) == set(each[0])
    for key in got:
        longest = got[key].shape[-1]
        wanted = torch.cat([torch.nn.functional.pad(one[key], (0, longest - one[key].shape[-1])) for one in each])
        wrong = (wanted - got[key]).abs().float()
        if key == "input_features":  # Whisper's window reaches over the end of a clip
            for row, length in zip(wrong, lengths, strict=True):
                row[:, length : length + 2] = 0
        if key == "attention_mask":  # a clip ends at a whole frame of 10 ms
            assert wrong.sum(1).max() <= 2 * 160
        else:  # samples are float16
            assert wrong.max() < 4e-3, key
    whole = transformers.AutoModel.from_pretrained(folders[name]).eval()
    with torch.no_grad():
        states = getattr(whole, "encoder" if name == "whisper" else "forward")(**got).last_hidden_state
        assert torch.allclose(mine.encoder.hf_encoder(**got), states, atol=1e-5)
        tokens = mine.encoder(values, lengths)
        assert tokens.shape == (2, mine.token_count(values.shape[1]), 24)
        alone = mine.encoder(*mine.batch(samples[1:]))
        assert torch.allclose(alone[0], tokens[1, : alone.shape[1]], atol=1e-4)
        # What was decoded from codes is heard too, and what is changed for training keeps its shape.
        codes = mine.codec.encode(values, lengths)[:1, : mine.code_count(89)]
        made = mine.codec.decode(codes)[0].numpy()
        assert made.shape[1] == mine.settings.bands and mine.encoder(*mine.batch([made])).isfinite().all()
        changed, longer = mine.augment(values, lengths, torch.rand(2, 8))
        assert changed.shape[2] == values.shape[2] and mine.encoder(changed, longer).isfinite().all()
        still, same = mine.augment(values, lengths, torch.full((2, 8), 0.5), mask_parts=False)
        assert same.equal(lengths) and torch.allclose(still[:, :44], values[:, :44].float(), atol=1e-2)
    wave, rate = mine.to_object(samples[0])
    assert rate == 8000 and len(wave) == 89 * 80


RECIPE = """
model:
  backbone: {{width: 32, layers: 1, heads: 2, context: 128}}
  text: {{vocabulary: 270}}
  image: {{encoder: "hf:{image}", codec_width: 32}}
  audio: {{encoder: "hf:{audio}", freeze: false, codec_width: 32}}
training: {{steps: 4, codec_steps: 3, batch_size: 8, validations: 2, ema: {ema}}}
"""


@pytest.mark.parametrize(("image", "audio", "ema"), [("clip", "whisper", 0.9), ("vit", "hubert", "null")])
def test_towers_are_trained_or_not_and_travel_with_the_checkpoint(image, audio, ema, folders, tmp_path, plait):
    sources = shutil.copytree(folders["clip"].parent, tmp_path / "sources")
    write_world(tmp_path / "files", 32)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(image=sources / image, audio=sources / audio, ema=ema))
    run = tmp_path / "run"
    assert plait("prepare", tmp_path / "files", "-o", tmp_path / "data") == 0
    assert plait("plan", recipe) == 0
    assert plait("train", tmp_path / "data", "-o", run, "--recipe", recipe) == 0
    shutil.rmtree(sources)
    mine = load_file(run / "checkpoints" / "last" / "model.safetensors")
    seen, heard = (transformers.AutoModel.from_pretrained(folders[name]) for name in (image, audio))
    seen = getattr(seen, "vision_model", seen).state_dict()
    heard = (heard.encoder if audio == "whisper" else heard).state_dict()
    frozen, moved = 0, set()
    for name, value in mine.items():
        part, _, inner = name.partition(".encoder.hf_encoder.network.")
        if part == "modalities.image" and inner and "pooler" not in inner:
            assert torch.equal(seen[inner], value), name
            frozen += 1
        elif part == "modalities.audio" and inner and not torch.equal(heard[inner][: len(value)], value):
            moved.add(inner)
    assert frozen > 20 and len(moved) > 20

    # From the run alone.
    model = library.load(run, device="cpu")
    red = make_image(0, np.random.default_rng(1))
    audio = (np.sin(np.arange(1600) * 0.3).astype(np.float32), 8000)
    assert len(model.classify(red, column="en", top=4)) == 4
    assert len(model.classify(audio, labels=["one", "two"])) == 2
    assert isinstance(model.transcribe(audio), str)
    assert np.allclose(np.linalg.norm(model.embed([red, audio, "red disc"]), axis=1), 1, atol=1e-4)
    assert len(model.speak("red disc", n=1, best_of=2)) == 1 and len(model.draw("red disc", n=1, best_of=2)) == 1
    card = (run / "checkpoints" / "best" / "README.md").read_text()
    assert f"hf:{sources / image}" in card and "frozen" in card
    (tmp_path / "a.wav").write_bytes(encode_wav(*audio))
    assert plait("classify", run, tmp_path / "a.wav", "--labels", "one,two", "--column", "en") == 0
    if audio == "whisper":
        assert plait("evaluate", run, "--reference-seconds", 0.5, "--limit", 8) == 0


def test_settings_follow_the_tower_and_the_data():
    rng = np.random.default_rng(0)
    small = PILImage.fromarray(rng.integers(0, 256, (28, 28, 3), np.uint8))
    large = small.resize((500, 400))
    hf_encoder = {"config": {"model_type": "vit"}, "reads": "pixels", "size": 224}

    def size(image: PILImage.Image, **more: object) -> int:
        import io

        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return ImageSettings.fitted(SIZES["tiny"], [buffer.getvalue()], more).size

    assert (size(small), size(large)) == (28, 32)
    assert (
        size(small, hf_encoder=hf_encoder),
        size(large, hf_encoder=hf_encoder),
        size(large, hf_encoder=hf_encoder, size=64),
    ) == (28, 224, 64)


def test_what_is_no_encoder_is_refused_by_name(folders, tmp_path, plait, capsys):
    write_world(tmp_path / "files", 8)
    assert plait("prepare", tmp_path / "files", "-o", tmp_path / "data") == 0
    pickled = shutil.copytree(folders["vit"], tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    cut = shutil.copytree(folders["vit"], tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-50])
    lost = shutil.copytree(folders["vit"], tmp_path / "lost")
    config = json.loads((lost / "config.json").read_text())
    (lost / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    for kind, encoder, message in [
        ("image", "hf:nobody/nothing", "'nobody/nothing' is not a local folder"),
        ("image", f"hf:{tmp_path}/nothing", "There is no folder"),
        ("image", "openai/clip", "Write hf: and a name"),
        ("image", f"hf:{pickled}", "a format that can run code"),
        ("image", f"hf:{cut}", "cut cannot be loaded"),
        ("image", f"hf:{lost}", "lacks weights of its encoder"),
        ("image", f"hf:{folders['whisper']}", "cannot"),
        ("audio", f"hf:{folders['bert']}", "cannot"),
        ("audio", f"hf:{folders['clip']}", "cannot"),
    ]:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(json.dumps({"model": {kind: {"encoder": encoder}}, "training": {"steps": 2}}))
        start = time.monotonic()
        assert plait("train", tmp_path / "data", "-o", tmp_path / "run", "--recipe", recipe) != 0
        assert time.monotonic() - start < 5
        assert message in " ".join(capsys.readouterr().err.split()), encoder
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
    with pytest.raises(PlaitError, match=r"model\.audio\.seconds is 40"):
        hf_encoder = hf_encoders.describe(f"hf:{folders['whisper']}", "audio").model_dump()
        wave = encode_wav(np.zeros(800, np.float32), 8000)
        AudioSettings.fitted(SIZES["tiny"], [wave], {"encoder": "hf:x", "hf_encoder": hf_encoder, "seconds": 40})
