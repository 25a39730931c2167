"""Left and right in the names of labels: which side a name says, and of what."""

import re
from collections.abc import Iterable

LEFT, RIGHT = "left", "right"
WORDS = {"left": LEFT, "lt": LEFT, "l": LEFT, "right": RIGHT, "rt": RIGHT, "r": RIGHT}
# Organs that FLARE22, BTCV and others write in one word with the letter of their side: RK, lkid, LAG, rad.
AFTER_A_LETTER = {
    "k": "kidney", "kid": "kidney", "kidney": "kidney", "lung": "lung",
    "ag": "adrenal gland", "ad": "adrenal gland", "adrenal": "adrenal gland",
}  # fmt: skip
ONE_WORD = re.compile(rf"([lr])({'|'.join(AFTER_A_LETTER)})")
FUSED = re.compile(r"(left|right)([a-z]{3,})|([a-z]{3,})(left|right)")  # leftkidney, kidneyright
NUMBERED = re.compile(r"([lr])(\d+)")  # L1: the first left rib, or a vertebra
OTHER_VERTEBRAE = re.compile(r"(c|t|th|s)\d+")
VERTEBRA = ("vertebra", "vertebrae", "vertebral", "body")

Sided = tuple[str, str]  # "left", "right" or "" for neither; the other words, small


def words_of(name: str) -> list[str]:
    """Splits a name in any notation into small words: snake_case, kebab-case, CamelCase, LKidney."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name)
    return re.findall(r"[a-z0-9]+", spaced.lower())


def sided(name: str) -> Sided:
    """Says of which side a name is, and of what: ("left", "kidney"); ("", "liver"), as far as it alone tells."""
    words = words_of(name)
    if len(words) == 1 and (match := ONE_WORD.fullmatch(words[0])):
        return WORDS[match[1]], AFTER_A_LETTER[match[2]]
    for number, word in enumerate(words):
        side, rest = WORDS.get(word, ""), ""
        if match := NUMBERED.fullmatch(word):
            side, rest = WORDS[match[1]], match[2]
        elif match := FUSED.fullmatch(word):
            side, rest = match[1] or match[4], match[2] or match[3]
        others = [*words[:number], *rest.split(), *words[number + 1 :]]
        if side and others:
            return side, " ".join(others)
    return "", " ".join(words)


def sides_of(names: Iterable[str]) -> dict[str, Sided]:
    """Says of which side each label of a data set is; two kinds of names mean a side only among certain others.

    `LAD` is an adrenal gland beside `RAD`, alone it is an artery of the heart. `L1` is a vertebra where there are other
    vertebrae, such as `T12`.

    Args:
        names: All labels of the data set, in any notation.
    """
    found = {name: sided(name) for name in names}
    small = {name.lower() for name in found}
    has_vertebrae = any(OTHER_VERTEBRAE.fullmatch(word) for name in found for word in words_of(name))
    for name in found:
        words = [word for word in words_of(name) if word not in VERTEBRA]
        is_vertebra = has_vertebrae and len(words) == 1 and NUMBERED.fullmatch(words[0])
        if is_vertebra or (name.lower() in ("lad", "rad") and not {"lad", "rad"} <= small):
            found[name] = "", " ".join(words_of(name))
    return found
