"""The teacher cache when a process is killed, and when two share the work."""

import itertools
import os
import socket
import subprocess
import sys

import torch

from hf_distill.teachers.keys import content_keys
from hf_distill.teachers.store import AnswerStore
from hf_distill.testing import tiny_task


def model_inputs(task, rows):
    return {key: value for key, value in task.collate(rows).items() if key != "labels"}


FILL = """
import sys, torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
from hf_distill import DistillationTrainer, DistillationTrainingArguments
from hf_distill.teachers import fill
from hf_distill.testing import tiny_task
import time
fill.FLUSH_SECONDS = 0.0
task = tiny_task("token", rows=800)
forward = task.teacher.forward
def slowly(*args, **kwargs):
    time.sleep(0.02)
    return forward(*args, **kwargs)
slowly.__signature__ = __import__("inspect").signature(forward)
task.teacher.forward = slowly
args = DistillationTrainingArguments(
    {out!r}, use_cpu=True, report_to="none", disable_tqdm=True, max_steps=1, hidden_state_weight=1.0,
    teacher_cache_dir={cache!r}, teacher_batch_size=4, teacher_cache_dtype="float32", teacher_dtype="float32",
)
trainer = DistillationTrainer(task.student, args, task.collate, task.rows, teacher_model=task.teacher)
trainer.train()
"""


# One process imports the libraries; its children fill the cache and are killed: each a random moment after it has
# written a random number of files, so that no machine is too slow or too fast for it.
KILL = """
import os, pathlib, random, signal, time
from hf_distill import DistillationTrainer, DistillationTrainingArguments
generator, cache = random.Random(0), pathlib.Path({cache!r})
files = lambda: sorted(file.name for file in cache.rglob("*.arrow"))
for _ in range(20):
    enough = len(files()) + generator.randrange(5)
    child = os.fork()
    if not child:
        try:
            exec(compile({fill!r}, "fill", "exec"), {{"__name__": "fill"}})
        finally:
            os._exit(1)
    while len(files()) < enough:
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "the child ended by itself"
        time.sleep(0.001)
    time.sleep(generator.uniform(0.0, 0.1))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print("files", *files(), flush=True)
"""


def test_killed_at_random_moments_it_goes_on_where_it_was(tmp_path):
    """Twenty kills while it is filled: what was on disk stays, and in the end every answer is the teacher's."""
    cache = tmp_path / "cache"
    fill = FILL.format(tests=os.path.dirname(__file__), out=str(tmp_path / "out"), cache=str(cache))
    kill = KILL.format(fill=fill, cache=str(cache))

    def python(script):
        return subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, timeout=600, check=True
        ).stdout

    files = [set(line.split()[1:]) for line in python(kill).splitlines() if line.startswith("files")]
    assert len(files) == 20
    assert all(before <= after for before, after in itertools.pairwise(files))  # nothing that was there is lost
    columns = {"teacher_logits": "float32", "teacher_hidden_states_2": "float32", "teacher_hidden_states_4": "float32"}
    (home,) = {file.parent for file in cache.rglob("*.arrow")}
    known = len(AnswerStore(home, columns))
    assert 0 < known < 800
    assert f"asked about {800 - known} of 800 rows" in python(fill)

    task, store = tiny_task("token", rows=800), AnswerStore(home, columns)
    where = store.find(content_keys(task.collate(task.rows), {"input_ids", "attention_mask"}))
    assert (where >= 0).all()
    for row, kept in zip(task.rows, store.read(where, "teacher_logits"), strict=True):
        assert torch.allclose(kept, task.teacher(**model_inputs(task, [row])).logits[0], atol=1e-5)


def test_two_processes_share_the_work(tmp_path):
    """Each asks about its half, and both learn from the whole."""
    script = tmp_path / "two.py"
    script.write_text(
        """
import os, sys, torch
from torch import distributed as dist
torch.set_num_threads(1)
from hf_distill import DistillationTrainer, DistillationTrainingArguments
from hf_distill.testing import tiny_task
task, asked = tiny_task("token"), []
count = lambda module, args, kwargs: asked.append(len(kwargs["input_ids"]))
task.teacher.register_forward_pre_hook(count, with_kwargs=True)
args = DistillationTrainingArguments(
    sys.argv[1], use_cpu=True, ddp_backend="gloo", report_to="none", disable_tqdm=True, max_steps=2,
    per_device_train_batch_size=4, teacher_batch_size=4, teacher_cache_dir=sys.argv[1] + "/cache",
    teacher_dtype="float32",
)
trainer = DistillationTrainer(task.student, args, task.collate, task.rows, teacher_model=task.teacher)
asked.clear()
trainer.train()
both = [None, None]
dist.all_gather_object(both, (sum(asked), {k: v.sum().item() for k, v in trainer.model.state_dict().items()}))
assert [rows for rows, _ in both] == [27, 27], both  # 24 of 48, and 3 that tell whether padding matters
assert both[0][1] == both[1][1]
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # all is checked; gloo's threads now and then abort an interpreter that ends by itself
"""
    )
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    finished = subprocess.run(
        [*command, str(script), str(tmp_path / "out")], capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0, finished.stderr
