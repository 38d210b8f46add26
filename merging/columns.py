"""What the field's data sets call their columns."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

#: Spellings of a column, ours first.
ALIASES: Mapping[str, tuple[str, ...]] = {
    "query": ("query", "anchor", "question", "sentence1"),
    "positive": ("positive", "positives", "pos", "document", "passage", "answer", "doc", "sentence2"),
    "negative": ("negative", "negatives", "neg", "hard_negative", "hard_negatives"),
    "teacher": ("teacher", "scores"),
    "sentence1": ("sentence1", "sentence_1", "text1", "sentence_A", "question1", "query", "anchor"),
    "sentence2": ("sentence2", "sentence_2", "text2", "sentence_B", "question2", "positive", "document"),
    "text": ("text", "sentence", "sentences"),
    "label": ("label", "labels", "is_duplicate"),
    "score": ("score", "similarity_score", "similarity", "relatedness_score", "value", "label"),
}
_NUMBERED = re.compile(r"(.*?)_?(\d+)")


def keys_of(name: str, keys: Sequence[str], renamed: str | None = None) -> list[str]:
    """A row's keys for one of our columns: none or one; of `negative` any number (`negative_1`, `negative_2` …).

    Args:
        renamed: what the file calls it; then no alias is taken.
    """
    spellings = (renamed,) if renamed is not None else ALIASES[name]
    found = [key for key in spellings if key in keys][:1]
    if name != "negative":
        return found
    numbered = []
    for key in keys:
        match = _NUMBERED.fullmatch(key)
        if match and match[1] in spellings:
            numbered.append((int(match[2]), key))
    return [*found, *(key for _, key in sorted(numbered))]
