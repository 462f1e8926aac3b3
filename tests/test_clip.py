"""CLIP without a judge: published sizes, which layer and vector each system reads, tokens, names in files."""

import copy
import gzip
import json
import pickle

import pytest
import torch
from torch.nn import functional as F

from ldm.conditioning import clip_tokenizer
from ldm.conditioning.clip import CLIPText, CLIPTextEncoder, CLIPVision, quick_gelu
from ldm.conditioning.clip_image import CLIPImageEncoder, preprocess
from ldm.conditioning.clip_tokenizer import (
    BOS,
    EOS,
    PUBLISHED,
    CLIPTokenizer,
    chunks_for,
    find_vocabulary,
    read_clip_tokenizer,
)
from ldm.conditioning.conditioner import Conditioner
from ldm.utils.errors import ConfigError, DataError, WeightsError
from ldm.weights.clip import from_open_clip, from_transformers, to_open_clip, to_transformers

CPU = torch.device("cpu")


def toy_vocabulary():
    """Bytes, bytes that end a word, merges for three words, and the two marks last: the order of CLIP's own."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    letters.insert(0, letters.pop(letters.index("!")))  # as in CLIP's, where "!" is id 0
    merges = []
    for word in ("photo", "cat", "red"):
        parts = [*word[:-1], word[-1] + "</w>"]
        merges += [("".join(parts[: i + 1]), parts[i + 1]) for i in range(len(parts) - 1)]
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges] + [BOS, EOS]
    return {token: index for index, token in enumerate(tokens)}, merges


@pytest.fixture(scope="module")
def tokenizer():
    return CLIPTokenizer(*toy_vocabulary())


def text_network(tokenizer, seed=0, **knobs):
    torch.manual_seed(seed)
    sizes = {"width": 32, "depth": 3, "num_heads": 4, "activation": "gelu"} | knobs
    network = CLIPText(**sizes, vocab_size=len(tokenizer))
    for parameter in network.parameters():  # at their initial size, positions and biases hardly matter
        parameter.data += 0.1 * torch.randn_like(parameter)
    return network.eval()


def vision_network():
    torch.manual_seed(0)
    return CLIPVision(32, 2, 4, 64, 24, "gelu", image_size=28, patch_size=14).eval()


# ----------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    "sizes, count",
    [
        ((768, 12, 12, "quick_gelu"), 123_060_480),
        ((1024, 23, 16, "gelu"), 340_387_840),
        ((1280, 32, 20, "gelu", True), 694_659_840),
    ],
)
def test_text_towers_have_the_published_sizes(sizes, count):
    with torch.device("meta"):
        network = CLIPText(*sizes)
    assert sum(parameter.numel() for parameter in network.parameters()) == count


@pytest.mark.parametrize(
    "sizes, count, keys",
    [
        ((1024, 24, 16, 4096, 768, "quick_gelu"), 303_966_208, 392),
        ((1280, 32, 16, 5120, 1024, "gelu"), 632_076_800, 520),
        ((1664, 48, 16, 8192, 1280, "gelu"), 1_844_907_264, 776),
    ],
)
def test_vision_towers_have_the_published_sizes(sizes, count, keys):
    with torch.device("meta"):
        network = CLIPVision(*sizes)
    assert sum(parameter.numel() for parameter in network.parameters()) == count
    assert len(to_transformers(network.state_dict())) == keys


@pytest.mark.parametrize("sizes, transformers, open_clip", [
    ((768, 12, 12, "quick_gelu"), 196, 149),
    ((1280, 32, 20, "gelu", True), 517, 390),
])  # fmt: skip
def test_published_numbers_of_keys(sizes, transformers, open_clip):
    with torch.device("meta"):
        state = CLIPText(*sizes).state_dict()
    assert len(to_transformers(state)) == transformers and len(to_open_clip(state)) == open_clip


# ---------------------------------------------------------------------------------------- layer, norm, pooled, null


def test_layer_and_norm_rules_differ_and_each_is_what_it_says(tokenizer):
    """Trap: SD 1.x reads the last layer normed, SD 2.x the penultimate normed, SDXL the penultimate as it is."""
    network = text_network(tokenizer)
    ids = tokenizer.encode(["a red photo"])[:, 0]
    x = network.tokens(ids) + network.positions
    states = [x] + [x := block(x) for block in network.blocks]
    expected = {(0, True): network.norm(states[3]), (1, True): network.norm(states[2]), (1, False): states[2]}
    for (skip, final_norm), value in expected.items():
        encoder = CLIPTextEncoder(network, tokenizer, skip=skip, final_norm=final_norm)
        assert torch.equal(encoder(["a red photo"], CPU)["context"], value)
    pooled = [CLIPTextEncoder(network, tokenizer, skip=n, pooled=True)(["a"], CPU)["pooled"] for n in range(4)]
    assert all(torch.equal(pooled[0], other) for other in pooled)  # the vector is always that of the last layer


@torch.no_grad()
def test_frozen_values(tokenizer):
    """The three rules on fixed weights, to five digits: what any refactoring must reproduce."""
    network = text_network(tokenizer)
    for index, (name, parameter) in enumerate(network.named_parameters()):
        wave = torch.sin(torch.arange(parameter.numel(), dtype=torch.float64) * (index + 1.7)).view_as(parameter)
        parameter.copy_(0.3 * wave + ("norm" in name and name.endswith("weight")))
    for skip, final_norm, mean in [(0, True, 0.868901), (1, True, 0.881124), (1, False, 0.762593)]:
        context = CLIPTextEncoder(network, tokenizer, skip, final_norm)(["a photo"], CPU)["context"]
        assert float(context.abs().mean()) == pytest.approx(mean, rel=1e-5)


def test_activation_is_named_and_matters(tokenizer):
    x = torch.linspace(-4, 4, 9)
    assert torch.allclose(quick_gelu(x), x / (1 + (-1.702 * x).exp()))
    assert 1e-2 < (quick_gelu(x) - F.gelu(x)).abs().max() < 3e-2
    with pytest.raises(ConfigError, match="activation is 'relu', expected one of: quick_gelu, gelu"):
        text_network(tokenizer, activation="relu")


def test_text_is_causal_and_padding_changes_what_the_context_holds(tokenizer):
    network = text_network(tokenizer)
    eos, zeros = (CLIPTextEncoder(network, tokenizer, pad=pad, pooled=True)(["cat"], CPU) for pad in (None, 0))
    assert torch.equal(eos["context"][:, :3], zeros["context"][:, :3]) and torch.equal(eos["pooled"], zeros["pooled"])
    assert not torch.allclose(eos["context"][:, 3:], zeros["context"][:, 3:])


def test_pooling_is_at_the_first_eos_and_survives_added_tokens(tokenizer):
    vocab, merges = toy_vocabulary()
    added = CLIPTokenizer(vocab, merges, ["<toy>"])
    network = text_network(added)
    plain = CLIPTextEncoder(network, tokenizer, pooled=True)
    extended = CLIPTextEncoder(network, added, pooled=True)
    assert torch.equal(plain(["a cat"], CPU)["pooled"], extended(["a cat"], CPU)["pooled"])
    ids = added.encode(["a <toy> cat"])[:, 0]
    assert len(vocab) in ids[0] and ids.argmax(-1) == 2  # the rule that breaks
    assert extended.find_eos(ids) == 4 and ids[0, 4] == added.eos
    context = extended(["a <toy> cat"], CPU)
    assert torch.equal(context["pooled"], context["context"][:, 4])  # skip 0, normed, not projected


def test_zero_null_is_zeros_but_a_given_empty_prompt_is_encoded(tokenizer):
    """Trap: SDXL's base model was trained with zeros, its refiner and SD 1.x with the encoded empty text."""
    network = text_network(tokenizer, projected=True)
    knobs = {"skip": 1, "final_norm": False, "pooled": True}
    base = Conditioner({"text": CLIPTextEncoder(network, tokenizer, **knobs, zero_null=True)})
    refiner = Conditioner({"text": CLIPTextEncoder(network, tokenizer, **knobs)})
    batch = {"caption": ["a cat", "a photo"]}
    assert all(not value.any() for value in base.pair(batch)[1].values())
    assert all(value.any() for value in refiner.pair(batch)[1].values())
    mixed = base({"caption": ["a cat", None, ""]})
    assert mixed["context"][0].any() and not mixed["context"][1].any() and not mixed["pooled"][1].any()
    assert torch.allclose(mixed["context"][2], refiner({"caption": [""]})["context"][0], atol=1e-6)
    with pytest.raises(DataError, match="expected text"):
        refiner({"caption": [None]})


