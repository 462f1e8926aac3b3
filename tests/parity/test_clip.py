"""CLIP against transformers: both text models, the vision model, the tokenizer; OpenCLIP against torch's own layers."""

import json

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from ldm.conditioning.clip import CLIPText, CLIPTextEncoder, CLIPVision
from ldm.conditioning.clip_image import CLIPImageEncoder, preprocess
from ldm.conditioning.clip_tokenizer import CLIPTokenizer, read_clip_tokenizer
from ldm.io.tensors import write_tensors
from ldm.weights.clip import from_open_clip, from_transformers, to_open_clip, to_transformers
from tests.test_clip import published_vocabulary, toy_vocabulary

transformers = pytest.importorskip("transformers")

VOCAB = len(toy_vocabulary()[0])
TEXT = [  # width, depth, heads, activation
    (32, 2, 4, "quick_gelu"),
    (48, 3, 3, "gelu"),
    (64, 4, 1, "quick_gelu"),
    (40, 5, 5, "gelu"),
    (96, 2, 6, "gelu"),
]
VISION = [  # width, depth, heads, mlp, projection, activation, image, patch
    (32, 2, 4, 128, 24, "quick_gelu", 28, 14),
    (48, 3, 3, 100, 48, "gelu", 32, 8),
    (64, 4, 1, 64, 16, "quick_gelu", 42, 14),
    (40, 3, 5, 200, 64, "gelu", 16, 4),
    (52, 4, 2, 256, 20, "gelu", 56, 14),
]
SEEDS_SCALES = [(0, 1.0), (1, 1.0), (2, 1 / 16)]
RULES = [(0, True), (1, True), (1, False), (2, False)]


def error(ours, theirs):
    return float((ours - theirs).abs().max() / theirs.abs().max())


def randomised(module, seed, scale):
    """Every parameter drawn anew, those that start constant or small too."""
    torch.manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.normal_(std=parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3).mul_(scale)
        parameter.data.add_(scale * (parameter.ndim == 1))
    return module.eval()


def text_judge(cls, config, seed=0, scale=1.0):
    width, depth, heads, activation = config
    return randomised(
        cls(
            transformers.CLIPTextConfig(
                vocab_size=VOCAB,
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=depth,
                num_attention_heads=heads,
                projection_dim=width,
                hidden_act=activation,
                bos_token_id=VOCAB - 2,
                eos_token_id=2,  # as in the published configs: wrong, and read as "pool at the largest id"
                pad_token_id=0,
            )
        ),
        seed,
        scale,
    )


@pytest.fixture(scope="module")
def tokenizer():
    return CLIPTokenizer(*toy_vocabulary())


PROMPTS = ["a photo of a red cat", "", "cat " * 75, "9 lives!"]


@pytest.mark.parametrize("config", TEXT, ids=str)
@pytest.mark.parametrize("seed, scale", SEEDS_SCALES)
@pytest.mark.parametrize("projected", [False, True])
@torch.no_grad()
def test_text_equals_transformers(config, seed, scale, projected, tokenizer):
    cls = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    theirs = text_judge(cls, config, seed, scale)
    ours = CLIPText(*config, projected, vocab_size=VOCAB).eval()
    ours.load_state_dict(from_transformers(theirs.state_dict(), ours.state_dict()))
    ids = tokenizer.encode(PROMPTS, pad=0 if projected else None)[:, 0]
    expected = theirs(ids, output_hidden_states=True)
    norm = (theirs.text_model if projected else theirs).final_layer_norm
    pooled = expected.text_embeds if projected else expected.pooler_output
    for skip, final_norm in RULES:
        state = expected.hidden_states[-1 - skip]
        encoder = CLIPTextEncoder(ours, tokenizer, skip, final_norm, pooled=True, pad=0 if projected else None)
        cond = encoder(PROMPTS, torch.device("cpu"))
        assert error(cond["context"], norm(state) if final_norm else state) <= 2e-5
        assert error(cond["pooled"], pooled) <= 2e-5
    sd1 = CLIPTextEncoder(ours, tokenizer, pad=0 if projected else None)(PROMPTS, torch.device("cpu"))
    assert error(sd1["context"], expected.last_hidden_state) <= 2e-5


