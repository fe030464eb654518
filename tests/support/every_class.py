"""Every causal language model that transformers has, made tiny."""

from typing import Any

from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


VOCABULARY = 96

# Sizes by the names that configurations give them; a class takes those that it has.
SIZES = {
    ("hidden_size", "d_model", "n_embd", "dim", "model_dim", "embed_dim", "word_embed_proj_dim"): 64,
    ("head_dim", "d_kv", "attention_head_dim", "qk_nope_head_dim", "v_head_dim", "global_head_dim"): 16,
    ("qk_rope_head_dim", "rotary_dim"): 8,
    ("kv_lora_rank", "q_lora_rank", "o_lora_rank"): 16,
    ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size"): 96,
    ("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"): 32,
    ("num_hidden_layers", "n_layer", "num_layers", "decoder_layers", "encoder_layers", "n_layers"): 2,
    ("num_attention_heads", "n_head", "decoder_attention_heads", "encoder_attention_heads", "n_heads", "num_heads"): 4,
    ("num_key_value_heads", "num_kv_heads", "multi_query_group_num"): 2,
    ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"): 4,
    ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"): 2,
    ("n_shared_experts", "n_group", "topk_group", "first_k_dense_replace"): 1,
    ("max_position_embeddings", "n_positions", "max_sequence_length", "block_size"): 128,
    ("vocab_size",): VOCABULARY,
    ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"): 1,
}
SWITCHES = {"is_decoder": True, "use_cache": False, "add_cross_attention": False, "attn_implementation": "eager"}


def names() -> list[str]:
    """Model types, of which each has one class of causal language model."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


# What a class asks for beside that.
OWN = {
    "dots3_note": {"num_key_value_heads": 4},
    "dots3_note_text": {"num_key_value_heads": 4},
    "dots1": {"n_group": 1, "topk_group": 1, "n_routed_experts": 4},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 9, "attn_layer_period": 3, "attn_layer_offset": 1},
    "zaya": {"num_experts_per_tok": 1},
}
# Computed from others where they are None.
OF_OTHERS = ("head_dim", "num_key_value_heads", "num_kv_heads")


def _shrink(config: PretrainedConfig) -> dict[str, Any]:
    sizes = {name: value for group, value in SIZES.items() for name in group}
    given = config.to_dict()
    if "qk_rope_head_dim" in given:  # latent attention rotates this part of a head alone
        sizes |= {"head_dim": sizes["qk_rope_head_dim"], "num_key_value_heads": sizes["num_attention_heads"]}
    whole = [
        name for name, value in given.items() if isinstance(value, int) and value is not True and value is not False
    ]
    whole += [name for name in OF_OTHERS if name in given]
    return {name: sizes[name] for name in whole if name in sizes}


def tiny_config(kind: str) -> PretrainedConfig:
    """The configuration of a model type with small sizes."""
    cls = CONFIG_MAPPING[kind]
    plain = cls()
    small = _shrink(plain)
    for name in getattr(plain, "sub_configs", {}):
        inner = getattr(plain, name, None)
        if isinstance(inner, PretrainedConfig):
            small[name] = _shrink(inner)
    kinds = getattr(plain, "layer_types", None)
    computed = any(isinstance(getattr(cls, name, None), property) for name in ("layer_types", "layers_block_type"))
    if isinstance(kinds, list) and not computed:
        kinds = list(dict.fromkeys(kinds))
        small["layer_types"] = (kinds * 2)[:2] if len(kinds) <= 2 else kinds
        small["num_hidden_layers"] = len(small["layer_types"])
    switches = {name: value for name, value in SWITCHES.items() if hasattr(plain, name)}
    return cls(**small | switches | OWN.get(kind, {}))


def tiny_model(kind: str) -> PreTrainedModel:
    """A model of a type, with the weights that its class draws."""
    return AutoModelForCausalLM.from_config(tiny_config(kind)).float().eval()
