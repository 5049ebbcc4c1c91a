"""Test that the networks are as documented, and that models that cannot be trained exactly are refused."""

import math
import random
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from distributed_mnist.common import process_state
from distributed_mnist.config import ImageShape, Recipe
from distributed_mnist.errors import UsageError
from distributed_mnist.models.build import build, make_model, place
from distributed_mnist.models.inspection import ModelProperties, inspect
from distributed_mnist.models.zoo import MODELS, Enlarged
from distributed_mnist.user_code.functions import registered

CPU = torch.device("cpu")


class Flat(nn.Module):
    """One linear layer; subclasses add something that is refused."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.fc = nn.Linear(784, classes)

    def forward(self, images: Tensor) -> Any:
        return self.fc(images.flatten(1))


class BatchMean(Flat):
    def forward(self, images: Tensor) -> Tensor:
        return self.fc((images - images.mean(0)).flatten(1))


class Neighbour(Flat):
    """Mixes samples in the last digits only."""

    def forward(self, images: Tensor) -> Tensor:
        logits = self.fc(images.flatten(1))
        return logits + 1e-4 * logits.roll(1, dims=0)


class Counter(Flat):
    """Mixes no samples, but counts how often it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        return self.fc(images.flatten(1)) / self.calls


class Table(Flat):
    """Has a buffer that does not change, which is allowed."""

    def __init__(self) -> None:
        super().__init__()
        self.mask: Tensor
        self.register_buffer("mask", torch.ones(784))

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(images.flatten(1) * self.mask)


class FunctionalDropout(Flat):
    def forward(self, images: Tensor) -> Tensor:
        return self.fc(F.dropout(images.flatten(1), 0.5, self.training))


class Noise(Flat):
    def forward(self, images: Tensor) -> Tensor:
        logits = self.fc(images.flatten(1))
        return logits + torch.randn(len(images), 1) if self.training else logits


class Pair(Flat):
    def forward(self, images: Tensor) -> Any:
        return self.fc(images.flatten(1)), images


class Upright(Flat):
    """Needs images of another shape."""

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(images.reshape(len(images), 32, 32))


def dropout(*, where: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten(), nn.Linear(784, 10)]
    layers.insert(where, nn.Dropout(0.5))
    return nn.Sequential(*layers)


def problem(model: nn.Module, classes: int = 10) -> str:
    with pytest.raises(UsageError) as caught:
        inspect(model, "mine", classes, CPU)
    assert str(caught.value).startswith("--model mine: ")
    return str(caught.value).removeprefix("--model mine: ")


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("classes", [10, 47])
def test_images_to_logits(name: str, classes: int) -> None:
    model = build(name, classes, seed=0)
    assert model(torch.randn(5, 1, 28, 28)).shape == (5, classes)


@pytest.mark.parametrize("name", MODELS)
def test_the_number_of_parameters_in_the_docstring_is_true(name: str) -> None:
    stated = re.search(r"([\d,]+) parameters", MODELS[name].__doc__ or "")
    assert stated is not None
    model = build(name, 10, seed=0)
    counted = sum(p.numel() for p in model.parameters())
    assert counted == int(stated[1].replace(",", ""))
    assert inspect(model, name, 10, CPU) == ModelProperties(counted, draws_random_numbers=False, unused=())


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_decided_by_the_seed_alone(name: str) -> None:
    first = weights(build(name, 10, seed=3))
    torch.manual_seed(12345)
    torch.randn(7)
    assert torch.equal(weights(build(name, 10, seed=3)), first)
    assert not torch.equal(weights(build(name, 10, seed=4)), first)


def test_the_linear_model_has_the_original_scripts_names() -> None:
    shapes = {key: tuple(value.shape) for key, value in build("linear", 10, seed=0).state_dict().items()}
    assert shapes == {"fc.weight": (10, 784), "fc.bias": (10,)}


class Functional(Flat):
    def forward(self, images: Tensor) -> Tensor:
        return self.fc(F.batch_norm(images, torch.zeros(1), torch.ones(1), training=True).flatten(1))


