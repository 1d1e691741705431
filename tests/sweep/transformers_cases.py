"""Tiny transformers models, built from their configurations, one line each.

A line names the architecture, the class (with its head where there is one), what the model is fed, and what the
configuration needs beside the usual names of sizes in ``TEXT``, ``VISION`` and so on.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from .checks import Case, names_of

VOCABULARY = 99
LENGTH = 12
BATCH = 2

# Weights of the usual 0.02 in so small a model would make its layers contribute next to nothing.
SCALE = {"initializer_range": 0.1}
TEXT = {
    **SCALE,
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "num_labels": 3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 8,
}
PLAIN_TEXT = {key: value for key, value in TEXT.items() if key != "head_dim"}
GPT = {
    **SCALE,
    **{key: TEXT[key] for key in ("vocab_size", "num_labels", "bos_token_id", "eos_token_id", "pad_token_id")},
    "n_positions": 64,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
}
SEQ2SEQ = {
    **SCALE,
    "init_std": 0.1,
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
VISION = {
    **SCALE,
    "image_size": 32,
    "patch_size": 8,
    "num_channels": 3,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "num_labels": 3,
}
STAGES = {**SCALE, "num_channels": 3, "num_labels": 3, "hidden_sizes": [16, 32, 48], "depths": [2, 2, 1], "embedding_size": 16}
SWIN = {
    **SCALE,
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
    "num_labels": 3,
}
AUDIO = {
    **SCALE,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": (16, 16, 16),
    "conv_stride": (4, 4, 4),
    "conv_kernel": (8, 8, 8),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "num_labels": 3,
}
CLIP_PARTS = {
    "text_config": {key: PLAIN_TEXT[key] for key in PLAIN_TEXT if key not in ("num_labels", "num_key_value_heads")},
    "vision_config": {key: value for key, value in VISION.items() if key != "num_labels"},
    "projection_dim": 16,
}
PYRAMID = {
    **SCALE,
    "image_size": 64,
    "num_labels": 3,
    "num_encoder_blocks": 4,
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [16, 16, 32, 32],
    "num_attention_heads": [1, 2, 2, 4],
    "decoder_hidden_size": 16,
}


# ---------------------------------------------------------------- inputs


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def _tokens(length: int = LENGTH) -> Tensor:
    return torch.randint(3, VOCABULARY, (BATCH, length), generator=_generator())


def _pixels(size: int = 32) -> Tensor:
    return torch.randn(BATCH, 3, size, size, generator=_generator())


def text() -> dict[str, Any]:
    return {"input_ids": _tokens(), "attention_mask": torch.ones(BATCH, LENGTH, dtype=torch.long)}


def tokens_alone() -> dict[str, Any]:
    return {"input_ids": _tokens()}


def long_text() -> dict[str, Any]:
    return {"input_ids": _tokens(32), "attention_mask": torch.ones(BATCH, 32, dtype=torch.long)}


def text_pair() -> dict[str, Any]:
    return {"input_ids": _tokens(), "decoder_input_ids": _tokens(7)}


def image() -> dict[str, Any]:
    return {"pixel_values": _pixels()}


def large_image() -> dict[str, Any]:
    return {"pixel_values": _pixels(64)}


def larger_image() -> dict[str, Any]:
    return {"pixel_values": _pixels(128)}


def video() -> dict[str, Any]:
    return {"pixel_values": torch.randn(BATCH, 4, 3, 32, 32, generator=_generator())}


def text_and_image() -> dict[str, Any]:
    return {"input_ids": _tokens(), "pixel_values": _pixels()}


def wave() -> dict[str, Any]:
    return {"input_values": torch.randn(BATCH, 2048, generator=_generator())}


def spectrogram_pair() -> dict[str, Any]:
    return {"input_features": torch.randn(BATCH, 16, 40, generator=_generator()), "decoder_input_ids": _tokens(7)}


def frames_pair() -> dict[str, Any]:
    return {"input_features": torch.randn(BATCH, 40, 16, generator=_generator()), "decoder_input_ids": _tokens(7)}


def spectrogram() -> dict[str, Any]:
    return {"input_values": torch.randn(BATCH, 48, 32, generator=_generator())}


def series() -> dict[str, Any]:
    return {"past_values": torch.randn(BATCH, 32, 2, generator=_generator())}


Inputs = Callable[[], dict[str, Any]]

# ---------------------------------------------------------------- the table
# name of the configuration, class, inputs, configuration

ENCODERS: list[tuple[str, str, Inputs, dict[str, Any]]] = [
    ("bert", "BertForSequenceClassification", text, PLAIN_TEXT),
    ("roberta", "RobertaForSequenceClassification", text, PLAIN_TEXT),
    ("xlm-roberta", "XLMRobertaForTokenClassification", text, PLAIN_TEXT),
    (
        "distilbert",
        "DistilBertForSequenceClassification",
        text,
        {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 64, **TEXT},
    ),
    ("albert", "AlbertForSequenceClassification", text, {**PLAIN_TEXT, "embedding_size": 16, "num_hidden_groups": 2}),
    ("electra", "ElectraForSequenceClassification", text, {**PLAIN_TEXT, "embedding_size": 16}),
    (
        "deberta",
        "DebertaForSequenceClassification",
        text,
        {**PLAIN_TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    ),
    (
        "deberta-v2",
        "DebertaV2ForSequenceClassification",
        text,
        {**PLAIN_TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    ),
    ("mpnet", "MPNetForSequenceClassification", text, PLAIN_TEXT),
    ("modernbert", "ModernBertForSequenceClassification", text, PLAIN_TEXT),
    ("nomic_bert", "NomicBertModel", text, PLAIN_TEXT),
    ("convbert", "ConvBertForSequenceClassification", text, {**PLAIN_TEXT, "embedding_size": 32, "conv_kernel_size": 3}),
    (
        "mobilebert",
        "MobileBertForSequenceClassification",
        text,
        {**PLAIN_TEXT, "embedding_size": 16, "intra_bottleneck_size": 32, "true_hidden_size": 32},
    ),
    ("squeezebert", "SqueezeBertForSequenceClassification", text, {**PLAIN_TEXT, "embedding_size": 32}),
    (
        "funnel",
        "FunnelForSequenceClassification",
        text,
        {
            "vocab_size": VOCABULARY,
            "block_sizes": [1, 1, 1],
            "d_model": 32,
            "n_head": 4,
            "d_head": 8,
            "d_inner": 64,
            "num_labels": 3,
        },
    ),
    ("fnet", "FNetForSequenceClassification", tokens_alone, PLAIN_TEXT),
    ("rembert", "RemBertForSequenceClassification", text, {**PLAIN_TEXT, "input_embedding_size": 16}),
    ("roformer", "RoFormerForSequenceClassification", text, {**PLAIN_TEXT, "embedding_size": 32}),
    ("esm", "EsmForSequenceClassification", text, {**PLAIN_TEXT, "position_embedding_type": "rotary"}),
    (
        "nystromformer",
        "NystromformerForSequenceClassification",
        text,
        {**PLAIN_TEXT, "num_landmarks": 4, "segment_means_seq_len": LENGTH},
    ),
    ("megatron-bert", "MegatronBertForSequenceClassification", text, PLAIN_TEXT),
    ("ernie", "ErnieForSequenceClassification", text, PLAIN_TEXT),
    ("splinter", "SplinterForQuestionAnswering", text, PLAIN_TEXT),
    ("layoutlm", "LayoutLMForSequenceClassification", text, PLAIN_TEXT),
    ("longformer", "LongformerForSequenceClassification", long_text, {**PLAIN_TEXT, "attention_window": 8}),
    ("big_bird", "BigBirdForSequenceClassification", long_text, {**PLAIN_TEXT, "attention_type": "original_full"}),
    (
        "canine",
        "CanineForSequenceClassification",
        text,
        {
            **PLAIN_TEXT,
            "local_transformer_stride": 4,
            "upsampling_kernel_size": 2,
            "downsampling_rate": 2,
            "num_hash_functions": 4,
            "num_hash_buckets": 32,
        },
    ),
    (
        "xlnet",
        "XLNetForSequenceClassification",
        text,
        {"vocab_size": VOCABULARY, "d_model": 32, "n_layer": 3, "n_head": 4, "d_inner": 64, "num_labels": 3},
    ),
    (
        "flaubert",
        "FlaubertForSequenceClassification",
        text,
        {"vocab_size": VOCABULARY, "emb_dim": 32, "n_layers": 3, "n_heads": 4, "max_position_embeddings": 64, "num_labels": 3},
    ),
    ("ibert", "IBertForSequenceClassification", text, PLAIN_TEXT),
    ("data2vec-text", "Data2VecTextForSequenceClassification", text, PLAIN_TEXT),
    (
        "reformer",
        "ReformerForSequenceClassification",
        long_text,
        {
            **PLAIN_TEXT,
            "attention_head_size": 8,
            "feed_forward_size": 64,
            "axial_pos_embds": False,
            "attn_layers": ["local", "local"],
            "local_attn_chunk_length": 8,
            "hidden_dropout_prob": 0.0,
            "is_decoder": False,
        },
    ),
    (
        "perceiver",
        "PerceiverForSequenceClassification",
        lambda: {"inputs": _tokens()},
        {
            "vocab_size": VOCABULARY,
            "num_latents": 8,
            "d_latents": 32,
            "d_model": 32,
            "num_self_attends_per_block": 2,
            "num_self_attention_heads": 4,
            "num_cross_attention_heads": 4,
            "max_position_embeddings": 64,
            "num_labels": 3,
        },
    ),
]

DECODERS: list[tuple[str, str, Inputs, dict[str, Any]]] = [
    ("gpt2", "GPT2LMHeadModel", text, GPT),
    ("gpt_bigcode", "GPTBigCodeForCausalLM", text, GPT),
    (
        "gpt_neo",
        "GPTNeoForCausalLM",
        text,
        {
            **SCALE,
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 64,
            "max_position_embeddings": 64,
            "num_layers": 4,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 2]],
            "window_size": 4,
        },
    ),
    ("gpt_neox", "GPTNeoXForCausalLM", text, PLAIN_TEXT),
    ("gptj", "GPTJForCausalLM", text, {**GPT, "rotary_dim": 4}),
    ("codegen", "CodeGenForCausalLM", text, {**GPT, "rotary_dim": 4}),
    ("openai-gpt", "OpenAIGPTLMHeadModel", text, GPT),
    ("ctrl", "CTRLLMHeadModel", text, {**GPT, "dff": 64}),
    ("opt", "OPTForCausalLM", text, {**PLAIN_TEXT, "ffn_dim": 64, "word_embed_proj_dim": 32}),
    ("biogpt", "BioGptForCausalLM", text, PLAIN_TEXT),
    (
        "xglm",
        "XGLMForCausalLM",
        text,
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "num_layers": 3,
            "attention_heads": 4,
            "ffn_dim": 64,
            "max_position_embeddings": 64,
        },
    ),
    ("bloom", "BloomForCausalLM", text, {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 3, "n_head": 4}),
    ("mpt", "MptForCausalLM", text, {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 64}),
    ("falcon", "FalconForCausalLM", text, PLAIN_TEXT),
    ("llama", "LlamaForCausalLM", text, TEXT),
    ("mistral", "MistralForCausalLM", text, TEXT),
    ("qwen2", "Qwen2ForSequenceClassification", text, TEXT),
    ("qwen3", "Qwen3ForCausalLM", text, TEXT),
    ("gemma", "GemmaForCausalLM", text, TEXT),
    ("gemma2", "Gemma2ForCausalLM", text, {**TEXT, "query_pre_attn_scalar": 8}),
    ("gemma3_text", "Gemma3ForCausalLM", text, {**TEXT, "query_pre_attn_scalar": 8}),
    ("phi", "PhiForCausalLM", text, PLAIN_TEXT),
    ("phi3", "Phi3ForCausalLM", text, PLAIN_TEXT),
    ("stablelm", "StableLmForCausalLM", text, PLAIN_TEXT),
    ("starcoder2", "Starcoder2ForCausalLM", text, PLAIN_TEXT),
    ("olmo", "OlmoForCausalLM", text, PLAIN_TEXT),
    ("olmo2", "Olmo2ForCausalLM", text, PLAIN_TEXT),
    ("cohere", "CohereForCausalLM", text, PLAIN_TEXT),
    ("granite", "GraniteForCausalLM", text, PLAIN_TEXT),
    ("persimmon", "PersimmonForCausalLM", text, PLAIN_TEXT),
    ("nemotron", "NemotronForCausalLM", text, TEXT),
    ("glm", "GlmForCausalLM", text, TEXT),
    ("helium", "HeliumForCausalLM", text, TEXT),
    ("smollm3", "SmolLM3ForCausalLM", text, TEXT),
    ("diffllama", "DiffLlamaForCausalLM", text, TEXT),
    ("mixtral", "MixtralForCausalLM", text, {**TEXT, "num_local_experts": 4}),
    (
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        text,
        {**PLAIN_TEXT, "num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    ),
    ("gpt_oss", "GptOssForCausalLM", text, {**TEXT, "num_local_experts": 4}),
    (
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        text,
        {
            **PLAIN_TEXT,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "kv_lora_rank": 8,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
            "first_k_dense_replace": 1,
        },
    ),
    (
        "mamba",
        "MambaForCausalLM",
        tokens_alone,
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 4},
    ),
    (
        "mamba2",
        "Mamba2ForCausalLM",
        tokens_alone,
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "state_size": 4,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 1,
            "chunk_size": 8,
        },
    ),
    (
        "falcon_mamba",
        "FalconMambaForCausalLM",
        tokens_alone,
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 4},
    ),
    (
        "rwkv",
        "RwkvForCausalLM",
        tokens_alone,
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "context_length": 64, "use_cache": False},
    ),
    ("recurrent_gemma", "RecurrentGemmaForCausalLM", text, {**PLAIN_TEXT, "lru_width": 32, "attention_window_size": 8}),
    (
        "bamba",
        "BambaForCausalLM",
        text,
        {
            **PLAIN_TEXT,
            "num_hidden_layers": 4,
            "attn_layer_indices": [1, 3],
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_d_state": 4,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 8,
        },
    ),
    (
        "jamba",
        "JambaForCausalLM",
        text,
        {
            **PLAIN_TEXT,
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 2,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
]

ENCODER_DECODERS: list[tuple[str, str, Inputs, dict[str, Any]]] = [
    ("bart", "BartForConditionalGeneration", text_pair, SEQ2SEQ),
    ("mbart", "MBartForConditionalGeneration", text_pair, SEQ2SEQ),
    ("pegasus", "PegasusForConditionalGeneration", text_pair, SEQ2SEQ),
    ("marian", "MarianMTModel", text_pair, SEQ2SEQ),
    ("blenderbot-small", "BlenderbotSmallForConditionalGeneration", text_pair, SEQ2SEQ),
    ("m2m_100", "M2M100ForConditionalGeneration", text_pair, SEQ2SEQ),
    ("plbart", "PLBartForConditionalGeneration", text_pair, SEQ2SEQ),
    (
        "led",
        "LEDForConditionalGeneration",
        text_pair,
        {**SEQ2SEQ, "attention_window": 8, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64},
    ),
    (
        "prophetnet",
        "ProphetNetForConditionalGeneration",
        text_pair,
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_encoder_layers": 2,
            "num_decoder_layers": 2,
            "num_encoder_attention_heads": 4,
            "num_decoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "max_position_embeddings": 64,
            "ngram": 2,
        },
    ),
    ("t5", "T5ForConditionalGeneration", text_pair, T5),
    ("mt5", "MT5ForConditionalGeneration", text_pair, T5),
    ("umt5", "UMT5ForConditionalGeneration", text_pair, T5),
    ("longt5", "LongT5ForConditionalGeneration", text_pair, {**T5, "local_radius": 3, "encoder_attention_type": "local"}),
    (
        "switch_transformers",
        "SwitchTransformersForConditionalGeneration",
        text_pair,
        {**T5, "num_experts": 2, "expert_capacity": 32, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    ),
    (
        "whisper",
        "WhisperForConditionalGeneration",
        spectrogram_pair,
        {**SEQ2SEQ, "num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 64},
    ),
    (
        "speech_to_text",
        "Speech2TextForConditionalGeneration",
        frames_pair,
        {**SEQ2SEQ, "input_feat_per_channel": 16, "conv_channels": 16, "max_source_positions": 64, "max_target_positions": 64},
    ),
]

VISION_MODELS: list[tuple[str, str, Inputs, dict[str, Any]]] = [
    ("vit", "ViTForImageClassification", image, VISION),
    ("deit", "DeiTForImageClassificationWithTeacher", image, VISION),
    ("beit", "BeitForImageClassification", image, {**VISION, "use_relative_position_bias": True}),
    ("data2vec-vision", "Data2VecVisionForImageClassification", image, VISION),
    ("dinov2", "Dinov2ForImageClassification", image, VISION),
    ("dinov2_with_registers", "Dinov2WithRegistersForImageClassification", image, VISION),
    ("dinov3_vit", "DINOv3ViTModel", image, {**VISION, "num_register_tokens": 2}),
    ("ijepa", "IJepaForImageClassification", image, VISION),
    (
        "vit_mae",
        "ViTMAEForPreTraining",
        image,
        {
            **VISION,
            "decoder_hidden_size": 16,
            "decoder_num_hidden_layers": 2,
            "decoder_num_attention_heads": 4,
            "decoder_intermediate_size": 32,
        },
    ),
    ("vit_msn", "ViTMSNForImageClassification", image, VISION),
    ("yolos", "YolosForObjectDetection", image, {**VISION, "image_size": [32, 32], "num_detection_tokens": 5}),
    ("aimv2_vision_model", "Aimv2VisionModel", image, VISION),
    ("siglip", "SiglipForImageClassification", image, CLIP_PARTS),
    (
        "dpt",
        "DPTForSemanticSegmentation",
        image,
        {
            **VISION,
            "num_hidden_layers": 4,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [8, 8, 8, 8],
            "fusion_hidden_size": 8,
            "readout_type": "project",
        },
    ),
    ("swin", "SwinForImageClassification", image, SWIN),
    ("swinv2", "Swinv2ForImageClassification", image, SWIN),
    ("swin2sr", "Swin2SRForImageSuperResolution", image, {**SWIN, "image_size": 16, "patch_size": 1, "num_channels_out": 3}),
    (
        "focalnet",
        "FocalNetForImageClassification",
        image,
        {
            "image_size": 32,
            "patch_size": 2,
            "embed_dim": 16,
            "hidden_sizes": [16, 32],
            "depths": [2, 2],
            "focal_levels": [2, 2],
            "focal_windows": [3, 3],
            "num_labels": 3,
        },
    ),
    (
        "hiera",
        "HieraForImageClassification",
        image,
        {
            "image_size": [32, 32],
            "patch_size": [7, 7],
            "patch_stride": [4, 4],
            "patch_padding": [3, 3],
            "masked_unit_size": [4, 4],
            "embed_dim": 16,
            "depths": [1, 1, 2],
            "num_heads": [2, 4, 8],
            "query_stride": [2, 2],
            "num_query_pool": 1,
            "num_labels": 3,
        },
    ),
    ("segformer", "SegformerForSemanticSegmentation", large_image, PYRAMID),
    ("glpn", "GLPNForDepthEstimation", large_image, PYRAMID),
    ("pvt", "PvtForImageClassification", large_image, PYRAMID),
    ("pvt_v2", "PvtV2ForImageClassification", large_image, PYRAMID),
    (
        "levit",
        "LevitForImageClassification",
        large_image,
        {
            "image_size": 64,
            "hidden_sizes": [16, 32, 48],
            "num_attention_heads": [2, 4, 6],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
            "attention_ratio": [2, 2, 2],
            "num_labels": 3,
        },
    ),
    (
        "cvt",
        "CvtForImageClassification",
        large_image,
        {**SCALE, "embed_dim": [16, 32, 48], "num_heads": [1, 2, 4], "depth": [1, 2, 3], "num_labels": 3},
    ),
    (
        "mobilevit",
        "MobileViTForImageClassification",
        larger_image,
        {
            "image_size": 128,
            "hidden_sizes": [16, 24, 32],
            "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32],
            "num_labels": 3,
            "output_stride": 32,
        },
    ),
    (
        "mobilevitv2",
        "MobileViTV2ForImageClassification",
        large_image,
        {"image_size": 64, "width_multiplier": 0.25, "n_attn_blocks": [1, 1, 1], "num_labels": 3},
    ),
    (
        "swiftformer",
        "SwiftFormerForImageClassification",
        large_image,
        {"image_size": 64, "depths": [1, 1, 2, 1], "embed_dims": [8, 16, 16, 24], "num_labels": 3},
    ),
    (
        "poolformer",
        "PoolFormerForImageClassification",
        large_image,
        {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1], "num_labels": 3},
    ),
    ("videomae", "VideoMAEForVideoClassification", video, {**VISION, "num_frames": 4, "tubelet_size": 2}),
    ("timesformer", "TimesformerForVideoClassification", video, {**VISION, "num_frames": 4}),
    ("vivit", "VivitForVideoClassification", video, {**VISION, "num_frames": 4, "tubelet_size": [2, 8, 8]}),
    ("resnet", "ResNetForImageClassification", image, {**STAGES, "layer_type": "basic"}),
    ("regnet", "RegNetForImageClassification", image, {**STAGES, "groups_width": 8}),
    ("convnext", "ConvNextForImageClassification", image, {**STAGES, "num_stages": 3, "patch_size": 2}),
    ("convnextv2", "ConvNextV2ForImageClassification", image, {**STAGES, "num_stages": 3, "patch_size": 2}),
    ("dinov3_convnext", "DINOv3ConvNextModel", large_image, {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 2, 1, 1]}),
    (
        "mobilenet_v1",
        "MobileNetV1ForImageClassification",
        large_image,
        {"image_size": 64, "depth_multiplier": 0.25, "num_labels": 3},
    ),
    (
        "mobilenet_v2",
        "MobileNetV2ForImageClassification",
        large_image,
        {"image_size": 64, "depth_multiplier": 0.25, "num_labels": 3},
    ),
    (
        "efficientnet",
        "EfficientNetForImageClassification",
        large_image,
        {"image_size": 64, "width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320, "num_labels": 3},
    ),
    (
        "bit",
        "BitForImageClassification",
        large_image,
        {"embedding_size": 16, "hidden_sizes": [32, 32, 64, 64], "depths": [1, 1, 2, 1], "num_groups": 4, "num_labels": 3},
    ),
    (
        "textnet",
        "TextNetForImageClassification",
        large_image,
        {"num_labels": 3, "hidden_sizes": [16, 16, 16, 32, 32], "stem_out_channels": 16},
    ),
    (
        "sam_vision_model",
        "SamVisionModel",
        large_image,
        {**VISION, "image_size": 64, "global_attn_indexes": [1], "window_size": 4, "output_channels": 16, "mlp_dim": 64},
    ),
]

OTHERS: list[tuple[str, str, Inputs, dict[str, Any]]] = [
    ("clip", "CLIPModel", text_and_image, CLIP_PARTS),
    ("siglip2_text_model", "Siglip2TextModel", text, PLAIN_TEXT),
    ("blip", "BlipForConditionalGeneration", text_and_image, CLIP_PARTS),
    ("git", "GitForCausalLM", text_and_image, {**PLAIN_TEXT, "vision_config": CLIP_PARTS["vision_config"]}),
    ("vilt", "ViltForQuestionAnswering", text_and_image, {**VISION, **PLAIN_TEXT}),
    ("wav2vec2", "Wav2Vec2ForSequenceClassification", wave, AUDIO),
    ("hubert", "HubertForSequenceClassification", wave, AUDIO),
    ("wavlm", "WavLMForSequenceClassification", wave, AUDIO),
    ("sew", "SEWForSequenceClassification", wave, {**AUDIO, "squeeze_factor": 1}),
    (
        "data2vec-audio",
        "Data2VecAudioForSequenceClassification",
        wave,
        {**AUDIO, "conv_pos_kernel_size": 5, "num_conv_pos_embeddings": 2},
    ),
    (
        "audio-spectrogram-transformer",
        "ASTForAudioClassification",
        spectrogram,
        {**VISION, "max_length": 48, "num_mel_bins": 32, "frequency_stride": 8, "time_stride": 8},
    ),
    (
        "patchtst",
        "PatchTSTForPrediction",
        series,
        {
            "num_input_channels": 2,
            "context_length": 32,
            "patch_length": 8,
            "patch_stride": 8,
            "d_model": 32,
            "ffn_dim": 64,
            "num_attention_heads": 4,
            "num_hidden_layers": 3,
            "prediction_length": 4,
            "loss": "mse",
        },
    ),
    (
        "patchtsmixer",
        "PatchTSMixerForPrediction",
        series,
        {
            "num_input_channels": 2,
            "context_length": 32,
            "patch_length": 8,
            "patch_stride": 8,
            "d_model": 16,
            "num_layers": 3,
            "prediction_length": 4,
            "loss": "mse",
        },
    ),
]

TABLE = [*ENCODERS, *DECODERS, *ENCODER_DECODERS, *VISION_MODELS, *OTHERS]


# Reversible layers compute gradients in training mode alone, and only for inputs that require one.
REVERSIBLE = ("reformer",)


def transformers_cases() -> dict[str, Case]:
    """One case for each line of the table by the name of its configuration."""
    return {name: _case(name, class_name, inputs, config) for name, class_name, inputs, config in TABLE}


def _case(name: str, class_name: str, inputs: Inputs, config: dict[str, Any]) -> Case:
    build = partial(_build, name, class_name, config)
    return Case(class_name, build, partial(_run, inputs), _heads, gradients_in_training=name in REVERSIBLE)


def _build(name: str, class_name: str, config: dict[str, Any]) -> nn.Module:
    model = getattr(transformers, class_name)(transformers.AutoConfig.for_model(name, **config))
    if name in REVERSIBLE:
        model.enable_input_require_grads()
    return model


def _run(inputs: Inputs, model: nn.Module) -> Any:
    return model(**inputs())


def _heads(model: nn.Module) -> set[str]:
    """By transformers' own convention: what stands outside of the base model is the head."""
    base = getattr(model, model.base_model_prefix, None)
    heads = names_of(model, [child for child in model.children() if base is not None and child is not base])
    embeddings = model.get_output_embeddings()
    return heads | names_of(model, [] if embeddings is None else [embeddings])
