"""Whatever state the caller is in, the body runs in torch's defaults, and the caller's state comes back."""

import contextlib
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from distributed_mnist.common import process_state
from distributed_mnist.common.process_state import changes, defined_state, snapshot, torch_defaults

Contexts = Callable[[], contextlib.AbstractContextManager[Any]]


class Doubling(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result * 2 if func is torch.nn.functional.linear else result


class Halving(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result / 2 if func is torch.ops.aten.addmm.default else result


@contextlib.contextmanager
def call(setter: Callable[[Any], Any], value: Any, before: Any) -> Iterator[None]:
    setter(value)
    try:
        yield
    finally:
        setter(before)


def attribute(owner: Any, name: str, value: Any) -> contextlib.AbstractContextManager[None]:
    return call(lambda new: setattr(owner, name, new), value, getattr(owner, name))


BACKENDS: Any = torch.backends
STATES: dict[str, Contexts] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "mkldnn": lambda: attribute(BACKENDS.mkldnn, "enabled", False),
    "mkldnn-precision": lambda: attribute(BACKENDS.mkldnn.matmul, "fp32_precision", "bf16"),
    "cuda-precision": lambda: attribute(BACKENDS.cuda.matmul, "allow_tf32", True),
    "cudnn": lambda: attribute(BACKENDS.cudnn, "benchmark", True),
    "attention": lambda: torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    "denormals": lambda: call(torch.set_flush_denormal, True, False),
    "matmul": lambda: call(torch.set_float32_matmul_precision, "medium", "highest"),
    "dtype": lambda: call(torch.set_default_dtype, torch.float64, torch.float32),
    "device": lambda: torch.device("meta"),
    "default-device": lambda: call(torch.set_default_device, "meta", None),
    "no-grad": torch.no_grad,
    "inference": torch.inference_mode,
    "anomaly": lambda: call(torch.autograd.set_detect_anomaly, True, False),
    "function-mode": Doubling,
    "dispatch-mode": Halving,
    "saved-tensors": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t * 2, lambda t: t),
}


def result() -> list[Any]:
    """What a small step gives, with everything that the settings may change in it."""
    layer = torch.nn.Linear(40, 8)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(320).view(8, 40) / 317 + 1e-3)
        layer.bias.fill_(1e-39)
    x = (torch.arange(120).view(3, 40) / 119).requires_grad_()
    layer(x).square().sum().backward()
    assert x.grad is not None
    return [
        layer.bias.tolist(),
        x.grad.tolist(),
        str(x.dtype),
        str(x.device),
        torch.tensor(0.5).is_inference(),
    ]


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("context", [torch_defaults, defined_state])
def test_the_callers_state_changes_nothing_and_comes_back(name: str, context: Contexts) -> None:
    expected, usual = result(), snapshot()
    with STATES[name]():
        theirs, grad, device = snapshot(), torch.is_grad_enabled(), torch.get_default_device()
        with context():
            assert result() == expected
            assert snapshot() == usual
        assert snapshot() == theirs
        assert (torch.is_grad_enabled(), torch.get_default_device()) == (grad, device)
        assert torch.is_inference_mode_enabled() == (name == "inference")
    assert snapshot() == usual
    assert result() == expected


def test_weights_converted_by_an_outer_autocast_are_not_used() -> None:
    """autocast caches a weight as bf16 until the outermost context ends: an update would go unseen."""
    layer, x = torch.nn.Linear(4, 2), torch.ones(1, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch_defaults():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            before = layer(x)
        with torch.no_grad():
            layer.weight.add_(1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not torch.equal(layer(x), before)


def test_every_setting_is_watched() -> None:
    """Two of one name would hide each other."""
    settings = (*process_state._PROCESS, *process_state._THREAD, *process_state._CHOSEN)
    assert len({setting.name for setting in settings}) == len(settings) == len(snapshot())


def test_settings_that_the_body_changes_end_with_it() -> None:
    before = snapshot()
    with defined_state():
        inside = snapshot()
        with defined_state():
            torch.set_num_threads(before["number of threads"] + 1)
            torch.set_default_dtype(torch.float64)
            torch.set_default_device("meta")
            assert changes(inside) == (
                "default dtype from torch.float32 to torch.float64, number of threads from "
                f"{before['number of threads']} to {before['number of threads'] + 1}"
            )
        assert changes(inside) == ""
        assert torch.ones(1).device.type == "cpu"
    assert snapshot() == before


def in_threads(count: int, body: Callable[[], None]) -> None:
    threads = [threading.Thread(target=body) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)


@pytest.mark.parametrize(("context", "most"), [(defined_state, 1), (torch_defaults, 3)])
def test_runs_take_turns_and_other_uses_need_not(context: Contexts, most: int) -> None:
    inside, seen = [], []
    together = threading.Barrier(most)  # on a busy machine a thread may start late

    def body() -> None:
        with context():
            inside.append(None)
            together.wait(30)
            time.sleep(0.05)  # others would come in meanwhile, if they could
            seen.append((len(inside), torch.get_default_dtype()))
            together.wait(30)
            inside.pop()

    with STATES["dtype"]():
        in_threads(3, body)
        assert torch.get_default_dtype() == torch.float64  # the last to leave restores it
    assert seen == [(most, torch.float32)] * 3


def test_a_forked_process_does_not_wait_for_a_thread_that_it_lacks() -> None:
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with defined_state():
            entered.set()
            leave.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    entered.wait(30)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python warns of any fork beside threads
            child = os.fork()
        if not child:
            os._exit(0 if process_state._one_at_a_time.acquire(timeout=5) else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        leave.set()
        thread.join(30)
