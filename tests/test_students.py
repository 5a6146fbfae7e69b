"""Students cut from a teacher: the oracle is the teacher itself with blocks removed in place."""

import copy
import inspect
from types import SimpleNamespace

import pytest
import torch
import transformers as hf

from hf_distill import LayerMapping
from hf_distill.students import create_student
from hf_distill.students.blocks import block_influence

# Transformers 5.0 uses torch.jit itself, which recent versions of torch deprecate.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
# The most common names; attribute_map turns them into each architecture's own.
SIZES = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 6, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
DEBERTA = {**SIZES, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "conv_kernel_size": 3}
GROUPED = {**SIZES, "num_key_value_heads": 1, "head_dim": 8}
TYPES = [f"{kind}_attention" for kind in ("sliding", "full", "sliding", "sliding", "full", "full")]
SLIDING = {**GROUPED, "use_sliding_window": True, "sliding_window": 3, "layer_types": TYPES}
VIT = {**SIZES, "image_size": 8, "patch_size": 4}
T5 = {**SIZES, "num_decoder_layers": 4, "d_ff": 32, "d_kv": 8, "decoder_start_token_id": 0}
BART = {
    **SIZES, "encoder_layers": 6, "decoder_layers": 4, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "decoder_start_token_id": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "d_model": 16,
}  # fmt: skip
WHISPER = {**BART, "max_source_positions": 20, "max_target_positions": 20, "num_mel_bins": 8}
# (config, its entries, task, path of the blocks, path of the decoder's)
MODELS = {
    "bert": (hf.BertConfig, SIZES, "SequenceClassification", "bert.encoder.layer"),
    "roberta": (hf.RobertaConfig, SIZES, "TokenClassification", "roberta.encoder.layer"),
    "mpnet": (hf.MPNetConfig, SIZES, "MaskedLM", "mpnet.encoder.layer"),
    "deberta": (hf.DebertaV2Config, DEBERTA, "MaskedLM", "deberta.encoder.layer"),
    "electra": (hf.ElectraConfig, SIZES, "SequenceClassification", "electra.encoder.layer"),
    "modernbert": (hf.ModernBertConfig, {**SIZES, "local_attention": 4}, "MaskedLM", "model.layers"),
    "distilbert": (hf.DistilBertConfig, SIZES, "QuestionAnswering", "distilbert.transformer.layer"),
    "gpt2": (hf.GPT2Config, SIZES, "CausalLM", "transformer.h"),
    "llama": (hf.LlamaConfig, GROUPED, "CausalLM", "model.layers"),
    "qwen2": (hf.Qwen2Config, SLIDING, "CausalLM", "model.layers"),
    "qwen3": (hf.Qwen3Config, SLIDING, "SequenceClassification", "model.layers"),
    "vit": (hf.ViTConfig, VIT, "ImageClassification", "vit.encoder.layer|vit.layers"),
    "dinov2": (hf.Dinov2Config, VIT, "ImageClassification", "dinov2.encoder.layer|dinov2.layers"),
    "t5": (hf.T5Config, T5, "Seq2SeqLM", "encoder.block", "decoder.block"),
    "bart": (hf.BartConfig, BART, "Seq2SeqLM", "model.encoder.layers", "model.decoder.layers"),
    "whisper": (hf.WhisperConfig, WHISPER, "SpeechSeq2Seq", "model.encoder.layers", "model.decoder.layers"),
}
# In Transformers 5.0 its attention slides by position, whatever layer_types says: most cuts are refused there.
OLD_MODERNBERT = hasattr(hf.ModernBertConfig(), "global_attn_every_n_layers")
CUTTABLE = [name for name in MODELS if not (OLD_MODERNBERT and name == "modernbert")]
ENCODER_DECODERS = ("t5", "bart", "whisper")


def make(name, **changes):
    config_class, entries, task = MODELS[name][:3]
    torch.manual_seed(0)
    return noisy(getattr(hf, f"AutoModelFor{task}").from_config(config_class(**{**entries, **changes})))


