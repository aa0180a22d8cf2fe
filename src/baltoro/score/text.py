"""OCR reward: normalised edit similarity (report section 4.4.2, "normalized edit distance")."""

import unicodedata

from rapidfuzz.distance import Levenshtein


def edit_similarity(predicted: str, target: str) -> float:
    """1 - Levenshtein / length of the longer, both after NFKC and collapsing whitespace; both empty is 1."""
    return Levenshtein.normalized_similarity(_normalise(predicted), _normalise(target))


def _normalise(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).split())
