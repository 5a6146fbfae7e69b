"""The trainer's side of the teacher cache: when it is filled, and with what."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hf_distill.heads import core_model, forward_parameters, label_columns
from hf_distill.losses import refuse_top_k
from hf_distill.output_head import OutputHead
from hf_distill.preflight import as_loaded
from hf_distill.teachers import TeacherAnswersCollator
from hf_distill.teachers.cache import require_cacheable
from hf_distill.teachers.cached import brings
from hf_distill.teachers.keeper import CacheKeeper
from hf_distill.teachers.kept_logits import KeptLogits
from hf_distill.teachers.loading import cache_dtype
from hf_distill.teachers.rows import columns_of, is_stream

if TYPE_CHECKING:
    from hf_distill.trainer import DistillationTrainer


def make_keeper(trainer: DistillationTrainer) -> CacheKeeper | None:
    """Who keeps the answers, if there is a `teacher_cache_dir` and anything to keep."""
    args, teacher = trainer.args, trainer.teacher
    if not getattr(args, "teacher_cache_dir", None) or teacher is None or not trainer.losses.teacher_needs:
        return None
    require_cacheable(trainer.losses.teacher_needs)
    dtype = cache_dtype(args, args.device)
    labels = label_columns(trainer.label_names, forward_parameters(trainer.model)[0] | teacher.input_names)
    if args.teacher_cache_logits == "top_k":
        refuse_top_k(trainer.losses.active())
    logits = KeptLogits(args.teacher_cache_logits, args.teacher_cache_top_k, trainer.alignment.vocabulary)
    return CacheKeeper(
        args.teacher_cache_dir,
        teacher,
        trainer.head,
        sorted(labels),
        dtype,
        args.teacher_cache_dtype,
        logits,
        args.device,
    )


def known_of_teacher(trainer: DistillationTrainer) -> tuple[OutputHead | None, int]:
    """What makes logits of stored answers that are shorter: the teacher's output head, and the number of classes."""
    keeper = trainer.cache_keeper
    head = trainer.removable_heads.teacher if keeper is None else keeper.output_head
    vocabulary = trainer.alignment.vocabulary or getattr(core_model(trainer.model).config, "vocab_size", None)
    return head, int(vocabulary or 0)


def collator_after_filling(trainer: DistillationTrainer, dataset: Any, training: bool) -> TeacherAnswersCollator:
    """The trainer's collator, after every row of the dataset is in the cache; from then on a row that is not is an
    error.
    """
    keeper, collator, args = trainer.cache_keeper, trainer.data_collator, trainer.args
    if keeper is None or not (training or args.eval_with_teacher):
        return collator
    trainer.open_cache()
    required = _fill(trainer, keeper, dataset, stream_is_fine=not training)
    if training and args.eval_with_teacher and args.eval_strategy != "no":  # while the teacher is there
        several = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"": trainer.eval_dataset}
        for some in several.values():
            _fill(trainer, keeper, some, stream_is_fine=True)
    keeper.release()
    return replace(collator, required=required)


def _fill(trainer: DistillationTrainer, keeper: CacheKeeper, dataset: Any, stream_is_fine: bool) -> bool:
    """Ask about the rows of a dataset, unless it brings the answers, or is a stream that need not be cached."""
    if brings(columns_of(dataset), keeper.needs) or (is_stream(dataset) and stream_is_fine):
        return False
    rows, collate = as_loaded(trainer, dataset, trainer.data_collator.collator)
    main = trainer.is_world_process_zero()
    report = keeper.fill(
        dataset,
        rows,
        collate,
        batch_size=trainer.args.teacher_batch_size,
        rank=trainer.accelerator.process_index,
        world=trainer.accelerator.num_processes,
        progress=main and not trainer.args.disable_tqdm,
        barrier=trainer.accelerator.wait_for_everyone,
    )
    if report is not None and main:
        print(report.line(keeper.folder))
    return True
