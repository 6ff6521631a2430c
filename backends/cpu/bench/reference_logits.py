"""transformers' logits of given token ids, as float32 in an .npy file.

    python reference_logits.py MODEL IDS.json DTYPE THREADS OUT.npy

IDS.json: {"prompts": lists of token ids, "positions": which of each prompt's logits are wanted}.

Knows: transformers. Does not know: engines.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    """OUT: [prompts, positions, V]."""
    model_folder, ids, dtype, threads, out = sys.argv[1:]
    asked = json.loads(Path(ids).read_text())
    torch.set_num_threads(int(threads))
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=getattr(torch, dtype))
    positions = torch.tensor(asked["positions"])
    found = []
    with torch.inference_mode():
        for prompt in asked["prompts"]:
            logits = model(torch.tensor([prompt]), logits_to_keep=positions).logits
            found.append(logits[0].float().numpy())
    np.save(out, np.stack(found))


if __name__ == "__main__":
    main()
