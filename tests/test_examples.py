"""The small examples, on tiny models: that they run through, and that their numbers are what they say."""

import csv
import json
from importlib import import_module
from pathlib import Path

import datasets
import numpy as np
import pytest
import tokenizers
import torch
import transformers as hf
import yaml
from card_schema import problems

from hf_distill.reports.card_facts import CardFacts
from hf_distill.reports.model_card import render

EXAMPLES = Path(__file__).parent.parent / "examples"
WORDS = [f"word{i}" for i in range(20)]


@pytest.fixture
def example(monkeypatch):
    """Imports a script or helper of examples/ as it runs there; what it silences is loud again afterwards."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    verbosity = hf.logging.get_verbosity()
    yield import_module
    hf.logging.set_verbosity(verbosity)
    hf.logging.enable_progress_bar()


def facts_of_card(folder):
    """What the card of a saved student says, after checks that the card is made of it and the Hub would take it."""
    facts, text = (
        CardFacts.from_dict(json.loads((folder / "card.json").read_text())),
        (folder / "README.md").read_text(),
    )
    assert text == str(render(facts))
    assert problems(yaml.safe_load(text.split("---\n")[1])) == []
    assert str(folder.parent) not in text  # where things lie on this machine
    return facts


@pytest.fixture
def tokenizer(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    return hf.BertTokenizerFast(str(tmp_path / "vocab.txt"))


@pytest.fixture
def bert(tokenizer, tmp_path):
    """The folder of a BERT without a masked-LM head."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    hf.BertModel(hf.BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    return str(tmp_path / "bert")