def noisy(model):
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)  # biases are zero, and blocks alike, as they come
    return model.eval()


def blocks_at(model, paths):
    """The module list at the first of the paths, by version of Transformers, that exists."""
    modules = dict(model.named_modules())
    return next((path, modules[path]) for path in paths.split("|") if path in modules)


def without_blocks(teacher, paths, kept):
    """A copy with the other blocks taken out of their list."""
    model = copy.deepcopy(teacher)
    path, blocks = blocks_at(model, paths)
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, torch.nn.ModuleList([blocks[k] for k in kept]))
    if leaf == "block":  # T5 keeps the relative attention bias of all blocks in block 0
        first, owner = blocks[kept[0]].layer[0].SelfAttention, blocks[0].layer[0].SelfAttention
        first.has_relative_attention_bias = True
        first.relative_attention_bias = owner.relative_attention_bias
    if getattr(model.config, "layer_types", None):  # Qwen looks the type up by position
        model.config.layer_types = [model.config.layer_types[k] for k in kept]
    return model


def outputs(model):
    """Logits and hidden states of both stacks on two rows, the second padded."""
    torch.manual_seed(1)
    config, ids = model.config, torch.arange(3, 19).view(2, 8)
    inputs = {
        "pixel_values": lambda: {"pixel_values": torch.randn(2, 3, 8, 8)},
        "input_features": lambda: {"input_features": torch.randn(2, 8, 40)},
        "input_ids": lambda: {"input_ids": ids, "attention_mask": torch.tensor([[1] * 8, [1] * 5 + [0] * 3])},
    }[model.main_input_name]()
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False  # the blocks of the reference keep their old numbers
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
    names = ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")
    found = {f"{key}.{index}": state for key in names for index, state in enumerate(output.get(key) or ())}
    assert found
    return found | {key: value for key, value in output.items() if isinstance(value, torch.Tensor)}


def assert_same(student, reference):
    ours, theirs = outputs(student), outputs(reference)
    assert ours.keys() == theirs.keys()
    assert not [key for key, value in theirs.items() if not torch.equal(ours[key], value)]


@pytest.mark.parametrize("name", CUTTABLE)
@pytest.mark.parametrize("kept", [(0, 3, 4), (1, 5)])
def test_student_equals_the_teacher_with_blocks_removed_in_place(name, kept):
    if name == "modernbert":
        kept = (0, *kept[1:])
    teacher = make(name)
    assert_same(create_student(teacher, layers=kept), without_blocks(teacher, MODELS[name][3], kept))


@pytest.mark.parametrize("name", MODELS)
def test_full_depth_is_an_independent_copy_of_the_teacher(name):
    teacher = make(name).train()
    for parameter in teacher.parameters():
        parameter.requires_grad_(False)
    before = torch.get_rng_state()
    student = create_student(teacher, num_hidden_layers=6)
    assert torch.equal(torch.get_rng_state(), before)
    assert (student.training, teacher.training) == (False, True)
    fresh = {key: parameter.requires_grad for key, parameter in make(name).named_parameters()}
    assert {key: parameter.requires_grad for key, parameter in student.named_parameters()} == fresh
    ours = {tensor.data_ptr() for tensor in [*student.parameters(), *student.buffers()] if tensor.numel()}
    assert not ours & {tensor.data_ptr() for tensor in [*teacher.parameters(), *teacher.buffers()]}
    assert_same(student, teacher.eval())
    teacher.config.dtype = student.config.dtype
    assert student.config.to_dict() == teacher.config.to_dict()


@pytest.mark.parametrize("name", CUTTABLE)
def test_saving_and_reloading_changes_nothing(name, tmp_path):
    student = create_student(make(name), num_hidden_layers=2)
    student.save_pretrained(tmp_path / "one")
    auto = getattr(hf, f"AutoModelFor{MODELS[name][2]}")
    again, info = auto.from_pretrained(tmp_path / "one", output_loading_info=True)
    assert not any(info.values())
    assert_same(again, student)
    again.save_pretrained(tmp_path / "two")
    assert (tmp_path / "one" / "config.json").read_text() == (tmp_path / "two" / "config.json").read_text()


