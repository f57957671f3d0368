"""Codecs, features, the vocabulary and the objectives, against independent oracles."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage

from plait.core.rng import uniform
from plait.modalities.audio import Audio, AudioSettings, mel_filters
from plait.modalities.base import Vocabulary
from plait.modalities.fsq import FSQ
from plait.modalities.image import Image, ImageSettings
from plait.modalities.text import Text
from plait.model.multimodal import IGNORE, ModelConfig, Multimodal, Sequence, collate
from plait.model.objectives import InfoNCE, SigmoidLoss
from plait.model.transformer import TransformerConfig
from plait.training.losses import token_losses


@given(st.lists(st.integers(2, 9), min_size=1, max_size=5))
@settings(max_examples=50, deadline=None)
def test_fsq_is_a_bijection(levels: list[int]) -> None:
    quantizer = FSQ(levels)
    codes = torch.arange(quantizer.size)
    vectors = quantizer.vectors(codes)
    assert torch.equal(quantizer.codes(vectors), codes)
    assert vectors.unique(dim=0).shape[0] == quantizer.size == math.prod(levels)
    noisy = quantizer.quantize(torch.randn(200, len(levels)) * 3)
    assert torch.allclose(quantizer.vectors(quantizer.codes(noisy)), noisy, atol=1e-5)


def test_mel_filters_equal_transformers() -> None:
    from transformers.audio_utils import mel_filter_bank

    theirs = mel_filter_bank(257, 64, 0.0, 4000.0, 8000, norm=None, mel_scale="htk")
    assert np.allclose(mel_filters(8000, 512, 64).numpy(), theirs, atol=1e-5)


def test_vocoder_keeps_the_pitch() -> None:
    audio = Audio(AudioSettings(rate=8000, seconds=1.0), 16)
    wave = np.sin(2 * np.pi * 700 * np.arange(6000) / 8000).astype(np.float32)
    rebuilt, rate = audio.to_object(audio.sample((wave, 8000)))
    peak = np.abs(np.fft.rfft(rebuilt * np.hanning(len(rebuilt)))).argmax() * rate / len(rebuilt)
    assert rate == 8000 and abs(peak - 700) < 40


@pytest.mark.parametrize("samples", [1, 10, 256, 257])
def test_a_click_is_a_audio(samples: int) -> None:
    """Shorter than the window's half, which the transform mirrors."""
    audio = Audio(AudioSettings(), width=32)
    sample = audio.sample((np.full(samples, 0.5, np.float32), 8000))
    assert len(sample) >= 1 and np.isfinite(sample).all()


def test_audio_is_blind_to_padding() -> None:
    """Alone or beside a longer one, an audio clip has the same embeddings and codes."""
    torch.manual_seed(0)
    audio = Audio(AudioSettings(), 32).eval()
    rng = np.random.default_rng(0)
    short, long = (rng.normal(size=(n, 64)).astype(np.float16) for n in (37, 90))
    alone, beside = audio.batch([short]), audio.batch([short, long])
    tokens, codes = audio.token_count(37), audio.code_count(37)
    with torch.no_grad():
        assert torch.allclose(audio.encoder(*alone)[0, :tokens], audio.encoder(*beside)[0, :tokens], atol=1e-5)
        assert torch.equal(audio.codec.encode(*alone)[0, :codes], audio.codec.encode(*beside)[0, :codes])


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "1"])
@pytest.mark.parametrize("shape", [(40, 20), (5, 9), (28, 28)])
def test_any_image_fits(mode: str, shape: tuple[int, int]) -> None:
    for channels in (1, 3):
        image = Image(ImageSettings(size=28, channels=channels), 16)
        sample = image.sample(PILImage.new("RGB", shape, "red").convert(mode))
        assert sample.shape == (28, 28, channels) and sample.dtype == np.uint8
        assert image.codec.encode(*image.batch([sample])).shape == (1, 49)


def test_image_codes_are_local() -> None:
    """What stands in one corner changes no code far from it; in runs made before, it did."""
    torch.manual_seed(0)
    values = torch.randint(0, 256, (1, 64, 64, 3), dtype=torch.uint8)
    other = values.clone()
    other[:, :4, :4] = 255 - other[:, :4, :4]
    for fitted, alike in ((ImageSettings.sized(64, {}), True), (ImageSettings(size=64, patch=8), False)):
        codec = Image(fitted, 16).codec
        with torch.no_grad():
            before, after = (codec.encoder(x.movedim(-1, 1).float() / 127.5 - 1) for x in (values, other))
        assert torch.equal(before[..., 5:, 5:], after[..., 5:, 5:]) == alike
        assert not torch.equal(before[..., 0, 0], after[..., 0, 0])


def test_augmentation_is_a_function_of_the_record() -> None:
    audio, image = Audio(AudioSettings(), 16), Image(ImageSettings(size=16, channels=1, flip=True, erase=0.5), 16)
    rng = np.random.default_rng(1)
    clips = [rng.normal(size=(n, 64)).astype(np.float16) for n in (40, 40)]
    images = [rng.integers(0, 255, (16, 16, 1), dtype=np.uint8) for _ in range(2)]
    draw = torch.from_numpy(uniform(0, 3, np.array([[5], [9]]), np.arange(8))).float()
    for modality, samples in ((audio, clips), (image, images)):
        values, lengths = modality.augment(*modality.batch(samples), draw)
        other, other_lengths = modality.augment(*modality.batch(samples[1:]), draw[1:])
        assert torch.equal(values[1], other[0]) and lengths[1] == other_lengths[0]


