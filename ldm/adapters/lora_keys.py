"""Keys in files of LoRA and its kin: the layer that each is about, and which of its tensors."""

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

KINDS = {  # the end of a key -> the tensor's name in `lora_tensors`
    **{f"{start}{old}.weight": new for start in ("lora_", "lora.", "lora_linear_layer.")
       for old, new in (("down", "down"), ("up", "up"), ("mid", "mid"))},
    "lora_A.weight": "down", "lora_B.weight": "up",
    "lora_B.bias": "up_b", "lora_up.bias": "up_b", "lora.up.bias": "up_b",
    "lora_magnitude_vector": "magnitude", "lora_magnitude_vector.weight": "magnitude",
    "alpha": "alpha", "lora.alpha": "alpha", "lora_linear_layer.alpha": "alpha",
    **{f"hada_{name}": f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{name}": f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    **{f"{name}.weight": name for name in ("a1", "a2", "b1", "b2")},
    "diff": "diff", "diff_b": "diff_b", "w_norm": "diff", "b_norm": "diff_b",
    "bias": "bias", "base_layer.bias": "bias",
    **{name: name for name in ("dora_scale", "scalar", "bias_indices", "bias_values", "bias_size", "on_input",
                               "oft_blocks", "rescale")},
}  # fmt: skip
GENERAL = {"alpha", "bias"}  # kinds whose keys other files have too
WRAPPED = r"(base_model\.model|module|_orig_mod)\."  # what PEFT, DDP and torch.compile put before names
SPELLINGS = (  # of one key, brought to one
    (rf"^((?:unet|transformer|text_encoder(?:_[23])?|diffusion_model)\.)?{WRAPPED}(?:{WRAPPED})*", r"\1"),
    (r"(?<=\.)_orig_mod\.", ""),
    (r"\.processor\.", "."),
    (r"\.self_attn\.to_(q|k|v|out)_lora\.", r".self_attn.\1_proj.lora."),
    (r"\.to_(q|k|v)_lora\.", r".to_\1.lora."),
    (r"\.to_out_lora\.", ".to_out.0.lora."),
)
NAMED = r"\.(lora_[AB]|lora_magnitude_vector|(?:hada|lokr)_\w+)\.(?!weight$|bias$)([^.]+)(?=$|\.weight$|\.bias$)"
BUNDLED = "bundle_emb."  # before the textual-inversion embedding of a trigger word
UNREAD = {  # a piece of a key -> the kind of adapter that has such keys; the first row that matches
    r"\.base_layer\.": "a whole network with a LoRA inside; save the adapter alone",
    r"\.modules_to_save\.": "layers that were trained whole (modules_to_save) beside its LoRA",
    r"\.lora_E(\.|$)|\.ranknum(\.|$)": "AdaLoRA",
    r"lora_embedding_[AB]": "a LoRA of a token embedding",
    r"vera_(lambda|A|B)": "VeRA",
    r"\.oft_[Rrs](\.|$)": "OFT in PEFT's layout, where LyCORIS' and kohya's is read",
    r"\.boft_(R|s)(\.|$)": "BOFT in PEFT's layout, where LyCORIS' is read",
    r"\.ia3_l(\.|$)": "(IA)^3 in PEFT's layout, where LyCORIS' is read",
    r"oft_diag|\.oft_": "OFT of an early or other layout",
    r"fourierft_|vblora_|hra_u|\.bone_|\.miss_|randlora_|shira_|loha_|poly_": "an adapter of PEFT's other than LoRA",
    r"lllite_": "a ControlNet-LLLite",
    r"^(unet|text_encoder):\d+:": "a LoRA of numbered layers (cloneofsimo/lora), which names none",
    r"^(image_proj|ip_adapter)\.": "an IP-Adapter beside its LoRA",
}


class Keys(NamedTuple):
    """What the keys of a file say."""

    modules: dict[str, dict[str, Any]]  # tensors by stem and by kind
    embeddings: list[str]  # words whose embedding is bundled with it
    adapters: list[str]  # what PEFT calls the adapters in it
    twice: list[str]  # keys of a tensor that another key gave already
    unknown: list[str]


def split_keys(tensors: Mapping[str, Any]) -> Keys:
    """Every key accounted for: what is no adapter's is unknown."""
    modules: dict[str, dict[str, Any]] = defaultdict(dict)
    words, adapters, twice, unknown = set(), set(), [], []
    for key, tensor in tensors.items():
        spelled, found = _spell(key)
        adapters.update(found)
        stem, kind = _stem(spelled)
        if key.startswith(BUNDLED):
            words.add(key.removeprefix(BUNDLED).partition(".")[0])
        elif kind is None and f"{key.removesuffix('.weight')}.on_input" in tensors:
            modules[spelled.removesuffix(".weight")]["weight"] = tensor
        elif kind is None:
            unknown.append(key)
        elif kind in modules[stem]:
            twice.append(key)
        else:
            modules[stem][kind] = tensor
    return Keys(dict(modules), sorted(words), sorted(adapters), sorted(twice), sorted(unknown))


def _spell(key: str) -> tuple[str, list[str]]:
    """The key as diffusers has it today, and the names of PEFT's adapters that were in it."""
    for pattern, name in SPELLINGS:
        key = re.sub(pattern, name, key)
    return re.sub(NAMED, r".\1", key), [name for _, name in re.findall(NAMED, key)]


def _stem(key: str) -> tuple[str, str | None]:
    """The layer and the kind of its tensor, None for a key of no adapter."""
    words = key.split(".")
    for count in (3, 2, 1):
        if len(words) > count and (kind := KINDS.get(".".join(words[-count:]))):
            return ".".join(words[:-count]), kind
    return key, None


def unread_kind(keys: list[str]) -> str | None:
    """The kind of adapter that has such keys and is not read here."""
    return next((words for pattern, words in UNREAD.items() if any(re.search(pattern, key) for key in keys)), None)
