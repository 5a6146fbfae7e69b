"""Training a language model without ever computing all its logits is the same training."""

import pytest
import torch
import transformers
from parity import different_tensors, record_gradients

from hf_distill import preflight, unprojected
from hf_distill.activations import Needs
from hf_distill.losses import DistillationLoss, SoftTargetLoss
from hf_distill.output_head import OutputHeads, find_output_head
from hf_distill.testing import VOCABULARY, tiny_task

SIZES = {
    "vocab_size": VOCABULARY, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "attention_dropout": 0.0,
}  # fmt: skip
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32}
LARGE = {"hidden_size": 24, "num_hidden_layers": 3, "intermediate_size": 48}
# Model -> what is left of its output when its head is a linear layer: the factor, and the cap.
CAUSAL = {
    "gpt2": (None, {}, (1.0, None)),
    "llama": ("Llama", {"tie_word_embeddings": False}, (1.0, None)),
    "llama, tied": ("Llama", {"tie_word_embeddings": True}, (1.0, None)),
    "gemma2": ("Gemma2", {"final_logit_softcapping": 2.0}, (1.0, 2.0)),
    "cohere": ("Cohere", {"logit_scale": 0.25}, (0.25, None)),
    "granite": ("Granite", {"logits_scaling": 8.0}, (0.125, None)),
}


def causal_task(name):
    task = tiny_task("causal_lm", rows=16)
    family, options, _ = CAUSAL[name]
    if family is not None:
        config_class = getattr(transformers, f"{family}Config")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            task.student, task.teacher = (
                transformers.AutoModelForCausalLM.from_config(config_class(**SIZES, **size, **options))
                for size in (SMALL, LARGE)
            )
            for model in (task.student, task.teacher):
                for parameter in model.parameters():
                    parameter.data += 0.3 * torch.randn_like(parameter)
    return task


def task_of(name):
    return tiny_task(name, rows=16) if name == "masked_lm" else causal_task(name)


@pytest.fixture
def with_heads(monkeypatch):
    """Make the next trainers keep their heads: the path of every other task."""
    return lambda: monkeypatch.setattr(preflight, "find_output_head", lambda model, ids: None)


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    monkeypatch.setattr(unprojected, "CHUNK", 20 * VOCABULARY)


def run(task, make_trainer, double=True, **kwargs):
    """A trainer after one step, the step's gradients, and every loss that was logged."""
    if double:
        task.student.double(), task.teacher.double()
    kwargs = {"max_steps": 1, "logging_steps": 1, "logging_strategy": "steps", "padding_free": False, **kwargs}
    trainer = make_trainer(task, **kwargs)
    gradients = record_gradients(trainer)
    trainer.train()
    trainer.evaluate(task.rows[:3])
    logs = {key: value for line in trainer.state.log_history for key, value in line.items() if "loss" in key}
    return trainer, gradients[0], logs


def assert_same(ours, theirs, relative=1e-5):
    assert ours[0].removable_heads.student is not None
    assert theirs[0].removable_heads == OutputHeads()
    assert different_tensors(ours[1], theirs[1], relative) == []
    assert {"loss", "eval_loss", "eval_distillation_loss"} <= set(ours[2])
    assert ours[2] == pytest.approx(theirs[2], rel=relative)


@pytest.mark.parametrize("name", [*CAUSAL, "masked_lm"])
def test_gradients_and_losses_are_those_of_all_logits(name, make_trainer, with_heads):
    ours = run(task_of(name), make_trainer)
    assert ours[0].removable_heads.teacher is not None
    with_heads()
    assert_same(ours, run(task_of(name), make_trainer))


def test_the_same_in_fp32(make_trainer, with_heads):
    ours = run(causal_task("llama, tied"), make_trainer, double=False)
    with_heads()
    assert_same(ours, run(causal_task("llama, tied"), make_trainer, double=False))


