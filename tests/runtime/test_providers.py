"""Execution providers: those that really load, without noise."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from coordconv_patch.errors import ArgumentError, ExportError
from coordconv_patch.running.silence import descriptors_silenced
from coordconv_patch.runtime import providers as providers_module
from coordconv_patch.runtime.providers import CPU, make_session, working_providers


@pytest.fixture(autouse=True)
def _nothing_remembered() -> Iterator[None]:
    """Each test finds out anew, and the tests after it do not see what was pretended here."""
    remembered = providers_module._works
    remembered.cache_clear()
    yield
    remembered.cache_clear()


@pytest.fixture
def built_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str], list[str]], None]:
    """Pretend that ONNX Runtime was built with some providers, of which a few work."""

    def pretend(names: list[str], working: list[str]) -> None:
        monkeypatch.setattr(ort, "get_available_providers", lambda: names)
        monkeypatch.setattr(providers_module, "_works", working.__contains__)

    return pretend


def identity() -> bytes:
    return providers_module.probe_model()


def test_the_cpu_always_works_and_comes_last() -> None:
    found = working_providers()
    assert found[-1] == CPU
    assert set(found) <= set(ort.get_available_providers())
    for name in found:
        assert make_session(identity(), [name]).get_providers()[0] == name


def test_a_provider_that_does_not_load_is_left_out() -> None:
    for name in ort.get_available_providers():
        options = ort.SessionOptions()
        options.log_severity_level = 4
        loads = ort.InferenceSession(identity(), options, providers=[name]).get_providers()
        computes = name != "AzureExecutionProvider"  # it calls servers, see below
        assert (name in working_providers()) == (loads[0] == name and computes)


def test_finding_out_is_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    working_providers()
    assert capfd.readouterr() == ("", "")


def test_a_session_on_what_works_is_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    session = make_session(identity(), working_providers(), threads=1)
    assert session.run(None, {"x": np.array([-2.0], np.float32)})[0].tolist() == [0.0]
    assert capfd.readouterr() == ("", "")


def _speak_while_silenced() -> None:
    with descriptors_silenced():
        print("hidden")
        os.write(1, b"hidden")
        os.write(2, b"hidden")
        raise KeyError


def test_output_comes_back_after_the_silence(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyError):
        _speak_while_silenced()
    print("shown")
    os.write(2, b"shown too")
    sys.stdout.flush()
    assert capfd.readouterr() == ("shown\n", "shown too")


def test_providers_come_in_the_runtimes_order(built_in: Any) -> None:
    built_in(["TensorRT", "CUDA", "ROCm", CPU], ["CUDA", "ROCm"])
    assert working_providers() == ("CUDA", "ROCm", CPU)


def test_the_cpu_comes_last_wherever_the_runtime_lists_it(built_in: Any) -> None:
    built_in([CPU, "CUDA"], ["CUDA"])
    assert working_providers() == ("CUDA", CPU)


def test_what_only_calls_servers_is_not_taken_for_a_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    azure = "AzureExecutionProvider"
    monkeypatch.setattr(ort, "get_available_providers", lambda: [azure, CPU])
    session = type(
        "Session", (), {"__init__": lambda *_, **__: None, "get_providers": [azure].copy}
    )
    monkeypatch.setattr(ort, "InferenceSession", session)  # it says that it runs on it
    assert working_providers() == (CPU,)
    assert working_providers([azure, CPU]) == (CPU,)
    with pytest.raises(ExportError, match="none of providers"):
        working_providers([azure])


def test_requested_providers_keep_their_order_and_lose_those_that_do_not_work(
    built_in: Any,
) -> None:
    built_in(["TensorRT", "CUDA", "ROCm", CPU], ["CUDA", "ROCm"])
    assert working_providers(["ROCm", "TensorRT", "CUDA"]) == ("ROCm", "CUDA")
    assert working_providers([CPU, "CUDA"]) == (CPU, "CUDA")
    assert working_providers([CPU]) == (CPU,)


def test_a_provider_that_the_runtime_was_not_built_with_is_named(built_in: Any) -> None:
    built_in(["CUDA", CPU], [])
    with pytest.raises(ArgumentError, match=f"has no Abacus; it has CUDA, {CPU}"):
        working_providers(["CUDA", "Abacus"])


def test_requesting_only_what_does_not_work_is_an_error(built_in: Any) -> None:
    built_in(["CUDA", CPU], [])
    with pytest.raises(ExportError, match=r"none of providers=\['CUDA'\] works here .*always does"):
        working_providers(["CUDA"])


def test_a_provider_that_raises_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no such device")

    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", CPU])
    monkeypatch.setattr(ort, "InferenceSession", refuse)
    assert working_providers() == (CPU,)


def test_a_provider_that_falls_back_to_the_cpu_does_not_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = ort.InferenceSession
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", CPU])
    monkeypatch.setattr(
        ort,
        "InferenceSession",
        lambda model, options, providers: real(model, options, providers=[CPU]),
    )
    assert working_providers() == (CPU,)


def test_each_provider_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def refuse(model: bytes, options: Any, providers: list[str]) -> None:
        tried.extend(providers)
        raise RuntimeError("no such device")

    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", CPU])
    monkeypatch.setattr(ort, "InferenceSession", refuse)
    working_providers()
    working_providers()
    assert tried == ["CUDAExecutionProvider"]


def test_sessions_take_bytes_strings_and_paths(tmp_path: Path) -> None:
    path = tmp_path / "identity.onnx"
    path.write_bytes(identity())
    for model in (identity(), str(path), path):
        session = make_session(model, [CPU])
        assert session.run(None, {"x": np.array([3.0], np.float32)})[0].tolist() == [3.0]


def test_session_options_reach_the_runtime() -> None:
    options = make_session(identity(), [CPU], threads=1).get_session_options()
    assert options.intra_op_num_threads == 1
    assert options.graph_optimization_level == ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    plain = make_session(identity(), [CPU], graph_optimization=False).get_session_options()
    assert plain.graph_optimization_level == ort.GraphOptimizationLevel.ORT_DISABLE_ALL


def test_disabled_optimizers_reach_the_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    real = ort.InferenceSession

    def session(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs)
        return real(*args, **kwargs)

    monkeypatch.setattr(ort, "InferenceSession", session)
    make_session(identity(), [CPU], disabled_optimizers=("Pad_Fusion",))
    make_session(identity(), [CPU])
    assert seen[0]["disabled_optimizers"] == ["Pad_Fusion"]
    assert "disabled_optimizers" not in seen[1]
