"""What is refused, with a reason, before anything is trained."""

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BartConfig,
    BertConfig,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
)

from hf_distill import DistillationTrainer
from hf_distill.losses import HardLabelLoss, HiddenStateLoss, SoftTargetLoss
from hf_distill.testing import tiny_task


@pytest.mark.parametrize(
    ("argument", "value", "reason"),
    [
        ("fsdp", True, "does not support FSDP yet"),
        ("deepspeed", {"zero_optimization": {"stage": 2}}, "does not support DeepSpeed yet"),
        ("use_liger_kernel", True, "Set use_liger_kernel=False"),
    ],
)
def test_settings_that_nobody_tested(argument, value, reason, make_trainer, make_args):
    args = make_args()
    setattr(args, argument, value)  # the arguments themselves would already ask for the packages
    with pytest.raises(ValueError, match=reason):
        make_trainer(tiny_task("single_label"), args=args)


def test_several_gpus_in_one_process(make_trainer, make_args):
    args = make_args()
    args._n_gpu = 2
    with pytest.raises(ValueError, match=r"2 GPUs in one process.*accelerate launch"):
        make_trainer(tiny_task("single_label"), args=args)


def test_models_sharded_when_loaded(make_trainer, monkeypatch):
    task = tiny_task("single_label")
    monkeypatch.setattr(type(task.student), "is_distributed_loading_by_transformers", True, raising=False)
    with pytest.raises(ValueError, match="sharded at load time"):
        make_trainer(task, teacher_model=None, soft_target_weight=0.0)


def test_encoder_decoders(make_args):
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=37, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder"):
        DistillationTrainer(t5, make_args(), teacher_model=tiny_task("single_label").teacher)
    bart = AutoModelForSequenceClassification.from_config(
        BartConfig(vocab_size=37, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                   decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32)
    )  # fmt: skip
    with pytest.raises(ValueError, match="is an encoder-decoder"):
        DistillationTrainer(bart, make_args(), teacher_model=tiny_task("single_label").teacher)


