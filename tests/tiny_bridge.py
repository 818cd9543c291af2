"Two tiny models that nobody has trained, for tests of bridges: a Mistral with grouped heads, a Llama of another width and tokenizer."
from pathlib import Path

import torch
import transformers as hf

from peer_nb.bridge.needle_models import needle_tokenizer


def write_ends(place: Path) -> Path:
    "Folders `source` and `target` with their tokenizers"
    torch.manual_seed(0)
    for name, kind, sizes in (("source", hf.MistralConfig, dict(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, sliding_window=None)),
                              ("target", hf.LlamaConfig, dict(hidden_size=24, num_attention_heads=2))):
        tokenizer = needle_tokenizer(name)
        config = kind(vocab_size=len(tokenizer), num_hidden_layers=2, intermediate_size=32, bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **sizes)
        hf.AutoModelForCausalLM.from_config(config).save_pretrained(place/name)
        tokenizer.save_pretrained(place/name)
    return place
