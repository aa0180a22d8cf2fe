"""transformers' DeepseekV3 with the weights of one of our language models."""

from typing import Any

import torch
import transformers

from baltoro.model.kimi import KimiK25
from baltoro.model.moe import Experts


def deepseek_v3(model: KimiK25, **settings: Any) -> transformers.DeepseekV3ForCausalLM:
    """`settings`: of its configuration, beside what the weights decide."""
    c = model.config.text
    config = transformers.DeepseekV3Config(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_heads,
        q_lora_rank=c.q_lora_rank,
        kv_lora_rank=c.kv_lora_rank,
        qk_nope_head_dim=c.qk_nope_head_dim,
        qk_rope_head_dim=c.qk_rope_head_dim,
        v_head_dim=c.v_head_dim,
        intermediate_size=c.intermediate_size,
        first_k_dense_replace=c.first_k_dense,
        n_routed_experts=c.n_routed_experts,
        num_experts_per_tok=c.num_experts_per_tok,
        n_shared_experts=c.n_shared_experts,
        moe_intermediate_size=c.moe_intermediate_size,
        routed_scaling_factor=c.routed_scaling_factor,
        n_group=1,
        topk_group=1,
        rms_norm_eps=c.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        **settings,
    )
    peer = transformers.DeepseekV3ForCausalLM(config)
    weights = model.language_model.state_dict()
    for name, module in model.language_model.named_modules():
        if isinstance(module, Experts):
            gate, up, down = (weights.pop(f"{name}.{part}_proj").transpose(1, 2) for part in ("gate", "up", "down"))
            weights[f"{name}.gate_up_proj"] = torch.cat((gate, up), 1)
            weights[f"{name}.down_proj"] = down
    peer.load_state_dict(weights)
    return peer
