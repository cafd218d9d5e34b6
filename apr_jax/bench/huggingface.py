"""HuggingFace transformers as a contestant of the benchmark, on the very weight arrays that our model holds."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from apr_jax.bench.cases import PREFILL, Case
from apr_jax.bench.ours import Calls, tokens
from apr_jax.converters.checkpoint.qwen2 import Qwen2Config
from apr_jax.model.language_model import LanguageModel
from apr_jax.model.parameters import Parameters, parameter_sources


class HuggingFace:
    """Qwen2ForCausalLM with its default attention, called as `generate` calls it.

    Attributes:
      name: In tables.
      compiled: Through torch.compile(mode="reduce-overhead") with a static cache, or as it is with a dynamic one.
    """

    def __init__(self, config: Qwen2Config, model: Any, compiled: bool):
        self.compiled = compiled
        self.name = "HuggingFace compiled" if compiled else "HuggingFace"
        self._config = config
        self._model = model
        self._device = model.device

    @classmethod
    def over(cls, model: LanguageModel) -> tuple[HuggingFace, HuggingFace]:
        """Returns both forms on the arrays of `model`."""
        theirs = _model(model.config, model.parameters, model.fused)
        return cls(model.config, theirs, False), cls(model.config, theirs, True)

    def prepare(self, case: Case, steps: int) -> tuple[Calls, dict[str, Any]]:
        """As `Ours.prepare`."""
        import torch

        begun = time.perf_counter()
        torch.compiler.reset()
        forward = self._model.__call__
        if self.compiled:
            forward = torch.compile(self._model.forward, mode="reduce-overhead", dynamic=False)
        calls = self._prefill(case, forward) if case.kind == PREFILL else self._decode(case, steps, forward)
        # The second and third call of a compiled program record its CUDA graph.
        for _ in range(3 if self.compiled else 1):
            calls(1)
        return calls, {"compile_seconds": time.perf_counter() - begun} if self.compiled else {}

    def last_logits(self, ids: np.ndarray) -> np.ndarray:
        """As `Ours.last_logits`."""
        import torch

        with torch.inference_mode():
            ids = torch.from_numpy(np.array(ids, np.int64)).to(self._device)
            return self._model(input_ids=ids, logits_to_keep=1).logits[:, -1].float().cpu().numpy()

    def _prefill(self, case: Case, forward: Any) -> Calls:
        import torch

        ids = self._tokens(case.batch, case.length)
        cache = self._cache(case.batch, case.length) if self.compiled else None

        def calls(count: int) -> float:
            with torch.inference_mode():
                begun = self._now()
                for _ in range(count):
                    if cache is not None:
                        _rewind(cache, 0)
                    out = forward(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                    out.logits[:, -1].argmax(-1)
                    del out
                return self._now() - begun

        return calls

    def _decode(self, case: Case, steps: int, forward: Any) -> Calls:
        import torch

        cache = self._cache(case.batch, case.length + steps) if self.compiled else None
        first = self._tokens(case.batch, 1)
        if cache is not None:
            cache = self._filled(cache, case)

        def calls(count: int) -> float:
            nonlocal cache
            with torch.inference_mode():
                if not self.compiled:
                    cache = self._filled(self._cache(case.batch, None), case)
                begun = self._now()
                for _ in range(count):
                    token = first
                    for _ in range(steps):
                        torch.compiler.cudagraph_mark_step_begin()
                        out = forward(input_ids=token, past_key_values=cache, use_cache=True)
                        token = out.logits[:, -1:].argmax(-1)
                    self._take_back(cache, case, steps)
                return self._now() - begun

        return calls

    def _take_back(self, cache: Any, case: Case, steps: int) -> None:
        """Removes the tokens of one call, so that every call starts from the same context."""
        if self.compiled:
            _rewind(cache, case.length)
        else:
            cache.crop(-steps)

    def _cache(self, batch: int, capacity: int | None) -> Any:
        from transformers import DynamicCache, StaticCache

        if capacity is None:
            return DynamicCache(config=self._model.config)
        cache = StaticCache(config=self._model.config, max_cache_len=capacity)
        heads, head_dim = self._config.num_kv_heads, self._config.head_dim
        cache.early_initialization(batch, heads, head_dim, self._model.dtype, self._device)
        return cache

    def _filled(self, cache: Any, case: Case) -> Any:
        """Puts random keys and values of the context into a cache."""
        import torch

        shape = (case.batch, self._config.num_kv_heads, case.length, self._config.head_dim)
        for layer in range(self._config.num_layers):
            keys, values = (torch.randn(shape, dtype=self._model.dtype, device=self._device) for _ in range(2))
            cache.update(keys, values, layer)
        return cache

    def _tokens(self, batch: int, length: int) -> Any:
        import torch

        return torch.from_numpy(tokens(self._config, batch, length).astype(np.int64)).to(self._device)

    def _now(self) -> float:
        import torch

        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def _rewind(cache: Any, length: int) -> None:
    """Sets a static cache back to its first tokens, in place, as CUDA graphs need it."""
    for layer in cache.layers:
        layer.cumulative_length.fill_(length)


def _model(config: Qwen2Config, parameters: Parameters, fused: bool) -> Any:
    """Returns HuggingFace's model over the arrays of `parameters`; nothing is copied."""
    import torch
    from transformers import Qwen2Config as HfConfig
    from transformers import Qwen2ForCausalLM
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    tensors = _tensors(config, parameters, fused)
    some = next(iter(tensors.values()))
    with torch.device("meta"):
        model = Qwen2ForCausalLM(HfConfig(**_hf_config(config))).to(some.dtype)
    model.load_state_dict(tensors, assign=True, strict=False)
    model.tie_weights()
    model.model.rotary_emb = Qwen2RotaryEmbedding(config=model.config).to(some.device)
    if missing := [name for name, value in (*model.named_parameters(), *model.named_buffers()) if value.is_meta]:
        raise RuntimeError(f"HuggingFace's model has parameters that this one has not: {missing}")
    return model.eval()


def _tensors(config: Qwen2Config, parameters: Parameters, fused: bool) -> dict[str, Any]:
    """Returns torch tensors over the arrays, under HuggingFace's names; parts of a fused one are ranges of its rows."""
    import torch

    shapes, tensors = config.tensor_shapes(), {}
    for path, names in parameter_sources(config, fused).items():
        node = parameters
        for part in path.split("."):
            node = node[int(part) if part.isdigit() else part]
        whole, start = torch.from_dlpack(node), 0
        for name in names:
            tensors[name] = whole[start : start + shapes[name][0]]
            start += shapes[name][0]
    return tensors


def _hf_config(config: Qwen2Config) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
    }
