"""What a student's card says, and that the Hub would take it."""

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
import yaml
from card_schema import problems
from datasets import Dataset, Split
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification

from hf_distill import DistillationTrainer, Schedule, losses
from hf_distill.losses import HiddenStateLoss, SoftTargetLoss
from hf_distill.losses.soft_target import DIVERGENCES
from hf_distill.reports.card_facts import CardFacts, facts_of
from hf_distill.reports.model_card import render
from hf_distill.reports.sources import conditions
from hf_distill.testing import TASKS, tiny_task

CARDS = Path(__file__).parent.parent / "model_cards"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def metadata(text):
    return yaml.safe_load(text.split("---\n")[1])


def card(trainer, **given):
    trainer.create_model_card(**given)
    return (Path(trainer.args.output_dir) / "README.md").read_text()


def from_the_hub(model, name):
    model.config._name_or_path, model.config._commit_hash = name, COMMIT
    return model


def block(text, heading):
    return re.search(rf"## {heading}\n.*?```python\n(.*?)```", text, re.DOTALL)[1]


class TestGolden:
    @pytest.mark.parametrize("stored", sorted(CARDS.glob("*.json")), ids=lambda path: path.stem)
    def test_stored_facts_give_the_stored_card(self, stored):
        text = str(render(CardFacts.from_dict(json.loads(stored.read_text()))))
        assert text == stored.with_suffix(".md").read_text()
        assert problems(metadata(text)) == []

    def test_every_card_has_its_facts(self):
        names = {path.stem for path in CARDS.glob("*.md")}
        assert names
        assert names == {path.stem for path in CARDS.glob("*.json")}

    def test_facts_survive_json(self, make_trainer):
        task = tiny_task("single_label")
        from_the_hub(task.teacher, "org/teacher")
        from_the_hub(task.student, "org/student")
        facts = facts_of(make_trainer(task, hidden_state_weight=1.0), license="mit")
        assert CardFacts.from_dict(json.loads(json.dumps(facts.to_dict()))) == facts

    def test_json_has_no_numbers_for_keys_but_the_card_is_the_same(self, make_trainer):
        facts = facts_of(make_trainer(tiny_task("single_label"), hidden_state_weight=1.0, layer_mapping={-1: -1}))
        text = str(render(facts))
        assert "    layer_mapping={-1: -1},\n" in text
        assert str(render(CardFacts.from_dict(json.loads(json.dumps(facts.to_dict()))))) == text


@pytest.mark.parametrize(
    "broken",
    [
        {"base_model": "a path/with spaces"}, {"base_model": "a/b", "base_model_relation": "distilled"},
        {"license": "my own"}, {"license": "other"}, {"pipeline_tag": "tagging"}, {"datasets": "not a list"},
        {"model-index": [{"name": "x", "results": [{"task": {"type": "fill-mask"}}]}]},
        {"model-index": [{"name": "x"}]}, {"tags": ["a", "a"]}, {"accuracy": 1.0}, {"base_model_relation": "finetune"},
    ],
)  # fmt: skip
def test_the_schema_refuses(broken):
    assert problems(broken)


def test_every_source_of_a_loss_is_bibtex_with_one_field_a_line():
    entry = re.compile(r"@(article|inproceedings)\{\w+,\n(  (\w+)=\{[^{}\n]+\},\n)+  year=\{\d{4}\}\n\}")
    soft = [SoftTargetLoss(divergence=name, standardize=True) for name in DIVERGENCES]
    citations = [getattr(losses, name).citation for name in losses.__all__ if name.endswith("Loss")]
    told = {text for citation in [*citations, *(loss.citation for loss in soft)] for text in citation.split("\n\n")}
    assert len(told - {""}) > 12
    assert [text for text in told - {""} if not entry.fullmatch(text)] == []


class TestEveryTask:
    @pytest.mark.parametrize("name", TASKS)
    def test_the_hub_takes_the_card_and_its_code_loads_the_student(self, name, make_trainer, tmp_path):
        trainer = make_trainer(tiny_task(name))
        trainer.hub_model_id = str(tmp_path / "out")
        trainer.save_model()
        text = card(trainer, metrics={"accuracy": 0.5})
        assert problems(metadata(text)) == []
        assert metadata(text)["model-index"][0]["results"][0]["task"]["type"] == metadata(text)["pipeline_tag"]
        names = {}
        exec(block(text, "How to use"), names)
        assert type(names["model"]) is type(trainer.model)

    def test_a_pair_is_asked_as_one(self, make_trainer):
        facts = facts_of(make_trainer(tiny_task("single_label")), tasks="text-classification")
        facts.has_processor = facts.pair = True
        assert 'model({"text": "A text.", "text_pair": "Another."})' in block(str(render(facts)), "How to use")

    @pytest.mark.parametrize("tag", ["text-classification", "image-classification", "question-answering", "fill-mask"])
    def test_at_most_five_lines_of_code(self, tag, make_trainer):
        facts = facts_of(make_trainer(tiny_task("single_label")), tasks=tag)
        facts.has_processor = True
        code = block(str(render(facts)), "How to use")
        compile(code, "card", "exec")
        assert len([line for line in code.splitlines() if line]) <= 5


