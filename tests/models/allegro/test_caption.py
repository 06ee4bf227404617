"""Prompts are prepared as AllegroPipeline prepares them."""

from __future__ import annotations

import importlib.util
import sys

import pytest
from diffusers import AllegroPipeline

from vidgen.errors import ConfigError
from vidgen.models.allegro.caption import prepared

needs_soup = pytest.mark.skipif(
    importlib.util.find_spec("bs4") is None, reason="beautifulsoup4 is not installed: no caption is cleaned"
)
CAPTIONS = (
    "A Seaside harbor with bright sunlight, and sparkling seawater.",
    "",
    "  Two  cats ; one dog : and a bird .  ",
    "see https://example.com/a/b?c=1 or www.site.org/page/ or mail me at a.b@site.com for more",
    "www:foo and https:bar, a plain-host.co.uk/way",
    "<b>Bold</b> &amp; <i>it&quot;s</i> &ampok <person> and <a href='x'>link</a>",
    "@nick_name wrote #123 and #1234 and #12345 about 123456 and 12345",
    "one 中文 two ㇀ three 㐀 four ㍿ five カタカナ",
    "dash — en – minus − bar ― wave 〜 double⸺ three",
    'quotes “a” «b» `c` ´d´ ¨e¨ ‘f’ """AUSVERKAUFT""" \'\'x\'\'',
    "host 192.168.0.1 at 1:23 ",
    "line\\nbreak and photo_1.JPG clip.mp4 end... of . it",
    "***SALE*** [now] {or} (never) | a/b\\c * ~ § ©2024 ® ™ · º ½",
    "this-is-my-cute-cat and this_is_it",
    "this-is my-cat",
    "jc6640 jc6640vc 6640vc231 j2d1a2a abcd1234 a1",
    "worldwide free shipping free download free click for more click on it png images jpeg image page 12",
    "a 10x20 picture of 1.5х2.5 and 3×4",
    "a : b,c.d/e",
    "'quoted'",
    '"double quoted"',
    "_lead and trail-",
    ".hidden",
    "caf\u00c3\u00a9 mojibake &lt;tag&gt; &amp;amp; na\u00efve",
    "50%25 off+now %41",
    "ALL CAPS\nand\ttabs",
)


@pytest.mark.parametrize("caption", CAPTIONS)
def test_without_cleaning_a_prompt_is_only_put_in_lower_case(caption: str) -> None:
    pipe = AllegroPipeline.__new__(AllegroPipeline)
    assert [prepared(caption, clean=False)] == AllegroPipeline._text_preprocessing(pipe, caption, clean_caption=False)


@needs_soup
@pytest.mark.filterwarnings("ignore")  # beautifulsoup takes a caption for a file name or a link, and says so
@pytest.mark.parametrize("caption", CAPTIONS)
def test_a_cleaned_prompt_is_the_references(caption: str) -> None:
    pipe = AllegroPipeline.__new__(AllegroPipeline)
    assert [prepared(caption, clean=True)] == AllegroPipeline._text_preprocessing(pipe, caption, clean_caption=True)


@needs_soup
def test_the_captions_above_reach_the_rules() -> None:
    changed = [caption for caption in CAPTIONS if prepared(caption, clean=True) != prepared(caption, clean=False)]
    assert len(changed) > 20


def test_cleaning_without_beautifulsoup_names_the_package_and_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bs4", None)
    with pytest.raises(ConfigError, match=r"clean_caption.*beautifulsoup4.*vidgen\[allegro\].*false"):
        prepared("a cat", clean=True)
    assert prepared(" A Cat ", clean=False) == "a cat"