def test_text_k_of_a_batch_is_the_text_alone_and_gradients_flow(tokenizer):
    encoder = CLIPTextEncoder(text_network(tokenizer), tokenizer, pooled=True)
    texts = ["a cat", "a red photo", "a cat", ""]
    batch = encoder(texts, CPU)
    for k, text in enumerate(texts):
        alone = encoder([text], CPU)
        assert all(torch.allclose(alone[name][0], batch[name][k], atol=1e-5) for name in ("context", "pooled"))
    (batch["context"].sum() + batch["pooled"].sum()).backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())
    assert encoder.dims == {"context_dim": 32, "pooled_dim": 32}


def test_impossible_knobs(tokenizer):
    network = text_network(tokenizer)
    for knobs, message in [({"skip": 4}, "skip is 4, expected 0 to 3"), ({"chunks": 0}, "chunks is 0")]:
        with pytest.raises(ConfigError, match=message):
            CLIPTextEncoder(network, tokenizer, **knobs)
    with pytest.raises(ConfigError, match="not divisible into 5 heads"):
        text_network(tokenizer, num_heads=5)
    small = CLIPText(32, 1, 4, "gelu", vocab_size=100)
    with pytest.raises(ConfigError, match="vocabulary ends with id 5.., the network knows 100"):
        CLIPTextEncoder(small, tokenizer)
    with pytest.raises(ConfigError, match="not divisible by patch_size"):
        CLIPVision(32, 1, 4, 64, 24, "gelu", image_size=30)


