"""Captions of the web, cleaned as Imagen's open successors (DeepFloyd IF, PixArt, arXiv:2310.00426) cleaned theirs.

What their weights were trained on has no addresses, markup, article numbers or advertisement, is lower-cased, and knows
one kind of dash and quotation mark.
Deviation: of the repairs of broken Unicode, those that have to guess how a text was broken are left out.
"""

import html
import re
import unicodedata
from collections.abc import Iterable
from html.entities import html5
from html.parser import HTMLParser
from urllib.parse import unquote_plus

from ldm.utils.errors import DataError

MAX_CHARACTERS = 4096  # of a caption; T5 reads less, and some patterns take quadratic time
DASHES = (  # of other scripts and typography, beside "-"
    "\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0\ufe31\ufe32\ufe58"
    "\ufe63\uff0d"
)
FILES = "(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)"
WIDE = r"[\u0132\u0133\u0149\u01c4-\u01cc\u01f1-\u01f3\ufb00-\ufb06\uff01-\uffef]"  # joined letters and other widths
UNSEEN = r"[\0-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]"
NOT_SHOWN = {"script", "style", "template", "rt", "rp"}  # elements whose text is not the page's

Rows = Iterable[tuple[str, str]]  # (pattern, what takes its place), in the order in which they are applied
WEB = [
    ("<person>", "person"),  # a placeholder of anonymised captions, not markup
    (r"\bhttps?:(?:/{1,3}|[a-zA-Z0-9%])", ""),
    (r"\b[a-zA-Z0-9.-]+\.(?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)", ""),  # domains with their path
    (r"\bwww:(?:/{1,3}|[a-zA-Z0-9%])", ""),
]
NOISE = [
    (r"@\w+\b", ""),  # @somebody
    (r"[\u31c0-\u9fff]+", ""),  # Chinese and Japanese characters, from their strokes to the unified ideographs
    (f"[-{DASHES}]+", "-"),
    (r"[`´«»“”¨]", '"'),
    (r"[‘’]", "'"),
    (r"&quot;?|&amp", ""),
    (r"\d{1,3}(?:\.\d{1,3}){3}", " "),  # the number of a computer, 127.0.0.1
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),  # a line break that was written out
    (r"#(?:\d{1,3}|\d{5,})\b", ""),
    (r"\b\d{6,}\b", ""),  # article numbers
    (rf"\S+\.{FILES}", ""),
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+", " "),
    (r"\s+\.\s+", " "),
]
REPAIRS = [
    (r"\x1b\[(?:\d|;)*[a-zA-Z]", ""),  # colours of a terminal
    (r"[\u02bc\u2018-\u201b]", "'"),
    (r"[\u201c-\u201f]", '"'),
    (r"\r\n|[\r\u2028\u2029]", "\n"),
    (r"\u3000", " "),
    (UNSEEN, ""),
]
GOODS = [
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # jc6640
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),  # jc6640vc
    (r"\b\d+[a-zA-Z]+\d+\b", ""),  # 6640vc231
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b{FILES}(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),  # j2d1a2a
    (r"\b\d+\.?\d*[x\u0445×]\d+\.?\d*\b", ""),  # 20x30, with the Latin or the Cyrillic letter
]
SPACING = [
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"'](.+)[\"']$", r"\1"),  # wholly in quotation marks
    (r"^['_,:;-]", ""),
    (r"['_,:+-]$", ""),
    (r"^\.\S+$", ""),
]


def clean_caption(text: str) -> str:
    """A caption as those systems read it: they clean it twice, which is not the same as once. DataError if no text."""
    if not isinstance(text, str):
        raise DataError(f"caption {text!r} is {type(text).__name__}, expected text; use '' where there is none")
    return _clean(_clean(text[:MAX_CHARACTERS]))


def _clean(text: str) -> str:
    text = replace(unquote_plus(text).strip().lower(), WEB)
    text = replace(visible_text(text), NOISE)
    if len(re.findall("[-_]", text)) > 3:  # this-is-the-name-of-a-file
        text = re.sub("[-_]", " ", text)
    text = html.unescape(html.unescape(repair(text)))
    return replace(replace(text, GOODS), SPACING).strip()


def replace(text: str, rows: Rows) -> str:
    """Apply each row to the whole text, in order."""
    for pattern, replacement in rows:
        text = re.sub(pattern, replacement, text)
    return text


def repair(text: str) -> str:
    """Unicode as it was meant: letters in their usual width, no marks that nobody sees, accents composed (NFC)."""
    text = re.sub(WIDE, lambda match: unicodedata.normalize("NFKC", match[0]), text)
    return unicodedata.normalize("NFC", replace(text, REPAIRS))


def visible_text(markup: str) -> str:
    """What a browser would show of HTML; of what is no HTML, the text itself."""
    page = _Page()
    try:
        page.feed(markup)
        page.close()
    except AssertionError:  # so html.parser calls a declaration that makes no sense
        return markup
    return "".join(page.parts)


class _Page(HTMLParser):
    """Collects text and the characters that entities stand for."""

    def __init__(self):
        super().__init__(convert_charrefs=False)
        self.parts: list[str] = []
        self.hidden: list[str] = []  # open elements that are not shown

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if tag in NOT_SHOWN:
            self.hidden.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.hidden:
            self.hidden = self.hidden[: self.hidden.index(tag)]

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data)

    def handle_charref(self, name: str) -> None:
        self.handle_data(html.unescape(f"&#{name};"))

    def handle_entityref(self, name: str) -> None:
        self.handle_data(html5.get(f"{name};", f"&{name}"))

    def unknown_decl(self, data: str) -> None:
        if data[:6].upper() == "CDATA[":
            self.handle_data(data[6:])
