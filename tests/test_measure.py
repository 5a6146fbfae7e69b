"""Size and latency of a model."""

import time

import pytest
import torch
from torch import nn

from hf_distill.reports.measure import count_parameters, disk_megabytes, measure_cost, measure_latency
from hf_distill.reports.memory import peak_memory_megabytes


class Recorder(nn.Module):
    """Notes under which conditions it is called."""

    def __init__(self, seconds=0.0):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.seconds = seconds
        self.calls = []

    def forward(self, x):
        self.calls.append((len(x), self.training, torch.get_num_threads(), torch.is_inference_mode_enabled()))
        time.sleep(self.seconds)
        return self.linear(x)


def test_shared_parameters_count_once_and_frozen_ones_count():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    assert count_parameters(model) == 9 + 3 + 3


def test_disk_size_is_that_of_the_weights_alone(tmp_path):
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(bytes(1_500_000))
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(bytes(500_000))
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_bytes(bytes(700_000))
    (tmp_path / "optimizer.pt").write_bytes(bytes(900_000))
    assert disk_megabytes(tmp_path) == pytest.approx(2.0)


def test_disk_size_does_not_add_up_two_formats_of_the_same_weights(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(bytes(1_000_000))
    (tmp_path / "pytorch_model.bin").write_bytes(bytes(3_000_000))
    assert disk_megabytes(tmp_path) == pytest.approx(1.0)


def test_disk_size_of_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no weights"):
        disk_megabytes(tmp_path)


def test_latency_takes_the_inputs_in_turn_in_eval_mode_on_the_asked_threads():
    model = Recorder().train()
    latency = measure_latency(model, [{"x": torch.ones(1, 2)}, {"x": torch.ones(3, 2)}], runs=4, warmup=2, threads=2)
    assert [call[0] for call in model.calls] == [1, 3, 1, 3, 1, 3]
    assert all(call[1:] == (False, 2, True) for call in model.calls)
    assert (latency.runs, latency.threads, latency.device) == (4, 2, "cpu")
    assert 0 < latency.p50_ms <= latency.p90_ms <= latency.p95_ms


def test_latency_is_in_milliseconds():
    latency = measure_latency(Recorder(0.01), [{"x": torch.ones(1, 2)}], runs=3, warmup=0)
    assert 10 <= latency.p50_ms < 1000


def test_latency_leaves_threads_and_modes_as_they_were():
    model = nn.ModuleDict({"frozen": Recorder().eval(), "rest": Recorder()})
    model.forward = lambda x: model["rest"](x)
    model.training = True
    before = torch.get_num_threads()
    measure_latency(model, [{"x": torch.ones(1, 2)}], runs=1, warmup=0, threads=before + 1)
    assert torch.get_num_threads() == before
    assert model.training
    assert model["rest"].training
    assert not model["frozen"].training


def test_threads_come_back_after_an_error():
    before = torch.get_num_threads()
    with pytest.raises(TypeError):
        measure_latency(Recorder(), [{"y": torch.ones(1, 2)}], threads=before + 1)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("numbers", [{"runs": 0}, {"warmup": -1}, {"threads": 0}])
def test_impossible_numbers_are_refused(numbers):
    with pytest.raises(ValueError, match="needs runs >= 1"):
        measure_latency(Recorder(), [{"x": torch.ones(1, 2)}], **numbers)


def test_no_inputs_are_refused():
    with pytest.raises(ValueError, match="at least one batch"):
        measure_latency(Recorder(), [])


def test_throughput_counts_the_rows_of_ragged_batches():
    latency = measure_latency(Recorder(0.01), [{"x": torch.ones(1, 2)}, {"x": torch.ones(3, 2)}], runs=2, warmup=0)
    assert 4 / 0.2 < latency.rows_per_second <= 4 / 0.02


def test_any_callable_can_be_timed():
    latency = measure_latency(lambda x: x + 1, [{"x": torch.ones(2, 2)}], runs=3, warmup=0)
    assert latency.device == "cpu"


class Peak(nn.Module):
    """Holds 100 numbers; at most 10 + 1,000 + 10,000 of a pass at once, the inputs included."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(10, 10))
        self.tied = self.weight

    def forward(self, x):
        first = x.repeat(100)  # 1,000
        second = first.repeat(10)  # 10,000
        del first
        third = second[:10].view(2, 5) * 1  # a view takes nothing, its product 10
        del second
        return third.repeat(100, 1).add_(1)  # 1,000


def test_peak_memory_is_what_is_alive_at_once():
    model, x = Peak().train(), torch.ones(10)
    numbers = 100 + 10 + 1_000 + 10_000
    assert peak_memory_megabytes(model, {"x": x}) == pytest.approx(4 * numbers / 1e6)
    assert model.training


def test_cost_is_measured_at_every_batch_size_and_the_rows_start_over(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(bytes(2_000_000))
    rows = [{"x": torch.full((2,), float(i)), "labels": torch.tensor(0)} for i in range(5)]
    seen = []

    def collate(part):
        seen.append([int(row["x"][0]) for row in part])
        return {name: torch.stack([row[name] for row in part]) for name in part[0]}

    model = Recorder()
    cost = measure_cost(model, rows, collate, folder=tmp_path, batch_sizes=(1, 8), runs=6, warmup=1, threads=1)
    assert seen[:5] == [[0], [1], [2], [3], [4]]
    assert seen[5] == [0, 1, 2, 3, 4, 0, 1, 2]
    assert {call[0] for call in model.calls} == {1, 8}
    assert (cost.parameters, cost.disk_mb) == (6, 2.0)
    assert cost.peak_memory_mb == pytest.approx(4 * (6 + 8 * 2 + 8 * 2) / 1e6)
    assert [latency.runs for latency in cost.latency.values()] == [6, 6]


def test_cost_without_rows_is_refused():
    with pytest.raises(ValueError, match="needs rows and batch sizes"):
        measure_cost(Recorder(), [], lambda part: {})