# ------------------------------------------------------------------------------------------------- tokens, chunks


def test_rows_of_cat(tokenizer):
    """Trap: after EOS comes EOS for CLIP-L, id 0 for OpenCLIP."""
    cat = tokenizer.backend.token_to_id("cat</w>")
    row = [tokenizer.bos, cat, tokenizer.eos]
    assert tokenizer.encode(["Cat "]).tolist() == [[row + [tokenizer.eos] * 74]]
    assert tokenizer.encode(["cat"], pad=0).tolist() == [[row + [0] * 74]]
    assert tokenizer.encode(["!"])[0, 0, 1] != 0  # a "!" that is written is not padding
    assert tokenizer.encode([]).shape == (0, 1, 77)


def test_long_prompts_continue_in_chunks(tokenizer, caplog):
    text = " ".join(["cat"] * 80 + ["red"] * 80)
    assert [chunks_for([n, 3]) for n in (0, 1, 75, 76, 150, 151)] == [1, 1, 1, 2, 2, 3]
    ids = tokenizer.encode([text, "cat"], chunks=3)
    assert (ids[..., 0] == tokenizer.bos).all() and (ids[0, :2, 76] == tokenizer.eos).all()
    words = torch.cat([ids[0, 0, 1:76], ids[0, 1, 1:76], ids[0, 2, 1:11]])
    assert words.tolist() == list(tokenizer.ids(text)) and ids[0, 2, 11] == tokenizer.eos
    assert torch.equal(ids[1, 1], tokenizer.encode([""])[0, 0])  # what a short prompt has left is empty
    network = text_network(tokenizer)
    cond = CLIPTextEncoder(network, tokenizer, pooled=True, chunks=3)([text, "cat"], CPU)
    assert cond["context"].shape == (2, 231, 32)
    for chunk, part in enumerate((75 * ["cat"], 5 * ["cat"] + 70 * ["red"], 10 * ["red"])):
        alone = CLIPTextEncoder(network, tokenizer, pooled=True)([" ".join(part)], CPU)
        assert torch.allclose(cond["context"][0, 77 * chunk : 77 * chunk + 77], alone["context"][0], atol=1e-5)
        assert torch.allclose(cond["pooled"][0], alone["pooled"][0], atol=1e-5) == (chunk == 0)
    assert not caplog.records


def test_a_prompt_without_room_is_cut_with_one_line(tokenizer, caplog):
    fresh = copy.deepcopy(tokenizer)
    ids = fresh.encode(["cat " * 10_000, "red " * 90], chunks=2)
    assert ids.shape == (2, 2, 77) and (ids[0, :, 76] == fresh.eos).all()
    assert [record.message for record in caplog.records] == [
        f"prompt of 10000 tokens cut to 150, lost {'cat ' * 15!r}...; 134 chunks of 75 hold it all"
    ]


