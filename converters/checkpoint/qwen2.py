"""What a Qwen2 checkpoint is: its configuration through an allow-list, and the table of its tensors.

Covers Qwen2 and Qwen2.5 (dense, full attention). A configuration that asks for anything else is refused by name, never
half-read: an attribute is either used, known to be without effect on the forward pass, or an error.

Sources: `Qwen2Config` and `modeling_qwen2.py` of HuggingFace transformers; the keys of `.apr` metadata as the command
`apr` writes and reads them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from apr_jax.converters.errors import RefusedError

# Attributes that say nothing about the forward pass: provenance, training, generation, and what transformers saves
# along.
_WITHOUT_EFFECT = frozenset(
    """architectures attention_dropout bos_token_id dtype eos_token_id initializer_range max_window_layers model_type
    pad_token_id sliding_window torch_dtype transformers_version use_cache _name_or_path _attn_implementation_autoset
    return_dict output_hidden_states output_attentions torchscript use_bfloat16 chunk_size_feed_forward
    is_encoder_decoder is_decoder tie_encoder_decoder finetuning_task id2label label2id num_labels problem_type prefix
    task_specific_params tokenizer_class sep_token_id decoder_start_token_id max_length min_length do_sample
    early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty
    length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores
    return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens tf_legacy_loss auto_map""".split()
)
_USED = frozenset(
    """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    rope_theta rope_parameters rope_scaling rms_norm_eps tie_word_embeddings max_position_embeddings hidden_act
    use_sliding_window use_mrope layer_types pruned_heads""".split()
)

_HF_NAMES = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
}
_ROPE_OBJECTS = ("rope_parameters", "rope_scaling")

# `.apr` key -> the spellings that the engine reads in its place (apr-v2-format section 3.4).
_APR_KEYS = {
    "vocab_size": ("n_vocab",),
    "hidden_size": ("hidden_dim", "d_model", "n_embd"),
    "intermediate_size": ("ffn_dim", "intermediate_dim", "n_inner"),
    "num_layers": ("n_layers", "num_hidden_layers", "n_layer"),
    "num_heads": ("n_heads", "num_attention_heads", "n_head"),
    "num_kv_heads": ("n_kv_heads", "num_key_value_heads"),
    "rms_norm_eps": ("layer_norm_eps", "norm_eps"),
    "max_position_embeddings": ("max_seq_len", "context_length", "n_ctx"),
}
_APR_ROPE_NEOX = 2
# HuggingFace's names of what changes the arithmetic, should a foreign writer have put them into `.apr` metadata.
_CHECKED_IN_APR = (
    "rope_theta",
    "hidden_act",
    "use_sliding_window",
    "use_mrope",
    "layer_types",
    "pruned_heads",
    *_ROPE_OBJECTS,
)
_CHANGING = ("partial_rotary_factor", "rope_local_base_freq", "attention_bias", "quantization_config", "num_experts")
_MAX_LAYERS = 10_000
# The float32 range without subnormal numbers: `.apr` stores rope_theta and eps in float32, and engines compute with it.
_SMALLEST, _LARGEST = 2.0**-126, 2.0**127
_SHOWN = 40


@dataclasses.dataclass(frozen=True)
class Qwen2Config:
    """The numbers that define a Qwen2 forward pass.

    Attributes:
      vocab_size: Rows of the embedding and of the head.
      hidden_size: Width of the residual stream.
      intermediate_size: Width of the MLP.
      num_layers: Decoder layers.
      num_heads: Query heads.
      num_kv_heads: Key and value heads; divides num_heads.
      head_dim: Width of one head, even.
      rope_theta: Base of the rotary angles.
      rms_norm_eps: Added to the mean square in every RMSNorm.
      tie_word_embeddings: Whether the head is the embedding matrix.
      max_position_embeddings: Longest sequence that the model was made for.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int = 32768

    def __post_init__(self) -> None:
        _raise_if(_value_problems(dataclasses.asdict(self)))

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], file: str | None = None) -> Qwen2Config:
        """Reads the content of a HuggingFace config.json.

        Args:
          config: The parsed JSON object.
          file: Its path, for error messages.

        Raises:
          RefusedError: Naming every attribute that is missing, malformed, unknown or not supported.
        """
        problems = list(_hf_problems(config))
        heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
        head_dim = config.get("head_dim")
        if head_dim is None and type(heads) is int and type(hidden) is int and heads > 0:
            head_dim = hidden // heads
            if hidden % heads:
                problems.append(
                    f"hidden_size {hidden} is no multiple of num_attention_heads {heads}, and head_dim is not given"
                )
        # Wherever it stands; that the places agree has been checked.
        bases = [config.get("rope_theta")]
        bases += [rope.get("rope_theta") for rope in map(config.get, _ROPE_OBJECTS) if isinstance(rope, Mapping)]
        theta = next((base for base in bases if base is not None), None)
        values = {
            "vocab_size": config.get("vocab_size"),
            "hidden_size": hidden,
            "intermediate_size": config.get("intermediate_size"),
            "num_layers": config.get("num_hidden_layers"),
            "num_heads": heads,
            "num_kv_heads": config.get("num_key_value_heads"),
            "head_dim": head_dim,
            "rope_theta": _number(10000.0 if theta is None else theta),
            "rms_norm_eps": _number(config.get("rms_norm_eps", 1e-6)),
            "tie_word_embeddings": config.get("tie_word_embeddings", False),
            "max_position_embeddings": config.get("max_position_embeddings", 32768),
        }
        _raise_if([*problems, *_value_problems(values, _HF_NAMES)], file)
        return cls(**values)

    @classmethod
    def from_apr(cls, metadata: Mapping[str, Any], tied: bool, file: str | None = None) -> Qwen2Config:
        """Reads the metadata of an `.apr` file.

        Args:
          metadata: The parsed metadata object; null and absent mean the same.
          tied: Whether the file holds no head of its own (its `tied_embeddings` key is not to be trusted).
          file: Its path, for error messages.

        Raises:
          RefusedError: Naming every key that is missing, malformed or not supported.
        """
        problems = []
        architecture = metadata.get("architecture")
        if architecture != "qwen2":
            problems.append(f"architecture is {architecture!r}, expected 'qwen2'")
        # Absent means what `apr` assumes for Qwen2: split halves, theta 1e6, eps 1e-6 (apr-v2-format section 3.4).
        rope_type = metadata.get("rope_type")
        if rope_type not in (None, _APR_ROPE_NEOX):
            problems.append(f"rope_type is {rope_type!r}, expected {_APR_ROPE_NEOX} (split halves)")
        problems += _arithmetic_problems(
            {key: metadata[key] for key in _CHECKED_IN_APR if metadata.get(key) is not None}
        )
        problems += [
            f"{key} is {metadata[key]!r}: not supported"
            for key in _CHANGING
            if metadata.get(key) not in (None, False, 0)
        ]
        given: dict[str, Any] = {}
        for key, aliases in _APR_KEYS.items():
            spelt = {name: metadata[name] for name in (key, *aliases) if metadata.get(name) is not None}
            if len({repr(value) for value in spelt.values()}) > 1:
                problems.append(f"{' and '.join(spelt)} contradict each other")
            given[key] = next(iter(spelt.values()), None)
        heads, hidden, head_dim = given["num_heads"], given["hidden_size"], metadata.get("head_dim")
        if head_dim is None and type(heads) is int and type(hidden) is int and heads > 0:
            head_dim = hidden // heads
        values = given | {
            "num_kv_heads": heads if given["num_kv_heads"] is None else given["num_kv_heads"],
            "head_dim": head_dim,
            "rope_theta": _number(1e6 if metadata.get("rope_theta") is None else metadata["rope_theta"]),
            "rms_norm_eps": _number(1e-6 if given["rms_norm_eps"] is None else given["rms_norm_eps"]),
            "tie_word_embeddings": tied,
            "max_position_embeddings": given["max_position_embeddings"] or 32768,
        }
        _raise_if([*problems, *_value_problems(values)], file)
        return cls(**values)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns name -> shape of every tensor of the checkpoint, in order of execution; weights are `[out, in]`.

        `lm_head.weight` is listed only where the head is not tied: 290 names for Qwen2.5-0.5B, 339 for 7B.
        """
        hidden, ffn = self.hidden_size, self.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (self.vocab_size, hidden)}
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}."
            shapes |= {
                prefix + "input_layernorm.weight": (hidden,),
                prefix + "self_attn.q_proj.weight": (q, hidden),
                prefix + "self_attn.q_proj.bias": (q,),
                prefix + "self_attn.k_proj.weight": (kv, hidden),
                prefix + "self_attn.k_proj.bias": (kv,),
                prefix + "self_attn.v_proj.weight": (kv, hidden),
                prefix + "self_attn.v_proj.bias": (kv,),
                prefix + "self_attn.o_proj.weight": (hidden, q),
                prefix + "post_attention_layernorm.weight": (hidden,),
                prefix + "mlp.gate_proj.weight": (ffn, hidden),
                prefix + "mlp.up_proj.weight": (ffn, hidden),
                prefix + "mlp.down_proj.weight": (hidden, ffn),
            }
        shapes[FINAL_NORM] = (hidden,)
        if not self.tie_word_embeddings:
            shapes[HEAD] = (self.vocab_size, hidden)
        return shapes


EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"
# Ending of tables that old versions of transformers saved and everybody makes anew.
RECOMPUTED = "rotary_emb.inv_freq"
# The attribute that says whether the head is the embedding.
TIED = "tie_word_embeddings"


def check_tensors(config: Qwen2Config, found: Mapping[str, tuple[int, ...]], file: str | None = None) -> None:
    """Checks that a checkpoint holds exactly the tensors that its configuration asks for.

    Args:
      config: The configuration.
      found: Name -> shape of every tensor in the checkpoint. A head beside a tied configuration is let through: whether
        it is a copy of the embedding is for the caller to see.
      file: The checkpoint's path, for error messages.

    Raises:
      RefusedError: Code "tensors-mismatch", naming every missing, unexpected and mis-shaped tensor.
    """
    expected = config.tensor_shapes()
    optional = {HEAD: (config.vocab_size, config.hidden_size)} if config.tie_word_embeddings else {}
    problems = [f"missing: {name} {list(shape)}" for name, shape in expected.items() if name not in found]
    for name, shape in found.items():
        wanted = expected.get(name, optional.get(name))
        if wanted is None:
            problems.append(f"unexpected: {name} {list(shape)}")
        elif tuple(shape) != wanted:
            problems.append(f"shape: {name} is {list(shape)}, the configuration needs {list(wanted)}")
    if problems:
        listed = problems[:_SHOWN] + ([f"... and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else [])
        raise RefusedError(
            f"the tensors do not match the configuration, {len(problems)} of them:\n  " + "\n  ".join(listed),
            code="tensors-mismatch",
            file=file,
        )


def _number(value: Any) -> Any:
    return float(value) if type(value) is int else value


def _value_problems(values: Mapping[str, Any], spelling: Mapping[str, str] = MappingProxyType({})) -> Iterable[str]:
    """Checks types and ranges; `spelling` gives the names that the user knows the fields by."""
    for field in dataclasses.fields(Qwen2Config):
        name, value = spelling.get(field.name, field.name), values[field.name]
        if value is None:
            yield f"{name} is missing"
        elif field.type == "int" and (type(value) is not int or not 0 < value < 2**31):
            yield f"{name} is {value!r}, expected a positive integer"
        elif field.type == "float" and not (isinstance(value, float) and _SMALLEST <= value <= _LARGEST):
            yield f"{name} is {value!r}, expected a positive number that float32 can hold"
        elif field.type == "bool" and type(value) is not bool:
            yield f"{name} is {value!r}, expected true or false"
    layers, heads, kv_heads = (spelling.get(name, name) for name in ("num_layers", "num_heads", "num_kv_heads"))
    if type(values["num_layers"]) is int and values["num_layers"] > _MAX_LAYERS:
        yield f"{layers} is {values['num_layers']}, expected at most {_MAX_LAYERS}"
    if type(values["head_dim"]) is int and values["head_dim"] % 2:
        yield f"head_dim is {values['head_dim']}, expected an even number (RoPE rotates pairs)"
    count, groups = values["num_heads"], values["num_kv_heads"]
    if type(count) is int and type(groups) is int and groups > 0 and count % groups:
        yield f"{kv_heads} is {groups}, expected a divisor of {heads} {count}"


def _hf_problems(config: Mapping[str, Any]) -> Iterable[str]:
    model_type = config.get("model_type")
    if model_type != "qwen2":
        yield f"model_type is {model_type!r}, expected 'qwen2'"
    yield from _arithmetic_problems(config)
    for key, value in config.items():
        if key not in _USED and key not in _WITHOUT_EFFECT and value is not None:
            yield f"{key} is not known to leave the forward pass unchanged"


def _arithmetic_problems(config: Mapping[str, Any]) -> Iterable[str]:
    """Attributes that ask for another arithmetic than Qwen2's plain one."""
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        yield f"hidden_act is {config['hidden_act']!r}, expected 'silu'"
    if config.get("use_sliding_window"):
        yield f"use_sliding_window is {config['use_sliding_window']!r}: sliding-window attention is not supported"
    if config.get("pruned_heads"):
        yield f"pruned_heads is {config['pruned_heads']!r}: pruned heads are not supported"
    if config.get("use_mrope"):
        yield f"use_mrope is {config['use_mrope']!r}: multimodal RoPE is not supported"
    layer_types = config.get("layer_types")
    if layer_types is not None and (
        not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types)
    ):
        yield "layer_types holds something else than 'full_attention'"
    yield from _all_rope_problems(config)