@pytest.mark.parametrize(
    "model",
    [
        BatchMean(),
        Neighbour(),
        Functional(),
        nn.Sequential(nn.BatchNorm2d(1), BatchMean()),
        nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False), Neighbour()),
    ],
    ids=["mean", "neighbour", "functional", "with-norm", "with-norm-without-buffers"],
)
@pytest.mark.parametrize("training", [True, False])
def test_mixing_samples_is_refused(model: nn.Module, training: bool) -> None:
    said = problem(model.train(training))
    assert said.startswith("one image's logits depend on the others in its batch;")


@pytest.mark.parametrize(
    ("model", "layers", "min_images"),
    [
        (nn.Sequential(nn.Flatten(), nn.BatchNorm1d(784), nn.Linear(784, 10)), ("1",), 2),
        (nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(784, 10)), ("0",), 1),
        (
            nn.Sequential(nn.Flatten(), nn.BatchNorm1d(784, track_running_stats=False), nn.Linear(784, 10)),
            ("1",),
            2,
        ),
        (
            nn.Sequential(nn.BatchNorm2d(1, momentum=None), nn.Flatten(), nn.Dropout(), nn.Linear(784, 10)),
            ("0",),
            1,
        ),
        (
            nn.Sequential(nn.InstanceNorm2d(1, track_running_stats=True), nn.Flatten(), nn.Linear(784, 10)),
            ("0",),
            1,
        ),
    ],
    ids=["1d", "2d", "no-buffers", "cumulative", "instance"],
)
def test_layers_with_batch_statistics_are_found_and_left_as_they_are(
    model: nn.Module, layers: tuple[str, ...], min_images: int
) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    properties = inspect(place(model, CPU), "mine", 10, CPU)
    assert (properties.statistics_layers, properties.min_images) == (layers, min_images)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert all(module.training for module in model.modules())


class Frozen(Flat):
    """Keeps its batch norm in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)

    def train(self, mode: bool = True) -> "Frozen":
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(self.norm(images))


def test_a_frozen_batch_norm_has_no_batch_statistics() -> None:
    assert inspect(Frozen(), "mine", 10, CPU).statistics_layers == ()


def test_a_lazy_batch_norm_starts_without_statistics() -> None:
    def lazy(classes: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.LazyBatchNorm1d(), nn.Linear(784, classes))

    with registered({"mine:lazy": lazy}):
        state = build("mine:lazy", 10, 0).state_dict()
    assert not state["1.running_mean"].any()
    assert (state["1.running_var"] == 1).all()
    assert state["1.num_batches_tracked"] == 0


def test_the_reason_is_named() -> None:
    assert problem(BatchMean()).startswith("one image's logits depend on the others in its batch;")
    counts = problem(Counter())
    assert counts.startswith(
        "its buffer calls changes in the forward pass; what a pass leaves for the next"
    )
    assert counts.endswith("(as a counter, a moving average or spectral norm does)")
    assert problem(nn.Sequential(nn.Flatten(), spectral_norm(nn.Linear(784, 10)))).endswith(
        "(as a counter, a moving average or spectral norm does)"
    )
    frozen = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(784, 10))
    frozen[0].eval()
    assert problem(frozen).endswith(
        "train() has ended the evaluation mode of 0: override train() to keep it"
    )
    norm = nn.BatchNorm2d(1)
    assert problem(nn.Sequential(norm, Counter())).startswith("its buffer 1.calls changes in the forward")
    assert problem(nn.Sequential(norm, Remembering(training=True))).startswith("it gives other logits when")
    assert problem(nn.Sequential(nn.Flatten(), nn.SyncBatchNorm(784), nn.Linear(784, 10))).startswith(
        "its layer 1 is a SyncBatchNorm, whose statistics would depend on the number of processes"
    )


class Overwriting(Flat):
    """Changes its images."""

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(images.sub_(1).flatten(1))


class Remembering(Flat):
    """Remembers its last pass, in `mode` only, in an attribute that is no buffer."""

    def __init__(self, *, training: bool) -> None:
        super().__init__()
        self.mode, self.last = training, torch.zeros(())

    def forward(self, images: Tensor) -> Tensor:
        logits = self.fc(images.flatten(1))
        if self.training == self.mode:
            logits, self.last = logits + self.last, logits.detach().mean()
        return logits


class Sorting(Flat):
    """Sends images through its layer in another order: no image's logits depend on the others."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(784, 300)

    def forward(self, images: Tensor) -> Tensor:
        order = images.sum((1, 2, 3)).argsort()
        hidden = images.flatten(1).index_copy(0, order, images.flatten(1)[order])
        return self.fc(hidden) + self.wide(hidden)[:, :10]