def test_vocabulary_from_any_of_its_files(tokenizer, tmp_path):
    vocab, merges = toy_vocabulary()
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    lines = ["#version: 0.2", *map(" ".join, merges)]
    (tmp_path / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    texts = ["a photo of a Cat's café, 42!", "猫 🐈"]
    readers = [read_clip_tokenizer(tmp_path), read_clip_tokenizer(tmp_path / "json")]
    readers += [read_clip_tokenizer(tmp_path / "json" / "tokenizer.json"), pickle.loads(pickle.dumps(tokenizer))]
    for other in readers:
        assert torch.equal(other.encode(texts), tokenizer.encode(texts)) and len(other) == len(vocab)


def test_padding_marked_as_special_stays_punctuation(tokenizer):
    """OpenCLIP's published tokenizer.json marks "!" as a special token; the program it was trained with did not."""
    table = json.loads(tokenizer.to_json())
    mark = table["added_tokens"][0]
    table["added_tokens"] += [mark | {"id": 0, "content": "!"}, mark | {"id": len(tokenizer), "content": "<toy>"}]
    other = CLIPTokenizer.from_json(json.dumps(table))
    assert torch.equal(other.encode(["a cat!"]), tokenizer.encode(["a cat!"]))
    assert other.encode(["<toy>!"])[0, 0, 1] == len(tokenizer) == len(other) - 1


def test_what_is_no_vocabulary_is_named(tmp_path):
    vocab, merges = toy_vocabulary()
    with pytest.raises(WeightsError, match="vocabulary without ..startoftext"):
        CLIPTokenizer({"a": 0}, [])
    with pytest.raises(WeightsError, match="vocabulary and merges do not fit"):
        CLIPTokenizer(vocab, [("nowhere", "seen")])
    with pytest.raises(WeightsError, match="no vocabulary there; expected vocab.json"):
        read_clip_tokenizer(tmp_path)
    for text in ("[]", "{}", '{"model": {"vocab": {}, "merges": 3}}', "{", '{"model": {"vocab": 1, "merges": []}}'):
        with pytest.raises(WeightsError):
            CLIPTokenizer.from_json(text)
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    with pytest.raises(DataError, match=r"merges.txt: no such file"):
        read_clip_tokenizer(tmp_path)
    for bad in ("[]", json.dumps(vocab | {"b": "one"})):
        (tmp_path / "vocab.json").write_text(bad)
        (tmp_path / "merges.txt").write_text("#version: 0.2\na b c\n")
        with pytest.raises(WeightsError):
            read_clip_tokenizer(tmp_path)


# ------------------------------------------------------------------------------------------- published vocabulary


def published_vocabulary():
    """OpenAI's file, as a package of the extra `parity` brings it."""
    try:
        return find_vocabulary()
    except WeightsError as error:
        pytest.skip(f"{error}")


def test_published_ids():
    tokenizer = read_clip_tokenizer(published_vocabulary())
    assert len(tokenizer) == 49408 and tokenizer.ids("!") == (256,) and tokenizer.backend.token_to_id("!") == 0
    row = [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer.encode(["a photo of a cat"])[0, 0].tolist() == row + [49407] * 70
    assert tokenizer.encode(["A photo  of a CAT"], pad=0)[0, 0].tolist() == row + [0] * 70
    again = CLIPTokenizer.from_json(tokenizer.to_json())
    assert torch.equal(again.encode(["caf\u00e9, 42!"]), tokenizer.encode(["caf\u00e9, 42!"]))


def test_vocabulary_is_found(tmp_path, monkeypatch, caplog, tokenizer):
    monkeypatch.setattr(clip_tokenizer, "PACKAGES", ("no_such_package",))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(WeightsError, match="none was found here; pip install clip-anytorch, or give tokenizer=PATH"):
        read_clip_tokenizer()
    snapshot = tmp_path / "hub" / "models--openai--clip-vit-large-patch14" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    with caplog.at_level("INFO"):
        assert torch.equal(read_clip_tokenizer().encode(["a cat"]), tokenizer.encode(["a cat"]))
    assert caplog.records[-1].message == f"CLIP's vocabulary: {snapshot}"
    package = tmp_path / "vocabulary_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / PUBLISHED).write_bytes(b"")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(clip_tokenizer, "PACKAGES", ("vocabulary_package",))
    assert find_vocabulary() == package / PUBLISHED


def test_published_file_that_is_damaged(tmp_path, monkeypatch):
    path = tmp_path / PUBLISHED
    for data, error, message in [
        (b"not gzip", DataError, "damaged or not a gzip file"),
        (gzip.compress(b"heading\na b\n" * 9)[:-4], DataError, "damaged or not a gzip file"),
        (gzip.compress(b"heading\n" + b"a b\n" * 9), WeightsError, "holds no 48,894 merges of two parts each"),
        (gzip.compress(b"heading\n" + b"a b c\n" * 50_000), WeightsError, "holds no 48,894 merges of two parts each"),
        (gzip.compress(bytes(1 << 26)), DataError, "unpacks to over 33,554,432 bytes"),
    ]:
        path.write_bytes(data)
        with pytest.raises(error, match=message):
            read_clip_tokenizer(path)
    with pytest.raises(DataError, match="no such file"):
        read_clip_tokenizer(tmp_path / "other.txt.gz")


# ---------------------------------------------------------------------------------------------------------- images


def test_images_of_any_size_and_none(tokenizer):
    encoder = CLIPImageEncoder(vision_network())
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in [(28, 28), (31, 60), (100, 40)]]
    cond = encoder([*images, None], CPU)
    assert cond["context"].shape == (4, 5, 32) and cond["pooled"].shape == (4, 24)
    assert torch.allclose(cond["pooled"][3:], encoder.encode(torch.zeros(1, 3, 28, 28))["pooled"], atol=1e-6)
    assert encoder.dims == {"context_dim": 32, "pooled_dim": 24}
    with pytest.raises(DataError, match=r"image is torch.float32 \(3, 8, 8\), expected torch.uint8"):
        encoder([torch.zeros(3, 8, 8)], CPU)


@pytest.mark.parametrize("height, width", [(40, 40), (33, 50), (61, 20), (300, 401)])
def test_resizing_equals_pil(height, width):
    from PIL import Image

    generator = torch.Generator().manual_seed(height)
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
    short = min(height, width)
    size = (int(28 * width / short), int(28 * height / short))
    resized = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - 28) // 2, (size[1] - 28) // 2
    square = torch.frombuffer(bytearray(resized.crop((left, top, left + 28, top + 28)).tobytes()), dtype=torch.uint8)
    mean, std = torch.tensor([[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]])
    expected = ((square.view(28, 28, 3) / 255 - mean) / std).permute(2, 0, 1)
    assert (preprocess(image, 28) - expected).abs().max() <= 1e-6