@pytest.mark.parametrize("config", VISION, ids=str)
@pytest.mark.parametrize("seed, scale", SEEDS_SCALES)
@torch.no_grad()
def test_vision_equals_transformers(config, seed, scale):
    width, depth, heads, mlp, projection, activation, image, patch = config
    theirs = randomised(
        transformers.CLIPVisionModelWithProjection(
            transformers.CLIPVisionConfig(
                hidden_size=width,
                intermediate_size=mlp,
                num_hidden_layers=depth,
                num_attention_heads=heads,
                projection_dim=projection,
                hidden_act=activation,
                image_size=image,
                patch_size=patch,
            )
        ),
        seed,
        scale,
    )
    ours = CLIPVision(*config).eval()
    ours.load_state_dict(from_transformers(theirs.state_dict(), ours.state_dict()))
    images = [torch.randint(0, 256, (3, 70, 61), dtype=torch.uint8) for _ in range(2)]
    expected = theirs(torch.stack([preprocess(x, image) for x in images]), output_hidden_states=True)
    for skip in (0, 1, 2):
        cond = CLIPImageEncoder(ours, skip)(images, torch.device("cpu"))
        assert error(cond["context"], expected.hidden_states[-1 - skip]) <= 2e-5
        assert error(cond["pooled"], expected.image_embeds) <= 2e-5
    published = to_transformers(ours.state_dict())
    assert published.keys() == theirs.state_dict().keys()
    assert all(torch.equal(published[key], value) for key, value in theirs.state_dict().items())


def pil_processor(size):
    """The one with which published pipelines saw pictures: transformers 5 has it beside one of torchvision's."""
    try:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as Processor
    except ImportError:
        Processor = transformers.CLIPImageProcessor
    return Processor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


@pytest.mark.parametrize("size", [28, 224, 336])
def test_pictures_are_prepared_as_there(size):
    generator, judge = torch.Generator().manual_seed(size), pil_processor(size)
    for sides in ((size, size), (300, 200), (37, 91), (427, 640), (1024, 77), (size + 1, size), (5, 7), (1, 1)):
        image = torch.randint(0, 256, (3, *sides), generator=generator, dtype=torch.uint8)
        theirs = judge(Image.fromarray(image.permute(1, 2, 0).numpy()), return_tensors="pt")["pixel_values"][0]
        assert (preprocess(image, size) - theirs).abs().max() <= 1e-6


@torch.no_grad()
def test_pooled_at_the_end_where_tokens_were_added(tokenizer, tmp_path):
    """transformers pools where our config.json says; at 2, as published, it would take the added token for the end."""
    from ldm.tools.convert import convert
    from tests.test_systems_weights import networks, original, save_vocabulary

    nets = networks("sd15") | {"clip_l": CLIPText(64, 2, 1, "quick_gelu", vocab_size=VOCAB + 2)}
    write_tensors(tmp_path / "a.safetensors", original("sd15", nets))
    convert(tmp_path / "a.safetensors", tmp_path / "b", "diffusers", tokenizer=save_vocabulary(tmp_path / "v"))
    theirs = transformers.CLIPTextModel.from_pretrained(tmp_path / "b/text_encoder").eval()
    ids = tokenizer.encode(["a red cat"])[:, 0]
    ids[0, 2] = VOCAB + 1
    encoder = CLIPTextEncoder(nets["clip_l"].eval(), tokenizer, pooled=True)
    assert error(encoder.encode(ids[:, None])["pooled"], theirs(ids).pooler_output) <= 2e-5


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("config", TEXT, ids=str)
def test_text_round_trip_is_bit_exact_and_loads_there(config, projected):
    cls = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    theirs = text_judge(cls, config).state_dict()
    ours = CLIPText(*config, projected, vocab_size=VOCAB)
    ours.load_state_dict(from_transformers(theirs, ours.state_dict()))
    published = to_transformers(ours.state_dict(), prefix="text_model.final_layer_norm.bias" in theirs)
    assert published.keys() == theirs.keys() and all(torch.equal(published[key], theirs[key]) for key in theirs)


class OpenCLIPBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, x, mask=None):  # N B D
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))


class OpenCLIPText(nn.Module):
    """The published layout, of torch's layers: fused in_proj, a table of positions, x @ text_projection."""

    def __init__(self, width, depth, heads):
        super().__init__()
        self.token_embedding = nn.Embedding(VOCAB, width)
        self.positional_embedding = nn.Parameter(torch.empty(77, width))
        self.text_projection = nn.Parameter(torch.empty(width, width))
        self.logit_scale = nn.Parameter(torch.empty(()))
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(OpenCLIPBlock(width, heads) for _ in range(depth))
        self.ln_final = nn.LayerNorm(width)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.2)

    def forward(self, ids):
        x = (self.token_embedding(ids) + self.positional_embedding).transpose(0, 1)
        mask = torch.full((77, 77), -torch.inf).triu(1)
        states = [x] + [x := block(x, mask) for block in self.transformer.resblocks]
        last = self.ln_final(x.transpose(0, 1))
        pooled = last[torch.arange(len(ids)), ids.argmax(-1)] @ self.text_projection
        return [state.transpose(0, 1) for state in states], pooled