class Sparse(Flat):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(3, 10, sparse=True)

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) + self.table((images.mean((1, 2, 3)) > 0).long())


def test_parameters_that_cannot_be_trained_are_named() -> None:
    assert problem(Flat().double()) == (
        "its parameter fc.weight is float64: trained parameters must be float32"
    )
    assert problem(Sparse()) == (
        "the gradient of its parameter table.weight is sparse: make its layer with sparse=False"
    )


def test_a_hook_that_nothing_calls_is_refused() -> None:
    model = Flat()
    model.fc.weight.register_post_accumulate_grad_hook(lambda _: None)
    assert problem(model) == (
        "its parameter fc.weight has a hook of register_post_accumulate_grad_hook, which nothing here "
        "would call: use register_hook"
    )


class Failing(torch.autograd.Function):
    """Fails in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        raise ArithmeticError("not today")


class FailingBackwards(Flat):
    def forward(self, images: Tensor) -> Tensor:
        return Failing.apply(super().forward(images))


def test_a_backward_pass_that_fails() -> None:
    assert problem(FailingBackwards()) == "its backward pass fails: ArithmeticError: not today"


class NoiseForBright(Flat):
    def forward(self, images: Tensor) -> Tensor:
        noise = [float(torch.rand(())) if float(image.mean()) > 0 else 0.0 for image in images]
        return super().forward(images) + torch.tensor(noise)[:, None] + torch.rand(len(images), 1)


def test_draws_that_depend_on_the_images_are_named() -> None:
    assert problem(NoiseForBright()) == (
        "how many random numbers it draws depends on what the images show: draw as many for every image"
    )


def test_nan_is_left_to_the_loop_which_names_the_step() -> None:
    model = Flat()
    with torch.no_grad():
        model.fc.bias.fill_(math.nan)
    inspect(model, "mine", 10, CPU)


def test_what_else_is_wrong_is_said_as_it_is() -> None:
    assert problem(Overwriting()) == "it changes its images in place: let it begin with images.clone()"
    assert problem(Remembering(training=True)).startswith(
        "it gives other logits when a pass is repeated; it keeps state between passes"
    )
    assert problem(Remembering(training=False)).startswith(
        "it gives other logits when a pass is repeated in evaluation; it keeps state between passes"
    )
    inspect(Sorting(), "mine", 10, CPU)


class Viewing(nn.Module):
    """Views a convolution's output as rows, which needs the contiguous layout: in the modes `when`."""

    def __init__(self, when: Sequence[bool]) -> None:
        super().__init__()
        self.conv, self.fc, self.when = nn.Conv2d(1, 3, 5, stride=3), nn.Linear(3 * 8 * 8, 10), when

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.conv(images)
        views = self.training in self.when
        return self.fc(hidden.view(len(images), -1) if views else hidden.flatten(1))


class Masked(Viewing):
    """Has a buffer that is a view of one number, which cannot be written."""

    def __init__(self) -> None:
        super().__init__([True])
        self.register_buffer("mask", torch.ones(1).expand(28, 28))

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images * self.get_buffer("mask"))


def leaving(classes: int) -> nn.Module:
    """A factory in a module that is also a program."""
    sys.exit(0)


def test_a_factory_that_ends_the_program_is_refused() -> None:
    with (
        registered({"mine:leaving": leaving}),
        pytest.raises(UsageError, match="factory failed: SystemExit"),
    ):
        build("mine:leaving", 10, 0)


