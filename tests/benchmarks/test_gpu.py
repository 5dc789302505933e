"""The benchmark for GPUs, on a CPU in small: that its cases run, are kept, and are not measured twice."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import gpu

CPU = torch.device("cpu")


def run(path: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> dict[str, dict[str, object]]:
    command = ["gpu.py", "--tiny", "--device", "cpu", "--output", str(path), *options]
    monkeypatch.setattr(sys, "argv", command)
    gpu.main()
    return dict(json.loads(path.read_text())["cases"])


def test_cases_run_and_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "gpu.json"
    only = ("--only", "matmul|abxi|sasrec|width 8|catalogue 50|length 6|ranking")
    found = run(path, monkeypatch, *only)
    assert not [case for case, answer in found.items() if "error" in answer or "missing" in answer]
    for case, answer in found.items():
        figures = {"matmul": "tflops", "ranking": "users_per_second"}.get(case.split()[0], "tokens_per_second")
        assert float(str(answer[figures])) > 0
        assert float(str(answer["peak_mib"])) > 0
        assert answer["commit"]
    capsys.readouterr()
    assert run(path, monkeypatch, *only) == found
    assert capsys.readouterr().out == f"written  {path}\n"


def test_a_case_that_fails_is_written_down_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "gpu.json"
    with monkeypatch.context() as patch:
        patch.setattr(gpu, "products", lambda *_: 1 / 0)
        assert "ZeroDivisionError" in str(run(path, patch, "--only", "matmul")["matmul fp32"]["error"])
    assert "tflops" in run(path, monkeypatch, "--only", "matmul")["matmul fp32"]


def test_a_gpu_has_a_case_for_each_arithmetic_and_mode() -> None:
    names = [name for name, _ in gpu.cases(gpu.WHOLE, torch.device("cuda"))]
    assert len(set(names)) == len(names)
    for name in (
        "matmul bf16",
        "food-kitchen abxi tf32 reduce-overhead",
        "food-kitchen sasrec bf16 default fused",
        "width 2048 fused",
        "catalogue 10000000 fused",
        "length 2048 shared",
        "ranking 1000000 tf32",
    ):
        assert name in names
