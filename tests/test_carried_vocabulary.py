"""Students with a trimmed vocabulary: the oracle is the teacher on the same text, at the kept tokens' places."""

import pytest
import torch
import transformers as hf
from datasets import Dataset
from test_students import MODELS, noisy
from test_vocabulary import CORPUS, OTHER, original, tokens, trimmed

from hf_distill import DistillationTrainer, DistillationTrainingArguments
from hf_distill.students import create_student

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
# Teacher's architecture -> its tokenizer, changes to the config of test_students.
PAIRS = {
    "bert": ("wordpiece", {}, "MaskedLM"),
    "distilbert": ("wordpiece", {}, "MaskedLM"),
    "electra": ("wordpiece", {"embedding_size": 12}, "SequenceClassification"),
    "mpnet": ("wordpiece", {"pad_token_id": 0}, "MaskedLM"),
    "deberta": ("wordpiece", {}, "MaskedLM"),
    "modernbert": ("wordpiece", {}, "MaskedLM"),
    "roberta": ("byte_level", {"pad_token_id": 1}, "MaskedLM"),
    "gpt2": ("gpt2", {}, "CausalLM"),
    "llama": ("byte_fallback", {}, "CausalLM"),
    "qwen3": ("gpt2", {"tie_word_embeddings": True}, "CausalLM"),
    "t5": ("t5", {}, "Seq2SeqLM"),
    "bart": ("byte_level", {"pad_token_id": 1}, "Seq2SeqLM"),
}


def make(name, **more):
    config_class, entries = MODELS[name][:2]
    kind, changes, task = PAIRS[name]
    tokenizer = original(kind)
    known = {key: getattr(tokenizer, key) for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
    entries = {**entries, **known, **changes, "vocab_size": len(tokenizer) + 3, "max_position_embeddings": 60, **more}
    torch.manual_seed(0)
    model = noisy(getattr(hf, f"AutoModelFor{task}").from_config(config_class(**entries)))
    if name == "bart":
        model.final_logits_bias.normal_()
    return model


def outputs(model, tokenizer, text):
    encoded = tokenizer(text, return_tensors="pt")
    if model.config.is_encoder_decoder:
        encoded["decoder_input_ids"] = encoded["input_ids"]
    with torch.no_grad():
        output = model(**encoded, output_hidden_states=True)
    states = output.get("hidden_states") or output.decoder_hidden_states
    return output.logits, states


def within(name, number=6):
    old, new = trimmed(name)
    kept = set(new.get_vocab())
    return [text for text in OTHER if set(tokens(old, text)) <= kept][:number]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", PAIRS)
def test_outputs_on_kept_tokens_are_exactly_the_teachers(name, tied):
    teacher = make(name, tie_word_embeddings=tied)
    old, new = trimmed(PAIRS[name][0])
    student = create_student(teacher, processing_class=old, new_processing_class=new)
    ids = [old.get_vocab()[token] for token in sorted(new.get_vocab(), key=new.get_vocab().get)]
    assert student.config.get_text_config().vocab_size == len(new) == len(ids)
    for text in within(PAIRS[name][0]):
        (ours, our_states), (theirs, their_states) = outputs(student, new, text), outputs(teacher, old, text)
        if PAIRS[name][2] != "SequenceClassification":
            theirs = theirs[..., ids]
        # Matrix products of other widths may round differently.
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)
        assert all(torch.equal(a, b) for a, b in zip(our_states, their_states, strict=True))


def test_special_ids_follow_their_tokens():
    old, new = trimmed("gpt2")
    teacher = make("gpt2")
    teacher.generation_config.eos_token_id = [old.eos_token_id, old.pad_token_id]
    student = create_student(teacher, processing_class=old, new_processing_class=new)
    assert (student.config.pad_token_id, student.config.eos_token_id) == (new.pad_token_id, new.eos_token_id)
    assert new.pad_token_id != old.pad_token_id == teacher.config.pad_token_id
    assert student.generation_config.eos_token_id == [new.eos_token_id, new.pad_token_id]
    assert teacher.generation_config.eos_token_id == [old.eos_token_id, old.pad_token_id]