def test_a_buffer_that_cannot_be_written_stays_as_it_is() -> None:
    inspect(place(Masked(), CPU), "mine", 10, CPU)


@pytest.mark.parametrize("when", [(True,), (False,), (True, False), ()])
def test_a_model_that_needs_the_contiguous_layout_has_it(when: Sequence[bool]) -> None:
    model = Viewing(when)
    state = torch.get_rng_state()
    model = place(model, CPU)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert model.get_submodule("conv")(torch.ones(2, 1, 28, 28)).is_contiguous() == bool(when)
    inspect(model, "mine", 10, CPU)
    assert not place(model.eval(), CPU).training


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Flatten(), nn.LayerNorm(784), nn.Linear(784, 10)),
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(4 * 26 * 26, 10)),
        nn.Sequential(nn.InstanceNorm2d(1), nn.Flatten(), nn.Linear(784, 10)),
        Table(),
    ],
    ids=["layer", "group", "instance", "buffer"],
)
def test_norms_of_one_sample_are_allowed(model: nn.Module) -> None:
    assert not inspect(model, "mine", 10, CPU).draws_random_numbers


@pytest.mark.parametrize(
    "model",
    [dropout(where=0), dropout(where=2), FunctionalDropout(), Noise()],
    ids=["first", "last", "functional", "noise"],
)
@pytest.mark.parametrize("training", [True, False])
def test_random_numbers_are_noticed(model: nn.Module, training: bool) -> None:
    assert inspect(model.train(training), "mine", 10, CPU).draws_random_numbers


@pytest.mark.parametrize("source", ["torch", "NumPy", "Python"])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_the_generators_are_named(source: str, where: str) -> None:
    draw: Callable[[], float] = {
        "torch": lambda: float(torch.rand(())),
        "NumPy": np.random.rand,
        "Python": random.random,
    }[source]

    class Drawing(Flat):
        def forward(self, images: Tensor) -> Tensor:
            logits = self.fc(images.flatten(1))
            if self.training and where == "backward" and logits.requires_grad:
                logits.register_hook(lambda gradient: gradient * draw())
            return logits * draw() if self.training and where == "forward" else logits

    assert inspect(Drawing(), "mine", 10, CPU).draws_from == (source,)


def test_what_a_factory_makes_depends_on_the_seed_alone() -> None:
    def filled(draw: Callable[[], Any]) -> Callable[[int], nn.Module]:
        def make(classes: int) -> nn.Module:
            model = Flat(classes)
            with torch.no_grad():
                model.fc.bias.copy_(torch.as_tensor([draw() for _ in range(classes)]))
            return model

        return make

    def made(factory: Callable[[int], nn.Module], seed: int = 0) -> Tensor:
        with registered({"mine:model": factory}):
            return weights(make_model(Recipe(model="mine:model", seed=seed), 10, CPU)[0])

    for draw in (np.random.rand, random.random):
        first = made(filled(draw))
        draw()
        assert torch.equal(made(filled(draw)), first)
        assert not torch.equal(made(filled(draw), seed=1), first)
    with pytest.raises(UsageError, match="makes different weights at each call"):
        made(filled(lambda: np.random.default_rng().random()))
    kept = Flat()
    with pytest.raises(UsageError, match="returns the same module at each call"):
        made(lambda _: kept)


def test_a_factorys_settings_end_with_it_and_a_forward_may_change_none() -> None:
    class Setting(Flat):
        def forward(self, images: Tensor) -> Tensor:
            torch.set_num_threads(3)
            return super().forward(images)

    threads = torch.get_num_threads()

    def factory(classes: int) -> nn.Module:
        torch.set_num_threads(threads + 1)
        return Flat(classes)

    with registered({"mine:model": factory}):
        build("mine:model", 10, 0)
    assert torch.get_num_threads() == threads
    with process_state.defined_state():
        torch.set_num_threads(1)
        assert problem(Setting()) == (
            "its forward pass changes torch's number of threads from 1 to 3, on which results depend: "
            "remove that call"
        )


