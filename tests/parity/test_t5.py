"""T5 and mT5 against transformers, tokens against it and SentencePiece, cleaned captions against diffusers' PixArt."""

import random
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from ldm.conditioning.captions import clean_caption
from ldm.conditioning.t5 import T5Encoder, T5TextEncoder
from ldm.conditioning.t5_tokenizer import T5Tokenizer, read_t5_tokenizer
from ldm.weights.t5 import from_config, from_transformers, to_config, to_transformers
from tests.test_t5_tokenizer import KINDS, toy_charsmap, toy_model, toy_vocabulary

transformers = pytest.importorskip("transformers")

VOCAB = len(toy_vocabulary()) + 5
CONFIGS = [  # family, width, depth, heads, head_dim, mlp
    ("t5", 32, 2, 4, 8, 64),
    ("t5", 48, 3, 3, 24, 40),
    ("t5", 40, 4, 5, 16, 100),
    ("mt5", 64, 3, 1, 32, 72),
    ("mt5", 24, 5, 6, 8, 48),
    ("t5", 96, 2, 2, 64, 33),
]
SEEDS_SCALES = [(0, 1.0), (1, 1.0), (2, 1 / 16), (3, 4.0)]


def error(ours, theirs):
    return float((ours - theirs).abs().max() / theirs.abs().max())


def judge(config, seed=0, scale=1.0):
    family, width, depth, heads, head_dim, mlp = config
    kinds = {
        "t5": (transformers.T5Config, transformers.T5EncoderModel),
        "mt5": (transformers.MT5Config, transformers.MT5EncoderModel),
    }
    config_class, model_class = kinds[family]
    model = model_class(
        config_class(
            vocab_size=VOCAB,
            d_model=width,
            num_layers=depth,
            num_heads=heads,
            d_kv=head_dim,
            d_ff=mlp,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
        )
    )
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.normal_(std=parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3).mul_(scale)
        parameter.data.add_(scale * (parameter.ndim == 1))
    return model.eval()


def ours_of(theirs):
    net = T5Encoder(**from_config(theirs.config.to_dict())).eval()
    net.load_state_dict(from_transformers(theirs.state_dict(), net.state_dict()))
    return net.requires_grad_(False)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("seed, scale", SEEDS_SCALES)
@torch.no_grad()
def test_network_equals_transformers(config, seed, scale):
    theirs = judge(config, seed, scale)
    ours = ours_of(theirs)
    for lengths in ([1], [2, 1], [7, 3, 7], [40, 1, 17], [150, 131]):  # past 128, the last bucket
        ids = torch.randint(0, VOCAB, (len(lengths), max(lengths)))
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        assert error(ours(ids, mask), theirs(ids, attention_mask=mask.long()).last_hidden_state) <= 2e-5
        assert error(ours(ids), theirs(ids).last_hidden_state) <= 2e-5


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_round_trip_is_bit_exact_and_loads_there(config, tmp_path):
    theirs = judge(config)
    net = ours_of(theirs)
    published = to_transformers(net.state_dict())
    assert all(torch.equal(published[key], theirs.state_dict()[key]) for key in published)
    assert theirs.state_dict().keys() - published.keys() == {"encoder.embed_tokens.weight"}
    described = type(theirs.config).from_dict(to_config(net))
    if config[0] == "t5":  # of mT5's two marks, the vocabulary's size is not the published one here
        assert from_config(described.to_dict()) == from_config(theirs.config.to_dict())
    fresh = type(theirs)(theirs.config)
    missing, unknown = fresh.load_state_dict(published, strict=False)
    assert not unknown and set(missing) <= {"encoder.embed_tokens.weight"}
    theirs.save_pretrained(tmp_path)
    ours = net.state_dict()
    loaded = from_transformers(load_file(tmp_path / "model.safetensors"), ours)
    assert all(torch.equal(loaded[key], ours[key]) for key in ours)


PROMPTS = ["a photo of a red cat", "", "cat " * 50, "9 lives!"]


@pytest.mark.parametrize("config", CONFIGS[:4], ids=str)
@pytest.mark.parametrize("length", [5, 30])
@torch.no_grad()
def test_encoder_equals_the_pipelines_rules(config, length):
    """PixArt drops the padding, IF reads what T5 made of it, SD3 shows it to both."""
    theirs, tokenizer = judge(config), T5Tokenizer(toy_vocabulary(), 2, KINDS)
    ids, mask = tokenizer.encode(PROMPTS, length)
    masked = theirs(ids, attention_mask=mask.long()).last_hidden_state
    encode = partial(T5TextEncoder, ours_of(theirs), tokenizer, length)
    pixart = encode()(PROMPTS, torch.device("cpu"))
    assert torch.equal(pixart["context_mask"], mask) and error(pixart["context"][mask], masked[mask]) <= 2e-5
    assert error(encode(context_mask=False)(PROMPTS, torch.device("cpu"))["context"], masked) <= 2e-5
    sd3 = encode(mask=False, context_mask=False)(PROMPTS, torch.device("cpu"))["context"]
    assert error(sd3, theirs(ids).last_hidden_state) <= 2e-5


# ------------------------------------------------------------------------------------------------------------ tokens

TEXTS = [
    "a photo of a red cat",
    "A PHOTO,  of\ta\ncat...",
    "it's we're 12 cats & 3.14159 (50%) #7",
    "猫と写真、红色的猫 고양이",
    "🐈‍⬛ a cat 🎉🎉!!",
    "café réd cafe\u0301 naïve",
    "Привет, мир — “quotes” … ½ ² Ⅷ ﬁ",
    "\u00a0\u3000 spaces \u200b zero width\x7f",
    "</s> a <pad> cat<unk> <extra_id_0>a<extra_id_99>",
    "▁a▁cat",
    "",
    "   ",
    "photo" * 30,
    "cat " * 200,
]


