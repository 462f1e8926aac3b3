"""Captions cleaned as PixArt and IF clean theirs: each kind of rubbish, and texts made to take long."""

import pytest

from ldm.conditioning.captions import clean_caption, visible_text


@pytest.mark.parametrize(
    "text, cleaned",
    [
        ("A Photo of an ASTRONAUT, riding", "a photo of an astronaut, riding"),
        ("<person> at https://example.com/a/b today", "person at today"),
        ("<b>Bold</b> &amp; <i>it&eacute;m</i><script>x()</script>", "bold item".replace("e", "é")),
        ("@nick: a 猫 “cat”", 'a "cat"'),
        ("big – small — dash", "big - small - dash"),
        ("a_red_cat_on_a_mat", "a red cat on a mat"),
        ("IMG_001.jpg shoe #123 jc6640 free shipping 20x30", "shoe"),
        ("***SALE*** [now]", "sale now"),
        ("'all quoted'", "all quoted"),
        ("ﬁne ｆｕｌｌ cafe\u0301", "fine full café"),
        ("1 < 2 and I <3 you", "1 < 2 and i <3 you"),
        ("", ""),
    ],
)
def test_cleaned_captions(text, cleaned):
    assert clean_caption(text) == cleaned


def test_any_text_is_cleaned_in_time():
    for text in ("a." * 9000, "<a " * 9000, "<!" * 9000, "&#" * 9000, "<![x", "\0\x7f", "a1" * 5000 + "_"):
        assert isinstance(clean_caption(text), str)
    assert visible_text("<![x") == "<![x" and visible_text("a<!-- b -->c<style>d</style>e") == "ace"