def test_a_state_in_evaluation() -> None:
    class Drifting(Flat):
        def forward(self, images: Tensor) -> Tensor:
            self.calls = getattr(self, "calls", 0) + (not self.training)
            return super().forward(images) * (1 + self.calls)

    assert problem(Drifting()).startswith("it gives other logits when a pass is repeated in evaluation")


def test_a_wrong_number_of_logits() -> None:
    said = problem(Flat(11))
    assert said == "it returns shape (2, 11) for 2 images, not (2, 10): the data has 10 classes"
    assert problem(Flat(10), classes=47).startswith("it returns shape (2, 10) for 2 images, not (2, 47)")


def test_a_model_that_fails() -> None:
    assert problem(Upright()).startswith("it fails on images (2, 1, 28, 28): ")


def test_a_model_that_returns_no_tensor() -> None:
    assert "tuple" in problem(Pair())


def test_nothing_to_train() -> None:
    frozen = Flat().requires_grad_(False)
    assert problem(frozen) == "it has no parameters to train"
    assert problem(nn.Flatten()) == "it has no parameters to train"


def test_frozen_parameters_are_not_counted() -> None:
    model = Flat()
    model.fc.bias.requires_grad_(False)
    assert inspect(model, "mine", 10, CPU).parameters == 7840


def test_inspecting_leaves_weights_and_gradients_alone() -> None:
    model = dropout(where=0)
    before = weights(model)
    inspect(model, "mine", 10, CPU)
    assert torch.equal(weights(model), before)
    assert all(p.grad is None for p in model.parameters())


OWN = """
from torch import nn

WIDTH = 5

def net(classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(784, WIDTH), nn.ReLU(), nn.Linear(WIDTH, classes))

class Net(nn.Linear):
    def __init__(self, classes):
        super().__init__(784, classes)

def lazy(classes):
    return nn.Sequential(nn.LazyConv2d(3, 5, 3), nn.Dropout(0.5), nn.Flatten(), nn.LazyLinear(classes))

class Unused(nn.Linear):
    def __init__(self, classes):
        super().__init__(784, classes)
        self.more = nn.LazyLinear(3)

    def forward(self, images):
        return super().forward(images.flatten(1))

instance = nn.Linear(784, 10)

def failing(classes):
    raise KeyError("width")

def text(classes):
    return "a network"
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """Return a function that puts a module into the current folder under a free name; undone at the end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    names: list[str] = []

    def put(source: str) -> str:
        name = f"own_models_{tmp_path.name}_{len(names)}".replace("-", "_")
        (tmp_path / f"{name}.py").write_text(source)
        names.append(name)
        return name

    yield put
    for name in names:
        sys.modules.pop(name, None)


def build_problem(name: str) -> str:
    with pytest.raises(UsageError) as caught:
        build(name, 10, seed=0)
    return str(caught.value)


def test_a_model_of_ones_own(own: Callable[[str], str]) -> None:
    """It is found in the current folder, and its weights depend on the seed."""
    module = own(OWN)
    model = build(f"{module}:net", 10, seed=3)
    assert model(torch.randn(2, 1, 28, 28)).shape == (2, 10)
    assert torch.equal(weights(build(f"{module}:net", 10, seed=3)), weights(model))
    assert not torch.equal(weights(build(f"{module}:net", 10, seed=4)), weights(model))
    assert build(f"{module}:Net", 7, seed=0).out_features == 7


def test_lazy_layers_get_their_shapes(own: Callable[[str], str]) -> None:
    """Their weights depend on the seed alone, and one that no pass uses is named."""
    module = own(OWN)
    model = build(f"{module}:lazy", 10, seed=3)
    assert all(child.training for child in model.modules())
    assert inspect(model, "mine", 10, CPU).parameters == 78 + 1930
    torch.manual_seed(12345)
    assert torch.equal(weights(build(f"{module}:lazy", 10, seed=3)), weights(model))
    assert build_problem(f"{module}:Unused").endswith(
        "its more.weight gets no shape, because no pass uses its layer"
    )


