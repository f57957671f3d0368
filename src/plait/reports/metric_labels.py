"""What the figures of a report are called, and what they say: metric -> (name, kind, meaning)."""

from __future__ import annotations

TASKS = {
    "recognition": "Recognition: which of the known labels",
    "transcription": "Transcription and captions: free text",
    "language": "Language: how well it predicts text",
    "retrieval": "Retrieval: one kind finds another",
    "recommendation": "Recommendation: the next item, ranked among all",
    "drawing": "Drawing: images from labels",
    "speaking": "Speaking: audio from labels",
    "memorising": "Memorising: what was learnt by heart",
    "codec": "Codecs: what is lost on the way to codes and back",
    "timing": "Time",
}
# Metric -> (name, "share" of 1, "ratio" or plain "number", what it says).
MEANING = {
    "accuracy": ("accuracy", "share", "most likely label is the right one"),
    "train_accuracy": ("accuracy on training records", "share", "as many records as in the test"),
    "zero_shot_accuracy": ("zero-shot accuracy", "share", "nearest label in the embedding space"),
    "ece": ("expected calibration error", "share", "of the answer's probability; lower is better"),
    "precision": ("precision, macro", "share", ""),
    "recall": ("recall, macro", "share", ""),
    "f1": ("F1, macro", "share", ""),
    "exact": ("exact match", "share", "whole text right"),
    "wer": ("word error rate", "share", "lower is better"),
    "cer": ("character error rate", "share", "lower is better"),
    "nats_per_token": ("nats per token", "number", "lower is better"),
    "nats_per_character": ("nats per character", "number", "lower is better"),
    "bits_per_byte_ngrams": ("bits per byte of an n-gram model", "number", "of six characters, learnt in a second"),
    "bits_per_byte": ("bits per byte", "number", "lower is better"),
    "r_at_1": ("R@1", "share", "a related record comes first"),
    "r_at_5": ("R@5", "share", "a related record is among 5"),
    "r_at_10": ("R@10", "share", "a related record is among 10"),
    "p_at_10": ("P@10", "share", "related share of the first 10"),
    "judged_accuracy": ("judged right", "share", "a classifier of real data sees the label asked for"),
    "judge_real": ("judge on real test data", "share", "what the judge gets right at best"),
    "judge_reconstructed": ("judge on codec reconstructions", "share", "the most the codec allows"),
    "judged_share": ("judged right, relative to real", "ratio", ""),
    "diversity": ("diversity", "ratio", "spread within a label, relative to real"),
    "frechet": ("Fréchet distance", "number", "to real test data in the judge's features; baseline: real to real"),
    "near_copies": ("near copies", "share", "closer to a training sample than 99 % of real test data are"),
    "near_copies_features": ("near copies, in features", "share", "the same, as the judge sees it"),
    "verbatim": ("verbatim in train", "share", "of runs of 8 words that it wrote; baseline: of real test texts"),
    "near_texts": ("near copies", "share", "longer runs out of train than in 99 % of real test texts"),
    "exposure": ("exposure, bits", "number", "of planted canaries; chance: of canaries that were never planted"),
    "psnr": ("PSNR, dB", "number", "higher is better"),
    "mel_error": ("error of the log-mel", "number", "mean absolute; lower is better"),
    "codes_used": ("codes used", "share", "share of all codes that occur"),
    "code_perplexity": ("code perplexity", "share", "as a share of all codes"),
    "seconds": ("seconds", "number", ""),
    "steps": ("steps", "number", "of training"),
}
_RANKED = {"hr": ("HR", "the item that came is among {}"), "ndcg": ("NDCG", "the same, more for a better place"),
           "mrr": ("MRR", "the same, one over its place")}  # fmt: skip
MEANING |= {
    f"{name}_at_{depth}{suffix}": (f"{label}@{depth}{more}", "share", text.format(depth))
    for suffix, more in (("", ""), ("_unmasked", ", with what was seen"))
    for depth in (1, 5, 10, 20)
    for name, (label, text) in _RANKED.items()
}
_METHODS = {
    "cooccurrence": ("directed co-occurrence", "what followed what, and how soon: the baseline of all figures here"),
    "popularity": ("popularity", "the same for everybody"),
    "item_knn": ("item-kNN", "items that the same people chose"),
    "ease": ("EASE", "a linear model of which items go together"),
}
for _name, _label in (("hr", "HR@10"), ("ndcg", "NDCG@10"), ("coverage", "coverage@10")):
    MEANING |= {f"{_name}_at_10_{key}": (f"{_label}: {word}", "share", text) for key, (word, text) in _METHODS.items()}
MEANING |= {
    "hr_at_10_lead": ("lead in HR@10", "share", "model less directed co-occurrence, paired by user"),
    "ndcg_at_10_lead": ("lead in NDCG@10", "share", "model less directed co-occurrence, paired by user"),
    "cold_hr_at_10_lead": ("lead in HR@10, new items", "share", "model less nearest content, paired by user"),
    "coverage_at_10": ("coverage@10", "share", "of all items, those in somebody's first 10"),
    "novelty_at_10": ("novelty@10, bits", "number", "of surprise in popularity, mean over the first 10"),
    "hr_at_10_head": ("HR@10, popular items", "share", "those with the first third of all interactions"),
    "hr_at_10_middle": ("HR@10, items in the middle", "share", "the second third"),
    "hr_at_10_tail": ("HR@10, rare items", "share", "the last third"),
}
_NEW = {
    "": ("", "in no training history, ranked among all; baseline: popular in their categories"),
    "_genre": (": popular in the categories", "of the history"),
    "_nearest": (": nearest content", "to the last ten of the history"),
}
for _name, _label in (("hr_at_10", "HR@10"), ("ndcg_at_10", "NDCG@10"), ("hr_at_20", "HR@20")):
    MEANING |= {f"cold_{_name}{k}": (f"{_label}, new items{word}", "share", text) for k, (word, text) in _NEW.items()}
HEADLINES = ("accuracy", "exact", "bits_per_byte", "p_at_10", "judged_accuracy", "hr_at_10", "ndcg_at_10")
