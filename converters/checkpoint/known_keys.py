"""Keys of config.json that leave a Qwen2 forward pass as it is, whoever wrote them.

transformers takes every key along that it finds, so that trainers, mergers and exporters leave theirs behind, and each
version of transformers some of its own. What is listed here was looked up in `PretrainedConfig` of transformers 4.37 to
5.24, in `Qwen2Config`, and in what the tools write; a key that is not listed may change the arithmetic in the program
that it was written for, and is asked about (`--ignore-config`).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

WITHOUT_EFFECT = frozenset(
    # transformers: provenance, output, loading, training
    """architectures model_type transformers_version _name_or_path name_or_path _commit_hash auto_map _auto_class
    custom_pipelines torch_dtype dtype use_bfloat16 torchscript return_dict use_return_dict output_hidden_states
    output_attentions _output_attentions output_scores use_cache cache_implementation initializer_range
    attention_dropout hidden_dropout hidden_dropout_prob attention_probs_dropout_prob attn_pdrop resid_pdrop embd_pdrop
    classifier_dropout classifier_dropout_prob summary_first_dropout gradient_checkpointing chunk_size_feed_forward
    keys_to_ignore_at_inference pretraining_tp tf_legacy_loss xla_device is_encoder_decoder is_decoder
    tie_encoder_decoder cross_attention_hidden_size tie_last_hidden_states base_model_tp_plan base_model_pp_plan
    base_model_ep_plan base_model_fsdp_plan attn_implementation _attn_implementation _attn_implementation_internal
    _attn_implementation_autoset _flash_attn_2_enabled experts_implementation _experts_implementation
    _experts_implementation_internal attribute_map base_config_key""".split()
    # transformers: heads of other tasks
    + """finetuning_task id2label label2id num_labels problem_type task_specific_params prefix loss_type""".split()
    # transformers: tokens, and the settings of `generate` that old versions kept here
    + """tokenizer_class bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id mask_token_id unk_token_id
    decoder_start_token_id image_token_id video_token_id vision_token_id vision_start_token_id vision_end_token_id
    max_length min_length max_new_tokens min_new_tokens do_sample early_stopping num_beams num_beam_groups
    diversity_penalty temperature top_k top_p min_p typical_p epsilon_cutoff eta_cutoff repetition_penalty
    length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size encoder_repetition_penalty bad_words_ids
    num_return_sequences return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values
    renormalize_logits exponential_decay_length_penalty suppress_tokens begin_suppress_tokens penalty_alpha
    guidance_scale low_memory""".split()
    # which biases there are: the tensors say so, and transformers does not ask
    + """attention_bias qkv_bias mlp_bias bias use_bias no_bias""".split()
    # trainers, mergers, exporters: unsloth, axolotl, TRL, LLaMA-Factory, ms-swift, FastChat, LLaVA, mergekit,
    # OpenRLHF, vLLM, NeMo, Optimum, transformers.js, sentence-transformers
    + """unsloth_fixed unsloth_version unsloth_tokenizer model_name tokenizer_name tokenizer_model_max_length
    tokenizer_padding_side tokenizer_truncation_side model_max_length max_seq_length max_seq_len max_sequence_length
    seq_length seq_len use_flash_attn use_flash_attention use_flash_attention_2 flash_attn flash_attention
    _use_flash_attention_2 use_sdpa use_xformers use_liger use_liger_kernel use_unsloth_gc use_reentrant
    enable_gradient_checkpointing neftune_noise_alpha label_smoothing freeze_backbone tune_lm_head lora_rank
    lora_alpha lora_dropout training_args trl_version merge_method merged_from base_model base_model_name
    base_model_name_or_path hub_model_id onnx fp16 bf16 fp32 device_map low_cpu_mem_usage trust_remote_code
    reward_model_type value_head_dropout summary_dropout_prob peft_config merge_config mergekit_config
    use_fast_tokenizer use_fast attention_probs_dropout neftune_alpha max_model_len gguf_file nemo_version ds_config
    fsdp_config tensor_parallel_size tp_size model_parallel_size sequence_parallel normalize_reward mean std
    value_head_prefix transformers.js_config neuron sentence_transformers sbert_ce_default_activation_function
    classifier_activation matryoshka_dimensions kv_cache_dtype""".split()
)
"""Whatever they say."""

HARMLESS_VALUES: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "partial_rotary_factor": (1,),
        "rotary_pct": (1,),
        "rope_factor": (1,),
        "rope_interleaved": (False,),
        "use_mrope": (False,),
        "use_rope": (True,),
        "use_dynamic_ntk": (False,),
        "use_logn_attn": (False,),
        "use_qk_norm": (False,),
        "qk_layernorm": (False,),
        "is_causal": (True,),
        "add_cross_attention": (False,),
        "use_parallel_residual": (False,),
        "parallel_attn": (False,),
        "embedding_multiplier": (1,),
        "residual_multiplier": (1,),
        "logits_scaling": (1,),
        "logit_scale": (1,),
        "attn_logit_softcapping": (0,),
        "final_logit_softcapping": (0,),
        "lm_head_bias": (False,),
        "use_rmsnorm": (True,),
        "use_rms_norm": (True,),
        "num_experts_per_tok": (0,),
        "num_experts": (0,),
        "num_local_experts": (0, 1),
        "num_nextn_predict_layers": (0,),
        "sliding_window_pattern": (1,),
        "normalization_type": ("rms_norm", "rmsnorm", "RMSNorm"),
        "pruned_heads": ({}, []),
        "per_layer_config": ({},),
        "quantization_config": ({},),
    }
)
"""Where they say this; anything else asks for another arithmetic."""

WARNED: Mapping[str, str] = MappingProxyType(
    {
        "dual_chunk_attention_config": "dual chunk attention, which vLLM computes behind the trained length, is left "
        "out, as transformers leaves it out",
    }
)
"""What transformers does not compute either, though the checkpoint was published with it: opened, and said."""


def leaves_unchanged(key: str, value: Any) -> bool:
    """Says whether a key of config.json with this value is known to leave the forward pass as it is."""
    if value is None or key in WITHOUT_EFFECT or key in WARNED:
        return True
    return any(value == harmless and _alike(value, harmless) for harmless in HARMLESS_VALUES.get(key, ()))


def _alike(value: Any, harmless: Any) -> bool:
    """Tells true from 1, which are equal in Python."""
    return isinstance(value, bool) == isinstance(harmless, bool)
