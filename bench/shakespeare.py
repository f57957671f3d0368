"""Tiny Shakespeare on one core: nanoGPT's published setting for a processor, then the recipe `shakespeare`.

    python bench/shakespeare.py input.txt

The setting, written anew in plain PyTorch: 4 layers, 4 heads, width 128, context 64, batches of 12, 2,000 steps, no
dropout, AdamW from 1e-3 to 1e-4 with 100 steps of warm-up, in fp32, the loss of 20 batches of either split taken every
250 steps; it reaches 1.88 (https://github.com/karpathy/nanoGPT, README). Ours goes through `plait.training`, with
tokenizer, validation and checkpoints. Both are timed in process CPU seconds, and both are judged on all of the last
tenth in windows of their own context, in nats a character.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plait.core.config import load_recipe
from plait.data.dataset import Dataset
from plait.data.prepare import prepare
from plait.model import checkpoint as checkpoints
from plait.training.trainer import train

LAYERS, HEADS, WIDTH, CONTEXT, BATCH, STEPS = 4, 4, 128, 64, 12, 2000


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.LayerNorm(WIDTH, bias=False) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.first(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.second(x))))


class Peer(nn.Module):
    """A GPT with tied rows and learned positions."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.rows, self.places = nn.Embedding(characters, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.layers = nn.Sequential(*(Layer() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * LAYERS) if residual else 0.02)

    def loss(self, ids: Tensor) -> Tensor:
        """Mean -log P of ids[:, 1:] in nats."""
        x = self.rows(ids[:, :-1]) + self.places.weight[: ids.shape[1] - 1]
        logits = self.norm(self.layers(x)) @ self.rows.weight.t()
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def windows(ids: Tensor, context: int) -> Tensor:
    """(N, context + 1): each character but the first is predicted once; a remainder is left out."""
    return ids[: (len(ids) - 1) // context * context + 1].unfold(0, context + 1, context)


def run_peer(text: str, border: int) -> tuple[float, float]:
    """(CPU seconds, nats a character)."""
    names = sorted(set(text))
    ids = torch.tensor([names.index(c) for c in text])
    splits = ids[:border], ids[border:]
    torch.manual_seed(1337)
    model = Peer(len(names))
    matrices = [p for p in model.parameters() if p.ndim > 1]
    groups = [{"params": matrices, "weight_decay": 0.1},
              {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0}]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))

    def batch(split: Tensor) -> Tensor:
        starts = torch.randint(len(split) - CONTEXT, (BATCH, 1))
        return split[starts + torch.arange(CONTEXT + 1)]

    begun = time.process_time()
    for step in range(STEPS + 1):
        if step % 250 == 0:
            with torch.no_grad():
                for split in splits:
                    _ = [float(model.loss(batch(split))) for _ in range(20)]
        done = (step - 100) / (STEPS - 100)
        rate = 1e-3 * (step + 1) / 101 if step < 100 else 1e-4 + 0.5 * (1 + math.cos(math.pi * done)) * 9e-4
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = model.loss(batch(splits[0]))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    seconds = time.process_time() - begun
    with torch.no_grad():
        return seconds, float(model.loss(windows(splits[1], CONTEXT)))


def run_ours(path: Path, text: str, border: int, recipe: str, folder: Path) -> tuple[float, float]:
    """(CPU seconds, nats a character)."""
    prepare(path, folder / "data")
    begun = time.process_time()
    best = train(Dataset.open(folder / "data"), folder / "run", load_recipe(recipe), lambda progress: None, "cpu")
    seconds = time.process_time() - begun
    whole = checkpoints.load(best)
    model = whole.model.eval()
    ids = torch.tensor(whole.text.encode(text[border:]))
    assert len(ids) == len(text) - border  # characters
    with torch.no_grad():
        rows = windows(ids, model.config.backbone.max_length)
        hidden = model.backbone(F.embedding(rows[:, :-1], model.token_embedding.table()))
        loss = F.cross_entropy(model.logits(hidden, "text").flatten(0, 1), rows[:, 1:].flatten())
    return seconds, float(loss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="the text as one file")
    parser.add_argument("--recipe", default="shakespeare")
    parser.add_argument("--skip-peer", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    text = options.text.read_text(encoding="utf-8")
    border = int(0.9 * len(text))
    if not options.skip_peer:
        print("nanoGPT's setting: {:.1f} CPU seconds, {:.4f} nats".format(*run_peer(text, border)), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        seconds, loss = run_ours(options.text, text, border, options.recipe, Path(folder))
    print(f"{options.recipe}: {seconds:.1f} CPU seconds, {loss:.4f} nats")


if __name__ == "__main__":
    main()
