"""Test whether a model can be trained with `--precision exact`, by running it on a few random images."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...config import ImageShape
from ...errors import UsageError
from ...exact.initial_values import normal
from ...exact.module import ExactModule
from ...exact.passes.evaluation_pass import EvaluationPass
from ...exact.passes.training_pass import TrainingPass
from ...exact.products.interface import MOST_TERMS
from ...exact.refusal import Refused, layer_of
from ...exact.scales import Scales
from ...models.build import same_modes

_IMAGES = 3


def refusal(error: Refused, model: nn.Module, name: str) -> UsageError:
    """Return the error for a model that has no exact form, which names the layer."""
    layer = layer_of(error, model)
    where = f" (layer {layer})" if layer else ""
    return UsageError(f"--model {name}: with --precision exact, {error}{where}")


def require_exact_form(
    model: nn.Module, name: str, device: torch.device, shape: ImageShape, batch_size: int
) -> None:
    """Make passes in evaluation and in training. Raises `UsageError` if something has no exact form.

    The sums over samples must be the same integers in one pass and in two. Those over a batch must not be
    too long.
    """
    if hooked := _with_backward_hooks(model):
        raise UsageError(
            f"--model {name}: {hooked[0]} has a hook for gradients, which with --precision exact nothing "
            "calls, because gradients are sums of integers"
        )
    images = normal((_IMAGES, *shape), "trial").to(device, torch.float32)
    try:
        with same_modes(model):
            model.eval()
            with torch.no_grad():
                ExactModule(model, EvaluationPass(device))(images.clone())
            model.train()
            pass_ = TrainingPass(model, Scales(device))
            cut, whole = _sums_of_cuts(
                pass_, model, images, (range(1), range(1, _IMAGES)), (range(_IMAGES),)
            )
        if not torch.equal(cut, whole):
            raise Refused("its gradient for one image depends on the other images of the pass")
    except Refused as error:
        raise refusal(error, model, name) from error
    except Exception as error:  # in torch's own arithmetic it has run before
        failed = Refused(f"it fails: {type(error).__name__}: {error}")
        raise refusal(failed.with_traceback(error.__traceback__), model, name) from error
    require_exact_batch(pass_, _IMAGES, batch_size)


def _with_backward_hooks(model: nn.Module) -> list[str]:
    """Return the names of parameters and layers with hooks for the backward pass."""
    parameters = [
        f"its parameter {name}" for name, parameter in model.named_parameters() if parameter._backward_hooks
    ]
    layers = [
        f"its layer {name}" if name else "it"
        for name, module in model.named_modules()
        if module._backward_hooks or module._backward_pre_hooks
    ]
    return parameters + layers


def require_exact_batch(pass_: TrainingPass, samples: int, batch_size: int) -> None:
    """Raise `UsageError` if a sum over a batch may have more products than are exact.

    `pass_` has found scales with so many samples.
    """
    most = MOST_TERMS * samples // max(pass_.sums.most_products, 1)
    if batch_size > most:
        raise UsageError(
            f"--batch-size {batch_size}: with --precision exact, the sums over a batch of this model are "
            f"exact up to --batch-size {most}"
        )


def _sums_of_cuts(
    pass_: TrainingPass, model: nn.Module, images: Tensor, *cuts: Sequence[range]
) -> list[Tensor]:
    """Return all sums over samples, float64 in one vector, for each way to cut these images into passes."""
    module = ExactModule(model, pass_)

    def run(samples: range, *, starting: bool = False) -> None:
        pass_.begin_pass(starting=starting)
        module.key_draws("trial", first=samples.start)
        logits = module(images[samples.start : samples.stop].clone())
        weights = normal((len(images), logits.shape[1]), "trial's loss").to(logits)
        (logits * weights[samples.start : samples.stop]).sum().backward()  # see `per_shard.backpropagate`
        pass_.end_pass()

    pass_.begin_step()
    run(range(len(images)), starting=True)
    pass_.end_first_pass()
    results = []
    for cut in cuts:
        pass_.begin_step()
        for samples in cut:
            run(samples)
        results.append(pass_.sums.flat.clone())
    return results