@pytest.mark.parametrize("name", CUTTABLE)
@pytest.mark.parametrize("number", [1, 4])
def test_default_blocks_are_those_of_the_uniform_mapping(name, number):
    teacher = make(name)
    kept = [pair[1] - 1 for pair in LayerMapping.uniform().resolve(student_layers=number, teacher_layers=6)]
    if name == "modernbert":
        kept[0] = 0  # its block 0 has no attention norm
    student = create_student(teacher, num_hidden_layers=number)
    assert_same(student, create_student(teacher, layers=kept))
    block = sum(p.numel() for p in blocks_at(teacher, MODELS[name][3])[1][5].parameters())
    removed = (6 - number) * block  # every block but block 0 has as many
    assert sum(p.numel() for p in teacher.parameters()) - sum(p.numel() for p in student.parameters()) == removed


@pytest.mark.parametrize(("choice", "kept"), [("first", [0, 1]), ("last", [4, 5])])
def test_blocks_can_be_the_first_or_last(choice, kept):
    teacher = make("bert")
    student = create_student(teacher, num_hidden_layers=2, layer_choice=choice)
    assert_same(student, create_student(teacher, layers=kept))


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_blocks_by_importance_are_those_that_change_their_input_most(name):
    teacher = make(name)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    batches = [{"input_ids": torch.randint(3, 30, (2, 7)), "attention_mask": mask} for _ in range(3)]
    sums = [0.0] * 6
    for batch in batches:
        with torch.no_grad():
            states = [state.double().numpy() for state in teacher(**batch, output_hidden_states=True).hidden_states]
        for block in range(6):
            for row, place in mask.nonzero().tolist():
                x, y = (states[k][row, place] for k in (block, block + 1))
                sums[block] += 1 - float(x @ y / (x @ x) ** 0.5 / (y @ y) ** 0.5)
    torch.testing.assert_close(block_influence(teacher, batches), torch.tensor(sums, dtype=torch.float64) / 33)
    best = sorted(sorted(range(6), key=sums.__getitem__)[-3:])
    assert best != [1, 3, 5]  # the default
    batches = [{**batch, "row": ["not", "read"]} for batch in batches]
    student = create_student(teacher, num_hidden_layers=3, layer_choice="importance", calibration=iter(batches))
    assert_same(student, create_student(teacher, layers=best))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_hidden_layers": 2, "layer_choice": "best"}, "layer_choice must be one of"),
        ({"num_hidden_layers": 2, "layer_choice": "importance"}, "Pass some as calibration="),
        ({"layers": [1], "layer_choice": "last"}, r"layers=\[1\] names them"),
    ],
)
def test_a_choice_of_blocks_that_cannot_be_made_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        create_student(make("bert"), **given)


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_both_stacks_of_an_encoder_decoder_can_be_cut(name):
    teacher = make(name)
    _, _, _, encoder, decoder = MODELS[name]
    reference = without_blocks(without_blocks(teacher, encoder, (1, 4)), decoder, (1, 3))
    assert_same(create_student(teacher, layers=[1, 4], decoder_layers=[1, 3]), reference)
    assert_same(create_student(teacher, num_decoder_layers=2), without_blocks(teacher, decoder, (1, 3)))
    same_depth = make(name, num_hidden_layers=4, encoder_layers=4)
    cut = create_student(same_depth, layers=[0, 2], decoder_layers=[1, 3])
    assert_same(cut, without_blocks(without_blocks(same_depth, encoder, (0, 2)), decoder, (1, 3)))
    alone = hf.BartForCausalLM(hf.BartConfig(**BART))  # its own blocks are the decoder's of the config
    assert_same(create_student(alone.eval(), layers=[1, 3]), without_blocks(alone, "model.decoder.layers", (1, 3)))


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "t5", "bart"])
def test_blocks_are_numbered_afresh_for_the_cache(name):
    teacher = make(name)
    teacher.generation_config.repetition_penalty = 1.5
    decoder = {"decoder_layers": [1, 3]} if name in ENCODER_DECODERS else {}
    student = create_student(teacher, layers=[1, 3], **decoder)
    ids = torch.arange(3, 9)[None]
    cached, anew = (student.generate(ids, max_new_tokens=5, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached, anew)
    assert student.generation_config.repetition_penalty == 1.5


@pytest.mark.parametrize("name", [name for name in CUTTABLE if name in ("qwen2", "qwen3", "modernbert")])
def test_config_lists_with_one_entry_a_block_are_sliced(name):
    teacher = make(name)
    student = create_student(teacher, layers=[0, 1, 4])
    assert student.config.layer_types == [teacher.config.layer_types[k] for k in (0, 1, 4)]
    assert len(set(student.config.layer_types)) == 2
    other = make("llama", num_hidden_layers=3, eos_token_id=[2, 3, 4])  # as long, but not about blocks
    assert create_student(other, num_hidden_layers=2).config.eos_token_id == [2, 3, 4]


def test_dtypes_and_ties_are_kept_but_name_and_quantisation_leave_no_trace():
    teacher = make("bert").to(torch.bfloat16)
    teacher.classifier.to(torch.float32)
    teacher.config.quantization_config = {"quant_method": "gguf"}
    teacher.config._name_or_path = "somebody/large-teacher"
    student = create_student(teacher, num_hidden_layers=3)
    assert not hasattr(student.config, "quantization_config")
    assert student.config._name_or_path == student.name_or_path == ""
    assert (student.classifier.weight.dtype, student.dtype) == (torch.float32, torch.bfloat16)
    assert student.config.dtype == torch.bfloat16
    for tied in (True, False):
        student = create_student(make("llama", tie_word_embeddings=tied), num_hidden_layers=2)
        assert (student.lm_head.weight is student.model.embed_tokens.weight) is tied


def quantised(dequantize):
    teacher = make("bert")
    weight = teacher.classifier.weight.mul(8).to(torch.int8)
    teacher.classifier.weight = torch.nn.Parameter(weight, requires_grad=False)
    teacher.hf_quantizer = SimpleNamespace(dequantize=dequantize)
    return teacher


def test_a_quantised_teacher_is_dequantised_in_a_copy():
    def dequantize(model, **kwargs):
        model.classifier.weight = torch.nn.Parameter(model.classifier.weight.float())

    teacher = quantised(dequantize)
    student = create_student(teacher, num_hidden_layers=2)
    assert torch.equal(student.classifier.weight, teacher.classifier.weight.float())
    assert teacher.classifier.weight.dtype == torch.int8


BERT, T5_MODEL, NUMBER = (lambda: make("bert")), (lambda: make("t5")), {"num_hidden_layers": 2}


def changed(name, part, module, **changes):
    teacher = make(name, **changes)
    setattr(teacher, part, module)
    return teacher


BOTH = {side: {**SIZES, "model_type": "bert"} for side in ("encoder", "decoder")}
SWIN = {"embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "image_size": 16, "patch_size": 2}
REFUSED = [
    (BERT, {}, r"got neither num_hidden_layers nor layers. Pass one"),
    (BERT, {"num_hidden_layers": 2, "layers": [0]}, r"Both num_hidden_layers=2 and layers=\[0\] .* Pass one"),
    (BERT, {"num_hidden_layers": 7}, r"from 1 to 6, .* got 7"),
    (BERT, {"num_hidden_layers": 2.0}, r"a whole number .* got 2.0"),
    (BERT, {"num_hidden_layers": True}, r"a whole number .* got True"),
    (BERT, {"layers": []}, r"a list of block numbers from 0 to 5, got \[\]"),
    (BERT, {"layers": 3}, r"got 3. To give only their number, use num_hidden_layers"),
    (BERT, {"layers": [0, 6]}, r"asks for block 6, but the teacher has blocks 0 to 5"),
    (BERT, {"layers": [-1]}, r"asks for block -1, .* negative numbers are not taken"),
    (BERT, {"layers": [3, 1]}, r"in increasing order, got \[3, 1\]. Use \[1, 3\]"),
    (BERT, {"layers": [1, 1]}, r"every block once .* got \[1, 1\]. Use \[1\]"),
    (BERT, {"num_decoder_layers": 2}, r"is for encoder-decoders, but BertFor.* Pass num_hidden_layers"),
    (T5_MODEL, {"num_decoder_layers": 2, "decoder_layers": [0]}, r"Both num_decoder_layers=2 and decoder_"),
    (T5_MODEL, {"num_decoder_layers": 5}, r"num_decoder_layers must be .* from 1 to 4, .* got 5"),
    (T5_MODEL, {"decoder_layers": 2}, r"got 2. To give only their number, use num_decoder_layers"),
    (lambda: SimpleNamespace(get_base_model=lambda: None), NUMBER, r"wrapped by PEFT .*merge_and_unload"),
    (lambda: torch.nn.Linear(1, 1), NUMBER, r"needs a Transformers model, got Linear"),
    (lambda: hf.AlbertModel(hf.AlbertConfig(**SIZES, embedding_size=8)), NUMBER, r"Albert.* has no list of blocks"),
    (lambda: hf.SwinModel(hf.SwinConfig(**SWIN)), {"layers": [0]}, r"cannot be built with blocks .*Choose other"),
    (lambda: hf.EncoderDecoderModel(hf.EncoderDecoderConfig(**BOTH)), NUMBER, r"composed of several .* each part"),
    (lambda: make("modernbert"), {"layers": [2]}, r"(no place for model.layers.2.attn_norm.weight|attn_norm).* Keep"),
    (lambda: make("gpt2", scale_attn_by_inverse_layer_idx=True), {"layers": [1]}, r"scaling|scale_attn_by_inverse"),
    (lambda: changed("bert", "classifier", torch.nn.Linear(16, 2, device="meta")), NUMBER, r"device meta.* without"),
    (lambda: changed("bert", "classifier", torch.nn.Linear(16, 7)), NUMBER, r"classifier.* of shape .*it afresh"),
    (lambda: changed("llama", "lm_head", torch.nn.Linear(16, 40, bias=False), tie_word_embeddings=True), NUMBER,
     r"ties lm_head.weight .*tie_word_embeddings = False"),
    (lambda: quantised(None), NUMBER, r"is quantised, .* cannot be turned back .* without quantization_config"),
]  # fmt: skip


@pytest.mark.parametrize(("teacher", "kwargs", "message"), REFUSED, ids=[case[2] for case in REFUSED])
def test_what_cannot_be_cut_exactly_is_refused(teacher, kwargs, message):
    with pytest.raises(ValueError, match=message):
        create_student(teacher(), **kwargs)


@pytest.mark.parametrize("kept", [[0, 3], [1, 3]])
def test_a_list_of_all_blocks_in_every_block_is_no_reason_to_refuse(kept, tmp_path):
    """GPT-Neo's attention keeps the config's whole list; what counts is the block's own kind."""
    sizes = {"num_layers": 4, "num_heads": 4, "hidden_size": 32, "vocab_size": 37, "window_size": 3}
    sizes |= {"bos_token_id": 1, "eos_token_id": 2}
    config = hf.GPTNeoConfig(attention_types=[[["global", "local"], 2]], max_position_embeddings=64, **sizes)
    torch.manual_seed(0)
    teacher = noisy(hf.GPTNeoForCausalLM(config))
    student = create_student(teacher, layers=kept)
    assert_same(student, without_blocks(teacher, "transformer.h", kept))
    student.save_pretrained(tmp_path)
    assert_same(type(student).from_pretrained(tmp_path).eval(), student)