@given(st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_text_survives(text: str) -> None:
    import unicodedata

    assert TOKENIZER.decode(TOKENIZER.encode(text)) == unicodedata.normalize("NFC", text)


TOKENIZER = Text.train(["three blind mice", "三只瞎老鼠", "trois souris"], 300)


def small_model(tied: bool = False) -> Multimodal:
    torch.manual_seed(0)
    vocabulary = Vocabulary(
        text=TOKENIZER.size,
        columns={"image": "image", "audio": "audio", "en": "text"},
        levels={"image": [4, 3], "audio": [5, 3]},
        closers=["audio"],
    )
    backbone = TransformerConfig(
        width=32, layers=2, heads=4, kv_heads=2, head_width=8, hidden=48, max_length=128, dropout=0.0
    )
    images = {"size": 16, "channels": 1, "levels": [4, 3], "codec_width": 16, "stem": 8}
    clips = {"levels": [5, 3], "stem": 8, "codec_width": 16}
    modalities: dict[str, dict[str, object]] = {"image": images, "audio": clips}
    return Multimodal(ModelConfig(backbone=backbone, vocabulary=vocabulary, tied=tied, modalities=modalities)).eval()


def test_vocabulary_ranges_are_disjoint_and_whole() -> None:
    vocabulary = small_model().vocabulary
    covered = [i for start, stop in vocabulary.id_ranges.values() for i in range(start, stop)]
    assert covered == list(range(vocabulary.size))
    assert len(vocabulary.names()) == len(set(vocabulary.names())) == vocabulary.size - vocabulary.text


def test_likelihoods_equal_cross_entropy() -> None:
    """Restricted, over the rows of the target's space; unrestricted, over all of them."""
    model = small_model()
    vocabulary = model.vocabulary
    image, audio = vocabulary.id_ranges["image"], vocabulary.id_ranges["audio"]
    sequences = [
        Sequence().read_ids([1, 2, vocabulary.opener("image")]).write([image[0] + 3, image[0] + 7, vocabulary.end]),
        Sequence().read_ids([vocabulary.opener("audio")]).write([audio[0], vocabulary.closer("audio"), vocabulary.end]),
    ]
    batch = collate(sequences, model.media, vocabulary.pad)
    hidden = model(batch)
    for restricted in (True, False):
        found = token_losses(model, hidden, batch.targets, restricted)
        logits = model.logits(hidden)
        for token_type, (start, stop) in vocabulary.id_ranges.items():
            wanted = batch.targets.clone()
            wanted[(wanted < start) | (wanted >= stop)] = IGNORE
            view = logits[..., start:stop] if restricted else logits
            shifted = torch.where(wanted == IGNORE, IGNORE, wanted - (start if restricted else 0))
            total = F.cross_entropy(view.flatten(0, 1), shifted.flatten(), ignore_index=IGNORE, reduction="sum")
            assert (
                torch.allclose(found[token_type][0], total, atol=1e-4)
                and found[token_type][1] == (wanted != IGNORE).sum()
            )


def test_contrastive_without_ties_is_infonce() -> None:
    a, b = (F.normalize(torch.randn(6, 8), dim=-1) for _ in range(2))
    logit_scale = torch.tensor(2.0)
    logits = logit_scale.exp() * a @ b.t()
    wanted = (F.cross_entropy(logits, torch.arange(6)) + F.cross_entropy(logits.t(), torch.arange(6))) / 2
    found = InfoNCE()(a, b, torch.eye(6, dtype=torch.bool), {"logit_scale": logit_scale})
    assert torch.allclose(found, wanted, atol=1e-5)


def test_the_sigmoid_loss_judges_each_pair_by_itself() -> None:
    a, b = (F.normalize(torch.randn(6, 8), dim=-1) for _ in range(2))
    positives = torch.eye(6, dtype=torch.bool)
    positives[0, 3] = positives[3, 0] = True  # two records of one label
    scalars = {"logit_scale": torch.tensor(2.0), "logit_bias": torch.tensor(-3.0)}
    logits = torch.exp(scalars["logit_scale"]) * a @ b.t() - 3
    wanted = F.binary_cross_entropy_with_logits(logits, positives.float(), reduction="sum") / 6
    assert torch.allclose(SigmoidLoss()(a, b, positives, scalars), wanted, atol=1e-5)


def test_hidden_states_do_not_see_neighbours_or_padding() -> None:
    model = small_model()
    vocabulary = model.vocabulary
    rng = np.random.default_rng(0)

    def sequence(frames: int, words: int) -> Sequence:
        sample = rng.normal(size=(frames, 64)).astype(np.float16)
        made = Sequence().read_media(model.media["audio"], vocabulary.opener("audio"), sample, vocabulary.pad)
        return made.read_ids([vocabulary.opener("en")]).write(list(range(words)))

    short, long = sequence(23, 2), sequence(80, 9)
    with torch.no_grad():
        alone = model(collate([short], model.media, vocabulary.pad))[0]
        beside = model(collate([long, short], model.media, vocabulary.pad))[1]
    assert torch.allclose(alone, beside[: len(short)], atol=1e-5)