@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2", "t5"])
def test_it_works_in_a_pipeline_after_reloading(name, tmp_path):
    old, new = trimmed(PAIRS[name][0])
    depth = {"num_hidden_layers": 2} | ({"num_decoder_layers": 2} if name == "t5" else {})
    student = create_student(make(name), processing_class=old, new_processing_class=new, **depth)
    student.save_pretrained(tmp_path)
    new.save_pretrained(tmp_path)
    if name == "t5":
        auto, tokenizer = (
            hf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path),
            hf.AutoTokenizer.from_pretrained(tmp_path),
        )
        assert torch.equal(outputs(auto, tokenizer, OTHER[0])[0], outputs(student, new, OTHER[0])[0])
        return
    task = "text-generation" if name == "gpt2" else "feature-extraction"
    pipe = hf.pipeline(task, model=str(tmp_path), device="cpu")
    text = within(PAIRS[name][0])[0]
    assert pipe.tokenizer(text)["input_ids"] == new(text)["input_ids"]
    if name == "gpt2":
        assert pipe(text, max_new_tokens=3)[0]["generated_text"].startswith(text)
    else:
        state = outputs(student, new, text)[1][-1]
        torch.testing.assert_close(torch.tensor(pipe(text)), state, rtol=0, atol=1e-6)


def test_a_trimmed_student_learns_from_stored_answers(tmp_path):
    """Two tokenisations: the teacher's, whose answers become a column, and the student's."""
    old, new = trimmed("wordpiece")
    teacher = hf.BertForSequenceClassification(
        hf.BertConfig(**{**MODELS["bert"][1], "vocab_size": len(old), "num_labels": 3})
    )
    student = create_student(noisy(teacher), num_hidden_layers=2, processing_class=old, new_processing_class=new)
    text = CORPUS[:16]
    with torch.no_grad():
        logits = teacher(**old(text, padding=True, return_tensors="pt")).logits
    rows = Dataset.from_dict({**new(text), "labels": [0, 1, 2, 1] * 4, "teacher_logits": logits.tolist()})
    args = DistillationTrainingArguments(
        output_dir=tmp_path, max_steps=12, learning_rate=3e-3, per_device_train_batch_size=16, report_to=[],
        soft_target_weight=1.0, hard_label_weight=0.0, use_cpu=True, save_strategy="no", logging_steps=1,
        disable_tqdm=True,
    )  # fmt: skip
    trainer = DistillationTrainer(student, args, train_dataset=rows, processing_class=new)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] / 2
    with pytest.raises(ValueError, match="different tokenizers"):
        DistillationTrainer(student, args, train_dataset=rows, processing_class=new, teacher_model=teacher,
                            teacher_processing_class=old)  # fmt: skip


BERT = {"teacher": "bert", "processing_class": "wordpiece"}
REFUSED = [
    ({**BERT, "new_processing_class": None}, "processing_class was given without new_processing_class"),
    ({"teacher": "bert", "new_processing_class": "wordpiece"}, "new_processing_class was given without processing_"),
    ({**BERT, "new_processing_class": "t5"}, r"has \d+ tokens that processing_class has not, such as"),
    ({**BERT, "new_processing_class": "wordpiece", "vocab_size": 50}, r"ids up to \d+, .* has 50 rows"),
]


@pytest.mark.parametrize(("kwargs", "message"), REFUSED, ids=[case[1] for case in REFUSED])
def test_what_has_no_rows_is_refused(kwargs, message):
    teacher = make(kwargs["teacher"], **({"vocab_size": 50} if "vocab_size" in kwargs else {}))
    tokenizers = {key: original(value) for key, value in kwargs.items() if key.endswith("class") and value}
    with pytest.raises(ValueError, match=message):
        create_student(teacher, **tokenizers)


def test_a_vocabulary_without_the_special_tokens_is_refused():
    old, new = trimmed("gpt2")
    gone = max(set(old.get_vocab()) - set(new.get_vocab()))
    teacher = make("gpt2", eos_token_id=old.get_vocab()[gone])
    with pytest.raises(ValueError, match=r"lacks the token .*config.eos_token_id. Keep it"):
        create_student(teacher, processing_class=old, new_processing_class=new)


def test_moving_the_padding_id_of_counted_positions_is_refused():
    old = original("byte_level")
    teacher = make("roberta")
    new = hf.RobertaTokenizerFast(vocab={"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4, "a": 5}, merges=[])
    with pytest.raises(ValueError, match=r"has id 1 in the teacher and 0 in new_processing_class"):
        create_student(teacher, processing_class=old, new_processing_class=new)