def test_a_model_of_ones_own_in_a_package(own: Callable[[str], str], tmp_path: Path) -> None:
    package = own("") + "_package"
    (tmp_path / package).mkdir()
    (tmp_path / package / "inner.py").write_text(OWN)
    assert isinstance(build(f"{package}.inner:net", 10, seed=0), nn.Sequential)


def test_what_can_be_wrong_with_ones_own(own: Callable[[str], str]) -> None:
    module = own(OWN)
    broken = own("import torch\nraise RuntimeError('no licence')\n")
    crooked = own("def net(:\n")
    for name, said in {
        f"{module}:nut": f"--model {module}:nut: AttributeError: .*'nut'",
        f"{module}:WIDTH": f"--model {module}:WIDTH: WIDTH is not callable",
        f"{module}:text": f"--model {module}:text: the factory returned a str, not a torch module",
        f"{module}:instance": f"--model {module}:instance: this is a Linear itself: give a function of the",
        f"{module}:failing": f"--model {module}:failing: its factory failed: KeyError: 'width'",
        f"{broken}:net": f"--model {broken}:net: RuntimeError: no licence",
        f"{crooked}:net": f"--model {crooked}:net: SyntaxError: ",
        "no_such_module:net": "--model no_such_module:net: ModuleNotFoundError: .*no_such_module",
        ":net": "--model :net: ValueError",
    }.items():
        assert re.match(said, build_problem(name)), name


@pytest.mark.parametrize("name", ["resnet", "", "CNN"])
def test_no_such_model(name: str) -> None:
    hint = " did you mean cnn?" if name == "CNN" else ""
    assert build_problem(name) == (
        f"there is no model {name!r};{hint} "
        "there are linear, mlp, cnn, cnn-small, cnn-large, or package.module:factory"
    )


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 20, 20), (3, 32, 32), (3, 21, 27), (3, 64, 48)])
def test_networks_take_images_of_any_size(shape: ImageShape) -> None:
    for name in MODELS:
        model = build(name, 3, 0, shape)
        images = torch.randn(2, *shape)
        assert model.train()(images).shape == model.eval()(images).shape == (2, 3)


def test_small_images_are_enlarged_by_repeating_pixels() -> None:
    images = torch.arange(12.0).view(1, 1, 3, 4)
    enlarged = Enlarged((1, 3, 4))
    assert enlarged.shape == (1, 21, 28)
    assert torch.equal(enlarged(images)[0, 0], torch.kron(images[0, 0], torch.ones(7, 7)))
    assert Enlarged((1, 28, 20))(images) is images


@pytest.mark.parametrize(
    ("factory", "given"),
    [
        (lambda classes, shape: Flat(len(shape)), 3),
        (lambda classes, *, shape: Flat(shape[0]), 1),
        (lambda classes, width=4: Flat(width), 4),
        (lambda classes, **others: Flat(7 + len(others)), 7),
    ],
)
def test_a_factory_gets_the_shape_if_it_has_a_parameter_for_it(
    factory: Callable[..., nn.Module], given: int
) -> None:
    with registered({"own:factory": factory}):
        assert build("own:factory", 5, 0)(torch.zeros(1, 1, 28, 28)).shape == (1, given)


@pytest.mark.parametrize(
    ("factory", "advice"),
    [
        (Flat, "; let its factory take a second parameter, shape, which is (channels, height, width)"),
        (lambda classes, shape: Flat(classes), ""),
    ],
)
def test_a_network_for_other_images_is_refused(factory: Callable[..., nn.Module], advice: str) -> None:
    recipe = Recipe(model="own:factory")
    with registered({"own:factory": factory}), pytest.raises(UsageError) as caught:
        make_model(recipe, 10, CPU, (3, 32, 32))
    start = (
        "--model own:factory: it fails on images (2, 3, 32, 32): mat1 and mat2 shapes cannot be multiplied"
    )
    assert str(caught.value) == f"{start} (2x3072 and 784x10){advice}"