class TestSources:
    def test_a_teacher_of_the_hub_is_the_base_model(self, make_trainer):
        task = tiny_task("single_label")
        from_the_hub(task.teacher, "org/teacher")
        text = card(make_trainer(task))
        assert metadata(text)["base_model"] == "org/teacher"
        assert metadata(text)["base_model_relation"] == "finetune"
        assert f"Teacher: `org/teacher`, revision `{COMMIT}`" in text

    def test_several_teachers_and_where_the_student_started(self, make_trainer):
        task, other = tiny_task("single_label"), tiny_task("single_label", seed=1)
        teachers = [from_the_hub(task.teacher, "org/one"), from_the_hub(other.teacher, "org/two")]
        from_the_hub(task.student, "org/start")
        trainer = make_trainer(task, teacher_model=teachers)
        assert metadata(card(trainer))["base_model"] == ["org/start", "org/one", "org/two"]
        assert metadata(card(trainer, finetuned_from="org/start"))["base_model"] == ["org/start", "org/one", "org/two"]

    def test_a_folder_is_no_base_model_and_its_place_stays_private(self, make_trainer, tmp_path, monkeypatch):
        task = tiny_task("single_label")
        task.teacher.save_pretrained(tmp_path / "private" / "teacher")
        monkeypatch.chdir(tmp_path)
        for place in (str(tmp_path / "private" / "teacher"), "private/teacher"):
            text = card(make_trainer(task, teacher_model=None, teacher_model_name_or_path=place))
            assert "base_model" not in metadata(text)
            assert "Teacher: `teacher`" in text
            assert str(tmp_path) not in text

    def test_stored_answers_and_no_teacher(self, make_trainer):
        task = tiny_task("single_label")
        rows = [{**row, "teacher_logits": [0.1, 0.2, 0.3]} for row in task.rows]
        stored = card(make_trainer(task, teacher_model=None, train_dataset=rows))
        assert "Teacher: stored answers (column `teacher_logits`)" in stored
        alone = card(make_trainer(task, soft_target_weight=0.0))
        assert "trained without a teacher" in alone
        assert "Teacher: none" in alone


class TestLicense:
    def save(self, task, folder, header):
        task.teacher.save_pretrained(folder)
        (folder / "README.md").write_text(f"---\n{header}\n---\n\n# Teacher\n")
        return {"teacher_model": None, "teacher_model_name_or_path": str(folder)}

    def test_it_is_the_teachers(self, make_trainer, tmp_path):
        task = tiny_task("single_label")
        trainer = make_trainer(task, **self.save(task, tmp_path / "teacher", "license: apache-2.0"))
        text = card(trainer)
        assert metadata(text)["license"] == "apache-2.0"
        assert "licence" not in text

    def test_conditions_are_told_in_the_log_and_on_the_card(self, make_trainer, tmp_path, caplog):
        task = tiny_task("single_label")
        trainer = make_trainer(task, **self.save(task, tmp_path / "teacher", "license: cc-by-nc-4.0"))
        text = card(trainer)
        told = "`teacher` is under `cc-by-nc-4.0`, which does not allow commercial use."
        assert told in text
        assert told in caplog.text
        assert metadata(text)["license"] == "cc-by-nc-4.0"
        assert metadata(card(trainer, license="mit"))["license"] == "mit"
        assert told in card(trainer, license="mit")

    def test_a_licence_without_an_identifier_keeps_its_name(self, make_trainer, tmp_path):
        task = tiny_task("single_label")
        header = "license: other\nlicense_name: house-licence\nlicense_link: LICENSE"
        text = card(make_trainer(task, **self.save(task, tmp_path / "teacher", header)))
        assert problems(metadata(text)) == []
        assert metadata(text)["license_name"] == "house-licence"

    def test_an_unknown_one_is_told(self, make_trainer):
        text = card(make_trainer(tiny_task("single_label")))
        assert "license" not in metadata(text)
        assert "The licence of `BertForSequenceClassification` is not known here." in text

    @pytest.mark.parametrize(
        ("license", "word"),
        [
            ("cc-by-nc-sa-4.0", "commercial"), ("llama3.1", "outputs"), ("gemma", "distilled"), ("agpl-3.0", "same"),
            ("bigscience-bloom-rail-1.0", "restrictions"), ("cc-by-nd-4.0", "changed"), ("other", "own"),
            ("fair-noncommercial-research-license", "commercial"), ("cc-by-sa-4.0", "same"),
        ],
    )  # fmt: skip
    def test_what_licences_ask(self, license, word):
        assert word in conditions(license)

    @pytest.mark.parametrize("license", ["apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc0-1.0"])
    def test_free_ones_ask_nothing(self, license):
        assert conditions(license) is None


