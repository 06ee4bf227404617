"""What AllegroPipeline does to a prompt before it is tokenised: lower case, or the cleaning of web captions.

The cleaning is that of the captions the model was trained on; it drops CJK characters, links, file names, numbers that
look like article ids, and most punctuation. Refuses to know any encoder.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import unquote_plus

import ftfy

from vidgen.errors import ConfigError

Rule = tuple[re.Pattern[str], str]
"""A pattern and what stands for it."""

_HOST = r"[a-zA-Z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"
_AFTER_SCHEME = r"(?:/{1,3}|[a-zA-Z0-9%])"
_FILES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_DASHES = (
    r"\u002D\u058A\u05BE\u1400\u1806\u2010-\u2015\u2E17\u2E1A\u2E3A\u2E3B\u2E40\u301C\u3030\u30A0\uFE31\uFE32\uFE58"
    r"\uFE63\uFF0D"
)


def _rules(*pairs: tuple[str, str]) -> tuple[Rule, ...]:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in pairs)


LINKS = _rules(
    ("<person>", "person"),
    (rf"\b(?:https?:{_AFTER_SCHEME}|{_HOST})", ""),
    (rf"\b(?:www:{_AFTER_SCHEME}|{_HOST})", ""),
)
"""Before markup is taken away."""
CHARACTERS = _rules(
    (r"@[\w\d]+\b", ""),  # nicknames
    (r"[\u31c0-\u9fff]+", ""),  # CJK: strokes, phonetic extensions, enclosed letters, compatibility, ideographs
    (rf"[{_DASHES}]+", "-"),
    (r"[`´«»“”¨]", '"'),
    (r"[‘’]", "'"),
    (r"&quot;?", ""),
    (r"&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # IP addresses
    (r"\d:\d\d\s+$", ""),  # the tail of an article id
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"[\S]+\.(?:{_FILES})", ""),
    (r"[\"\']{2,}", '"'),
    (r"[\.]{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~)(\]\[}{|\\/*]+", " "),
    (r"\s+\.\s+", " "),
)
"""Before mojibake is repaired."""
WORDS = _rules(
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # jc6640
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),  # jc6640vc
    (r"\b\d+[a-zA-Z]+\d+\b", ""),  # 6640vc231
    (r"(worldwide\s+)?(free\s+)?shipping", ""),
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_FILES})(\simage[s]?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),  # j2d1a2a
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),  # sizes; the second x is Cyrillic
    (r"\b\s+\:\s+", ": "),
    (r"(\D[,\./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"\']([\w\W]+)[\"\']$", r"\1"),
    (r"^[\'\_,\-\:;]", ""),
    (r"[\'\_,\-\:\-\+]$", ""),
    (r"^\.\S+$", ""),
)
"""Last."""
_JOINERS = re.compile(r"[-_]")
FEW_JOINERS = 3
"""Dashes and underscores up to which a caption keeps them; with more it is taken for words-joined-like-this."""


def prepared(prompt: str, clean: bool) -> str:
    """The text that is tokenised. Cleaning runs twice, as there. ConfigError if it needs beautifulsoup4 in vain."""
    return cleaned(cleaned(prompt)) if clean else prompt.lower().strip()


def cleaned(caption: str) -> str:
    """One pass over a caption."""
    text = _replaced(unquote_plus(caption).strip().lower(), LINKS)
    text = _replaced(_soup()(text, features="html.parser").text, CHARACTERS)
    if len(_JOINERS.findall(text)) > FEW_JOINERS:
        text = _JOINERS.sub(" ", text)
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return _replaced(text, WORDS).strip()


def _replaced(text: str, rules: Sequence[Rule]) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


def _soup() -> Any:
    try:
        from bs4 import BeautifulSoup
    except ImportError as error:
        raise ConfigError(
            "params.clean_caption is True; it needs beautifulsoup4: pip install 'vidgen[allegro]', or allowed: false"
        ) from error
    return BeautifulSoup