OPTIONS = {
    "accumulation": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
    "without padding": {"padding_free": True},
    "jensen_shannon": {"divergence": "jensen_shannon", "beta": 0.3},
    "reverse_kl": {"divergence": "reverse_kl", "temperature": 3.0},
    "labels alone": {"soft_target_weight": 0.0},
    "teacher alone": {"hard_label_weight": 0.0},
    "hidden states beside": {"hidden_state_weight": 0.5},
    "attention maps beside": {"attention_weight": 0.5},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "no teacher in evaluation": {"eval_with_teacher": False},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_setting(option, make_trainer, with_heads):
    ours = run(causal_task("gpt2"), make_trainer, **OPTIONS[option])
    with_heads()
    same = {} if option == "accumulation" else OPTIONS[option]  # micro-batches add up to the whole batch
    assert_same(ours, run(causal_task("gpt2"), make_trainer, **same))


def test_stored_answers_of_the_teacher(make_trainer, with_heads):
    def task():
        made = causal_task("gpt2")
        with torch.no_grad():
            logits = [made.teacher(torch.tensor([row["input_ids"]])).logits[0] for row in made.rows]
        made.rows = [row | {"teacher_logits": z.tolist()} for row, z in zip(made.rows, logits, strict=True)]
        made.teacher.forward = None  # is not asked
        return made

    ours = run(task(), make_trainer, teacher_model=None, double=True)
    with_heads()
    assert_same(ours, run(task(), make_trainer, teacher_model=None))


def test_vocabularies_that_differ_in_padding(make_trainer, with_heads):
    def task():
        made = causal_task("llama")
        with torch.random.fork_rng():
            made.teacher.resize_token_embeddings(VOCABULARY + 3)
        return made

    torch.manual_seed(0)
    ours = run(task(), make_trainer)
    torch.manual_seed(0)
    with_heads()
    assert_same(ours, run(task(), make_trainer))


def test_bf16_autocast_computes_the_head_in_bf16(make_trainer, with_heads, monkeypatch):
    seen, sum_over_chunks = set(), unprojected.sum_over_chunks

    def watching(terms, student, *args):
        seen.add(student.hidden.dtype)
        return sum_over_chunks(terms, student, *args)

    monkeypatch.setattr("hf_distill.losses.base.sum_over_chunks", watching)
    ours = run(causal_task("llama, tied"), make_trainer, double=False, bf16=True, max_steps=1)
    assert torch.bfloat16 in seen
    with_heads()
    theirs = run(causal_task("llama, tied"), make_trainer, double=False, bf16=True, max_steps=1)
    assert {g.dtype for g in ours[1].values()} == {torch.float32}
    assert different_tensors(ours[1], theirs[1], 3e-2) == []


@pytest.mark.parametrize("name", ["llama", "llama, tied", "gpt2"])
def test_a_frozen_head_has_no_gradient_and_the_rest_has_the_same(name, make_trainer, with_heads):
    """Tied to the embeddings, these are frozen with it."""

    def task():
        made = causal_task(name)
        made.student.get_output_embeddings().weight.requires_grad_(False)
        return made

    ours = run(task(), make_trainer)
    with_heads()
    theirs = run(task(), make_trainer)
    assert_same(ours, theirs)
    assert not any(gradient.shape[0] == VOCABULARY and "lm_head" in key for key, gradient in ours[1].items())


class TestWhoKeepsItsHead:
    def heads(self, task, make_trainer, **kwargs):
        return make_trainer(task, **kwargs).removable_heads

    def test_a_loss_that_reads_all_logits(self, make_trainer):
        class LogitDistance(DistillationLoss):
            student_needs = teacher_needs = Needs(logits=True)

            def forward(self, student, teacher, batch):
                ours, theirs = batch.predictions(student, teacher)
                return batch.mean((ours - theirs).square().mean(-1))

        losses = {"soft": SoftTargetLoss(), "own": LogitDistance()}
        assert self.heads(causal_task("gpt2"), make_trainer, losses=losses) == OutputHeads()

    def test_a_loss_function_of_the_user(self, make_trainer):
        def own(outputs, labels, num_items_in_batch=None):
            return outputs.logits.square().sum()

        assert self.heads(causal_task("gpt2"), make_trainer, compute_loss_func=own) == OutputHeads()

    @pytest.mark.parametrize("name", ["single_label", "token"])
    def test_heads_that_are_no_vocabulary(self, name, make_trainer):
        assert self.heads(tiny_task(name), make_trainer) == OutputHeads()

    @pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
    @pytest.mark.parametrize(("targets", "whole", "removed"), [
        (["q_proj"], None, True), (["q_proj", "lm_head"], None, False), (["q_proj"], ["lm_head"], False),
    ])  # fmt: skip
    def test_an_adapter_on_the_head(self, targets, whole, removed, make_trainer, with_heads):
        peft = pytest.importorskip("peft")

        def task():
            made = causal_task("llama")
            config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets, modules_to_save=whole)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                made.student = peft.get_peft_model(made.student, config)
            return made

        ours = run(task(), make_trainer)
        assert (ours[0].removable_heads.student is not None) == removed
        with_heads()
        theirs = run(task(), make_trainer)
        assert different_tensors(ours[1], theirs[1]) == []

    def test_a_teacher_with_another_head_gives_all_its_logits(self, make_trainer, with_heads):
        def task():
            made = causal_task("llama")
            made.teacher.lm_head.register_forward_hook(lambda module, args, output: output * 1.5)
            return made

        ours = run(task(), make_trainer)
        assert ours[0].removable_heads.teacher is None
        with_heads()
        assert_same(ours, run(task(), make_trainer))