# ----------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("network", ["text", "projected", "vision"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_round_trips_are_bit_exact(tokenizer, network, dtype):
    built = vision_network() if network == "vision" else text_network(tokenizer, projected=network == "projected")
    state = built.to(dtype).state_dict()
    original = to_open_clip(state)
    ours = from_open_clip(original, state)
    diffusers = to_transformers(ours)
    again = to_open_clip(from_transformers(diffusers, state))
    assert again.keys() == original.keys() and all(torch.equal(again[key], original[key]) for key in original)
    assert all(again[key].dtype == original[key].dtype == dtype for key in original)
    assert all(torch.equal(ours[key], state[key]) for key in state)
    bare = to_transformers(state, prefix=False)
    assert not any(key.startswith(("text_model.", "vision_model.")) for key in bare)
    assert all(torch.equal(value, state[key]) for key, value in from_transformers(bare, state).items())


def test_known_extras_are_skipped_and_nothing_else(tokenizer):
    state = text_network(tokenizer).state_dict()
    theirs = to_transformers(state) | {"text_model.embeddings.position_ids": torch.arange(77)}
    assert from_transformers(theirs, state).keys() == state.keys()
    assert from_transformers(theirs | {"text_projection.weight": torch.eye(32)}, state).keys() == state.keys()
    with pytest.raises(WeightsError, match=r"missing none; unknown 1 \(text_model.surplus\)"):
        from_transformers(theirs | {"text_model.surplus": torch.eye(32)}, state)
    # SD 2.x: ours leaves out the last block and the projection of the file
    whole = to_open_clip(text_network(tokenizer, depth=4, projected=True).state_dict())
    assert from_open_clip(whole, state).keys() == state.keys()
    with pytest.raises(WeightsError, match="unknown 12 .transformer.resblocks.3.attn"):
        from_open_clip(whole, text_network(tokenizer, projected=True).state_dict())
    with pytest.raises(WeightsError, match="unknown 12 .transformer.resblocks.3.attn"):
        from_open_clip(whole, text_network(tokenizer, depth=2).state_dict())
    whole.pop("ln_final.bias")
    with pytest.raises(WeightsError, match=r"missing 1 \(ln_final.bias\); unknown none"):
        from_open_clip(whole, state)