def test_models_without_a_known_head(make_args):
    class Headless(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config = BertConfig()
            self.weight = torch.nn.Linear(1, 1)

    with pytest.raises(ValueError, match="Headless is of no task that can be distilled"):
        DistillationTrainer(Headless(), make_args(), teacher_model=tiny_task("single_label").teacher)
    bare = AutoModel.from_config(tiny_task("single_label").teacher.config)
    with pytest.raises(ValueError, match="BertModel is of no task"):
        DistillationTrainer(tiny_task("single_label").student, make_args(), teacher_model=bare)


def test_a_student_by_name(make_args):
    with pytest.raises(ValueError, match="model must be the student itself, got the string 'bert-base'"):
        DistillationTrainer("bert-base", make_args())


def test_losses_together_with_the_settings_that_they_replace(make_trainer):
    with pytest.raises(ValueError, match=r"\{'temperature': 4.0, 'hidden_state_weight': 1.0\} would have no effect"):
        make_trainer(
            tiny_task("single_label"), losses={"soft": SoftTargetLoss()}, temperature=4.0, hidden_state_weight=1.0
        )
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        make_trainer(tiny_task("single_label"), losses={"soft": SoftTargetLoss()}, label_smoothing_factor=0.1)


def test_losses_with_unusable_names_or_weights(make_trainer):
    task = tiny_task("single_label")
    with pytest.raises(ValueError, match="named by Python identifiers"):
        make_trainer(task, losses={"eval": SoftTargetLoss()})
    with pytest.raises(ValueError, match="must be a DistillationLoss object"):
        make_trainer(task, losses={"soft": SoftTargetLoss})
    with pytest.raises(ValueError, match="At least one loss needs a weight above 0"):
        make_trainer(task, losses={"soft": SoftTargetLoss(weight=0.0)})
    with pytest.raises(ValueError, match="at least 0, got -1"):
        SoftTargetLoss(weight=-1.0)


def test_a_compute_loss_func_that_would_not_be_called(make_trainer):
    with pytest.raises(ValueError, match=r"there is none\. Set hard_label_weight above 0"):
        make_trainer(tiny_task("single_label"), compute_loss_func=len, hard_label_weight=0.0)
    with pytest.raises(ValueError, match="question answering has not"):
        make_trainer(tiny_task("question_answering"), compute_loss_func=len)


def test_label_smoothing_of_a_regression(make_trainer):
    with pytest.raises(ValueError, match="a regression has none"):
        make_trainer(tiny_task("regression"), label_smoothing_factor=0.1)


def test_label_smoothing_of_several_labels_a_row(make_trainer):
    with pytest.raises(ValueError, match="each is a question of its own"):
        make_trainer(tiny_task("multi_label"), label_smoothing_factor=0.1)


@pytest.mark.parametrize(
    ("problem", "message"), [(None, "rows with 3 outputs .*as int64"), ("single_label_classification", "as int64")]
)
def test_classes_that_are_given_as_floats(problem, message, make_trainer):
    task = tiny_task("single_label")
    task.student.config.problem_type = task.teacher.config.problem_type = problem
    rows = [{**row, "labels": float(row["labels"])} for row in task.rows]
    with pytest.raises(ValueError, match=message):
        make_trainer(task, train_dataset=rows)


def test_one_loss_under_two_names(make_trainer):
    loss = SoftTargetLoss()
    with pytest.raises(ValueError, match="Every name needs a loss object of its own"):
        make_trainer(tiny_task("single_label"), losses={"a": loss, "b": loss})


def test_layers_that_do_not_exist(make_trainer):
    with pytest.raises(ValueError, match="the student has 2 layers"):
        make_trainer(tiny_task("token"), hidden_state_weight=1.0, layer_mapping={5: 1})
    with pytest.raises(ValueError, match="the teacher has 4 layers"):
        make_trainer(tiny_task("token"), losses={"hidden": HiddenStateLoss({1: 9}), "hard": HardLabelLoss()})


def test_patches_that_do_not_correspond(make_trainer):
    task, other = tiny_task("image"), tiny_task("image")
    other.teacher.config.patch_size = 2
    teacher = type(other.teacher)(other.teacher.config)
    with pytest.raises(ValueError, match="do not describe the same tokens or patches"):
        make_trainer(task, teacher_model=teacher, hidden_state_weight=1.0)
    make_trainer(task, teacher_model=teacher)  # without hidden states the patches are nobody's business


def test_plain_training_arguments_are_refused_the_same(make_args, make_trainer):
    args = make_args(cls=TrainingArguments)
    args.fsdp = True
    with pytest.raises(ValueError, match="FSDP"):
        make_trainer(tiny_task("single_label"), args=args)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's own call
def test_tokens_that_a_method_puts_in_front_of_the_text(make_trainer):
    peft = pytest.importorskip("peft")
    task = tiny_task("causal_lm")
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    task.student = peft.get_peft_model(task.student, prompt)
    with pytest.raises(ValueError, match=r"do not describe the same positions. \(PEFT's prompt tuning"):
        make_trainer(task)


@pytest.mark.parametrize("weights", [{"hidden_state_weight": 1.0}, {"attention_weight": 1.0}])
def test_layers_of_a_student_that_skips_blocks_at_random(weights, make_trainer):
    task = tiny_task("single_label")
    task.student.config.layerdrop = 0.1
    with pytest.raises(
        ValueError, match=r"layerdrop=0\.1: blocks are skipped.*from_pretrained\(\.\.\., layerdrop=0\.0"
    ):
        make_trainer(task, **weights)
    make_trainer(task)  # its answers may be compared


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_model_that_returns_a_tuple(who, make_trainer):
    task = tiny_task("single_label")
    getattr(task, who).config.return_dict = False
    with pytest.raises(ValueError, match=r"returned a tuple.*config\.return_dict is False: set it to True"):
        make_trainer(task, hidden_state_weight=1.0)


def test_a_teacher_that_answers_nan(make_trainer):
    task = tiny_task("single_label")
    task.teacher.classifier.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="The teacher answers NaN about the first rows"):
        make_trainer(task)


def test_a_loss_that_needs_a_teacher_says_what_of_it(make_args):
    task = tiny_task("single_label")
    with pytest.raises(ValueError, match="The losses need the teacher's logits, but there is no teacher_model"):
        DistillationTrainer(task.student, make_args(), task.collate, task.rows)