class TestFinding:
    ids = torch.arange(3, 11)[None]

    @pytest.mark.parametrize("name", CAUSAL)
    def test_what_a_model_does_to_its_logits(self, name):
        head = find_output_head(causal_task(name).student, self.ids)
        scale, softcap = CAUSAL[name][2]
        assert head.scale == pytest.approx(scale, rel=1e-6)
        assert head.softcap == softcap

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_in_reduced_precision(self, dtype):
        head = find_output_head(causal_task("gemma2").student.to(dtype), self.ids)
        assert head.scale == pytest.approx(1.0, rel=1e-6)
        assert head.softcap == 2.0

    @pytest.mark.parametrize("after", [
        lambda z: z + 0.01, lambda z: z.clamp(-50, 50), lambda z: z.roll(1, -1), lambda z: -z, lambda z: z[..., :-1],
        lambda z: z.log_softmax(-1), lambda z: z.flip(1), lambda z: z * torch.linspace(1.0, 1.001, VOCABULARY),
    ])  # fmt: skip
    def test_anything_else_keeps_the_head(self, after):
        model = causal_task("llama").student
        model.register_forward_hook(lambda module, args, outputs: outputs | {"logits": after(outputs["logits"])})
        assert find_output_head(model, self.ids) is None

    def test_a_bias_added_outside_the_layer_keeps_the_head(self):
        config = transformers.EsmConfig(**{**SIZES, **SMALL}, mask_token_id=3)
        model = transformers.EsmForMaskedLM(config)
        model.lm_head.bias.data += 1
        assert find_output_head(model, self.ids) is None

    def test_the_model_is_left_as_it_was(self):
        model = causal_task("llama").student.train()
        before = model(self.ids).logits
        head = find_output_head(model, self.ids)
        with head.taken_off(model):
            assert model(self.ids).logits.shape == (1, 8, 16)
        assert model.training
        assert torch.equal(model(self.ids).logits, before)


class TestLogitsThatAreAskedFor:
    def test_predictions_are_logits(self, make_trainer):
        task = causal_task("llama")
        trainer = make_trainer(task, per_device_eval_batch_size=1)
        rows = [row for row in task.rows if len(row["input_ids"]) == len(task.rows[0]["input_ids"])]
        output = trainer.predict(rows)
        with torch.no_grad():
            expected = [task.student(torch.tensor([row["input_ids"]])).logits for row in rows]
        torch.testing.assert_close(torch.tensor(output.predictions), torch.cat(expected))

    def test_metrics_see_logits(self, make_trainer):
        shapes = []
        trainer = make_trainer(
            causal_task("llama"),
            compute_metrics=lambda p: shapes.append(p.predictions.shape) or {},
            eval_dataset=tiny_task("causal_lm").rows[:4],
        )
        trainer.evaluate()
        assert shapes[0][-1] == VOCABULARY

    def test_outputs_that_are_asked_for_in_training_have_logits(self, make_trainer):
        task = causal_task("llama")
        trainer = make_trainer(task)
        loss, outputs = trainer.compute_loss(task.student.train(), task.collate(task.rows[:4]), return_outputs=True)
        assert outputs.logits.shape[-1] == VOCABULARY
        torch.testing.assert_close(loss, trainer.compute_loss(task.student, task.collate(task.rows[:4])))
