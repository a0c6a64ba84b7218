"""A small language model of transformers in a folder, and tasks to learn; to be imported where transformers is."""

import json
import random

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers


def save_model(folder):
    """A Llama of two layers whose tokens are bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = Tokenizer(models.BPE({c: i for i, c in enumerate(["<eos>", "<pad>", *alphabet])}, []))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<eos>", pad_token="<pad>")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=0,
        pad_token_id=1,
        bos_token_id=None,
        initializer_range=0.2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_task(path, shift, count=24):
    """Words whose letters are to be moved on in the alphabet."""
    rng = random.Random(shift)
    with path.open("w") as file:
        for _ in range(count):
            word = "".join(rng.choice("abcdef") for _ in range(rng.randint(2, 6)))
            moved = "".join(chr(ord(c) + shift) for c in word)
            file.write(json.dumps({"prompt": word, "completion": moved}) + "\n")
    return path