class TestContent:
    def test_data_of_the_hub_is_recognised(self, make_trainer):
        task = tiny_task("single_label")
        rows = Dataset.from_list(task.rows, split=Split.VALIDATION)
        rows.info.download_checksums = {f"hf://datasets/org/reviews@{COMMIT}/train.parquet": {"num_bytes": 1}}
        rows.info.config_name = "plain"
        text = card(make_trainer(task, eval_dataset=rows), metrics=None, dataset="Reviews")
        assert metadata(text)["datasets"] == ["org/reviews"]
        assert f"Reviews, revision `{COMMIT}`" in text
        assert "Rows to evaluate on: 48" in text

    def test_the_last_evaluation_is_in_the_model_index(self, make_trainer):
        task = tiny_task("single_label")
        rows = Dataset.from_list(task.rows, split=Split.VALIDATION)
        trainer = make_trainer(task, eval_dataset=rows, compute_metrics=lambda p: {"accuracy": 0.25, "mine": 1.0})
        trainer.evaluate()
        (result,) = metadata(card(trainer, dataset_tags="org/data"))["model-index"][0]["results"]
        assert result["dataset"] == {"name": "org/data", "type": "org/data", "split": "validation"}
        assert [(m["type"], m["value"]) for m in result["metrics"]] == [("accuracy", 0.25)]
        assert metadata(card(trainer, metrics={"f1": 0.5}))["metrics"] == ["f1"]

    def test_layers_schedules_and_losses_of_ones_own(self, make_trainer):
        losses = {
            "soft": SoftTargetLoss(Schedule.linear(4.0, 1.0)),
            "hidden": HiddenStateLoss({1: (1, 2), 2: 4}),
        }
        trainer = make_trainer(tiny_task("single_label"), losses=losses)
        text = card(trainer)
        assert trainer.losses.equation() in text
        assert "| 1 | 1 + 2 |\n| 2 | 4 |" in text
        assert "were passed to the trainer as `losses=`" in text
        assert "jiao2020tinybert" in text
        assert "hinton2015distilling" in text

    def test_its_arguments_make_the_same_arguments(self, make_trainer, make_args):
        args = make_args(temperature=3.0, layer_mapping={1: 2}, lr_scheduler_type="cosine", hidden_state_weight=0.5,
                         teacher_model_init_kwargs={"dtype": "float32", "token": "hf_secret"})  # fmt: skip
        text = card(make_trainer(tiny_task("single_label"), args=args))
        assert "hf_secret" not in text
        names = {}
        exec(block(text, "Training"), names)
        again, same = names["args"].to_dict(), args.to_dict()
        elsewhere = {"output_dir", "report_to", "disable_tqdm", "logging_strategy", "logging_dir"}
        assert {k: v for k, v in again.items() if k not in elsewhere} == {
            k: v for k, v in same.items() if k not in elsewhere
        }

    def test_results_stand_where_they_were_missing(self, make_trainer):
        trainer = make_trainer(tiny_task("single_label"))
        assert "cannot say what the teacher gave" in card(trainer)
        text = card(trainer, results="| model |\n| --- |", description="Small.", limits="Not for medicine.")
        assert "cannot say what the teacher gave" not in text
        assert "| model |\n| --- |" in text
        assert "Small." in text
        assert "Not for medicine." in text

    def test_tags_of_an_earlier_card_stay(self, make_trainer):
        trainer = make_trainer(tiny_task("single_label"))
        card(trainer, tags=["film"], language="en")
        assert metadata(card(trainer))["tags"] == [
            "film",
            "hf_distill",
            "knowledge-distillation",
            "generated_from_trainer",
        ]

    @pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's own call
    def test_an_adapter_is_one(self, make_trainer):
        peft = pytest.importorskip("peft")
        task = tiny_task("single_label")
        from_the_hub(task.student, "org/start")
        task.student = peft.get_peft_model(
            task.student, peft.LoraConfig(target_modules=["query"], task_type="SEQ_CLS")
        )
        found = metadata(card(make_trainer(task)))
        assert problems(found) == []
        assert (found["library_name"], found["base_model_relation"], found["base_model"]) == (
            "peft", "adapter", "org/start",
        )  # fmt: skip


def test_every_argument_of_trainers_method_is_taken_in_its_place():
    theirs = list(inspect.signature(transformers.Trainer.create_model_card).parameters)
    ours = inspect.signature(DistillationTrainer.create_model_card).parameters
    assert list(ours)[: len(theirs)] == theirs
    assert all(p.kind is p.KEYWORD_ONLY for name, p in ours.items() if name not in theirs)


def test_the_code_for_grey_images_runs(tmp_path):
    """A pipeline opens images in colour, which a processor of one channel refuses."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    student = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_channels=1, **sizes))
    student.save_pretrained(tmp_path)
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}, "image_mean": [0.5],
                 "image_std": [0.5]}  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    Image.new("L", (9, 7)).save(tmp_path / "image.png")
    facts = CardFacts(
        "a student", "ViTForImageClassification", "AutoModelForImageClassification", 1, "soft",
        model_id=str(tmp_path), pipeline_tag="image-classification", grey=True,
    )  # fmt: skip
    code = block(str(render(facts)), "How to use")
    code = code.replace("image.png", str(tmp_path / "image.png"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() in ("LABEL_0", "LABEL_1")
