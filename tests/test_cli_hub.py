"""`hf-distill` on a dataset by its name: the real client in a process of its own, with a local Hub or none."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import Repo, running_hub
from test_cli import NAMES, SIZES
from test_transfer_set import bert
from test_vocabulary import CORPUS, original

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


@pytest.fixture
def teacher(tmp_path):
    bert(**SIZES, **NAMES).save_pretrained(tmp_path / "teacher")
    original("wordpiece").save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def check(teacher, endpoint, folder):
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    own = {
        "HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }  # fmt: skip
    code = "import sys; from hf_distill.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "check", "--teacher", str(teacher), "--dataset", "me/data", "--json",
               "--output_dir", str(folder / "out"), "--compression", "3", "--use_cpu"]  # fmt: skip
    return subprocess.run(command, env=inherited | own, cwd=folder, capture_output=True, text=True, timeout=300)


def test_a_dataset_by_its_name_on_the_hub(teacher, tmp_path):
    rows = "".join(f"{text},{k % 2}\n" for k, text in enumerate(CORPUS[:60]))
    with running_hub() as hub:
        hub.repos["me/data"] = Repo(private=False)
        hub.repos["me/data"].commit("rows", {"train.csv": f"text,label\n{rows}".encode()})
        done = check(teacher, hub.url, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "classification into 2 classes of texts in 'text'" in json.loads(done.stdout)["task"]
    assert any(request.startswith("GET /datasets/me/data/resolve/") for request in hub.requests)


def test_without_a_network_one_line_says_so(teacher, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # and nobody listens
        done = check(teacher, f"http://127.0.0.1:{free.getsockname()[1]}", tmp_path)
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("hf-distill")]
    assert len(lines) == 1
    assert "The dataset me/data cannot be loaded" in lines[0]
    assert "Traceback" not in done.stderr
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