@pytest.fixture
def corpus(tmp_path):
    """A folder of two splits; every text is 4 to 12 words."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for split, rows in {"train": 24, "test": 10}.items():
        with (folder / f"{split}.csv").open("w", newline="") as file:
            lines = [[" ".join(WORDS[(i * j) % 20] for j in range(4 + i % 9))] for i in range(rows)]
            csv.writer(file).writerows([["text"], *lines])
    return str(folder)


@pytest.fixture
def batches(example, tokenizer, corpus):
    masked_lm = example("_masked_lm")
    rows = masked_lm.tokenize(masked_lm.texts(corpus, None, "text"), tokenizer, 8)["test"]
    return lambda seed=0: masked_lm.masked_once(rows, tokenizer, 0.3, batch_size=4, seed=seed)


def test_bf16_is_asked_for_as_trainer_takes_it_on_this_device(example, tmp_path):
    """Without a GPU Trainer refuses `bf16` alone, so the jobs failed on every CPU that computes in it."""
    assert hf.TrainingArguments(str(tmp_path), **example("_training").precision(True)).bf16
    assert not hf.TrainingArguments(str(tmp_path), **example("_training").precision(False)).bf16


class TestDistilBert:
    def test_the_job_leaves_a_table_and_a_student_that_opens_by_itself(self, example, bert, corpus, tmp_path, capsys):
        flags = {"teacher": bert, "dataset": corpus, "teacher_steps": 3, "steps": 2, "batch_size": 4, "max_length": 8}
        arguments = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
        out = tmp_path / "out"
        lines = example("distilbert").main([*arguments, "--output_dir", str(out), "--random_student", "true"])
        assert [line.name for line in lines] == [
            "word frequencies", "teacher", "student before training", "distilled student",
            "same student, no teacher", "random weights, no teacher",
        ]  # fmt: skip
        assert len({tuple(line.cross_entropy) for line in lines}) == len(lines)
        assert "perplexity" in capsys.readouterr().out
        student = hf.AutoModelForMaskedLM.from_pretrained(out / "student")
        assert isinstance(student, hf.DistilBertForMaskedLM)
        assert student.config.n_layers == 2
        assert hf.pipeline("fill-mask", model=str(out / "student"))("word1 [MASK]")
        facts = facts_of_card(out / "student")
        assert facts.teachers[0].name == "bert, after 3 steps of masked-LM training"
        assert "| same student, no teacher " in facts.results
        assert "5 * soft" in facts.equation

    def test_a_teacher_without_a_head_is_not_taken_as_it_is(self, example, bert, corpus, tmp_path):
        arguments = ["--teacher", bert, "--dataset", corpus, "--teacher_steps", "0", "--output_dir", str(tmp_path)]
        with pytest.raises(SystemExit, match=r"no masked-LM head: .*--teacher_steps"):
            example("distilbert").main(arguments)

    def test_every_model_is_asked_about_the_same_masks(self, batches):
        for ours, again in zip(batches(), batches(), strict=True):
            assert all(torch.equal(ours[key], again[key]) for key in ("input_ids", "labels"))
        assert any(
            not torch.equal(ours["labels"], others["labels"])
            for ours, others in zip(batches(), batches(seed=1), strict=True)
        )

    def test_a_long_text_becomes_several_rows_and_none_is_lost(self, example, tokenizer, corpus):
        masked_lm = example("_masked_lm")
        data = masked_lm.texts(corpus, None, "text")
        rows = masked_lm.tokenize(data, tokenizer, 8)["train"]
        assert max(map(len, rows["input_ids"])) == 8
        words = [token for row in rows["input_ids"] for token in row if token not in tokenizer.all_special_ids]
        assert words == [token for text in data["train"]["text"] for token in tokenizer(text)["input_ids"][1:-1]]

    def test_cross_entropy_is_the_loss_that_transformers_computes(self, example, bert, batches):
        model = hf.BertForMaskedLM.from_pretrained(bert).eval()
        filled = example("_masked_lm").fill_masks(model, batches())
        losses, counts = zip(
            *((model(**batch).loss.item(), (batch["labels"] != -100).sum().item()) for batch in batches()), strict=True
        )
        expected = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
        assert filled.losses.mean().item() == pytest.approx(expected, rel=1e-5)
        assert len(filled.labels) == sum(counts)

    def test_a_new_head_with_no_opinion_answers_with_word_frequencies(self, example, bert, batches):
        masked_lm = example("_masked_lm")
        counts = torch.arange(1, 26)
        model, is_new = masked_lm.load_teacher(bert, counts)
        assert is_new
        with torch.no_grad():
            model.bert.embeddings.word_embeddings.weight.zero_()  # the decoder's too: they are tied
        ours, known = masked_lm.fill_masks(model, batches()), masked_lm.fill_by_frequency(batches(), counts)
        torch.testing.assert_close(ours.losses, known.losses)
        assert ours.answers.tolist() == known.answers.tolist() == [24] * len(known.labels)


class TestDigits:
    """And the chain of assistants, which is taught on the same images."""

    @pytest.fixture
    def few(self, example, monkeypatch):
        pytest.importorskip("sklearn")
        digits, assistants = example("digits"), example("assistants")
        rows = {name: rows[:40] for name, rows in digits.digits().items()}
        for script in (digits, assistants):
            monkeypatch.setattr(script, "digits", lambda: rows)
        return digits, assistants

    def test_every_image_is_in_one_split(self, example):
        images = pytest.importorskip("sklearn.datasets").load_digits()
        data = example("digits").digits()
        assert {name: len(rows) for name, rows in data.items()} == {"train": 1000, "validation": 200, "test": 597}
        ours = [
            (*(row["pixel_values"].flatten() * 8 + 8).tolist(), int(row["labels"])) for r in data.values() for row in r
        ]
        assert sorted(ours) == sorted((*image, label) for image, label in zip(images.data, images.target, strict=True))

    def test_the_card_has_both_students_and_no_licence_of_a_teacher_that_has_none(self, few, tmp_path):
        digits, _ = few
        lines = digits.main(["--epochs", "1", "--teacher_epochs", "1", "--output_dir", str(tmp_path)])
        assert [line.name for line in lines] == ["teacher", "distilled student", "same student, no teacher"]
        facts = facts_of_card(tmp_path / "student")
        assert "| same student, no teacher " in facts.results
        assert facts.teachers[0].name == digits.TEACHER_NAME
        assert facts.license.license is None
        assert hf.AutoModelForImageClassification.from_pretrained(tmp_path / "student").config.num_labels == 10

    def test_the_end_of_a_chain_is_saved_with_its_last_teacher(self, few, tmp_path):
        _, assistants = few
        flags = ["--sizes", "2x8", "1x8", "1x4", "--epochs", "1", "--seeds", "1"]
        lines = assistants.main([*flags, "--output_dir", str(tmp_path)])
        assert [line.name for line in lines] == [
            "2x8, labels alone (teacher)", "1x8, from 2x8", "1x4, from 1x8", "1x4, from 2x8 directly",
            "1x4, labels alone",
        ]  # fmt: skip
        facts = facts_of_card(tmp_path / "student")
        assert facts.teachers[0].name == "the 1x8 assistant of the same script"
        assert facts.title == "Digits, 1 x 4 vision transformer"
        assert "| 1x4, labels alone " in facts.results


class TestHyperparameterSearch:
    @pytest.fixture
    def script(self, example, monkeypatch):
        pytest.importorskip("sklearn")
        pytest.importorskip("optuna")
        script = example("hyperparameter_search")
        few = {name: rows[:64] for name, rows in script.digits().items()}
        monkeypatch.setattr(script, "digits", lambda: few)
        return script

    def test_the_teacher_is_asked_once_whatever_the_number_of_trials(self, script, tmp_path, monkeypatch):
        monkeypatch.setattr("hf_distill.teachers.loading.has_fast_bf16", lambda device: False)  # else some rows twice
        teacher, data, rows = script.vision_transformer(**script.TEACHER, seed=0), script.digits(), []
        teacher.register_forward_pre_hook(
            lambda _, args, inputs: rows.append(len(inputs["pixel_values"])), with_kwargs=True
        )
        study = script.search(teacher, data, trials=3, epochs=1, folder=tmp_path)
        assert len(study.trials) == 3
        assert study.trials[0].params == script.DEFAULTS
        assert len({trial.params["temperature"] for trial in study.trials}) == 3
        first = sum(rows)
        assert len(data["train"]) <= first < 2 * len(data["train"])  # all rows once, and a dry run
        script.search(teacher, data, trials=1, epochs=1, folder=tmp_path)
        assert sum(rows) == first

    def test_what_is_chosen_is_the_best_on_validation_and_what_is_shown_the_test(self, script, tmp_path, capsys):
        flags = ["--trials", "2", "--seeds", "1", "--epochs", "1", "--teacher_epochs", "1"]
        study, lines = script.main([*flags, "--output_dir", str(tmp_path)])
        shown = json.loads((tmp_path / "trials.json").read_text())
        assert study.best_value == max(trial["validation_accuracy"] for trial in shown)
        assert [line.name for line in lines] == [
            "teacher", "student, chosen settings", "student, defaults", "same student, no teacher",
        ]  # fmt: skip
        assert "validation accuracy %" in capsys.readouterr().out
        assert hf.AutoModelForImageClassification.from_pretrained(tmp_path / "student").config.num_labels == 10
        facts = facts_of_card(tmp_path / "student")
        assert facts.arguments["learning_rate"] == study.best_params["learning_rate"]
        assert "| same student, no teacher " in facts.results

    def test_a_missing_optuna_is_told_with_the_way_to_get_it(self, script, monkeypatch, tmp_path):
        monkeypatch.setattr(script, "find_spec", lambda name: None)
        with pytest.raises(SystemExit, match=r"pip install 'optuna>=4'"):
            script.main(["--output_dir", str(tmp_path)])


class TestCausalLM:
    @pytest.fixture
    def flags(self, tmp_path):
        """A tiny Llama with a tokenizer in a folder, and 30 documents."""
        words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
        model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
        model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        hf.PreTrainedTokenizerFast(tokenizer_object=model, pad_token="[PAD]").save_pretrained(tmp_path / "llama")
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
        hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=len(words), **sizes)).save_pretrained(tmp_path / "llama")
        (tmp_path / "text").mkdir()
        for i in range(30):
            text = " ".join(WORDS[(i + j * j) % 20] for j in range(220))
            (tmp_path / "text" / f"{i}.txt").write_text(text)
        return [
            "--teacher", str(tmp_path / "llama"), "--text", str(tmp_path / "text"), "--layers", "0", "3",
            "--steps", "3", "--length", "16", "--test_documents", "4", "--validation_documents", "2",
        ]  # fmt: skip

    def test_teacher_and_both_students_are_compared(self, example, flags, tmp_path, capsys):
        lines = example("causal_lm").main([*flags, "--json", str(tmp_path / "out.json")])
        assert list(lines) == [
            "teacher", "student before training", "distilled student", "same student, without teacher",
        ]  # fmt: skip
        assert len({tuple(line["test"]) for line in lines.values()}) == 4
        assert "nats per token (mean and standard error" in capsys.readouterr().out
        assert json.loads((tmp_path / "out.json").read_text())["lines"].keys() == lines.keys()

    def test_the_distilled_student_is_saved_with_its_card(self, example, flags, tmp_path):
        script, out = example("causal_lm"), tmp_path / "out"
        lines = script.main([*flags, "--output_dir", str(out)])
        student = hf.AutoModelForCausalLM.from_pretrained(out)
        data = example("_lm_data")
        tokenizer = hf.AutoTokenizer.from_pretrained(out)
        parts = data.split_documents(data.read_documents(tmp_path / "text"), 2, 4)
        test = data.blocks(parts["test"], tokenizer, 16, 4)
        assert script.losses(student, test, 4) == pytest.approx(lines[script.DISTILLED]["test"], rel=1e-5)
        facts = facts_of_card(out)
        assert facts.teachers[0].name == "llama"
        assert f"| {script.ALONE} " in facts.results
        assert script.gained(lines) in facts.results

    def test_perplexity_is_that_of_the_loss_that_transformers_computes(self, example, flags):
        script = example("causal_lm")
        model = hf.AutoModelForCausalLM.from_pretrained(flags[1])
        documents = [torch.randint(22, (5, 16)).tolist(), torch.randint(22, (3, 16)).tolist()]
        expected = [model(input_ids=torch.tensor(d), labels=torch.tensor(d)).loss.item() for d in documents]
        assert script.losses(model, documents, 2) == pytest.approx(expected, rel=1e-5)

    def test_a_cache_changes_no_result(self, example, flags, tmp_path):
        script = example("causal_lm")
        plain, kept = (script.main([*flags, *more]) for more in ([], ["--teacher_cache_dir", str(tmp_path / "cache")]))
        distilled = script.DISTILLED
        assert kept[distilled]["test"] == pytest.approx(plain[distilled]["test"], rel=1e-3)

    def test_what_a_cache_loses_is_measured_against_the_gradient_of_all_logits(
        self, example, flags, monkeypatch, tmp_path, capsys
    ):
        """Errors of the whole gradient, by autograd on the models' own logits."""
        monkeypatch.syspath_prepend(str(EXAMPLES / "benchmarks"))
        script = example("kept_answers")
        sizes = ["--rows", "2", "--length", "16", "--top_k", "1", "22"]
        found = script.main([*flags[:7], *sizes, "--steps", "2", "--json", str(tmp_path / "out.json")])
        assert json.loads((tmp_path / "out.json").read_text()) == found
        assert len(found) == 2
        assert "30 tokens, student after 2 steps (all logits in fp16: 44 bytes per token)" in capsys.readouterr().out
        teacher, tokenizer, _ = script.load(flags[1])
        student = script.create_student(teacher, layers=[0, 3])
        cut = script.blocks(script.read_documents(tmp_path / "text"), tokenizer, 16)
        ids = torch.tensor(script.as_rows(cut, 2)["input_ids"])
        p, z = teacher(input_ids=ids).logits[:, :-1].softmax(-1), student(input_ids=ids).logits[:, :-1]
        best, q = p.argmax(-1, keepdim=True), z.softmax(-1)
        one_or_other = [torch.cat([x.gather(-1, best), 1 - x.gather(-1, best)], -1) for x in (p, q)]
        wholes = [(p, q), one_or_other]
        losses = [(a.detach() * (a / b).log()).sum(-1).mean() for a, b in wholes]
        losses.append(torch.nn.functional.cross_entropy(z.flatten(0, 1), ids[:, 1:].flatten()))
        exact, *others = (
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(student.parameters()), retain_graph=True)])
            for loss in losses
        )
        top_1, alone = (float((g - exact).norm() / exact.norm()) for g in others)
        lines = found["at the start"]
        assert lines["top-1 and the rest"]["error"] == pytest.approx(top_1, rel=1e-2)
        assert lines["text alone"]["error"] == pytest.approx(alone, rel=1e-4)
        assert lines["top-22 and the rest"]["error"] < 5e-2  # fp16; nearly uniform answers, so a small gradient
        assert lines["last hidden state"]["error"] < 1e-2
        assert lines["top-1 and the rest"]["bytes"] >= 2 * 2 + 4

    def test_the_text_that_comes_with_the_examples_is_long_enough(self, example):
        data = example("_lm_data")
        documents = data.film_reviews()
        assert len(documents) == 100
        assert min(len(text.split()) for text in documents) > 4 * 64


