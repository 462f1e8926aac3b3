"""Names of T5's parameters in transformers' files, as in `ledger`, and the arguments that their config.json tells."""

from collections.abc import Iterable, Mapping

from torch import Tensor

from ldm.conditioning.t5 import T5Encoder
from ldm.utils.errors import WeightsError
from ldm.weights.formats import MAX_REPEATS, Config, Shapes, check_fixed
from ldm.weights.ledger import Names, equal, to_ours, to_theirs, translate, without

TOKENS = ("shared.weight", "encoder.embed_tokens.weight")  # one table; a file holds it under either name, or both
TRANSFORMERS = [
    (r"^tokens\.weight$", TOKENS[0]),
    (r"^position\.table$", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
    (r"^norm\.", "encoder.final_layer_norm."),
    (r"^blocks\.", "encoder.block."),
    (r"\.norm1\.", ".layer.0.layer_norm."),
    (r"\.norm2\.", ".layer.1.layer_norm."),
    (r"\.attention\.qkv\.", *(f".layer.0.SelfAttention.{name}." for name in "qkv")),
    (r"\.attention\.out\.", ".layer.0.SelfAttention.o."),
    (r"\.mlp\.wi\.", ".layer.1.DenseReluDense.wi_0.", ".layer.1.DenseReluDense.wi_1."),
    (r"\.mlp\.wo\.", ".layer.1.DenseReluDense.wo."),
]
WRITTEN = ("T5EncoderModel", "MT5EncoderModel")
CLASSES = (*WRITTEN, "T5ForConditionalGeneration", "MT5ForConditionalGeneration", "T5Model", "MT5Model")
FAMILIES = {  # of config.json: what its keys are where they are not given
    "t5": {"vocab_size": 32128, "d_ff": 2048, "num_layers": 6, "num_heads": 8, "feed_forward_proj": "relu"},
    "mt5": {"vocab_size": 250112, "d_ff": 1024, "num_layers": 8, "num_heads": 6},
}
FIXED = {
    "feed_forward_proj": "gated-gelu",
    "layer_norm_epsilon": 1e-6,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
}


def names(keys: Iterable[str]) -> Names:
    """Their keys for each of ours."""
    return {key: translate(key, TRANSFORMERS) for key in keys}


def from_transformers(state: Mapping[str, Tensor], keys: Iterable[str]) -> dict[str, Tensor]:
    """A transformers state dict under our names, without the decoder of a whole T5. Raises WeightsError."""
    shared, tokens = TOKENS
    if shared in state and tokens in state and not equal(state[shared], state[tokens]):
        raise WeightsError(f"{shared} and {tokens} differ, in T5 they are one table; the file is damaged")
    named = names(keys)
    if shared not in state:
        named["tokens.weight"] = (tokens,)
    unused = ("decoder.", "lm_head.", *([tokens] if shared in state else ()))
    return to_ours(without(state, lambda key: key.startswith(unused)), named)


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `from_transformers`; the table of tokens once, as published."""
    return to_theirs(state, names(state))


def from_config(config: Config) -> Config:
    """Arguments of `T5Encoder` from the config.json of a T5EncoderModel or an MT5EncoderModel. Raises WeightsError."""
    family = config.get("model_type", "t5")
    if family not in FAMILIES:
        raise WeightsError(f"config.json has model_type={str(family)[:60]!r}, expected one of: {', '.join(FAMILIES)}")
    config = {"d_model": 512, "d_kv": 64, **FAMILIES[family], **config}
    check_fixed(config, FIXED)
    return {
        "width": config["d_model"],
        "depth": config["num_layers"],
        "num_heads": config["num_heads"],
        "head_dim": config["d_kv"],
        "mlp_dim": config["d_ff"],
        "vocab_size": config["vocab_size"],
    }


def from_shapes(shapes: Shapes) -> Config:
    """Arguments of `T5Encoder` from a file without config."""
    block = "encoder.block.{}.layer."
    num_heads = shapes[translate("position.table", TRANSFORMERS)[0]][1]
    return {
        "width": shapes["encoder.final_layer_norm.weight"][0],
        "depth": sum(f"{block.format(i)}0.layer_norm.weight" in shapes for i in range(MAX_REPEATS)),
        "num_heads": num_heads,
        "head_dim": shapes[f"{block.format(0)}0.SelfAttention.q.weight"][0] // num_heads,
        "mlp_dim": shapes[f"{block.format(0)}1.DenseReluDense.wo.weight"][1],
        "vocab_size": next(shapes[name][0] for name in TOKENS if name in shapes),
    }


def arguments(net: T5Encoder) -> Config:
    """The arguments that made a network."""
    attention = net.blocks[0].attention
    return {
        "width": net.width,
        "depth": len(net.blocks),
        "num_heads": attention.num_heads,
        "head_dim": attention.out.in_features // attention.num_heads,
        "mlp_dim": net.blocks[0].mlp.wo.in_features,
        "vocab_size": net.tokens.num_embeddings,
    }


def to_config(net: T5Encoder) -> Config:
    """config.json of the transformers model that is this network; its family is that of the vocabulary."""
    a = arguments(net)
    is_mt5 = a["vocab_size"] == FAMILIES["mt5"]["vocab_size"]
    return {
        "architectures": [WRITTEN[is_mt5]],
        "model_type": "mt5" if is_mt5 else "t5",
        "d_model": a["width"],
        "d_kv": a["head_dim"],
        "d_ff": a["mlp_dim"],
        "num_layers": a["depth"],
        "num_heads": a["num_heads"],
        "vocab_size": a["vocab_size"],
        "is_encoder_decoder": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
        **FIXED,
    }
