"""A language model is trained in memory that does not grow with tokens times vocabulary."""

import weakref

import torch
import transformers
from test_output_head import SIZES, SMALL
from test_unprojected import terms
from torch.utils._python_dispatch import TorchDispatchMode

from hf_distill import preflight, unprojected
from hf_distill.activations import Activations, Head
from hf_distill.batch import Batch
from hf_distill.testing import tiny_task
from hf_distill.unprojected import UnprojectedLogits


class LiveElements(TorchDispatchMode):
    """The most elements that were alive at a time, of all that was allocated in here."""

    def __init__(self):
        super().__init__()
        self.known, self.live, self.peak = weakref.WeakValueDictionary(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            storage = x.untyped_storage() if isinstance(x, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.known:
                self.known[storage._cdata] = storage
                elements = storage.nbytes() // 4
                self.live += elements
                weakref.finalize(storage, self.free, elements)
        self.peak = max(self.peak, self.live)
        return result

    def free(self, elements):
        self.live -= elements


def most_alive(tokens, classes, chunked):
    """Of forward and backward pass, beside the models' own tensors."""
    hidden = [torch.randn(1, tokens, width, requires_grad=width == 6) for width in (6, 9)]
    weights = [torch.randn(classes, width, requires_grad=width == 6) for width in (6, 9)]
    labels = torch.randint(0, classes, (1, tokens))
    batch = Batch.from_inputs({"input_ids": labels, "labels": labels}, Head("masked_lm"))
    losses = terms("jensen_shannon")
    with LiveElements() as live:
        student, teacher = (UnprojectedLogits(*pair) for pair in zip(hidden, weights, strict=True))
        if not chunked:
            student, teacher = student.materialise(), teacher.materialise()
        losses.total(losses(Activations(student), Activations(teacher), batch)).backward()
    return live.peak


def test_memory_does_not_grow_with_tokens_times_classes(monkeypatch):
    """What 400 more tokens add is the size of their hidden states and labels, whatever the vocabulary."""
    monkeypatch.setattr(unprojected, "CHUNK", 10 * 3000)
    monkeypatch.setattr(unprojected, "CACHED", 10 * 3000)
    few, many, all_at_once = (most_alive(*args) for args in ((100, 3000, True), (500, 3000, True), (500, 3000, False)))
    assert many - few <= 400 * 50
    assert all_at_once >= 500 * 3000 * 2 > 5 * many


class LargestTensor(TorchDispatchMode):
    """The largest number of elements that anything returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return result


def largest_tensor(make_trainer, tokens, vocabulary=4000):
    sizes = {**SIZES, "vocab_size": vocabulary, "max_position_embeddings": 256}
    config = transformers.LlamaConfig(**sizes, **SMALL)
    student, teacher = (transformers.AutoModelForCausalLM.from_config(config) for _ in range(2))
    rows = [{"input_ids": [5] * tokens, "labels": [5] * tokens, "attention_mask": [1] * tokens}] * 4
    task = tiny_task("causal_lm")
    task.student, task.teacher, task.rows = student, teacher, rows
    with LargestTensor() as largest:
        trainer = make_trainer(task, per_device_train_batch_size=2, max_steps=1, optim="adamw_torch")
        trainer.train()
        trainer.evaluate(rows[:2])
    return largest.elements


def test_no_tensor_of_tokens_times_vocabulary(make_trainer, monkeypatch):
    """From building the trainer to its evaluation; the largest tensor is then one of the model's own weights."""
    monkeypatch.setattr(unprojected, "CHUNK", 2**14)
    monkeypatch.setattr(unprojected, "CACHED", 2**13)
    assert largest_tensor(make_trainer, 32) == largest_tensor(make_trainer, 128) == 4000 * SMALL["hidden_size"]
    monkeypatch.setattr(preflight, "find_output_head", lambda model, ids: None)
    assert largest_tensor(make_trainer, 128) >= 2 * 127 * 4000