def test_the_convolutional_teacher_teaches_by_the_curve(example, tmp_path, capsys, monkeypatch):
    images = [[[(40 * label + row + column) % 256 for column in range(28)] for row in range(28)] for label in range(3)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    part = datasets.Dataset.from_dict(
        {"image": [np.array(image, np.uint8) for image in images] * 4, "label": [0, 1, 2] * 4}, features
    )
    datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), part)).save_to_disk(tmp_path / "data")
    capsys.readouterr()
    common = ["--data", str(tmp_path / "data"), "--output_dir", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["x", *common, "--epochs", "1", "--widths", "8,16,32", "--size", "32"])
    example("fashion_mnist").main()
    teacher = hf.AutoModelForImageClassification.from_pretrained(tmp_path / "teacher")
    assert f"{teacher.num_parameters():,} parameters" in capsys.readouterr().out
    few = ["--augmented_rows", "12", "--training_rows", "32", "--baselines", "false", "--compressions", "4"]
    monkeypatch.setattr("sys.argv", ["x", *common, "--teacher", str(tmp_path / "teacher"), *few])
    example("size_vs_retention").main()
    named = {line["name"]: line for line in json.loads((tmp_path / "results.json").read_text())["results"]}
    assert named["4x recipe"]["parameters"] <= teacher.num_parameters() / 4