@pytest.mark.parametrize("seed, config", enumerate([(32, 2, 4), (48, 3, 3), (64, 4, 1), (40, 5, 5), (96, 2, 6)]))
@torch.no_grad()
def test_open_clip_layout(seed, config, tokenizer):
    torch.manual_seed(seed)
    theirs = OpenCLIPText(*config).eval()
    theirs.logit_scale.fill_(100.0).log_()
    ours = CLIPText(*config, "gelu", projected=True, vocab_size=VOCAB).eval()
    ours.load_state_dict(from_open_clip(theirs.state_dict(), ours.state_dict()))
    states, pooled = theirs(tokenizer.encode(PROMPTS, pad=0)[:, 0])
    cond = CLIPTextEncoder(ours, tokenizer, 1, False, True, pad=0)(PROMPTS, torch.device("cpu"))
    assert error(cond["context"], states[-2]) <= 2e-5 and error(cond["pooled"], pooled) <= 2e-5
    published = to_open_clip(ours.state_dict())
    assert published.keys() == theirs.state_dict().keys()
    assert all(torch.equal(published[key], value) for key, value in theirs.state_dict().items())


@torch.no_grad()
def test_open_clip_vision_layout_loads_the_same_network():
    """Names and shapes of OpenCLIP's tower, given to the network that the test above compares."""
    ours = CLIPVision(*VISION[1]).eval()
    width, _, _, _, projection, _, image, patch = VISION[1]
    published = to_open_clip(ours.state_dict())
    assert published["visual.proj"].shape == (width, projection)
    assert published["visual.conv1.weight"].shape == (width, 3, patch, patch)
    assert published["visual.transformer.resblocks.0.attn.in_proj_weight"].shape == (3 * width, width)
    assert published["visual.class_embedding"].shape == (width,)
    assert published["visual.positional_embedding"].shape == (1 + (image // patch) ** 2, width)
    assert {"visual.ln_pre.weight", "visual.ln_post.bias"} <= published.keys()
    assert torch.equal(published["visual.proj"].t(), ours.projection.weight)
    x = torch.randn(3, width)
    assert torch.allclose(x @ published["visual.proj"], ours.projection(x), atol=1e-6)


TEXTS = [
    "a photo of a red cat",
    "A PHOTO,  of\ta\ncat...",
    "it's we're they'll I'd I've don't CAN'T",
    "12 cats & 3.14159 (50%) #7",
    "猫と写真、红色的猫 고양이",
    "🐈‍⬛ a cat 🎉🎉!!",
    "café cafe\u0301 naïve ÅNGSTRÖM ß İstanbul",
    "Привет, мир — “quotes” … ½ ² Ⅷ",
    "<|endoftext|> a <|startoftext|> cat",
    "العربية עברית हिन्दी",
    "\u00a0\u3000 spaces \u200b zero\x00width\x7f",
    "!",
    "cat!!! !cat",
    "",
    "   ",
    "photo" * 30,
    "cat " * 200,
]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
@pytest.mark.parametrize("pad", ["<|endoftext|>", 0])
def test_tokens_equal_transformers(text, pad, tokenizer):
    vocab, merges = toy_vocabulary()
    theirs = transformers.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)
    expected = theirs(text, truncation=True, max_length=77).input_ids
    expected += [theirs.eos_token_id if pad else 0] * (77 - len(expected))
    assert tokenizer.encode([text], pad=None if pad else 0)[0, 0].tolist() == expected


@pytest.mark.parametrize("pad", [49407, 0])
def test_published_vocabulary_equals_transformers(pad):
    ours = read_clip_tokenizer(published_vocabulary())
    model = json.loads(ours.to_json())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    theirs = transformers.CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=77)
    texts = [*TEXTS, "a photo of a cat", "Kraków's 1990s café — 50% off :-) (a:1.3) [b]", "\U0001f468\u200d\U0001f469"]
    expected = [row + [pad] * (77 - len(row)) for row in theirs(texts, truncation=True, max_length=77).input_ids]
    assert ours.encode(texts, pad=pad)[:, 0].tolist() == expected
