"""transformers' own `generate` on the same weights: what the engine is measured against.

Knows: static batches, left padding. Does not know: our models, our engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from vllm_core.bindings.torch.convert import DTYPES, from_host
from vllm_core.errors import ModelError
from vllm_core.ops import HostArray


class Peer:
    """A model of transformers with weights given as host arrays, greedy, on the CPU."""

    def __init__(
        self, config: Any, tensors: Iterable[tuple[str, HostArray]], dtype: str, threads: int
    ) -> None:
        """ModelError when the weights are not those of the config's architecture."""
        import transformers

        torch.set_num_threads(threads)
        library: Any = transformers  # most of it is not typed
        model = library.AutoModelForCausalLM.from_config(
            config, attn_implementation="sdpa", dtype=DTYPES[dtype]
        )
        named = {name: from_host(array) for name, array in tensors}
        missing, unexpected = model.load_state_dict(named, strict=False)
        model.tie_weights()
        # The class names what it can tie; only the config says whether it does.
        tied = set(model._tied_weights_keys or ()) if config.tie_word_embeddings else set()
        left = [*(name for name in missing if name not in tied), *unexpected]
        if left:
            raise ModelError(
                f"transformers' {type(model).__name__} and the weights differ, first in {left[0]!r}"
            )
        # Without an end-of-sequence id nothing ends early and no processor has to hold it back.
        model.generation_config = library.GenerationConfig(do_sample=False, pad_token_id=0)
        self._model = model.eval()

    def generate(
        self, prompts: Sequence[Sequence[int]], output_lens: Sequence[int], batch_size: int
    ) -> list[list[int]]:
        """Each prompt's own output_len tokens, in batches in the order given.

        A batch runs until its longest answer is done; what the others draw beyond theirs is cut.
        """
        answers: list[list[int]] = []
        for at in range(0, len(prompts), batch_size):
            part = slice(at, at + batch_size)
            answers += self._batch(prompts[part], output_lens[part])
        return answers

    def _batch(
        self, prompts: Sequence[Sequence[int]], output_lens: Sequence[int]
    ) -> list[list[int]]:
        longest, steps = max(map(len, prompts)), max(output_lens)
        ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        with torch.inference_mode():
            out = self._model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=steps, use_cache=True
            )
        drawn: list[list[int]] = out[:, longest:].tolist()
        return [answer[:length] for answer, length in zip(drawn, output_lens, strict=True)]


def versions() -> dict[str, Any]:
    """Of what runs here, and the threads that both sides share."""
    import transformers

    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }
