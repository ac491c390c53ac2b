"""Decoders of further families, for what the common three do not have; all computed in float64 throughout."""

import torch
import transformers as hf

_LLAMA_LIKE = {
    "vocab_size": 50,
    "hidden_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 20,
    "max_position_embeddings": 16,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def _opt(**options):
    sizes = {"vocab_size": 50, "hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "ffn_dim": 20}
    return hf.OPTForCausalLM(hf.OPTConfig(**sizes, max_position_embeddings=16, pad_token_id=1, **options))


DECODERS = {
    "opt": lambda: _opt(word_embed_proj_dim=6),  # products before and after the layers, positions with an offset
    "opt_post_norm": lambda: _opt(word_embed_proj_dim=8, do_layer_norm_before=False),
    "gemma": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**_LLAMA_LIKE, head_dim=4)),  # scaled embedding, gains 1 + w
    "gemma2": lambda: hf.Gemma2ForCausalLM(  # logits capped by tanh, two kinds of mask, norms after the products
        hf.Gemma2Config(**_LLAMA_LIKE, head_dim=4, sliding_window=4, final_logit_softcapping=3.0)
    ),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_LLAMA_LIKE)),  # biases of query, key and value only
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**_LLAMA_LIKE, head_dim=4, sliding_window=4)),
    "mixtral": lambda: hf.MixtralForCausalLM(  # experts: three-dimensional weights, tokens picked out by a router
        hf.MixtralConfig(**_LLAMA_LIKE, num_local_experts=3, experts_implementation="eager")
    ),
    "qwen3_moe": lambda: hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(
            **_LLAMA_LIKE,
            head_dim=4,
            num_experts=3,
            num_experts_per_tok=2,
            moe_intermediate_size=6,
            experts_implementation="eager",
        )
    ),
    "glm4_moe": lambda: hf.Glm4MoeForCausalLM(  # the router is a product in float32, a conversion in most models
        hf.Glm4MoeConfig(
            **_LLAMA_LIKE,
            head_dim=4,
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=6,
            n_shared_experts=1,
            first_k_dense_replace=1,
            n_group=1,
            topk_group=1,
            experts_implementation="eager",
        )
    ),
    "openai-gpt": lambda: hf.OpenAIGPTLMHeadModel(  # layers return lists
        hf.OpenAIGPTConfig(vocab_size=50, n_positions=16, n_embd=8, n_layer=3, n_head=2)
    ),
    "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**_LLAMA_LIKE)),  # a head with a bias
    "falcon": lambda: hf.FalconForCausalLM(  # a linear map written as a product with the transposed weight
        hf.FalconConfig(vocab_size=50, hidden_size=8, num_hidden_layers=3, num_attention_heads=2)
    ),
    "bloom": lambda: hf.BloomForCausalLM(  # a norm between embedding and layers
        hf.BloomConfig(vocab_size=50, hidden_size=8, n_layer=3, n_head=2)
    ),
}


def build_decoder(name):
    """The model of that name, every parameter random, ready to be measured."""
    torch.manual_seed(0)
    model = DECODERS[name]().to(torch.float64).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
        parameter.requires_grad_(False)
    return model


def shared_key_values() -> hf.PreTrainedModel:
    """Gemma3n, whose last layers take keys and values of others."""
    torch.manual_seed(0)
    config = hf.Gemma3nTextConfig(
        vocab_size=50, vocab_size_per_layer_input=50, hidden_size=8, hidden_size_per_layer_input=4, head_dim=4,
        intermediate_size=20, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1, laurel_rank=2,
        altup_num_inputs=2, max_position_embeddings=16, sliding_window=4, num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2, activation_sparsity_pattern=[0.0] * 4, pad_token_id=0,
    )  # fmt: skip
    model = hf.Gemma3nForCausalLM(config).double().eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    return model
