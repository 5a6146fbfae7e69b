"""Tiny language models and what they teach, for the tests of unusual teachers."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from hf_distill.testing import tiny_task

SIZES = {
    "vocab_size": 37, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def llama():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def batch():
    return {"input_ids": torch.randint(0, 37, (3, 9), generator=torch.Generator().manual_seed(0))}


def plain_answer(model):
    with torch.no_grad():
        return model(**batch(), use_cache=False).logits


def qwen():
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def trained_student(make_trainer, teacher, **kwargs):
    trainer = make_trainer(tiny_task("causal_lm"), teacher_model=teacher, max_steps=3, hard_label_weight=0.0, **kwargs)
    trainer.train()
    return trainer.model.state_dict()