@pytest.mark.parametrize("charsmap", [b"", toy_charsmap()], ids=["plain", "charsmap"])
@pytest.mark.parametrize("length", [2, 20, 300])
def test_tokens_equal_transformers(charsmap, length, tmp_path):
    (tmp_path / "spiece.model").write_bytes(toy_model(charsmap=charsmap))
    tokenizer = read_t5_tokenizer(tmp_path)
    gaps = [(f"<extra_id_{i}>", 0.0) for i in reversed(range(100))]
    theirs = transformers.T5Tokenizer([*toy_vocabulary(), *gaps], _spm_precompiled_charsmap=charsmap or None)
    expected = theirs(TEXTS, padding="max_length", truncation=True, max_length=length)
    ids, mask = tokenizer.encode(TEXTS, length)
    assert ids.tolist() == expected.input_ids and mask.long().tolist() == expected.attention_mask
    theirs.save_pretrained(tmp_path / "saved")  # tokenizer.json as others write it
    again = read_t5_tokenizer(tmp_path / "saved")
    assert torch.equal(again.encode(TEXTS, length)[0], ids) and len(again) == len(tokenizer)


def test_tokens_equal_sentencepiece(tmp_path):
    """A vocabulary with T5's normalisation, trained here; what differs are marks that combine with nothing."""
    sentencepiece = pytest.importorskip("sentencepiece")
    rng = random.Random(0)
    codes = [*range(32, 127)] * 4 + [*range(0xA1, 0x180), *range(0x2010, 0x2028), 0x3042, 0xFF21, 0xFB01]
    pool = [chr(code) for code in codes]
    words = ["".join(rng.choice("abcdefghij") for _ in range(rng.randint(1, 6))) for _ in range(300)]
    lines = [" ".join(rng.choice(words) for _ in range(12)) for _ in range(400)]
    with open(tmp_path / "spiece.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=file, vocab_size=200, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
            minloglevel=2,
        )  # fmt: skip
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    ours = read_t5_tokenizer(tmp_path)
    assert len(ours) == 300
    texts = lines[:50] + ["".join(rng.choice(pool) for _ in range(rng.randint(1, 40))) for _ in range(1000)]
    texts += [text for text in TEXTS if "<" not in text and "▁" not in text]
    assert all(list(ours.ids(text, 10_000)) == [*theirs.encode(text), 1] for text in texts)


# ---------------------------------------------------------------------------------------------------------- captions

CAPTIONS = [
    "A <person> on a horse, see http://example.com/a/b?c=d now",
    "buy at www.shop.co.it/path now! visit https://a.b.net or x.it/path/ foo.com.",
    "<b>Bold</b> &amp; <i>it&eacute;m</i> &lt;3 &#65; &#x42; &foo; &bar &copy 2020 &reg; &#128; &nbsp;x",
    "<script>x=1</script>after <style>b{}</style> z <!-- c --> d <!doctype html> e <![CDATA[cd]]> f",
    "<ruby>a<rt>b</rt></ruby> c <template>t<b>u</b></template> v",
    "@nick says hi @ you me@site.com, a@b.org R&D AT&T &quot;x&quot; &amp;amp; y &ampx &quot",
    "猫と cat 漢字 㐀 a — b – c ‐ d ― e “quoted” ‘single’ «g» `x´",
    "ip 192.168.0.1 ok time 1:23  line\\nbreak #12 #1234 #12345 1234567 123456x",
    "photo.jpg IMG_0001.PNG the pic.jpeg x png image pdf images page 12 of 13",
    '"""wow""" ... \'\'a\'\' .. ***SALE*** #sale (x) [y] {z} |p| \\b /c ~d -lead trail-',
    "this-is-my-cute-cat and this_is a_b_c_d_e --- --",
    "jc6640 jc6640vc 6640vc231 j2d1a2a3b 20x30 cm 20.5х30 3×4",
    "free shipping worldwide free shipping download free free download click for more click on this",
    "'all quoted'",
    '"all quoted"',
    ".hidden",
    "ﬁne ｆｕｌｌ ﾊﾝ ĳ ǆ ŉ cafe\u0301 \ufeff zero\u200b \x1b[31mred\x1b[0m\r\ny",
    "a+b%20c%zz a : b ,c.d/e 1 < 2 and 3 > 2 I <3 you <unclosed",
    "Ünïcödé™ ® © ½ İstanbul ÄÖÜ ß $5.99 50% off :) :-( ;)",
    "A photo of an astronaut riding a horse on Mars, 8k, highly detailed, trending on artstation",
    "",
    " . ",
    "it's 'x' 'y'",
]


def test_cleaned_captions_equal_pixart(monkeypatch):
    bs4, ftfy = pytest.importorskip("bs4"), pytest.importorskip("ftfy")
    from diffusers.pipelines.pixart_alpha import pipeline_pixart_alpha as pixart

    monkeypatch.setattr(pixart, "BeautifulSoup", bs4.BeautifulSoup, raising=False)
    monkeypatch.setattr(pixart, "ftfy", ftfy, raising=False)
    pipeline = pixart.PixArtAlphaPipeline.__new__(pixart.PixArtAlphaPipeline)
    rng = random.Random(0)
    words = " ".join(CAPTIONS).split()
    captions = CAPTIONS + [" ".join(rng.choice(words) for _ in range(rng.randint(2, 12))) for _ in range(1000)]
    for caption in captions:
        assert clean_caption(caption) == pipeline._clean_caption(pipeline._clean_caption(caption)), caption
