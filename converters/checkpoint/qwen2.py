"""What a Qwen2 checkpoint is: its configuration through an allow-list, and the table of its tensors.

Covers Qwen2 and Qwen2.5 (dense, full attention or sliding windows, every RoPE rule of transformers). A configuration
that asks for anything else is refused by name, never half-read: a key is either used, known to be without effect on the
forward pass (`known_keys`), left out because the user says so, or an error. null is what transformers makes of it: the
key's default.

Sources: `Qwen2Config` and `modeling_qwen2.py` of HuggingFace transformers; the keys of `.apr` metadata as the command
`apr` writes and reads them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from apr_jax.converters.checkpoint.known_keys import WARNED, leaves_unchanged
from apr_jax.converters.checkpoint.rope_scaling import OBJECTS, OUTSIDE, Problem, RopeScaling, read_rope
from apr_jax.converters.errors import RefusedError

_USED = frozenset(
    """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    rope_theta rms_norm_eps tie_word_embeddings max_position_embeddings hidden_act use_sliding_window sliding_window
    max_window_layers layer_types""".split()
) | {OUTSIDE, *OBJECTS}
# What transformers' `Qwen2Config` takes where config.json says nothing.
_ASSUMED = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
_THETA, _EPS, _POSITIONS, _WINDOW, _FULL_LAYERS = 10000.0, 1e-6, 32768, 4096, 28
_ACTIVATIONS = ("silu", "swish")
# Where null is not the default: as many KV heads as heads, and no window.
_NULL_SAYS_SOMETHING = ("num_key_value_heads", "sliding_window")
_LAYER_TYPES = {"full_attention": False, "attention": False, "sliding_attention": True}

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_HF_NAMES = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
}

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
_APR_THETA = 1e6
# HuggingFace's names of what changes the arithmetic, should another writer have put them into `.apr` metadata.
CHECKED_IN_APR = (
    "rope_theta",
    "hidden_act",
    "use_sliding_window",
    "sliding_window",
    "max_window_layers",
    "layer_types",
    OUTSIDE,
    *OBJECTS,
)
"""HuggingFace's keys that are read from `.apr` metadata as well."""
_CHANGING = (
    "use_mrope",
    "pruned_heads",
    "partial_rotary_factor",
    "rope_local_base_freq",
    "quantization_config",
    "num_experts",
)
_MAX_LAYERS = 10_000
# The float32 range without subnormal numbers: `.apr` stores rope_theta and eps in float32, and engines compute with it.
_SMALLEST, _LARGEST = 2.0**-126, 2.0**127
_SHOWN = 40
_LONGEST_VALUE = 60


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
      rope_scaling: A rule that changes the rotary frequencies; None is plain RoPE.
      sliding_window: How many keys a query sees in layers with a window, its own included; None without such layers.
      window_layers: Which layers have the window, rising.
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
    max_position_embeddings: int = _POSITIONS
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None
    window_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _raise_if(_value_problems(self.__dict__))

    def window_of(self, layer: int | None) -> int | None:
        """Returns how many keys a query of a layer sees, its own included; None is all before it."""
        return self.sliding_window if layer in self.window_layers else None

    @property
    def context_length(self) -> int:
        """How many positions the model can be asked for: `max_position_embeddings`, or what a RoPE rule makes of it."""
        rule = self.rope_scaling
        if rule is None:
            return self.max_position_embeddings
        original = rule.original_max_position_embeddings or self.max_position_embeddings
        return max(self.max_position_embeddings, int(original * rule.factor))

    @classmethod
    def from_hf(
        cls,
        config: Mapping[str, Any],
        file: str | None = None,
        ignored: Collection[str] = (),
        warnings: list[str] | None = None,
    ) -> Qwen2Config:
        """Reads the content of a HuggingFace config.json.

        Args:
          config: The parsed JSON object.
          file: Its path, for error messages.
          ignored: Keys that are left out, as if they were not there; "rope_scaling.factor" is one of an object.
          warnings: Added to: what was opened and is worth saying.

        Raises:
          RefusedError: Naming every attribute that is missing, malformed, unknown or not supported.
        """
        given = _without(config, ignored)
        problems = list(_hf_problems(given, ignored))
        warnings = [] if warnings is None else warnings
        warnings += [sentence for key, sentence in WARNED.items() if key in given]
        if assumed := {key: value for key, value in _ASSUMED.items() if key not in config or key in ignored}:
            said = ", ".join(f"{key} ({value})" for key, value in assumed.items())
            warnings.append(f"config.json does not say {said}: taken as transformers takes it")
        sizes = _ASSUMED | given
        if sizes["num_key_value_heads"] is None:
            sizes["num_key_value_heads"] = sizes["num_attention_heads"]
        heads, hidden = sizes["num_attention_heads"], sizes["hidden_size"]
        head_dim = given.get("head_dim")
        if head_dim is None and type(heads) is int and type(hidden) is int and heads > 0:
            head_dim = hidden // heads
            if hidden % heads:
                sentence = (
                    f"hidden_size {hidden} is no multiple of num_attention_heads {heads}, and head_dim is not given"
                )
                problems.append(Problem("hidden_size", sentence))
        values = {
            "vocab_size": sizes["vocab_size"],
            "hidden_size": hidden,
            "intermediate_size": sizes["intermediate_size"],
            "num_layers": sizes["num_hidden_layers"],
            "num_heads": heads,
            "num_kv_heads": sizes["num_key_value_heads"],
            "head_dim": head_dim,
            "rms_norm_eps": _number(given.get("rms_norm_eps", _EPS)),
            "tie_word_embeddings": given.get("tie_word_embeddings", False),
            "max_position_embeddings": given.get("max_position_embeddings", _POSITIONS),
        }
        values |= _arithmetic(given, values, _THETA, problems)
        _raise_if([*problems, *_value_problems(values, _HF_NAMES)], file)
        return cls(**values)

    @classmethod
    def from_apr(
        cls, metadata: Mapping[str, Any], tied: bool, file: str | None = None, ignored: Collection[str] = ()
    ) -> Qwen2Config:
        """Reads the metadata of an `.apr` file.

        Args:
          metadata: The parsed metadata object; null and absent mean the same.
          tied: Whether the file holds no head of its own (its `tied_embeddings` key is not to be trusted).
          file: Its path, for error messages.
          ignored: As for `from_hf`.

        Raises:
          RefusedError: Naming every key that is missing, malformed or not supported.
        """
        metadata = _without(metadata, ignored)
        problems = []
        if metadata.get("architecture") != "qwen2" and "architecture" not in ignored:
            sentence = f"architecture is {metadata.get('architecture')!r}, expected 'qwen2'"
            problems.append(Problem("architecture", sentence))
        # Absent means what `apr` assumes for Qwen2: split halves, theta 1e6, eps 1e-6 (apr-v2-format section 3.4).
        rope_type = metadata.get("rope_type")
        if rope_type not in (None, _APR_ROPE_NEOX):
            sentence = f"rope_type is {rope_type!r}, expected {_APR_ROPE_NEOX} (split halves)"
            problems.append(Problem("rope_type", sentence))
        problems += [
            Problem(key, f"{key} is {metadata[key]!r}: not supported")
            for key in _CHANGING
            if not leaves_unchanged(key, metadata.get(key)) and metadata[key] not in (False, 0)
        ]
        given: dict[str, Any] = {}
        for key, aliases in _APR_KEYS.items():
            spelt = {name: metadata[name] for name in (key, *aliases) if name in metadata}
            if len({repr(value) for value in spelt.values()}) > 1:
                problems.append(Problem(next(iter(spelt)), f"{' and '.join(spelt)} contradict each other"))
            given[key] = next(iter(spelt.values()), None)
        heads, hidden, head_dim = given["num_heads"], given["hidden_size"], metadata.get("head_dim")
        if head_dim is None and type(heads) is int and type(hidden) is int and heads > 0:
            head_dim = hidden // heads
        values = given | {
            "num_kv_heads": heads if given["num_kv_heads"] is None else given["num_kv_heads"],
            "head_dim": head_dim,
            "rms_norm_eps": _number(_EPS if given["rms_norm_eps"] is None else given["rms_norm_eps"]),
            "tie_word_embeddings": tied,
            "max_position_embeddings": given["max_position_embeddings"] or _POSITIONS,
        }
        theirs = {key: metadata[key] for key in CHECKED_IN_APR if key in metadata}
        values |= _arithmetic(theirs, values, _APR_THETA, problems)
        _raise_if([*problems, *_value_problems(values)], file)
        return cls(**values)

    def arithmetic_to_hf(self) -> dict[str, Any]:
        """Returns what config.json has to say besides sizes, where the model is no plain one: RoPE rule and windows."""
        said: dict[str, Any] = {}
        if self.rope_scaling is not None:
            said["rope_scaling"] = self.rope_scaling.to_hf()
        if self.sliding_window is not None:
            kinds = (
                "sliding_attention" if layer in self.window_layers else "full_attention"
                for layer in range(self.num_layers)
            )
            said |= {"use_sliding_window": True, "sliding_window": self.sliding_window, "layer_types": list(kinds)}
        return said

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
        # Of many, what is there beside what is not: names of another kind show themselves.
        shown = problems if len(problems) <= _SHOWN else [*problems[: _SHOWN // 2], *problems[-_SHOWN // 2 :]]
        listed = shown + ([f"... and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else [])
        raise RefusedError(
            f"the tensors do not match the configuration, {len(problems)} of them:\n  " + "\n  ".join(listed),
            code="tensors-mismatch",
            file=file,
            hint="`convert --rename FROM=TO` gives tensors other names, `convert --leave-out GLOB` leaves some out; "
            "what is missing only another file, or another config.json, can give it",
        )


def _number(value: Any) -> Any:
    return float(value) if type(value) is int else value


def _without(config: Mapping[str, Any], ignored: Collection[str]) -> dict[str, Any]:
    """Returns a configuration without the keys that are left out, and without those that are null, the default."""
    given = {
        key: value
        for key, value in config.items()
        if key not in ignored and (value is not None or key in _NULL_SAYS_SOMETHING)
    }
    for name in ignored:
        key, _, inner = name.partition(".")
        if inner and isinstance(given.get(key), Mapping):
            given[key] = {name: value for name, value in given[key].items() if name != inner}
    return given


def _value_problems(values: Mapping[str, Any], spelling: Mapping[str, str] = MappingProxyType({})) -> Iterator[Problem]:
    """Checks types and ranges; `spelling` gives the names that the user knows the fields by."""
    for field in dataclasses.fields(Qwen2Config):
        name, value = spelling.get(field.name, field.name), values.get(field.name)
        if value is None and "None" not in str(field.type):
            yield Problem(name, f"{name} is missing")
        elif field.type == "int" and (type(value) is not int or not 0 < value < 2**31):
            yield Problem(name, f"{name} is {value!r}, expected a positive integer")
        elif field.type == "float" and not (isinstance(value, float) and _SMALLEST <= value <= _LARGEST):
            yield Problem(name, f"{name} is {value!r}, expected a positive number that float32 can hold")
        elif field.type == "bool" and type(value) is not bool:
            yield Problem(name, f"{name} is {value!r}, expected true or false")
    layers, heads, kv_heads = (spelling.get(name, name) for name in ("num_layers", "num_heads", "num_kv_heads"))
    if type(values["num_layers"]) is int and values["num_layers"] > _MAX_LAYERS:
        yield Problem(layers, f"{layers} is {values['num_layers']}, expected at most {_MAX_LAYERS}")
    if type(values["head_dim"]) is int and values["head_dim"] % 2:
        yield Problem("head_dim", f"head_dim is {values['head_dim']}, expected an even number (RoPE rotates pairs)")
    count, groups = values["num_heads"], values["num_kv_heads"]
    if type(count) is int and type(groups) is int and groups > 0 and count % groups:
        yield Problem(kv_heads, f"{kv_heads} is {groups}, expected a divisor of {heads} {count}")


def _hf_problems(given: Mapping[str, Any], ignored: Collection[str]) -> Iterator[Problem]:
    """Finds what is not Qwen2, and keys of which nobody knows what they change."""
    model_type = given.get("model_type")
    if model_type != "qwen2" and "model_type" not in ignored:
        yield Problem("model_type", f"model_type is {model_type!r}, expected 'qwen2'")
    for key, value in given.items():
        if key not in _USED and not leaves_unchanged(key, value):
            within = key in ("text_config", "llm_config") and isinstance(value, Mapping)
            sentence = (
                f"{key} describes a language model within this one: make it config.json of a folder of its tensors, "
                "which `convert --to safetensors --as-is --rename FROM=TO --leave-out GLOB` writes"
                if within
                else f"{key} ({_shown(value)}) is not known to leave the forward pass unchanged"
            )
            yield Problem(key, sentence)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else text[:_LONGEST_VALUE] + " ..."


def _arithmetic(
    given: Mapping[str, Any], values: Mapping[str, Any], theta: float, problems: list[Problem]
) -> dict[str, Any]:
    """Returns rotary base, RoPE rule and windows, from HuggingFace's keys; `values` has the sizes."""
    if given.get("hidden_act", "silu") not in _ACTIVATIONS:
        problems.append(Problem("hidden_act", f"hidden_act is {given['hidden_act']!r}, expected 'silu'"))
    base, rule = read_rope(given, theta, values["max_position_embeddings"], values["head_dim"], problems)
    window, layers = _windows(given, values["num_layers"], problems)
    return {"rope_theta": base, "rope_scaling": rule, "sliding_window": window, "window_layers": layers}


def _windows(given: Mapping[str, Any], num_layers: Any, problems: list[Problem]) -> tuple[int | None, tuple[int, ...]]:
    """Returns the window and the layers that have it; what no layer uses is not judged."""
    used = given.get("use_sliding_window", False)
    if type(used) is not bool:
        problems.append(Problem("use_sliding_window", f"use_sliding_window is {used!r}, expected true or false"))
        return None, ()
    count = num_layers if type(num_layers) is int and 0 < num_layers <= _MAX_LAYERS else 0
    if "layer_types" in given:
        layers = _layers_of_type(given["layer_types"], count, problems)
    else:
        layers = _layers_from(given, count, problems) if used else ()
    window = given.get("sliding_window", _WINDOW)
    if not layers:
        return None, ()
    if not used:
        sentence = "layer_types asks for sliding windows, and use_sliding_window is false"
        problems.append(Problem("layer_types", sentence))
    elif type(window) is not int or window < 1:
        problems.append(Problem("sliding_window", f"sliding_window is {window!r}, expected a positive integer"))
    else:
        return window, layers
    return None, ()


def _layers_of_type(types: Any, count: int, problems: list[Problem]) -> tuple[int, ...]:
    """Returns the layers with a window that `layer_types` (5.x) names."""
    expected = "'full_attention' or 'sliding_attention' for each layer"
    if not isinstance(types, list):
        problems.append(Problem("layer_types", f"layer_types is {_shown(types)}, expected a list: {expected}"))
    elif strange := [kind for kind in types if not isinstance(kind, str) or kind not in _LAYER_TYPES]:
        problems.append(Problem("layer_types", f"layer_types holds {_shown(strange[0])}, expected {expected}"))
    elif count and len(types) != count:
        problems.append(Problem("layer_types", f"layer_types names {len(types)} layers, num_hidden_layers {count}"))
    else:
        return tuple(index for index, kind in enumerate(types) if _LAYER_TYPES[kind])
    return ()


def _layers_from(given: Mapping[str, Any], count: int, problems: list[Problem]) -> tuple[int, ...]:
    """Returns the layers from `max_window_layers` on: all behind those that attend to everything."""
    first = given.get("max_window_layers", _FULL_LAYERS)
    if type(first) is not int:
        problems.append(Problem("max_window_layers", f"max_window_layers is {first!r}, expected an integer"))
        return ()
    return tuple(range(max(first, 0), count)) if given.get("sliding_window", _WINDOW) is not None else ()


def _raise_if(problems: Iterable[Problem], file: str | None = None) -> None:
    listed = list(problems)
    if listed:
        keys = list(dict.fromkeys(problem.key for problem in listed))
        # Without these the model is another one; what is missing cannot be left out.
        wrong = [key for key in keys if key in _SIZES or f"{key} is missing" in [p.sentence for p in listed]]
        asked = [key for key in keys if key not in wrong]
        hints = [f"The configuration has to say {', '.join(wrong)} as the tensors have it"] if wrong else []
        if asked:
            hints.append(
                f"What changes nothing is left out, as if it were not there, by "
                f"{' '.join(f'--ignore-config {key}' for key in asked)} (in Python: ignore_config={asked!r})"
            )
        raise RefusedError(
            "the configuration is not supported:\n  " + "\n  ".join(problem.sentence for problem in listed),
            code="config-unsupported",
            file=file,
            hint=". ".join(hints),
        )