def _all_rope_problems(config: Mapping[str, Any]) -> Iterable[str]:
    bases = {"rope_theta": config.get("rope_theta")}
    for key in _ROPE_OBJECTS:
        value = config.get(key)
        yield from _rope_problems(key, value)
        bases[f"{key}.rope_theta"] = value.get("rope_theta") if isinstance(value, Mapping) else None
    given = {name: base for name, base in bases.items() if base is not None}
    if len(set(map(repr, map(_number, given.values())))) > 1:
        yield " and ".join(f"{name} {base!r}" for name, base in given.items()) + " contradict each other"


def _rope_problems(key: str, value: Any) -> Iterable[str]:
    if value is None:
        return
    if not isinstance(value, Mapping):
        yield f"{key} is {value!r}, expected an object"
        return
    kind = value.get("rope_type", value.get("type", "default"))
    if kind != "default":
        yield f"{key}.rope_type is {kind!r}: RoPE scaling is not supported"
    for name in value:
        if name not in ("rope_theta", "rope_type", "type") and kind == "default":
            yield f"{key}.{name} is not known to leave the forward pass unchanged"


def _raise_if(problems: Iterable[str], file: str | None = None) -> None:
    listed = list(problems)
    if listed:
        raise RefusedError(
            "the configuration is not supported:\n  " + "\n  ".join(listed),
            code="config-unsupported",
            file=file,
        )
