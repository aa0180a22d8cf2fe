"""Sizes of the model: one dataclass per tower, and the three published or built-in configurations."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Yarn:
    """YaRN context extension (arXiv 2309.00071) with mscale = mscale_all_dim = 1, as in the released config."""

    factor: float
    original_max_position: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True)
class TextConfig:
    """The K2 language model (DeepSeek-V3 class): MLA attention, sigmoid-routed mixture of experts."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    intermediate_size: int
    first_k_dense: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int
    moe_intermediate_size: int
    routed_scaling_factor: float
    rope_theta: float = 50000.0
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    yarn: Yarn | None = None

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim


@dataclass(frozen=True)
class VisionConfig:
    """MoonViT-3D and its projector."""

    patch_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    pos_emb_height: int
    pos_emb_width: int
    max_frames: int = 4
    merge: int = 2
    norm_eps: float = 1e-5


@dataclass(frozen=True)
class ModelConfig:
    text: TextConfig
    vision: VisionConfig


MOONVIT_3D = VisionConfig(
    patch_size=14,
    hidden_size=1152,
    num_layers=27,
    num_heads=16,
    intermediate_size=4304,
    pos_emb_height=64,
    pos_emb_width=64,
)

K25 = ModelConfig(
    text=TextConfig(
        vocab_size=163840,
        hidden_size=7168,
        num_layers=61,
        num_heads=64,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        intermediate_size=18432,
        first_k_dense=1,
        n_routed_experts=384,
        num_experts_per_tok=8,
        n_shared_experts=1,
        moe_intermediate_size=2048,
        routed_scaling_factor=2.827,
        yarn=Yarn(factor=64.0, original_max_position=4096),
    ),
    vision=MOONVIT_3D,
)

MOONLIGHT = ModelConfig(
    text=TextConfig(
        vocab_size=163840,
        hidden_size=2048,
        num_layers=27,
        num_heads=16,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        intermediate_size=11264,
        first_k_dense=1,
        n_routed_experts=64,
        num_experts_per_tok=6,
        n_shared_experts=2,
        moe_intermediate_size=1408,
        routed_scaling_factor=2.446,
    ),
    vision=MOONVIT_3D,
)

NANO = ModelConfig(
    text=TextConfig(
        vocab_size=2048,
        hidden_size=128,
        num_layers=4,
        num_heads=5,
        q_lora_rank=None,
        kv_lora_rank=128,
        qk_nope_head_dim=32,
        qk_rope_head_dim=32,
        v_head_dim=32,
        intermediate_size=512,
        first_k_dense=1,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=1,
        moe_intermediate_size=128,
        routed_scaling_factor=1.0,
        rope_theta=1000.0,
        initializer_range=0.088,
    ),
    vision=VisionConfig(
        patch_size=8,
        hidden_size=96,
        num_layers=3,
        num_heads=4,
        intermediate_size=256,
        pos_emb_height=8,
        pos_emb_width=8,
    ),
)

PRESETS: dict[str, ModelConfig] = {"nano": NANO, "moonlight": MOONLIGHT, "k25": K25}