def test_views_of_grey_images_are_what_the_processor_makes_of_them(example):
    """Without motion the training reads the images as users of the saved processor will."""
    module = example("fashion_mnist")
    images = [np.random.default_rng(k).integers(0, 256, (28, 28)).astype(np.uint8) for k in range(3)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    rows = datasets.Dataset.from_dict({"image": images, "label": [0, 1, 2]}, features)
    batch = module.Collator(module.Grey(rows, 56), moved=False)([2, 0])
    assert batch["labels"].tolist() == [2, 0]
    processor = hf.ViTImageProcessor(
        size={"height": 56, "width": 56}, image_mean=[module.MEAN] * 3, image_std=[module.DEVIATION] * 3
    )
    expected = processor([rows[k]["image"].convert("RGB") for k in (2, 0)], return_tensors="pt")["pixel_values"]
    step = 1 / 255 / module.DEVIATION  # one of 256 greys: the two round on their own
    assert (batch["pixel_values"] - expected).abs().max() <= 1.01 * step


def test_the_tagger_says_how_many_words_its_saved_model_gets_right(example, bert, tmp_path, capsys, monkeypatch):
    names = ["noun", "verb", "."]
    rows = {"words": [WORDS[k : k + 3 + k % 4] for k in range(12)]}
    rows["tags"] = [[WORDS.index(word) % 3 for word in words] for words in rows["words"]]
    features = datasets.Features(
        {"words": datasets.List(datasets.Value("string")), "tags": datasets.List(datasets.ClassLabel(names=names))}
    )
    part = datasets.Dataset.from_dict(rows, features)
    datasets.DatasetDict(dict.fromkeys(("train", "validation"), part)).save_to_disk(tmp_path / "data")
    flags = ["--data", str(tmp_path / "data"), "--output_dir", str(tmp_path), "--model", bert, "--epochs", "3"]
    monkeypatch.setattr("sys.argv", ["x", *flags, "--learning_rate", "1e-2"])
    example("brown_tags").main()
    tagger = hf.pipeline("token-classification", model=str(tmp_path / "teacher"))
    assert list(tagger.model.config.id2label.values()) == names
    right = []
    for words, tags in zip(rows["words"], rows["tags"], strict=True):  # each word is one token
        right += [found["entity"] == names[tag] for found, tag in zip(tagger(" ".join(words)), tags, strict=True)]
    assert f"{100 * np.mean(right):.1f} % of the validation words" in capsys.readouterr().out
